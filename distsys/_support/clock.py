"""How the package learns the time: a monotonic clock that goes on while the machine sleeps.

On Linux CLOCK_MONOTONIC stands still during suspend, and a lease must not: a laptop lid or a paused virtual machine
would stretch every local deadline. CLOCK_BOOTTIME goes on; where there is none, CLOCK_MONOTONIC has to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since an arbitrary point, never decreasing."""

_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Seconds, time spent suspended included."""
    return time.clock_gettime(_CLOCK)
