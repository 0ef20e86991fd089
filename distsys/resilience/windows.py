"""What a circuit breaker counts while it is closed: the last so many calls, or the calls of the last so many seconds.

A success must cost next to nothing. In a window of calls it is one append to a deque: threads may do that at the same
time without a lock. A window of time reads the clock and takes a lock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from functools import partial

from distsys._support.clock import Clock

BUCKETS = 10  # of a time window: calls leave it a tenth at a time


class TimeWindow(float):
    """A window of so many seconds, where a plain number means a window of calls."""


class LastCalls:
    """A window of the last `length` calls."""

    def __init__(self, length: int) -> None:
        self._failed: deque[bool] = deque(maxlen=length)
        self.success = partial(self._failed.append, False)
        self.failure = partial(self._failed.append, True)

    def counts(self) -> tuple[int, int]:
        """Return the number of calls, and how many of them failed."""
        return len(self._failed), self._failed.count(True)


class LastSeconds:
    """A window of the last `length` seconds.

    It forgets a tenth at a time, so a call counts for 0.9 to 1 of the length.
    """

    def __init__(self, length: float, clock: Clock) -> None:
        self._width = length / BUCKETS
        self._clock, self._lock = clock, threading.RLock()
        self._buckets: deque[list[int]] = deque()  # [number, calls, failures], oldest first
        self._newest_ends = -math.inf

    def success(self) -> None:
        """Count a call that succeeded."""
        with self._lock:
            self._newest()[1] += 1

    def failure(self) -> None:
        """Count a call that failed."""
        with self._lock:
            newest = self._newest()
            newest[1] += 1
            newest[2] += 1

    def counts(self) -> tuple[int, int]:
        """Return the number of calls, and how many of them failed."""
        with self._lock:
            self._newest()
            return sum(bucket[1] for bucket in self._buckets), sum(bucket[2] for bucket in self._buckets)

    def _newest(self) -> list[int]:
        """Return the bucket of the present moment, and forget those that are too old."""
        if (now := self._clock()) >= self._newest_ends:
            number = int(now / self._width)
            self._newest_ends = (number + 1) * self._width
            if not self._buckets or self._buckets[-1][0] != number:
                self._buckets.append([number, 0, 0])
            while self._buckets[0][0] <= number - BUCKETS:
                self._buckets.popleft()
        return self._buckets[-1]
