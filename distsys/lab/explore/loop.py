"""One event loop for several processes of a candidate, in virtual or in real time.

A process is a context variable: every callback belongs to the process whose context made it. A frozen process has its
callbacks parked until it is resumed; those of a dead one are dropped. When no callback is ready, the loop lets the
network execute one command, and only when no command is pending does time pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import select
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial
from heapq import heappop
from time import monotonic, sleep  # bound before a world changes the module
from time import time as wall_clock
from typing import Any

from distsys.lab.simulate.virtual_loop import Stuck, VirtualLoop

running_process: ContextVar[Process | None] = ContextVar("distsys_explored_process", default=None)


class Hung(SystemExit):
    """A run that blocks its process. A task lets a SystemExit through, and no other error."""


class Process:
    """A process of the candidate: a name, an identity, and whether it runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self.parked: list[Any] = []

    def __repr__(self) -> str:
        return self.name


class ExploreLoop(VirtualLoop):
    """`step` executes one pending command and says whether there was one; `wait` blocks until real time or news."""

    def __init__(self, *, step: Callable[[], bool], until: float, wait: Callable[[float], None] | None = None) -> None:
        super().__init__(until=until)
        self._step = step
        self._wait = wait
        self._zero = monotonic()
        self.readers: dict[int, Any] = {}  # callbacks by file descriptor, called before time passes

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        """Call when there is something to read."""
        self.readers[fd if isinstance(fd, int) else fd.fileno()] = partial(
            self.call_soon, callback, *args, context=copy_context()
        )

    def remove_reader(self, fd: Any) -> bool:
        """Stop to call; return whether there was anybody to call."""
        return self.readers.pop(fd if isinstance(fd, int) else fd.fileno(), None) is not None

    def _read(self, seconds: float) -> bool:
        """Call the readers that can read, after waiting for at most so many seconds."""
        try:
            ready = select.select(list(self.readers), [], [], seconds)[0] if self.readers else []
        except OSError:  # one was closed without a word, as a killed process does
            self.readers.clear()
            return False
        for fd in ready:
            self.readers[fd]()
        return bool(ready)

    def begin_at_whole_second(self) -> None:
        """Wait, in real time, for the next whole second of the wall clock: time 0 is then."""
        sleep(1 - wall_clock() % 1)
        self._zero = monotonic()
        self.now = 0.0

    def leap(self, seconds: float) -> None:
        """Let the clock of a loop in real time jump."""
        self._zero -= seconds
        self.until += seconds

    def resume(self, process: Process) -> None:
        """Let a frozen process run on: what came due meanwhile is due now."""
        process.frozen = False
        self._ready.extend(process.parked)
        process.parked.clear()

    def end(self) -> None:
        """Close the loop and every coroutine now: the garbage collector would do it in the middle of the next run."""
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(BaseException):
                task.get_coro().close()
        self.close()
        gc.collect()

    def run_until_complete(self, future: Any) -> Any:
        """Run until the future is done. Raises Stuck beyond `until`, or when nothing is left that could happen."""
        main = asyncio.ensure_future(future, loop=self)
        outer, self._running = asyncio._get_running_loop(), True
        assert outer is None
        asyncio._set_running_loop(self)
        try:
            while not main.done():
                if self._wait is not None:
                    self.now = monotonic() - self._zero
                self._due()
                if not self._ready and not self._step():
                    self._pass_time(main)
                if self.now > self.until:
                    raise Stuck(f"given up at {self.now:g} s")
                for _ in range(len(self._ready)):
                    self._dispatch(self._ready.popleft())
        finally:
            asyncio._set_running_loop(None)
            self._running = False
        return main.result()

    def _due(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            handle = heappop(self._timers)[2]
            if not handle._cancelled:
                self._ready.append(handle)

    def _pass_time(self, main: Any) -> None:
        if self._read(0):
            return
        if not self._timers and self._wait is None:
            raise Stuck(f"at {self.now:g} s nothing is left that could happen, but {main!r} waits")
        due = self._timers[0][0] if self._timers else math.inf
        if self._wait is None:
            self.now = max(self.now, due)
        else:
            self._wait(min(due - self.now, 0.005))

    def _dispatch(self, handle: Any) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(running_process)
        if process is None or not (process.frozen or process.dead):
            handle._context.run(handle._callback, *handle._args)
        elif process.frozen:
            process.parked.append(handle)
