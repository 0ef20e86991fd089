"""Check of a counter in an account: is an update lost?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.spans import Span, meetings, waits
from distsys.lab.history.words import count


class _Update(NamedTuple):
    write: Op
    source: Op | None  # the op that last told this process a value
    base: str  # that value, as its repr
    added: int  # 1 for a value that is no number


def _updates(history: History) -> Iterator[_Update]:
    """Yield the writes that were not refused, each with the value that it was computed from."""
    known: dict[str, Op] = {}
    for op in sorted(history, key=lambda op: op.called):
        source, is_number = known.get(op.process), isinstance(op.value, int)
        if op.name == "write" and op.status != "fail" and (source or is_number):
            base = source.value if source else op.value - 1
            added = op.value - base if is_number and isinstance(base, int) else 1
            yield _Update(op, source, repr(base), added)
        if op.name in ("read", "write") and op.status == "ok":
            known[op.process] = op


def _totals(low: int, high: int, perhaps: list[int]) -> set[int] | range:
    """Return the sums from `low` to `high` that are possible when each amount of `perhaps` counts or does not."""
    totals = {low - sum(amount for amount in perhaps if amount < 0)}
    for amount in perhaps:
        totals |= {total + amount for total in totals}
        if len(totals) > 10_000:
            return range(low, high + 1)  # too many to list: only the bounds are checked
    return totals


def no_lost_update(history: History) -> Finding:
    """Check that no two writes were computed from one value, and that facts["final"] is the sum of all writes.

    If every process adds an amount of its own, the sum shows a lost update also where the outcome of another write is
    unknown.
    """
    updates = list(_updates(history))
    done = [update for update in updates if update.write.status == "ok"]
    sure = [update.added for update in done]
    perhaps = [update.added for update in updates if update.write.status == "info"]
    by_base: dict[str, list[_Update]] = defaultdict(list)
    for update in done:
        by_base[update.base].append(update)
    rows, witness, where = [], list[Op | None](), ""
    for base, (first, *more) in by_base.items():
        for over in more:
            wrote = f"wrote {over.write.value!r} over {first.write.process}'s {first.write.value!r}, both from {base}"
            rows.append((history.at(over.write.end), history.who(over.write), wrote))
            witness = witness or [first.source, first.write, over.source, over.write]
    lost = len(rows)
    initial, final = history.facts.get("initial", 0), history.facts.get("final")
    if isinstance(final, int) and isinstance(initial, int):
        low = initial + sum(sure) + sum(amount for amount in perhaps if amount < 0)
        high = initial + sum(sure) + sum(amount for amount in perhaps if amount > 0)
        if final not in (totals := _totals(low, high, perhaps)):
            few = " or ".join(f"{total:,}" for total in sorted(totals)) if len(totals) < 4 else ""
            where = f", the counter is at {final:,} instead of {few or f'one of {low:,} to {high:,}'}"
            if final > high:
                return violated(f"{final - high:,} more than was written{where}", witness, *rows)
            lost = max(lost, 1, math.ceil((low - final) / max(1, *sure)))
    if lost:
        witness = witness or [update.write for update in done[-1:]]
        return violated(f"{lost:,} of {count(len(sure), 'update')} lost{where}", witness, *rows)
    if not sure:
        return inconclusive("nothing was written")
    cycles = [Span(u.write.process, u.source.called, u.write.end, u.write) for u in done if u.source]
    if not (waits(history) or any(meetings(cycles))):
        return inconclusive(f"no two processes were at it at the same time, {count(len(sure), 'write')}")
    unknown = f", {len(perhaps)} more of unknown outcome" if perhaps else ""
    return Finding("HELD", f"{count(len(sure), 'update')}, none lost{unknown}")
