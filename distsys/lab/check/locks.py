"""Do two processes hold the lock at once, and does somebody get it again after a fault?"""

from __future__ import annotations

from collections import defaultdict

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Finding, History
from distsys.lab.history.spans import RECOVERIES, conflicts, holds, is_of, waits
from distsys.lab.history.words import count, lasting


def mutual_exclusion(history: History) -> Finding:
    """At no moment do two living processes hold the lock."""
    held, pairs = holds(history), conflicts(history)
    total = count(len(held), "acquisition")
    if pairs:
        late, rows = defaultdict[int, set[str]](set), []
        for a, b in pairs:
            late[id(b)].add(a.process)
            end = min(a.end, b.end)
            when, who = f"{history.at(b.start, '')}-{history.at(end)}", f"{history.who(a.op)}, {history.who(b.op)}"
            rows.append((when, who, f"both held, {lasting(end - b.start)}"))
        summary = f"{1 + max(map(len, late.values()))} holders at once, {len(late):,} of {total}"
        return Finding("VIOLATED", summary, _in_time(span.op for span in pairs[0]), tuple(rows))
    if not held:
        return _unclear(f"nobody acquired the lock, {len(history.where('acquire'))} tried")
    if not (met := waits(history)):
        return _unclear(f"nobody asked for the lock while another held it, {total}")
    return Finding("HELD", f"one holder at a time, {total}, {len(met):,} asked for while held")


def progress(history: History, name: str = "acquire", done: str = "acquired") -> Finding:
    """After the last fault somebody still gets the lock, though the fault hit its holder (or a server)."""
    faults = [f for f in history.faults if f.kind not in (*RECOVERIES, "held")]  # held: a script's doing
    if not faults:
        return _unclear("no fault was injected")
    hit, when, end = faults[-1].target, faults[-1].at, history.end
    of_hit = [op for op in history if is_of(op.process, hit)]
    what = f"{hit} was {faults[-1].kind}" if of_hit else f"the fault on {hit}"
    cut = [op for op in of_hit if op.status == "info" and op.called <= when]  # the dead are owed no answer
    asked = [op for op in history.where(name) if (op.returned is None or op.returned > when) and op not in cut]
    if not asked:
        return _unclear(f"nobody asked after {what}")
    held = [hold for hold in holds(history) if is_of(hold.process, hit) and hold.start <= when <= hold.end]
    if got := [op.end for op in asked if op.status == "ok"]:
        if of_hit and not held and not any(op.name == "acquire" for op in cut):
            return _unclear(f"{hit} did not hold the lock when it was {faults[-1].kind}")
        return Finding("HELD", f"{done} again {lasting(min(got) - when)} after {what}")
    if any(hold.lease_end is not None and hold.lease_end >= end for hold in held):
        return _unclear(f"the run ended before {hit}'s lease did")
    rows = tuple((history.at(op.called), op.process, op.detail or "asked in vain") for op in asked)
    summary = f"nobody {done} in the {lasting(end - when)} after {what}, {len(asked):,} tried"
    return Finding("VIOLATED", summary, _in_time([*(hold.op for hold in held[-1:]), asked[0]]), rows)
