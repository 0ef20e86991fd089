"""The ladders as pytest fixtures, for locks, limiters, breakers and retries of your own in your own test suite.

def test_our_lock_survives(prove_lock):
    climb = prove_lock(OurLock, ttl=10)
    assert climb.passed, climb
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from distsys.lab.prove.ladder import Climb


def _prove(kind: str, signature: str, what: str) -> Any:
    """A fixture `prove_<kind>`, with what `pytest --fixtures` says of it."""

    def climb(candidate: Any, **options: Any) -> Climb:
        import asyncio  # not before it is used: pytest loads this plugin for everybody's tests

        from distsys.lab.session import Lab

        async def climbed() -> Climb:
            async with await Lab.open() as lab:
                return cast("Climb", await getattr(lab, f"try_{kind}")(candidate, **options))

        return asyncio.run(climbed())

    def prove() -> Callable[..., Climb]:
        return climb

    prove.__doc__ = f"`prove_{kind}({signature}) -> Climb`: climbs the ladder {what}; starts and ends its own servers."
    return pytest.fixture(name=f"prove_{kind}")(prove)


prove_lock = _prove("lock", "candidate, *, ttl=0.3, upto=None", "of locks")
prove_limiter = _prove("limiter", "candidate, *, upto=None", "of limiters: ten requests in any second")
prove_breaker = _prove("breaker", "candidate, *, upto=None", "of breakers: five failures and 30 seconds")
prove_retry = _prove("retry", "candidate, *, upto=None", "of retries: three attempts")
prove_endpoint = _prove("endpoint", "candidate, *, upto=None", "of idempotent endpoints: pay once")
