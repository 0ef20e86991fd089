"""One interface to every lock: enter and exit."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from distsys.errors import Rejected

TRIES = 3_000  # 10 ms apart: longer than any run


class NotGranted(Rejected):
    """The candidate's acquire() answered False."""


def looks_sync(candidate: Any) -> bool:
    """Return True if a candidate, or the lock it made, blocks: it has `with`, or an acquire() that is not async."""
    if hasattr(candidate, "__aenter__"):
        return False
    acquire = getattr(candidate, "acquire", None)
    return hasattr(candidate, "__enter__") if acquire is None else not inspect.iscoroutinefunction(acquire)


class Guard:
    """A lock with `async with`, `with`, or acquire() and release().

    `blocking` calls a function of a blocking lock; without it that is done on a thread of its own.
    """

    def __init__(self, lock: Any, blocking: Callable[..., Any] | None = None) -> None:
        if hasattr(lock, "__aenter__"):
            self._enter, self._exit = lock.__aenter__, lock.__aexit__
        elif hasattr(lock, "acquire") and hasattr(lock, "release"):
            self._enter, self._exit = lambda: lock.acquire(), lambda *_: lock.release()
        elif hasattr(lock, "__enter__"):
            self._enter, self._exit = lock.__enter__, lock.__exit__
        else:
            raise TypeError(f"{lock!r} is no lock: it needs `async with`, `with`, or acquire() and release()")
        # One thread: locks may keep state per thread.
        self._call = (blocking or partial(_threaded, ThreadPoolExecutor(1))) if looks_sync(lock) else plain

    async def enter(self) -> Any:
        """Return what the lock gives its holder. A lock that answers False is asked again, as its users do."""
        for _ in range(TRIES):
            granted = await self._call(self._enter)
            if granted is not False:
                return granted
            await asyncio.sleep(0.01)
        raise NotGranted(f"acquire() answered False {TRIES:,} times")

    async def exit(self, error: BaseException | None) -> None:
        """Leave the lock; `error` is what the body raised."""
        await self._call(self._exit, type(error) if error else None, error, None)


async def plain(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Call a function that may be async, and return its result."""
    answer = call(*args, **more)
    return await answer if inspect.isawaitable(answer) else answer


async def _threaded(thread: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, call, *args)
