"""Advice: find settings of retry and circuit breaker for your outage and workload, by trying them in virtual time.

Settings are compared by four things, in this order. The system recovers. Few calls fail in calm times, which are the
longest. Few calls fail during and after the outage. Few requests reach the dependency at the worst moment. A difference
smaller than the noise does not count; then the settings that were tried first win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from distsys.lab.show.html import escape, table
from distsys.lab.simulate.side_by_side import Each, Job, one_by_one
from distsys.lab.simulate.simulation import Simulation, policy
from distsys.lab.simulate.storm import Arm, Storm, simulate_arm

RATE = 100.0  # calls per second of a trial; more processes with the same load each would only change the noise
SEEDS = 3  # further seeds on which the recommended settings have to hold


Trial = tuple[dict[str, Any], Arm]  # settings, and their result


@dataclass(frozen=True)
class Advice:
    """Recommended settings, and the numbers that argue for them."""

    settings: dict[str, Any]
    simulation: Simulation  # of no retries, naive retries, and the recommended
    tried: tuple[Trial, ...]  # the best first
    confirmed: bool  # on other seeds as well

    @property
    def code(self) -> str:
        """The Python expression with these settings."""
        return _code(self.settings, self.simulation.storm)

    def __str__(self) -> str:
        well = sum(arm.verdict.status != "VIOLATED" for _, arm in self.tried)
        sure = f"it recovered on {SEEDS} other seeds, too" if self.confirmed else "NO settings recovered on every seed"
        small = f" (tried with {RATE:g} calls/s, the same load on fewer processes)"
        return f"{self.code}\n{well} of {len(self.tried)} settings recovered; {sure}{small}\n{self.simulation}"

    __repr__ = __str__

    def rows(self, most: int = 8) -> list[tuple[str, ...]]:
        """Return a table of what was tried, the best settings first; at most `most` rows."""
        return [
            (_words(settings), arm.verdict.status, f"{calm(arm):.1%}", f"{arm.goodput:.0%}", f"{arm.peak:,}")
            for settings, arm in self.tried[:most]
        ]

    def _repr_html_(self) -> str:
        code, note, *_ = map(escape, str(self).splitlines())
        best = table(("settings", "verdict", "good, calm", "good, outage", "peak/s"), self.rows())
        page = f'<pre style="white-space:pre-wrap">{code}</pre><p>{note}</p>{self.simulation._repr_html_()}'
        return f"<div>{page}<details><summary>the best of what was tried</summary>{best}</details></div>"


def advise(
    *, outage_seconds: float, rate: float, clients: int, deadline_seconds: float, timeout_seconds: float | None = None,
    utilisation: float = 0.7, error_rate: float = 0.01, seed: int = 7, each: Each = one_by_one,
) -> Advice:  # fmt: skip
    """Try some thirty settings in a storm like yours; this takes seconds.

    outage_seconds   how long the dependency is gone
    rate             calls per second of all `clients` together
    deadline_seconds after which an answer is worth nothing to a caller
    timeout_seconds  of one request; by default a quarter of the deadline
    utilisation      the rate as a share of what the dependency can serve
    error_rate       the share of requests that are lost even in calm times: what retries are for
    each             how to run the trials: one_by_one, or side_by_side in processes
    """
    scale = rate / RATE
    timeout = deadline_seconds / 4 if timeout_seconds is None else timeout_seconds
    within = max(10.0, 10 * timeout)
    storm = Storm(
        outage=outage_seconds, rate=RATE, clients=max(1, round(clients / scale)), deadline=deadline_seconds,
        timeout=timeout, queue=2 * timeout, utilisation=utilisation, error_rate=error_rate, calm=10.0,
        recover_within=within, after=within + max(5.0, 2 * timeout),
    )  # fmt: skip
    tried: dict[str, Trial] = {}

    def job(settings: dict[str, Any], name: str = "recommended", seed: int = seed) -> Job:
        return partial(simulate_arm, name, policy(**settings), storm, seed)

    def best(grid: Iterator[dict[str, Any]]) -> dict[str, Any]:
        new = [settings for settings in grid if str(settings) not in tried]
        arms = each(map(job, new))
        tried.update((str(settings), (settings, arm)) for settings, arm in zip(new, arms, strict=True))
        return min(tried.values(), key=_rank)[0]

    def holds(settings: dict[str, Any], arm: Arm) -> bool:
        others = each(job(settings, seed=seed + n) for n in range(1, SEEDS + 1))
        return all(run.verdict.status != "VIOLATED" for run in (arm, *others))

    delay = deadline_seconds / 40
    start: dict[str, Any] = {"max_attempts": 1, "base_delay": delay, "jitter": "full", "budget": 0.0}
    start |= {"breaker": 0, "recovery_timeout": 2 * timeout}
    chosen = best(
        {**start, "max_attempts": attempts, "budget": budget, "breaker": breaker}
        for attempts in (1, 2, 3, 5) for budget in (0.0, 0.1, 0.2)[: 3 if attempts > 1 else 1] for breaker in (0, 5)
    )  # fmt: skip
    if chosen["max_attempts"] > 1:
        chosen = best({**chosen, "base_delay": deadline_seconds / part} for part in (160, 20, 10, 5))
        chosen = best({**chosen, "jitter": jitter} for jitter in ("none", "equal"))
    if chosen["breaker"]:
        chosen = best({**chosen, "recovery_timeout": factor * timeout} for factor in (1, 4, 8))
        chosen = best({**chosen, "breaker": threshold} for threshold in (3, 8))
    ranking = sorted(tried.values(), key=_rank)
    confirmed = next((settings for settings, arm in ranking[:5] if holds(settings, arm)), None)
    settings = confirmed or chosen
    naive = {"max_attempts": 4, "base_delay": delay, "max_delay": delay, "jitter": "none"}
    arms = each([job({"max_attempts": 1}, "no retries"), job(naive, "naive, fixed delay"), job(settings)])
    return Advice(settings, Simulation(storm, seed, tuple(arms)), tuple(ranking), confirmed is not None)


def calm(arm: Arm) -> float:
    """Return the share of good calls before the trigger, without the last second: its calls meet the trigger."""
    return sum(arm.good[:9]) / max(1, sum(arm.calls[:9]))


def _rank(trial: Trial) -> tuple[float, ...]:
    """Return the sort key of the module's docstring, the best settings first."""
    settings, arm = trial
    good, peak = round(20 * arm.goodput), round(10 * arm.peak / RATE)
    return (arm.verdict.status == "VIOLATED", -round(calm(arm), 2), -good, peak, settings["max_attempts"])


def _words(settings: dict[str, Any]) -> str:
    parts = ["retry({max_attempts}, {base_delay:g}, jitter={jitter!r})"] * (settings["max_attempts"] > 1)
    parts += ["budget {budget:g}"] * bool(settings["budget"])
    parts += ["breaker({breaker}, {recovery_timeout:g})"] * bool(settings["breaker"])
    return " + ".join(parts or ["a timeout alone"]).format(**settings)


def _code(settings: dict[str, Any], storm: Storm) -> str:
    parts = [f"timeout={storm.timeout:g}"]
    if settings["max_attempts"] > 1:
        budget = f", budget=RetryBudget({settings['budget']:g})" if settings["budget"] else ""
        first = f"{settings['max_attempts']}, {settings['base_delay']:g}, jitter={settings['jitter']!r}"
        parts.insert(0, f"retry=retry({first}, timeout={storm.deadline:g}{budget})")
    if settings["breaker"]:
        parts.insert(0, f"circuit_breaker=circuit_breaker({settings['breaker']}, {settings['recovery_timeout']:g})")
    return f"resilient({', '.join(parts)})"
