"""The ladder as a pytest fixture, for locks of your own in your own test suite.

def test_our_lock_survives(prove_lock):
    climb = prove_lock(OurLock, ttl=10)
    assert climb.passed, climb
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distsys.lab.ladder import Climb


@pytest.fixture
def prove_lock() -> Callable[..., Climb]:
    """`prove_lock(candidate, *, ttl=0.3, upto=None) -> Climb`: climbs the ladder; starts and ends its own servers."""
    import asyncio

    from distsys.lab.session import Lab

    async def climb(candidate: Any, ttl: float, upto: int | None) -> Climb:
        async with await Lab.open() as lab:
            return await lab.try_lock(candidate, ttl=ttl, upto=upto)

    def prove(candidate: Any, *, ttl: float = 0.3, upto: int | None = None) -> Climb:
        return asyncio.run(climb(candidate, ttl, upto))

    return prove
