"""Checks made of other checks, and the two helpers that every check uses."""

from __future__ import annotations

from collections.abc import Iterable

from distsys.lab.history.history import Check, Finding, History, Op


def _unclear(why: str) -> Finding:
    return Finding("INCONCLUSIVE", why)


def _in_time(ops: Iterable[Op | None]) -> tuple[Op, ...]:
    return tuple(sorted({id(op): op for op in ops if op}.values(), key=lambda op: op.called))


def all_of(*checks: Check) -> Check:
    """Every promise at once: the first one broken is reported, or else the first one not put to the test."""

    def check(history: History) -> Finding:
        findings = [c(history) for c in checks]
        first = {f.status: f for f in reversed(findings)}
        held = Finding("HELD", "; ".join(f.summary for f in findings))
        return first.get("VIOLATED") or first.get("INCONCLUSIVE") or held

    return check


def or_refused(check: Check) -> Check:
    """A candidate that refuses what it can't promise has kept its promise, though danger was never reached."""

    def refused(history: History) -> Finding:
        finding, denied = check(history), history.where("acquire", status="fail")
        if finding.status == "INCONCLUSIVE" and denied:
            return Finding("HELD", f"{len(denied)} of {len(history.where('acquire'))} refused: {denied[0].detail}")
        return finding

    return refused
