"""Checks of circuit breaker, retry and bulkhead: the requests sent, the calls answered, and the waits in vain."""

from __future__ import annotations

import math

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Check, Finding, History, Op
from distsys.lab.history.spans import RECOVERIES
from distsys.lab.history.words import count, error_text, fault_text


def at_most_sent(most: int, *, per_call: bool = False, name: str = "request") -> Check:
    """Return a check that at most so many requests are sent from the last fault until it has ended.

    per_call  the limit is for each call, not for all calls together
    """

    def check(history: History) -> Finding:
        begin = max((f.at for f in history.faults if f.kind not in RECOVERIES), default=history.started)
        end = min((f.at for f in history.faults if f.kind in RECOVERIES and f.at >= begin), default=math.inf)
        calls = [op for op in history.where("call") if begin <= op.called < end]
        sent = [op for op in history.where(name) if op.returned is not None and begin <= op.called < end]
        allowed = most * len(calls) if per_call else most
        summary = f"{count(len(sent), 'request')} for {count(len(calls), 'call')}, allowed: {allowed:,}"
        if len(sent) > allowed:
            when = f"{history.at(sent[0].called, '')}-{history.at(sent[-1].end)}"
            excess = f"{count(len(sent), 'request')}, {len(sent) - allowed:,} too many"
            return violated(summary, sent, (when, sent[-1].process, excess))
        if all(op.status == "ok" for op in calls) if per_call else len(calls) <= most:
            return inconclusive(f"nothing had to be held back, {summary}")
        return Finding("HELD", summary)

    return check


def answered(history: History, process: str = "", name: str = "call") -> Finding:
    """Check that every call after the last fault, or after its end, is answered.

    process  only the calls of this one
    """
    faults = (f for f in history.faults if f.kind not in ("held", "released"))  # these two belong to the script
    last = max(faults, key=lambda f: f.at, default=None)
    begin, since = (last.at, f" after {fault_text(last)}") if last else (history.started, "")
    calls = [op for op in history.where(name, process=process or None) if op.called >= begin]
    if failed := [op for op in calls if op.status != "ok"]:
        rows = [(history.at(op.end), op.process, error_text(op)) for op in failed]
        summary = f"{len(failed):,} of {count(len(calls), 'call')} not answered{since}: {rows[0][2]}"
        return violated(summary, failed, *rows)
    if not calls:
        return inconclusive(f"nobody called{since}")
    return Finding("HELD", f"{count(len(calls), 'call')} answered{since}")


def refused_at_once(history: History) -> Finding:
    """Check that a refused call, for which no request is sent, does not wait before it is refused."""

    def inside(call: Op, name: str) -> list[Op]:
        end = history.until(call)
        return [op for op in history.where(name, process=call.process) if call.called <= op.called < end]

    refused = [op for op in history.where("call") if op.status != "ok" and not inside(op, "request")]
    in_vain = [(call, waits) for call in refused if (waits := inside(call, "wait"))]
    if in_vain:
        rows = [(history.at(call.end), call.process, f"refused after {count(len(w), 'wait')}") for call, w in in_vain]
        total = count(sum(len(waits) for _, waits in in_vain), "wait")
        summary = f"{total} in vain, by {len(in_vain):,} of {count(len(refused), 'refused call')}"
        first, waits = in_vain[0]
        return violated(summary, [first, *waits], *rows)
    if not refused:
        return inconclusive(f"no call was refused, {count(len(history.where('call')), 'call')}")
    return Finding("HELD", f"{count(len(refused), 'call')} refused, none waited")
