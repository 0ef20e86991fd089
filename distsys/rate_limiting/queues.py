"""Waiting for a limit: FIFO for each key in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from distsys._support.arguments import check_text, check_timeout
from distsys.errors import RateLimited
from distsys.rate_limiting.decision import Decision

Ask = Callable[[], Awaitable[Decision]]


class FairQueues:
    """FIFO of waiters for each key.

    limit      what RateLimited reports as the limit
    exhausted  what its message says is used up
    """

    def __init__(self, limit: float, exhausted: str) -> None:
        self._limit, self._exhausted = limit, exhausted
        self._locks = WeakValueDictionary[str, asyncio.Lock]()  # holds a key while somebody waits for it

    async def wait(self, key: str, ask: Ask, timeout: float | None, longest: float) -> Decision:
        """Wait for the turn, then ask until the answer is yes, each time after the `retry_after` of the last one.

        RateLimited as soon as `timeout` seconds can't be enough. Its `retry_after` is `longest` (seconds) if the turn
        did not come, because then the wait is not known.
        """
        now = asyncio.get_running_loop().time
        deadline = math.inf if check_timeout(timeout) is None else now() + (timeout or 0)
        lock = self._locks.setdefault(check_text("key", key, "'user:42'"), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout):  # the queue only: a request that was sent may have been granted
                await lock.acquire()
        except TimeoutError:
            raise self._refusal(key, longest) from None
        try:
            while not (decision := await ask()):
                if now() + decision.retry_after > deadline:
                    raise self._refusal(key, decision.retry_after)
                await asyncio.sleep(decision.retry_after)
        finally:
            lock.release()
        return decision

    def _refusal(self, key: str, wait: float) -> RateLimited:
        message = f"{key!r} has no {self._exhausted}; the next try can pass in {wait:.3g} s"
        return RateLimited(message, key=key, limit=self._limit, retry_after=wait)
