"""Cancellation of tasks, and work that continues after it.

The traps of Python 3.11's wait_for live in this module alone, so that they can go with that version.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from inspect import CORO_CREATED, getcoroutinestate
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger("distsys.cancellation")
_background: set[asyncio.Future[Any]] = set()  # asyncio keeps only weak references to tasks


async def reraise_swallowed_cancel(work: Awaitable[T]) -> T:
    """Await `work`, and raise the cancellation (also that of a timeout) which `work` may have swallowed.

    wait_for of Python 3.11, which redis-py uses to send, swallows one that arrives when its work is just done.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    answer = await work
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer


def cancel_watch() -> Callable[[], bool]:
    """Return a function that tells whether the running task was cancelled since this call.

    For a loop around code that may swallow the cancellation.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    return lambda: bool(task and task.cancelling() > before)


def cancel_if_deliverable(body: asyncio.Task[Any]) -> bool:
    """Cancel the task and return True; return False if wait_for on 3.11 would swallow it: retry next loop iteration.

    A cancelled wait_for of Python 3.11 returns the result if its work is done by the time the task is woken: a body
    busy with Redis would run on. Therefore work that is about to finish is waited for, and work that has not begun is
    cancelled too.
    """
    if sys.version_info < (3, 12):
        inner: Any = body.get_coro()
        while asyncio.iscoroutine(getattr(inner, "cr_await", None)):
            inner = inner.cr_await
        frame = getattr(inner, "cr_frame", None)
        if frame is not None and frame.f_code is asyncio.wait_for.__code__:
            work = frame.f_locals["fut"]
            waits_for = getattr(work, "_fut_waiter", work)
            if hasattr(work, "get_coro") and getcoroutinestate(work.get_coro()) == CORO_CREATED:
                work.cancel()
            elif work.done() or waits_for is None or waits_for.done():
                return False
    return body.cancel()


def in_background(work: Awaitable[Any], what: str) -> asyncio.Future[Any]:
    """Run `work` to its end whatever happens to the caller; a failure is logged, because no caller waits for it."""

    def log_failure(future: asyncio.Future[Any]) -> None:
        _background.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.warning("%s failed: %r", what, error)

    future = asyncio.ensure_future(work)
    _background.add(future)
    future.add_done_callback(log_failure)
    return future
