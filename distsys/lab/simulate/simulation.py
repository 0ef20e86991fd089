"""Simulation: one storm under several retry policies, and what each policy did to the dependency."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from distsys.lab.history.history import Expected
from distsys.lab.show.html import escape, table
from distsys.lab.show.svg import STATUS_COLOUR, WIDTH, box, document, path, put
from distsys.lab.show.verdict import MARK, Verdicts
from distsys.lab.simulate.side_by_side import Each, one_by_one
from distsys.lab.simulate.storm import Arm, Make, Process, Storm, simulate_arm

WIDE, HIGH = 300.0, 84.0  # of a panel


def policy(
    max_attempts: int = 4, base_delay: float = 0.1, *, deadline: bool = True, budget: float = 0.0, breaker: int = 0,
    recovery_timeout: float = 2.0, permits: int = 0, **retry: Any,
) -> Make:  # fmt: skip
    """Return a policy of the three rules in the usual order; 0 leaves one out.

    budget   the ratio of the RetryBudget
    breaker  the failure threshold of the circuit breaker
    permits  max_concurrent of the bulkhead
    """

    def make(process: Process) -> Any:
        storm = process.storm
        shared = process.budget(budget) if budget else None
        limit = storm.deadline if deadline else None
        return process.resilient(
            bulkhead=process.bulkhead(max_concurrent=permits, timeout=storm.timeout) if permits else None,
            circuit_breaker=process.breaker(breaker, recovery_timeout) if breaker else None,
            retry=process.retry(max_attempts, base_delay, timeout=limit, budget=shared, **retry),
        )

    return make


ARMS: dict[str, tuple[Make, Expected | None]] = {
    "no retries": (policy(1, deadline=False), "HELD"),
    "fixed retries": (policy(deadline=False, max_delay=0.1, jitter="none"), "VIOLATED"),
    "exponential, no jitter": (policy(deadline=False, jitter="none"), "VIOLATED"),
    "full jitter": (policy(), "VIOLATED"),
    "full jitter + budget": (policy(budget=0.1), "HELD"),
    "full jitter + breaker": (policy(breaker=5), "HELD"),
    "full jitter + bulkhead": (policy(permits=10), "HELD"),
    "all of them": (policy(budget=0.1, breaker=5, permits=10), "HELD"),
}


@dataclass(frozen=True)
class Simulation:
    """The arms of one storm, side by side."""

    storm: Storm
    seed: int
    arms: tuple[Arm, ...]

    def __getitem__(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def verdicts(self) -> Verdicts:
        """The verdicts of all arms."""
        return Verdicts(arm.verdict for arm in self.arms)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table, the names of its columns first. The share of good calls is taken from the trigger on."""
        rows: list[tuple[str, ...]] = [("policy", "verdict", "peak/s", "good", "p99 wait", "recovered")]
        for arm in self.arms:
            back = "metastable" if arm.metastable else "never" if arm.recovery is None else f"after {arm.recovery:g} s"
            expected = "" if arm.verdict.expected is None else " (as expected)"
            expected = expected if arm.verdict.as_expected else f", EXPECTED: {arm.verdict.expected}"
            verdict = f"{MARK[arm.verdict.status]} {arm.verdict.status}{expected}"
            rows.append((arm.name, verdict, f"{arm.peak:,}", f"{arm.goodput:.0%}", f"{arm.p99:.1f} s", back))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([str(self.storm), *lines])

    __repr__ = __str__

    def svg(self) -> str:
        """Return a picture with a panel for each arm: the requests that arrive, and the calls answered in time."""
        storm, out = self.storm, list[str]()
        lines, ticks = -(-len(self.arms) // 2), 5 * math.ceil(storm.end / 50)  # seconds
        right, up = WIDE / int(storm.end), HIGH / (1.05 * max(max(*arm.requests, *arm.calls) for arm in self.arms))
        for n, arm in enumerate(self.arms):
            x, y = (46.0, 402.0)[n % 2], n // 2 * (HIGH + 36) + HIGH + 22
            can = y - storm.capacity * up
            out.append(box(x + storm.calm * right, y - HIGH, storm.outage * right, HIGH, "pause", 0))
            for curve, css in ((arm.calls, "violation"), (arm.good, "label"), (arm.requests, "tick")):
                steps = "".join(f"V{y - count * up:.1f}h{right:.1f}" for count in curve)
                out.append(path(f"M{x} {y}{steps}" + f"V{y}Z" * (css != "tick"), css))
            out += [path(f"M{x} {y}h{WIDE}", "grid"), path(f"M{x} {can:.1f}h{WIDE}", "lease")]
            status = arm.verdict.status
            out.append(put(x, y - HIGH - 6, f"{MARK[status]} {arm.name}", "bold", f"fill:{STATUS_COLOUR[status]}"))
            out.append(put(x - 4, can + 4, f"{storm.capacity:,.0f}", "caption end"))
            seconds = range(0, int(storm.end) + 1, ticks)
            out += [put(x + at * right, y + 13, str(at), "caption middle") for at in seconds]
        height = lines * (HIGH + 36) + 22
        out.append(put(WIDTH / 2, height - 8, "seconds across, per second upwards", "caption middle"))
        return document("".join(out), height, str(storm))

    def _repr_html_(self) -> str:
        head, *rows = self.rows()
        source = base64.b64encode(self.svg().encode()).decode()
        alt = escape(f"{self.storm}. " + " ".join(f"{arm}." for arm in self.arms))
        return (
            f"<div><b>{escape(str(self.storm))}</b><br>{escape(self.storm.claim)}<br>"
            f'<img width="{WIDTH}" style="max-width:100%" alt="{alt}" src="data:image/svg+xml;base64,{source}">'
            "<p>Black line: requests that reach the dependency, per second; dashed: its capacity. Blue: calls "
            f"answered in time; crossed out: calls that fail. Hatched: the trigger.</p>{table(head, rows)}</div>"
        )


def simulate(
    policies: Mapping[str, Make] | Iterable[str] = tuple(ARMS), *, seed: int = 7, each: Each = one_by_one, **storm: Any
) -> Simulation:
    """Run policies of yours by name, or names of ARMS, in a Storm. The same seed gives the same trace.

    simulate(outage=10, clients=10_000)
    simulate({"mine": lambda process: process.retry(3, 0.2, budget=process.budget(0.1))})
    """
    settings = Storm(**storm)
    if isinstance(policies, Mapping):
        jobs = [partial(simulate_arm, name, make, settings, seed) for name, make in policies.items()]
        each = one_by_one
    else:
        jobs = [partial(simulate_arm, name, ARMS[name][0], settings, seed, ARMS[name][1]) for name in policies]
    return Simulation(settings, seed, tuple(each(jobs)))
