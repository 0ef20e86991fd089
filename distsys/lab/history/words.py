"""The words of a history: durations, counts, faults and errors as checks, stories and pictures write them."""

from __future__ import annotations

from distsys.lab.history.history import Fault, Finding, Op


def lasting(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def count(n: int, noun: str, plural: str = "") -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


LONG = 40  # letters of an error: then its name has to do


WORDS = {"stopped": "paused", "held": "held back"}  # for a fault's kind, of a process


def what(fault: Fault) -> str:
    """ "w1 paused (before-write)", "redis killed"."""
    if fault.kind == "server":
        return f"{fault.target} {fault.detail}"
    detail = f" ({fault.detail})" if fault.detail not in ("", fault.kind) else ""
    return f"{fault.target} {WORDS.get(fault.kind, fault.kind)}{detail}"


def refusal(finding: Finding) -> str:
    """How the check put the first one: "refused with 3 of 10 left"."""
    said = [row[-1] for row in finding.violations[:1] if row[-1].startswith("refused")]
    return said[0] if said else "refused"


def error(op: Op) -> str:
    """In few words: "HttpError: 503", "TimeoutError"."""
    return (op.detail if len(op.detail) < LONG else op.detail.partition(":")[0]).rstrip(": ") or "no answer"
