"""An event loop whose time is a number: asyncio code runs unchanged, and nobody waits.

Promise  callbacks run in asyncio's order, timers of one moment in the order of their making; time passes only when
         nothing else is left to do. Nothing of the machine gets in, so the same code and seed run the same way twice.
Not      sockets, threads, subprocesses, executors: NotImplementedError.
Units    seconds, from 0.
Errors   Stuck, when the main task waits for what can't come, or callbacks go on without end; what a callback or
         a forgotten task raised comes out of `run`.
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
_Loop: Any = asyncio.AbstractEventLoop  # whose methods that are not here raise NotImplementedError


class Stuck(RuntimeError):
    """The run would never end."""


class _Handle(asyncio.TimerHandle):
    __slots__ = ()

    def __init__(self, when: float, callback: Callable[..., Any], args: Any, context: Context | None) -> None:
        self._when, self._callback, self._args, self._cancelled = when, callback, args, False
        self._context = copy_context() if context is None else context

    def cancel(self) -> None:
        self._cancelled, self._args = True, ()
        self._callback = self._context = None  # type: ignore[assignment]  # frees now what they hold

    def __repr__(self) -> str:
        return f"<at {self._when:g} s: {self._callback}>"


class VirtualLoop(_Loop):  # type: ignore[misc]  # types insist on all 33 others
    """`limit`: callbacks in one virtual second; `until`: virtual seconds. Beyond, the run is given up."""

    def __init__(self, limit: int = 1_000_000, until: float = math.inf) -> None:
        self.now, self.limit, self.until = 0.0, limit, until
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []  # a heap; the number keeps the order of one moment
        self._made = 0
        self._running = self._closed = False
        self._unhandled: list[BaseException] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> _Handle:
        handle = _Handle(self.now, callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> _Handle:
        handle = _Handle(when, callback, args, context)
        self._made += 1
        heappush(self._timers, (when, self._made, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Handle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def run_until_complete(self, future: Any) -> Any:
        main = asyncio.ensure_future(future, loop=self)
        ready, timers, left, mark = self._ready, self._timers, self.limit, self.now + 1
        outer, self._running = asyncio._get_running_loop(), True
        if outer is not None:
            raise RuntimeError("another loop runs in this thread: use distsys.lab.virtual_loop.run")
        asyncio._set_running_loop(self)
        try:
            while not main.done():
                if not ready:
                    if not timers:
                        raise Stuck(f"at {self.now:g} s nothing is left that could happen, but {main!r} waits")
                    if timers[0][0] > self.now:
                        self.now = timers[0][0]
                        if self.now >= mark:
                            left, mark = self.limit, self.now + 1
                while timers and timers[0][0] <= self.now:
                    if not (handle := heappop(timers)[2])._cancelled:
                        ready.append(handle)
                left -= len(ready)
                if left < 0 or self.now > self.until:
                    why = f"{self.limit:,} callbacks in a second, something spins" if left < 0 else "it does not end"
                    raise Stuck(f"given up at {self.now:g} s: {why}")
                for _ in range(len(ready)):  # what these call soon has its turn after them, and after timers now due
                    handle = ready.popleft()
                    if not handle._cancelled:
                        handle._context.run(handle._callback, *handle._args)
        finally:
            asyncio._set_running_loop(None)
            self._running = False
        result = main.result()
        if self._unhandled:
            raise self._unhandled[0]
        return result

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Of tasks that ended with an error nobody looked at."""
        self._unhandled.append(context.get("exception") or RuntimeError(context["message"]))

    # ---- what asyncio asks of a loop besides

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def stop(self) -> None:
        """From any thread: ends the run at its next turn, with Stuck."""
        self.until = -1.0

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    async def shutdown_asyncgens(self) -> None: ...

    async def shutdown_default_executor(self, timeout: float | None = None) -> None: ...


_rarely = Lock()


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Else a third of the time goes into looking through thousands of tasks that live to the end."""
    if not _rarely.acquire(blocking=False):  # another run has seen to it
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
    """Runs a coroutine on a loop of its own; where a loop runs already, as in a notebook, in a thread meanwhile."""
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
