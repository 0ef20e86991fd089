"""The clock of leases."""

from __future__ import annotations

import time

from distsys._support import clock


def test_time_never_goes_back() -> None:
    """Each look is at least as late as the one before."""
    looks = [clock.elapsed() for _ in range(1000)]
    assert looks == sorted(looks)
    assert looks[-1] > looks[0]


def test_it_goes_on_while_the_machine_sleeps() -> None:
    """Where the system has such a clock, it is the one."""
    assert getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC) == clock._CLOCK
    before = time.clock_gettime(clock._CLOCK)
    assert before <= clock.elapsed() <= time.clock_gettime(clock._CLOCK)
