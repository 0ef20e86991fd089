"""Virtual event loop: its time is a number, so asyncio code runs unchanged and never waits in real time.

Promise  callbacks run in asyncio's order, timers of one moment in the order in which they were set; time passes only
         when nothing else is left to do. Nothing depends on the machine: the same code and seed run the same way twice.
Not      sockets, threads, subprocesses, executors: NotImplementedError.
Units    seconds, from 0.
Errors   Stuck, when the main task waits for what can't come, or callbacks go on without end; `run` raises what a
         callback or a task that nobody awaited has raised.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, copy_context
from heapq import heappop, heappush
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")
_Loop: Any = asyncio.AbstractEventLoop  # methods that are not defined here raise NotImplementedError


class Stuck(RuntimeError):
    """An error of a run that would never end."""


class _Handle(asyncio.TimerHandle):
    __slots__ = ()

    def __init__(self, when: float, callback: Callable[..., Any], args: Any, context: Context | None) -> None:
        self._when, self._cancelled = when, False
        self._callback, self._args = callback, args
        self._context = copy_context() if context is None else context

    def cancel(self) -> None:
        """Never run the callback."""
        self._cancelled = True
        self._args = ()
        self._callback = self._context = None  # type: ignore[assignment]  # free now what they hold

    def __repr__(self) -> str:
        return f"<at {self._when:g} s: {self._callback}>"


class VirtualLoop(_Loop):  # type: ignore[misc]  # typeshed wants the 33 other methods, too
    """An event loop in virtual time. It raises Stuck beyond `limit` callbacks in a second, or after `until` seconds."""

    def __init__(self, limit: int = 1_000_000, until: float = math.inf) -> None:
        self.now, self.limit, self.until = 0.0, limit, until
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []  # a heap; the number keeps the order within a moment
        self._timers_set = 0
        self._closed = False
        self._unhandled: list[BaseException] = []

    def time(self) -> float:
        """Return the virtual seconds since the start."""
        return self.now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> _Handle:
        """Run the callback after those that are ready."""
        handle = _Handle(self.now, callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> _Handle:
        """Run the callback when the virtual time is `when`."""
        handle = _Handle(when, callback, args, context)
        self._timers_set += 1
        heappush(self._timers, (when, self._timers_set, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Handle:
        """Run the callback after `delay` virtual seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Return a task of this loop."""
        return asyncio.Task(coro, loop=self, **options)

    def run_until_complete(self, future: Any) -> Any:
        """Run until the future is done and return its result. Raises Stuck if that would never happen."""
        main = asyncio.ensure_future(future, loop=self)
        ready, timers = self._ready, self._timers
        left, next_second = self.limit, self.now + 1  # callbacks that may still run until then
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("another loop runs in this thread: use distsys.lab.virtual_loop.run")
        asyncio._set_running_loop(self)
        try:
            while not main.done():
                if not ready:
                    if not timers:
                        raise Stuck(f"at {self.now:g} s nothing is left that could happen, but {main!r} waits")
                    if timers[0][0] > self.now:
                        self.now = timers[0][0]
                        if self.now >= next_second:
                            left, next_second = self.limit, self.now + 1
                while timers and timers[0][0] <= self.now:
                    if not (handle := heappop(timers)[2])._cancelled:
                        ready.append(handle)
                left -= len(ready)
                if left < 0 or self.now > self.until:
                    why = f"{self.limit:,} callbacks in a second, something spins" if left < 0 else "it does not end"
                    raise Stuck(f"given up at {self.now:g} s: {why}")
                for _ in range(len(ready)):  # what these callbacks schedule runs after them, and after timers now due
                    handle = ready.popleft()
                    if not handle._cancelled:
                        handle._context.run(handle._callback, *handle._args)
        finally:
            asyncio._set_running_loop(None)
        result = main.result()
        if self._unhandled:
            raise self._unhandled[0]
        return result

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep the error of a callback, or of a task that nobody awaited, for `run_until_complete` to raise."""
        self._unhandled.append(context.get("exception") or RuntimeError(context["message"]))

    # ---- what else asyncio needs of a loop

    def get_debug(self) -> bool:
        """Return False."""
        return False

    def is_running(self) -> bool:
        """Return whether callbacks run."""
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        """Return whether the loop was closed."""
        return self._closed

    def stop(self) -> None:
        """End the run at its next turn, with Stuck; may be called from any thread."""
        self.until = -1.0

    def close(self) -> None:
        """Drop all callbacks and timers."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    async def shutdown_asyncgens(self) -> None:
        """Do nothing: asyncio.Runner calls this at the end."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there is no executor."""


_rarely = Lock()


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Collect garbage rarely: scanning thousands of tasks that live to the end takes 2.30 s of CPU instead of 2.05."""
    if not _rarely.acquire(blocking=False):  # another run has set it
        yield
        return
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        _rarely.release()


def run(main: Coroutine[Any, Any, T], *, limit: int = 1_000_000, until: float = math.inf) -> T:
    """Run a coroutine on a virtual loop of its own; where a loop runs already, as in a notebook, in a thread.

    Raises Stuck beyond `limit` callbacks in one virtual second, or after `until` virtual seconds.
    """
    loop = VirtualLoop(limit, until)

    def work() -> T:
        with _collecting_rarely(), asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(main)

    if asyncio._get_running_loop() is None:
        return work()
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(work).result()
        except BaseException:
            loop.stop()  # interrupted
            raise
