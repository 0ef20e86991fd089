"""The ladders and the explorer as pytest fixtures: for rules of yours, in your own sync or async tests.

def test_our_lock_survives(prove_lock, explore_lock):
    climb = prove_lock(OurLock, ttl=10)
    assert climb.passed, climb
    exploration = explore_lock(OurLock)
    assert exploration.passed, exploration
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _fixture(name: str, method: str, signature: str, what: str) -> Any:
    """Return a fixture that calls a method of a lab of its own, with the text that `pytest --fixtures` shows."""

    def call(candidate: Any, **options: Any) -> Any:
        import asyncio  # not before it is used: pytest loads this plugin for everybody's tests
        from concurrent.futures import ThreadPoolExecutor

        from distsys.lab.session import Lab

        async def called() -> Any:
            async with await Lab.open() as lab:
                return await getattr(lab, method)(candidate, **options)

        with ThreadPoolExecutor(1) as thread:  # an async test has a loop in its own thread
            return thread.submit(asyncio.run, called()).result()

    def fixture() -> Callable[..., Any]:
        return call

    fixture.__doc__ = f"`{name}({signature})`: {what}. It starts and ends its own servers."
    return pytest.fixture(name=name)(fixture)


def _ladder(kind: str, signature: str, what: str) -> Any:
    return _fixture(f"prove_{kind}", f"try_{kind}", signature, f"climb the ladder {what}, and return the Climb")


prove_lock = _ladder("lock", "candidate, *, ttl=0.3, upto=None", "of locks")
prove_limiter = _ladder("limiter", "candidate, *, upto=None", "of limiters: ten requests in any second")
prove_breaker = _ladder("breaker", "candidate, *, upto=None", "of breakers: five failures and 30 seconds")
prove_retry = _ladder("retry", "candidate, *, upto=None", "of retries: three attempts")
prove_endpoint = _ladder("endpoint", "candidate, *, upto=None", "of idempotent endpoints: pay once")
explore_lock = _fixture(
    "explore_lock",
    "explore",
    "candidate, *, ttl=0.3",
    "search the interleavings of an async lock, return the Exploration",
)
