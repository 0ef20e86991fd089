"""The ladders as pytest fixtures, for locks, limiters, breakers and retries of your own in your own test suite.

def test_our_lock_survives(prove_lock):
    climb = prove_lock(OurLock, ttl=10)
    assert climb.passed, climb
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distsys.lab.ladder import Climb


@pytest.fixture
def prove_lock() -> Callable[..., Climb]:
    """`prove_lock(candidate, *, ttl=0.3, upto=None) -> Climb`: climbs the ladder; starts and ends its own servers."""
    return partial(_climb, "try_lock")


@pytest.fixture
def prove_limiter() -> Callable[..., Climb]:
    """`prove_limiter(candidate, *, upto=None) -> Climb`: the same for a limiter of ten requests in any second."""
    return partial(_climb, "try_limiter")


@pytest.fixture
def prove_breaker() -> Callable[..., Climb]:
    """`prove_breaker(candidate, *, upto=None) -> Climb`: the same for a breaker of five failures and 30 seconds."""
    return partial(_climb, "try_breaker")


@pytest.fixture
def prove_retry() -> Callable[..., Climb]:
    """`prove_retry(candidate, *, upto=None) -> Climb`: the same for a retry of three attempts."""
    return partial(_climb, "try_retry")


def _climb(ladder: str, candidate: Any, **options: Any) -> Climb:
    import asyncio

    from distsys.lab.session import Lab

    async def climb() -> Climb:
        async with await Lab.open() as lab:
            climbed: Climb = await getattr(lab, ladder)(candidate, **options)
            return climbed

    return asyncio.run(climb())
