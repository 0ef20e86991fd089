"""Waiting for a limit: FIFO for each key in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from distsys._support.arguments import check_text, check_timeout
from distsys.errors import RateLimited
from distsys.rate_limiting.decision import Decision


class Queues(WeakValueDictionary[str, asyncio.Lock]):
    """Those who wait in acquire(): in this process first come, first served, for each key."""

    def __init__(self, limit: float, left: str) -> None:
        super().__init__()
        self._limit, self._left = limit, left

    async def wait(
        self, key: str, ask: Callable[[], Awaitable[Decision]], timeout: float | None, longest: float
    ) -> Decision:
        """Asks again and again, each time when the answer before said so.

        RateLimited when `timeout` can't be enough; `longest` seconds are said while nobody knows how many.
        """
        now = asyncio.get_running_loop().time
        deadline = math.inf if check_timeout(timeout) is None else now() + (timeout or 0)
        queue = self.setdefault(check_text("key", key, "'user:42'"), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout):  # the queue only: a request that was sent may have been granted
                await queue.acquire()
        except TimeoutError:
            raise self._refusal(key, longest) from None
        try:
            while not (decision := await ask()):
                if now() + decision.retry_after > deadline:
                    raise self._refusal(key, decision.retry_after)
                await asyncio.sleep(decision.retry_after)
        finally:
            queue.release()
        return decision

    def _refusal(self, key: str, wait: float) -> RateLimited:
        message = f"{key!r} has no {self._left}; the next try can pass in {wait:.3g} s"
        return RateLimited(message, key=key, limit=self._limit, retry_after=wait)
