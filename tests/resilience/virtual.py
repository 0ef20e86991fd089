"""Time and steps by hand: an event loop whose clock jumps to the next timer, and ends at every await point."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator
from typing import Any


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    loop: Loop

    def select(self, timeout: float | None = None) -> Any:
        """Never wait: move the time to the next timer instead."""
        ready = super().select(0)
        if timeout is None and not ready:
            raise RuntimeError("nothing will ever happen: a deadlock")
        if not ready:
            self.loop.now += timeout or 0.0
        return ready


class Loop(asyncio.SelectorEventLoop):
    """One thread, virtual time, the same order each time."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 1_000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a virtual loop of its own; a deadlock is an error."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(coroutine)


class End:
    """`await end(coroutine)` comes up to the n-th await point and ends it there: by an error thrown in, or by close().

    `reached` says whether it came so far.
    """

    def __init__(self, point: int, error: BaseException | None) -> None:
        self.point, self.error, self.reached = point, error, False

    def __call__(self, coroutine: Coroutine[Any, Any, Any]) -> End:
        self.coroutine = coroutine
        return self

    def __await__(self) -> Generator[Any, Any, Any]:
        for number in range(1_000):
            try:
                waits_for = self.coroutine.send(None)
            except StopIteration as done:
                return done.value
            if number == self.point:
                self.reached = True
                if self.error is None:
                    self.coroutine.close()
                    return None
                return self.coroutine.throw(self.error)
            yield waits_for
        raise AssertionError("it does not end")


def at_every_await(scene: Callable[[End], Coroutine[Any, Any, None]]) -> int:
    """Runs `scene(end)` once for each await point and each way to end there; returns how many points there are."""
    points = -1
    for error in (asyncio.CancelledError(), None):
        for point in range(1_000):
            run(scene(end := End(point, error)))
            if not end.reached:
                break
            points = max(points, point)
    return points + 1
