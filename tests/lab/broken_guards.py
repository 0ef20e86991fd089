"""Breakers and retries with one mistake each. It imports little, for each worker imports it anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from distsys.lab.experiments.resilience import candidates as guards
from distsys.resilience.retry import retry


class Windowed(guards.Textbook):
    """Looks at the last ten calls; a late success still closes it."""

    def __init__(self, failure_threshold: int, recovery_timeout: float, clock: Callable[[], float]) -> None:
        super().__init__(failure_threshold, recovery_timeout, clock)
        self.last = deque[bool](maxlen=10)

    def failed(self) -> None:
        self.last.append(True)
        self.failures = sum(self.last) - 1
        super().failed()

    def succeeded(self) -> None:
        self.last.append(False)
        super().succeeded()


class DeafWhileOpen(Windowed):
    """And does not listen to late successes; but half open, it lets everybody through."""

    def succeeded(self) -> None:
        if self.state != "open":
            super().succeeded()


class LeaksProbes(guards.CountedProbes, DeafWhileOpen):
    """And lets one probe through, whose place is lost when it is cancelled."""


def three_more(call: guards.Call, max_attempts: int) -> guards.Call:
    """Takes max_attempts for the number of retries; sleeps by itself."""
    return retry(max_attempts + 1, 0.001)(call)


def does_not_know_what_is_lost(call: guards.Call, sleep: guards.Sleep) -> guards.Call:
    """Right about passwords; takes a lost reply for a lost request."""
    return retry(sleep=sleep)(call)
