"""The explorer as pytest fixtures: for rules of yours, in your own sync or async tests.

def test_our_lock(prove_lock):
    exploration = prove_lock(OurLock, ttl=10)
    assert exploration.passed, exploration
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _fixture(kind: str, more: str, what: str, verb: str = "prove") -> Any:
    """Return a fixture that explores in a lab of its own, with the text that `pytest --fixtures` shows."""

    def prove(candidate: Any, **options: Any) -> Any:
        import asyncio  # not before it is used: pytest loads this plugin for everybody's tests
        from concurrent.futures import ThreadPoolExecutor

        from distsys.lab.session import Lab

        async def explored() -> Any:
            async with await Lab.open() as lab:
                return await lab.explore(candidate, kind=kind, **options)

        with ThreadPoolExecutor(1) as thread:  # an async test has a loop in its own thread
            return thread.submit(asyncio.run, explored()).result()

    def fixture() -> Callable[..., Any]:
        return prove

    signature = f"candidate, *, {more}only=(), to_the_end=True, seed=7"
    fixture.__doc__ = (
        f"`{verb}_{kind}({signature})`: explore {what}, and return the Exploration. It starts its own servers."
    )
    return pytest.fixture(name=f"{verb}_{kind}")(fixture)


prove_lock = _fixture("lock", "ttl=0.3, ", "a lock: acquire() and release(), or a context manager")
explore_lock = _fixture("lock", "ttl=0.3, ", "a lock, as prove_lock does", "explore")
prove_limiter = _fixture("limiter", "window=1.0, ", "a limiter: ten requests in a window, or a bucket of ten")
prove_breaker = _fixture("breaker", "", "a breaker: five failures and 30 seconds")
prove_retry = _fixture("retry", "", "a retry: three attempts")
prove_endpoint = _fixture("endpoint", "", "an idempotent endpoint: pay(key, amount, user)")
