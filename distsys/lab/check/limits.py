"""Does a limiter admit more than it allows, or refuse while there is room?"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Check, Finding, History, Op
from distsys.lab.history.spans import said
from distsys.lab.history.words import count, lasting

TINY = 1e-6  # of a token: what sums of times may be off by


@dataclass(frozen=True)
class Allowance:
    """To each `per`: so many tokens in any window of that length, or so many at once and `refill_rate` a second."""

    tokens: float
    window_seconds: float = math.inf
    refill_rate: float = 0.0
    per: str = "key"  # what of an op's value tells whose tokens these are

    def within(self, seconds: float) -> float:
        return self.tokens + self.refill_rate * seconds if seconds < self.window_seconds else math.inf

    def same(self, a: Op, b: Op) -> bool:
        """Whether both take of the same tokens."""
        return bool(said(a, self.per) == said(b, self.per))

    def room(self, left: float, op: Op) -> str:
        who = said(op, self.per)
        return f"{left:,.3g} of {self.tokens:,.6g} left{'' if who is None else f' for {who}'}"

    def __str__(self) -> str:
        window = f" within {lasting(self.window_seconds)}" if self.window_seconds < math.inf else ""
        refill = f" at once and {self.refill_rate:.3g} a second" if self.refill_rate else ""
        return f"{self.tokens:,.6g}{window}{refill}{'' if self.per == 'key' else f' per {self.per}'}"


def _cost(op: Op) -> float:
    cost = said(op, "cost")
    return float(cost) if isinstance(cost, (int, float)) else 1.0


def _worst(ops: list[Op], allowed: Allowance) -> tuple[float, float, tuple[Op, ...]]:
    """By how much the ops that lie, from call to return, in a span of time exceed what is allowed in it, at the worst.

    Also how long that span is, and the ops. Every call begins a span: with n ops it takes n * n steps.
    """
    worst: tuple[float, float, tuple[Op, ...]] = (-math.inf, 0.0, ())
    subjects = defaultdict[str, list[Op]](list)
    for op in sorted((op for op in ops if op.returned is not None), key=lambda op: op.end):
        subjects[repr(said(op, allowed.per))].append(op)
    for mine in subjects.values():
        for start in sorted({op.called for op in mine}):
            inside, total = [], 0.0
            for op in mine:
                if op.called >= start:
                    inside.append(op)
                    total += _cost(op)
                    if (excess := total - allowed.within(op.end - start)) > worst[0] + TINY:
                        worst = excess, op.end - start, tuple(inside)
    return worst


def at_most(*allowances: Allowance) -> Check:
    """In no span of time more passes than is allowed in it; an op counts if all of it lies in the span."""

    def check(history: History) -> Finding:
        asked = history.where("admit")
        for allowed in allowances:
            excess, seconds, ops = _worst([op for op in asked if op.status == "ok"], allowed)
            if excess > TINY:
                when = f"{history.at(min(op.called for op in ops), '')}-{history.at(ops[-1].end)}"
                passed = f"{sum(map(_cost, ops)):,.6g} admitted"
                row = (when, "", f"{passed}, {math.ceil(excess - TINY):,} too many")
                summary = f"{passed} within {lasting(seconds)}, allowed: {allowed}"
                return Finding("VIOLATED", summary, _in_time(ops), (row,))
        if any(_worst(asked, allowed)[0] <= TINY for allowed in allowances):
            return _unclear(f"never more was asked for than is allowed, {count(len(asked), 'request')}")
        total = sum(op.status == "ok" for op in asked)
        return Finding("HELD", f"{total:,} of {len(asked):,} admitted, allowed: {'; '.join(map(str, allowances))}")

    return check


def _left(asked: Op, passed: list[Op], allowed: Allowance) -> tuple[float, list[Op]]:
    """What was certainly left when it was asked for, and the ops that count: each as late as it may have been."""
    latest = {id(op): op.end if op.status == "ok" else math.inf for op in passed}
    left, total, counted = allowed.tokens, 0.0, []
    for op in sorted(passed, key=lambda op: latest[id(op)], reverse=True):
        if op.called <= asked.end and allowed.same(op, asked):
            total += _cost(op)
            room = allowed.within(max(0.0, asked.called - latest[id(op)])) - total
            if room < math.inf:
                left = min(left, room)
                counted.append(op)
    return left, counted


def no_needless_refusal(*allowances: Allowance) -> Check:
    """Nobody is refused while each allowance certainly had room: a refused request takes nothing."""

    def check(history: History) -> Finding:
        asked = history.where("admit")
        refused = [op for op in asked if op.status == "fail"]
        passed = [op for op in asked if op.status != "fail"]
        rows, first = list[tuple[str, ...]](), tuple[Op, ...]()
        for op in refused:
            found = [(allowed, *_left(op, passed, allowed)) for allowed in allowances]
            if all(left >= _cost(op) for _, left, _ in found):
                before = [one for one in passed if one.precedes(op) and any(a.same(one, op) for a in allowances)]
                room = " and ".join(allowed.room(left, op) for allowed, left, _ in found)
                rows.append((history.at(op.end), op.process, f"refused with {room}"))
                counted = [one for *_, ops in found for one in ops]
                first = first or _in_time([op, *before[-math.ceil(allowances[0].tokens) :], *counted])
        if rows:
            summary = f"{len(rows):,} of {count(len(refused), 'refusal')} needless: {rows[0][1]} was {rows[0][2]}"
            return Finding("VIOLATED", summary, first, tuple(rows))
        again = [op for op in passed if op.status == "ok" and any(no.precedes(op) for no in refused)]
        if not again:
            return _unclear(f"nobody was admitted after a refusal, {count(len(refused), 'refusal')}")
        none = f"{count(len(refused), 'refusal')}, none while there was room"
        return Finding("HELD", f"{none}; {len(again):,} admitted later")

    return check
