"""Checks of rate limiting: does a limiter admit more than it allows, or refuse while it has room?"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Check, Finding, History, Op
from distsys.lab.history.words import count, duration_text

TINY = 1e-6  # tokens: the rounding error of a sum of times


@dataclass(frozen=True)
class Allowance:
    """What each subject may use: `tokens` in any window, or `tokens` at once and `refill_rate` more per second."""

    tokens: float
    window_seconds: float = math.inf
    refill_rate: float = 0.0
    per: str = "key"  # the entry of an op's value that names the subject

    def within(self, seconds: float) -> float:
        """Return how many tokens a span of this length may use."""
        return self.tokens + self.refill_rate * seconds if seconds < self.window_seconds else math.inf

    def room_text(self, left: float, op: Op) -> str:
        """Return how much was left when this op was called: "3 of 10 left for ann"."""
        subject = op.get(self.per)
        return f"{left:,.3g} of {self.tokens:,.6g} left{'' if subject is None else f' for {subject}'}"

    def __str__(self) -> str:
        window = f" within {duration_text(self.window_seconds)}" if self.window_seconds < math.inf else ""
        refill = f" at once and {self.refill_rate:.3g} a second" if self.refill_rate else ""
        return f"{self.tokens:,.6g}{window}{refill}{'' if self.per == 'key' else f' per {self.per}'}"


def cost_of(op: Op) -> float:
    """Return the tokens that a request asks for: the "cost" of its value, or 1."""
    cost = op.get("cost")
    return float(cost) if isinstance(cost, (int, float)) else 1.0


def _worst_span(ops: list[Op], allowed: Allowance) -> tuple[float, float, tuple[Op, ...]]:
    """Return (excess, seconds, ops) of the span of time with the largest excess over what is allowed in it.

    An op counts if it lies in the span from its call to its return. Each call begins a span: n ops take n * n steps.
    """
    worst: tuple[float, float, tuple[Op, ...]] = (-math.inf, 0.0, ())
    subjects = defaultdict[str, list[Op]](list)
    for op in sorted((op for op in ops if op.returned is not None), key=lambda op: op.end):
        subjects[repr(op.get(allowed.per))].append(op)
    for of_subject in subjects.values():
        for start in sorted({op.called for op in of_subject}):
            inside, total = [], 0.0
            for op in of_subject:
                if op.called >= start:
                    inside.append(op)
                    total += cost_of(op)
                    if (excess := total - allowed.within(op.end - start)) > worst[0] + TINY:
                        worst = excess, op.end - start, tuple(inside)
    return worst


def at_most(*allowances: Allowance) -> Check:
    """Return a check that no span of time admits more than is allowed in it."""

    def check(history: History) -> Finding:
        requests = history.where("admit")
        admitted = [op for op in requests if op.status == "ok"]
        for allowed in allowances:
            excess, seconds, ops = _worst_span(admitted, allowed)
            if excess > TINY:
                when = f"{history.at(min(op.called for op in ops), '')}-{history.at(ops[-1].end)}"
                total = f"{sum(map(cost_of, ops)):,.6g} admitted"
                row = (when, "", f"{total}, {math.ceil(excess - TINY):,} too many")
                return violated(f"{total} within {duration_text(seconds)}, allowed: {allowed}", ops, row)
        if any(_worst_span(requests, allowed)[0] <= TINY for allowed in allowances):
            return inconclusive(f"never more was asked for than is allowed, {count(len(requests), 'request')}")
        limits = "; ".join(map(str, allowances))
        return Finding("HELD", f"{len(admitted):,} of {len(requests):,} admitted, allowed: {limits}")

    return check


def _certainly_left(request: Op, passed: list[Op], allowed: Allowance) -> tuple[float, list[Op]]:
    """Return the tokens that were certainly left for a request, and the ops that used the others.

    Each earlier op is taken to have happened as late as it may have.
    """
    latest = {id(op): op.end if op.status == "ok" else math.inf for op in passed}
    left, total, counted = allowed.tokens, 0.0, []
    for op in sorted(passed, key=lambda op: latest[id(op)], reverse=True):
        if op.called <= request.end and op.get(allowed.per) == request.get(allowed.per):
            total += cost_of(op)
            room = allowed.within(max(0.0, request.called - latest[id(op)])) - total
            if room < math.inf:
                left = min(left, room)
                counted.append(op)
    return left, counted


def no_needless_refusal(*allowances: Allowance) -> Check:
    """Return a check that no request is refused while every allowance certainly had room for it.

    A refused request must use no tokens.
    """

    def check(history: History) -> Finding:
        refused = history.where("admit", status="fail")
        passed = [op for op in history.where("admit") if op.status != "fail"]
        rows, witness = list[tuple[str, str, str]](), list[Op]()
        for op in refused:
            found = [(allowed, *_certainly_left(op, passed, allowed)) for allowed in allowances]
            if all(left >= cost_of(op) for _, left, _ in found):
                room = " and ".join(allowed.room_text(left, op) for allowed, left, _ in found)
                rows.append((history.at(op.end), op.process, f"refused with {room}"))
                if not witness:
                    same = [p for p in passed if any(p.get(a.per) == op.get(a.per) for a in allowances)]
                    before = [p for p in same if p.precedes(op)][-math.ceil(allowances[0].tokens) :]
                    witness = [op, *before, *(counted for *_, ops in found for counted in ops)]
        if rows:
            summary = f"{len(rows):,} of {count(len(refused), 'refusal')} needless: {rows[0][1]} was {rows[0][2]}"
            return violated(summary, witness, *rows)
        later = [op for op in passed if op.status == "ok" and any(r.precedes(op) for r in refused)]
        refusals = count(len(refused), "refusal")
        if not later:
            return inconclusive(f"nobody was admitted after a refusal, {refusals}")
        return Finding("HELD", f"{refusals}, none while there was room; {len(later):,} admitted later")

    return check
