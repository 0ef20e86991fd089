"""Durations, counts, faults and errors as text, the same in checks, stories and pictures."""

from __future__ import annotations

from distsys.lab.history.history import Fault, Finding, Op


def duration_text(seconds: float) -> str:
    """Return a duration in s or ms: "1.50 s", "320 ms", "2.1 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def count(n: int, noun: str, plural: str = "") -> str:
    """Return the number with its noun: "1 call", "2,000 calls"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


MAX_ERROR_LETTERS = 40  # a longer error is cut to its name
FAULT_WORDS = {"stopped": "paused", "held": "held back"}  # what a fault of this kind does to a process


def fault_text(fault: Fault) -> str:
    """Return what was done to what: "w1 paused (before-write)", "redis killed"."""
    if fault.kind == "server":
        return f"{fault.target} {fault.detail}"
    detail = f" ({fault.detail})" if fault.detail not in ("", fault.kind) else ""
    return f"{fault.target} {FAULT_WORDS.get(fault.kind, fault.kind)}{detail}"


def refusal_text(finding: Finding) -> str:
    """Return the words of the check for the first refusal: "refused with 3 of 10 left"."""
    texts = [row[-1] for row in finding.violations[:1]]
    return next((text for text in texts if text.startswith("refused")), "refused")


def error_text(op: Op) -> str:
    """Return the error of a call, cut to its name if it is long: "HttpError: 503", "TimeoutError"."""
    text = op.detail if len(op.detail) < MAX_ERROR_LETTERS else op.detail.partition(":")[0]
    return text.rstrip(": ") or "no answer"
