"""Checks made of other checks, and the helpers that every check uses.

A check is a pure function History -> Finding. HELD takes a sign that the danger was reached; without one the answer is
INCONCLUSIVE. Only what certainly happened breaks a promise: an "info" op may or may not have happened, so it widens a
bound and is never a counterexample. A "fail" did not happen. Each row of `Finding.violations` is (when, who, what).
"""

from __future__ import annotations

from collections.abc import Iterable

from distsys.lab.history.history import Check, Finding, History, Op


def inconclusive(reason: str) -> Finding:
    """Return the finding of a run that never reached the danger."""
    return Finding("INCONCLUSIVE", reason)


def violated(summary: str, witness: Iterable[Op | None], *rows: tuple[str, str, str]) -> Finding:
    """Return the finding of a broken promise; the ops that show it are put in the order of their calls, each once."""
    ops = {id(op): op for op in witness if op}.values()
    return Finding("VIOLATED", summary, tuple(sorted(ops, key=lambda op: op.called)), rows)


def all_of(*checks: Check) -> Check:
    """Return a check of every promise at once.

    It reports the first check that found a violation, or else the first that was inconclusive.
    """

    def check(history: History) -> Finding:
        findings = [c(history) for c in checks]
        first = {f.status: f for f in reversed(findings)}
        held = Finding("HELD", "; ".join(f.summary for f in findings))
        return first.get("VIOLATED") or first.get("INCONCLUSIVE") or held

    return check


def or_refused(check: Check) -> Check:
    """Return a check that also counts a refused acquire as HELD: a candidate may refuse what it cannot promise."""

    def refused(history: History) -> Finding:
        finding, denied = check(history), history.where("acquire", status="fail")
        if finding.status == "INCONCLUSIVE" and denied:
            return Finding("HELD", f"{len(denied)} of {len(history.where('acquire'))} refused: {denied[0].detail}")
        return finding

    return refused
