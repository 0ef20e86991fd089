"""The clock of leases."""

from __future__ import annotations

import time

from distsys._support import clock


def test_time_never_goes_back() -> None:
    """Each reading is at least as late as the one before."""
    readings = [clock.elapsed() for _ in range(1000)]
    assert readings == sorted(readings)
    assert readings[-1] > readings[0]


def test_it_also_counts_time_suspended() -> None:
    """It uses CLOCK_BOOTTIME where the system has it."""
    assert getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC) == clock._CLOCK
    before = time.clock_gettime(clock._CLOCK)
    assert before <= clock.elapsed() <= time.clock_gettime(clock._CLOCK)
