"""What a history shows: each check is a pure function History -> Finding; HELD takes a sign that danger was reached.

Only what certainly happened breaks a promise: an "info" op may or may not have happened, so it widens a bound and never
makes a counterexample; a "fail" did not happen. Rows of `Finding.violations` are (when, who, what).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.spans import Span, meetings, waits
from distsys.lab.history.words import count


def _writes(history: History) -> list[tuple[Op, Op | None, Any, int]]:
    """(the write, the op that told its process a value before, that value, what it adds), of all but refused writes.

    One whose value is no number counts as one more.
    """
    known: dict[str, Op] = {}
    found = []
    for op in sorted(history, key=lambda op: op.called):
        source, number = known.get(op.process), isinstance(op.value, int)
        if op.name == "write" and op.status != "fail" and (source or number):
            value = source.value if source else op.value - 1
            found.append((op, source, value, op.value - value if number and isinstance(value, int) else 1))
        if op.name in ("read", "write") and op.status == "ok":
            known[op.process] = op
    return found


def _totals(least: int, most: int, maybe: list[int]) -> set[int] | range:
    """What the sum can be, from `least` to `most`: each of `maybe` counts or does not."""
    totals = {least - sum(amount for amount in maybe if amount < 0)}
    for amount in maybe:
        totals |= {total + amount for total in totals}
        if len(totals) > 10_000:
            return range(least, most + 1)  # then only the bounds can be told
    return totals


def no_lost_update(history: History) -> Finding:
    """Each write adds to the last value, and counts: no two come from one value; facts: "final" is the sum of all.

    When every process adds an amount of its own, the sum tells whose was lost, even where another's outcome is unknown.
    """
    writes = _writes(history)
    done = [(write, source, value) for write, source, value, _ in writes if write.status == "ok"]
    sure, maybe = ([added for write, *_, added in writes if write.status == status] for status in ("ok", "info"))
    groups: dict[str, list[tuple[Op, Op | None]]] = defaultdict(list)
    for write, source, value in done:
        groups[repr(value)].append((write, source))
    rows, first, lost, where = [], tuple[Op, ...](), 0, ""
    for value, ((write, source), *more) in groups.items():
        for over, again in more:
            what = f"wrote {over.value!r} over {write.process}'s {write.value!r}, both from {value}"
            rows.append((history.at(over.end), history.who(over), what))
            first, lost = first or _in_time([source, write, again, over]), lost + 1
    initial, final = history.facts.get("initial", 0), history.facts.get("final")
    if isinstance(final, int) and isinstance(initial, int):
        low = initial + sum(sure) + sum(amount for amount in maybe if amount < 0)
        high = initial + sum(sure) + sum(amount for amount in maybe if amount > 0)
        if final not in (totals := _totals(low, high, maybe)):
            ends = sorted(totals) if len(totals) < 4 else ()
            where = f", the counter is at {final:,} instead of "
            where += " or ".join(f"{end:,}" for end in ends) or f"one of {low:,} to {high:,}"
            if final > high:
                return Finding("VIOLATED", f"{final - high:,} more than was written{where}", first, tuple(rows))
            lost = max(lost, 1, math.ceil((low - final) / max(1, *sure)))
    if lost:
        witness = first or tuple(write for write, *_ in done[-1:])
        return Finding("VIOLATED", f"{lost:,} of {count(len(sure), 'update')} lost{where}", witness, tuple(rows))
    if not sure:
        return _unclear("nothing was written")
    cycles = [Span(write.process, read.called, write.end, write) for write, read, _ in done if read]
    if not (waits(history) or any(meetings(cycles))):
        return _unclear(f"no two processes were at it at the same time, {count(len(sure), 'write')}")
    unknown = f", {len(maybe)} more of unknown outcome" if maybe else ""
    return Finding("HELD", f"{count(len(sure), 'update')}, none lost{unknown}")
