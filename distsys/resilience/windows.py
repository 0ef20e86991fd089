"""What a circuit breaker looks at while it is closed: the last so many calls, or those of so many seconds.

A success must cost next to nothing: it is a number drawn from a counter, which threads can do at once without a lock;
how many were drawn is looked at when a call fails. Only a window of time, which needs the time of each, takes a lock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from itertools import count

from distsys._support.clock import Clock

BUCKETS = 10  # of a time window: calls leave it a tenth at a time


class TimeWindow(float):
    """A window of time, instead of a number of calls."""


class LastCalls:
    """The last `length` calls."""

    def __init__(self, length: int) -> None:
        self._ring: deque[bool] = deque(maxlen=length)
        self._drawn, counter = 0, count()
        self.success = counter.__next__

    def failure(self) -> None:
        self._look()
        self._ring.append(True)

    def counts(self) -> tuple[int, int]:
        """Calls, and those that failed."""
        self._look()
        return len(self._ring), sum(self._ring)

    def _look(self) -> None:
        number = self.success()
        fresh, self._drawn = number - self._drawn, number + 1
        self._ring.extend([False] * min(fresh, self._ring.maxlen or 0))


class LastSeconds:
    """Calls of the last `length` seconds, forgotten a tenth of the window at a time: between 0.9 and 1 of it count."""

    def __init__(self, length: float, clock: Clock) -> None:
        self._width, self._clock, self._lock = length / BUCKETS, clock, threading.RLock()
        self._buckets: deque[list[int]] = deque()  # [number, calls, failures], oldest first
        self._ends = -math.inf  # the newest of them

    def success(self) -> None:
        with self._lock:
            self._newest()[1] += 1

    def failure(self) -> None:
        with self._lock:
            newest = self._newest()
            newest[1] += 1
            newest[2] += 1

    def counts(self) -> tuple[int, int]:
        with self._lock:
            self._newest()
            return sum(bucket[1] for bucket in self._buckets), sum(bucket[2] for bucket in self._buckets)

    def _newest(self) -> list[int]:
        if (now := self._clock()) >= self._ends:
            number = int(now / self._width)
            self._ends = (number + 1) * self._width
            if not self._buckets or self._buckets[-1][0] != number:
                self._buckets.append([number, 0, 0])
            while self._buckets[0][0] <= number - BUCKETS:
                self._buckets.popleft()
        return self._buckets[-1]


Window = LastCalls | LastSeconds


def window_of(length: int | TimeWindow, clock: Clock) -> Window:
    return LastSeconds(length, clock) if isinstance(length, TimeWindow) else LastCalls(length)
