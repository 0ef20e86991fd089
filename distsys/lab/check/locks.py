"""Checks of locks: do two processes hold the lock at once, and does anybody get it again after a fault?"""

from __future__ import annotations

from collections import defaultdict

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Finding, History
from distsys.lab.history.spans import RECOVERIES, conflicts, holds, is_task_of, waits
from distsys.lab.history.words import count, duration_text


def mutual_exclusion(history: History) -> Finding:
    """Check that no two living processes hold the lock at the same time."""
    held, pairs = holds(history), conflicts(history)
    total = count(len(held), "acquisition")
    if pairs:
        others, rows = defaultdict[int, set[str]](set), []
        for a, b in pairs:
            others[id(b)].add(a.process)
            end = min(a.end, b.end)
            when, who = f"{history.at(b.start, '')}-{history.at(end)}", f"{history.who(a.op)}, {history.who(b.op)}"
            rows.append((when, who, f"both held, {duration_text(end - b.start)}"))
        summary = f"{1 + max(map(len, others.values()))} holders at once, {len(others):,} of {total}"
        return violated(summary, [span.op for span in pairs[0]], *rows)
    if not held:
        return inconclusive(f"nobody acquired the lock, {len(history.where('acquire'))} tried")
    if not (met := waits(history)):
        return inconclusive(f"nobody asked for the lock while another held it, {total}")
    return Finding("HELD", f"one holder at a time, {total}, {len(met):,} asked for while held")


def progress(history: History, name: str = "acquire", done: str = "acquired") -> Finding:
    """Check that somebody gets the lock after the last fault, which hit its holder or a server."""
    faults = [f for f in history.faults if f.kind not in (*RECOVERIES, "held")]  # "held" belongs to the script
    if not faults:
        return inconclusive("no fault was injected")
    victim, when, end = faults[-1].target, faults[-1].at, history.end
    of_victim = [op for op in history if is_task_of(op.process, victim)]
    fault = f"{victim} was {faults[-1].kind}" if of_victim else f"the fault on {victim}"
    cut_short = [op for op in of_victim if op.status == "info" and op.called <= when]  # no answer is due to the dead
    asked = [op for op in history.where(name) if (op.returned is None or op.returned > when) and op not in cut_short]
    if not asked:
        return inconclusive(f"nobody asked after {fault}")
    held = [hold for hold in holds(history) if is_task_of(hold.process, victim) and hold.start <= when <= hold.end]
    if got := [op.end for op in asked if op.status == "ok"]:
        if of_victim and not held and not any(op.name == "acquire" for op in cut_short):
            return inconclusive(f"{victim} did not hold the lock when it was {faults[-1].kind}")
        return Finding("HELD", f"{done} again {duration_text(min(got) - when)} after {fault}")
    if any(hold.lease_end is not None and hold.lease_end >= end for hold in held):
        return inconclusive(f"the run ended before {victim}'s lease did")
    rows = [(history.at(op.called), op.process, op.detail or "asked in vain") for op in asked]
    summary = f"nobody {done} in the {duration_text(end - when)} after {fault}, {len(asked):,} tried"
    return violated(summary, [*(hold.op for hold in held[-1:]), asked[0]], *rows)
