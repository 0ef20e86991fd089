"""A monotonic clock that also counts the time while the machine is suspended.

On Linux CLOCK_MONOTONIC stops during suspend, and a lease must not: a closed laptop or a paused virtual machine would
stretch every local deadline. CLOCK_BOOTTIME does not stop. Systems without it use CLOCK_MONOTONIC.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since an arbitrary point, never decreasing."""

_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Return the seconds since an arbitrary point, time spent suspended included."""
    return time.clock_gettime(_CLOCK)
