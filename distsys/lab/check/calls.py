"""What a breaker, retry or bulkhead lets through: how much is sent, who is answered, and who waits in vain."""

from __future__ import annotations

import math

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Check, Finding, History, Op
from distsys.lab.history.spans import RECOVERIES
from distsys.lab.history.words import count, error, what


def at_most_sent(most: int, *, per_call: bool = False, name: str = "request") -> Check:
    """From the last fault until it is over at most so many requests are sent, all together or for each call."""

    def check(history: History) -> Finding:
        begin = max((f.at for f in history.faults if f.kind not in RECOVERIES), default=history.started)
        over = min((f.at for f in history.faults if f.kind in RECOVERIES and f.at >= begin), default=math.inf)
        asked = [op for op in history.where("call") if begin <= op.called < over]
        sent = [op for op in history.where(name) if op.returned is not None and begin <= op.called < over]
        allowed = most * len(asked) if per_call else most
        total = f"{count(len(sent), 'request')} for {count(len(asked), 'call')}, allowed: {allowed:,}"
        if len(sent) > allowed:
            when = f"{history.at(sent[0].called, '')}-{history.at(sent[-1].end)}"
            row = (when, sent[-1].process, f"{count(len(sent), 'request')}, {len(sent) - allowed:,} too many")
            return Finding("VIOLATED", total, _in_time(sent), (row,))
        if all(op.status == "ok" for op in asked) if per_call else len(asked) <= most:
            return _unclear(f"nothing had to be held back, {total}")
        return Finding("HELD", total)

    return check


def answered(history: History, process: str = "", name: str = "call") -> Finding:
    """Whoever calls after the last fault, or after its end, is answered; `process` looks at the calls of one alone."""
    last = max((f for f in history.faults if f.kind != "held"), key=lambda f: f.at, default=None)
    begin, since = (last.at, f" after {what(last)}") if last else (history.started, "")
    asked = [op for op in history.where(name, process=process or None) if op.called >= begin]
    if failed := [op for op in asked if op.status != "ok"]:
        rows = [(history.at(op.end), op.process, error(op)) for op in failed]
        summary = f"{len(failed):,} of {count(len(asked), 'call')} not answered{since}: {rows[0][2]}"
        return Finding("VIOLATED", summary, _in_time(failed), tuple(rows))
    if not asked:
        return _unclear(f"nobody called{since}")
    return Finding("HELD", f"{count(len(asked), 'call')} answered{since}")


def refused_at_once(history: History) -> Finding:
    """A call for which nothing is sent waits for nothing."""

    def inside(call: Op, name: str) -> list[Op]:
        end = history.until(call)
        return [op for op in history.where(name, process=call.process) if call.called <= op.called < end]

    refused = [op for op in history.where("call") if op.status != "ok" and not inside(op, "request")]
    vain = [(call, waits) for call in refused if (waits := inside(call, "wait"))]
    if vain:
        rows = [(history.at(call.end), call.process, f"refused after {count(len(w), 'wait')}") for call, w in vain]
        total = sum(len(waits) for _, waits in vain)
        summary = f"{count(total, 'wait')} in vain, by {len(vain):,} of {count(len(refused), 'refused call')}"
        return Finding("VIOLATED", summary, _in_time([vain[0][0], *vain[0][1]]), tuple(rows))
    if not refused:
        return _unclear(f"no call was refused, {count(len(history.where('call')), 'call')}")
    return Finding("HELD", f"{count(len(refused), 'call')} refused, none waited")
