"""Which settings for retry and circuit breaker, for an outage and a workload of yours: tried out, in virtual time.

First of all the system has to come back; then what counts is how few calls fail in calm times, for these are longest;
then in and after the outage; then how little is asked of the dependency at the worst moment. What differs by less than
the noise does not count, and then what was tried first is taken.
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

RATE = 100.0  # calls per second at which it is tried; more processes of the same load change the noise alone
SEEDS = 3  # besides the first, on which the recommended settings have to hold


@dataclass(frozen=True)
class Advice:
    """Settings, and the numbers that argue for them."""

    settings: dict[str, Any]
    simulation: Simulation  # of no retries, naive retries, and the recommended
    tried: tuple[tuple[dict[str, Any], Arm], ...]  # the best first
    confirmed: bool  # on other seeds, too

    @property
    def code(self) -> str:
        """That says the settings."""
        return _code(self.settings, self.simulation.storm)

    def __str__(self) -> str:
        well = sum(arm.verdict.status != "VIOLATED" for _, arm in self.tried)
        sure = f"it recovered on {SEEDS} other seeds, too" if self.confirmed else "NO settings recovered on every seed"
        small = f" (tried with {RATE:g} calls/s, the same load on fewer processes)"
        return f"{self.code}\n{well} of {len(self.tried)} settings recovered; {sure}{small}\n{self.simulation}"

    __repr__ = __str__

    def rows(self, most: int = 8) -> list[tuple[str, ...]]:
        """Of what was tried, the best first."""
        return [
            (_said(one), arm.verdict.status, f"{calm(arm):.1%}", f"{arm.goodput:.0%}", f"{arm.peak:,}")
            for one, arm in self.tried[:most]
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
    """Tries some thirty settings in a storm of yours; it takes seconds.

    outage_seconds   of the dependency; rate: calls per second of all `clients` together
    deadline_seconds after which an answer is worth nothing to a caller
    timeout_seconds  of one request; a quarter of the deadline
    utilisation      the rate as a share of what the dependency can do
    error_rate       of requests, lost even in calm times: what retries are for
    """
    scale = rate / RATE
    timeout = deadline_seconds / 4 if timeout_seconds is None else timeout_seconds
    within = max(10.0, 10 * timeout)
    storm: dict[str, Any] = {
        "outage": outage_seconds, "rate": RATE, "clients": max(1, round(clients / scale)), "deadline": deadline_seconds,
        "timeout": timeout, "queue": 2 * timeout, "utilisation": utilisation, "error_rate": error_rate, "calm": 10.0,
        "recover_within": within, "after": within + max(5.0, 2 * timeout),
    }  # fmt: skip
    how, tried = Storm(**storm), dict[str, tuple[dict[str, Any], Arm]]()

    def job(settings: dict[str, Any], name: str = "recommended", seed: int = seed) -> Job:
        return partial(simulate_arm, name, policy(**settings), how, seed)

    def best(grid: Iterator[dict[str, Any]]) -> dict[str, Any]:
        new = [settings for settings in grid if str(settings) not in tried]
        tried.update((str(one), (one, arm)) for one, arm in zip(new, each(map(job, new)), strict=True))
        return min(tried.values(), key=_worth)[0]

    def holds(settings: dict[str, Any], arm: Arm) -> bool:
        others = each(job(settings, seed=seed + n) for n in range(1, SEEDS + 1))
        return all(one.verdict.status != "VIOLATED" for one in (arm, *others))

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
    order = sorted(tried.values(), key=_worth)
    settings = next((one for one, arm in order[:5] if holds(one, arm)), None)
    confirmed, settings = settings is not None, settings or chosen
    naive = {"max_attempts": 4, "base_delay": delay, "max_delay": delay, "jitter": "none"}
    arms = each([job({"max_attempts": 1}, "no retries"), job(naive, "naive, fixed delay"), job(settings)])
    return Advice(settings, Simulation(how, seed, tuple(arms)), tuple(order), confirmed)


def calm(arm: Arm) -> float:
    """The share of good calls before the trigger; the last second before it is part of the storm."""
    return sum(arm.good[:9]) / max(1, sum(arm.calls[:9]))


def _worth(one: tuple[dict[str, Any], Arm]) -> tuple[float, ...]:
    settings, arm = one
    good, peak = round(20 * arm.goodput), round(10 * arm.peak / RATE)
    return (arm.verdict.status == "VIOLATED", -round(calm(arm), 2), -good, peak, settings["max_attempts"])


def _said(settings: dict[str, Any]) -> str:
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
