"""How the package learns the time: a monotonic clock that goes on while the machine sleeps.

CLOCK_MONOTONIC stands still during suspend on Linux, and a lease must not: a laptop lid or a paused virtual machine would
otherwise stretch every local deadline. On macOS CLOCK_MONOTONIC_RAW stops too and CLOCK_MONOTONIC does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since an arbitrary point, never decreasing."""


def _clock_id() -> int:
    return getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


_CLOCK = _clock_id()


def elapsed() -> float:
    """Seconds since boot, time spent suspended included."""
    return time.clock_gettime(_CLOCK)
