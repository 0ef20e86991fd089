"""Tasks that are cancelled, and work that goes on when they are."""

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


async def heard(work: Awaitable[T]) -> T:
    """Awaits `work`, and raises the cancellation (of a timeout, too) which `work` may have swallowed.

    wait_for of Python 3.11, by which redis-py sends, does so when its work is done in the same moment.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    answer = await work
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer


def cancellation() -> Callable[[], bool]:
    """Whether the running task was asked to cancel since: for loops, around much that may swallow it."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    return lambda: bool(task and task.cancelling() > before)


def try_cancel(body: asyncio.Task[Any]) -> bool:
    """Cancels a task; False if it would not notice, and should be asked again in the next turn of the event loop.

    wait_for of Python 3.11 returns the result when it is cancelled and its work is done by the time the task is woken:
    a body busy with Redis would run on. Work that is about to run is waited for, or cancelled if it has not begun.
    """
    if sys.version_info < (3, 12):
        inner: Any = body.get_coro()
        while asyncio.iscoroutine(getattr(inner, "cr_await", None)):
            inner = inner.cr_await
        frame = getattr(inner, "cr_frame", None)
        if frame is not None and frame.f_code is asyncio.wait_for.__code__:
            work = frame.f_locals["fut"]
            waits = getattr(work, "_fut_waiter", work)
            if hasattr(work, "get_coro") and getcoroutinestate(work.get_coro()) == CORO_CREATED:
                work.cancel()
            elif work.done() or waits is None or waits.done():
                return False
    return body.cancel()


def in_background(work: Awaitable[Any], what: str) -> asyncio.Future[Any]:
    """Runs `work` to its end whatever happens to the caller; a failure is logged, for nobody is left to raise it to."""

    def done(future: asyncio.Future[Any]) -> None:
        _background.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.warning("%s failed: %r", what, error)

    future = asyncio.ensure_future(work)
    _background.add(future)
    future.add_done_callback(done)
    return future
