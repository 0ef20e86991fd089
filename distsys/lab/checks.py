"""What a history shows: each check is a pure function History -> Finding; HELD takes a sign that danger was reached.

Only what certainly happened breaks a promise: an "info" op may or may not have happened, so it widens a bound and never
makes a counterexample; a "fail" did not happen. Rows of `Finding.violations` are (when, who, what).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

from distsys.lab.history import Check, Finding, History, Op
from distsys.lab.spans import RECOVERIES, Span, conflicts, count, holds, is_of, lasting, meetings, said, waits
from distsys.lab.story import error, what

Pairs = list[tuple[Op, Op]]
_token = attrgetter("token")
TINY = 1e-6  # of a token: what sums of times may be off by


def _unclear(why: str) -> Finding:
    return Finding("INCONCLUSIVE", why)


def _in_time(ops: Iterable[Op | None]) -> tuple[Op, ...]:
    return tuple(sorted({id(op): op for op in ops if op}.values(), key=lambda op: op.called))


def all_of(*checks: Check) -> Check:
    """Every promise at once: the first one broken is reported, or else the first one not put to the test."""

    def check(history: History) -> Finding:
        findings = [c(history) for c in checks]
        first = {f.status: f for f in reversed(findings)}
        held = Finding("HELD", "; ".join(f.summary for f in findings))
        return first.get("VIOLATED") or first.get("INCONCLUSIVE") or held

    return check


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


def _older(ops: list[Op]) -> Pairs:
    """(newer, older): an older token certainly came after a newer one, which was in before the older one was sent."""
    done = deque(sorted((op for op in ops if op.status == "ok" and op.returned is not None), key=lambda op: op.end))
    found: Pairs = []
    newest: Op | None = None
    for op in sorted(ops, key=lambda op: op.called):
        while done and done[0].end <= op.called:
            newest = max(filter(None, (newest, done.popleft())), key=_token)
        if newest is not None and _token(newest) > _token(op):
            found.append((newest, op))
    return found


def _broken(history: History, pairs: Pairs, summary: str, what: str) -> Finding:
    rows = [(history.at(b.end), history.who(b), f"{what} {history.who(a)}") for a, b in pairs]
    return Finding("VIOLATED", summary, _in_time(pairs[0]), tuple(rows))


def monotonic_tokens(history: History) -> Finding:
    """Each grant's token is newer than all earlier ones, and no write is accepted under an older one than the last."""
    grants = [op for op in history.where("acquire", status="ok") if op.token is not None]
    writes = [op for op in history.where("write", status="ok") if op.token is not None]
    if same := [(a, b) for a, b in pairwise(sorted(grants, key=_token)) if a.token == b.token]:
        twice = f"{count(len(same), 'token')} handed out twice, {len(grants):,} in all"
        return _broken(history, same, twice, "same as")
    if back := _older(grants):
        return _broken(history, back, f"{len(back):,} of {count(len(grants), 'token')} older than the last", "after")
    if late := _older(writes):
        return _broken(history, late, f"{len(late):,} of {count(len(writes), 'write')} under an old token", "after")
    if len({op.process for op in grants}) < 2:
        return _unclear(f"fewer than two processes were given a token, {count(len(grants), 'token')}")
    return Finding("HELD", f"{count(len(grants), 'token')}, each newer than the last")


def no_stale_write(history: History) -> Finding:
    """Once a write under a newer token is in, one under an older token is refused; INCONCLUSIVE if nobody tried."""
    tries = _older([op for op in history.where("write") if op.token is not None])
    if late := [(a, b) for a, b in tries if b.status == "ok"]:
        return _broken(history, late, f"{count(len(late), 'stale write')} accepted, {len(tries):,} tried", "after")
    if refused := [b for _, b in tries if b.status == "fail"]:
        return Finding("HELD", f"{count(len(refused), 'stale write')} refused")
    return _unclear("no write came under an older token than one before it")


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


def exactly_once(history: History) -> Finding:
    """Each key (an op's value) that was "request"ed with success is "apply"-ed once, however often it was asked for.

    facts["applied"] = {key: times}, as the store has it at the end, replaces counting the "apply" ops.
    """
    stored = history.facts.get("applied")
    sure = Counter(str(op.value) for op in history.where("apply", status="ok"))
    done = sure if stored is None else Counter({str(key): int(times) for key, times in stored.items()})
    maybe = Counter(str(op.value) for op in history.where("apply", status="info") if stored is None)
    asked: dict[str, list[Op]] = {key: [] for key in done}
    for op in history.where("request"):
        asked.setdefault(str(op.value), []).append(op)
    rows, first = [], None
    for key, ops in asked.items():
        least, most = any(op.status == "ok" for op in ops), any(op.status != "fail" for op in ops)
        if done[key] > most or done[key] + maybe[key] < least:
            should = f"should be {most:d}" if least == most else "should be 0 or 1"
            when = history.at(ops[0].called) if ops else ""
            rows.append((when, key, f"applied {count(done[key], 'time')}, {should}"))
            first = first or _in_time(op for op in history if op.name in ("request", "apply") and str(op.value) == key)
    if rows:
        summary = f"{len(rows):,} of {count(len(asked), 'key')} not applied exactly once: {rows[0][1]} {rows[0][2]}"
        return Finding("VIOLATED", summary, first or (), tuple(rows))
    again = sum(len(ops) > 1 for ops in asked.values())
    lost = sum(len(ops) == 1 and ops[0].status == "info" and done[key] > 0 for key, ops in asked.items())
    if not (again or lost):
        return _unclear(f"no request was repeated, {count(len(history.where('request')), 'request')}")
    unknown = f", {lost:,} without an answer" if lost else ""
    return Finding("HELD", f"{count(len(asked), 'key')} applied as asked, {again:,} asked for more than once{unknown}")


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
                before = [one for one in passed if one.end <= op.called and any(a.same(one, op) for a in allowances)]
                room = " and ".join(allowed.room(left, op) for allowed, left, _ in found)
                rows.append((history.at(op.end), op.process, f"refused with {room}"))
                counted = [one for *_, ops in found for one in ops]
                first = first or _in_time([op, *before[-math.ceil(allowances[0].tokens) :], *counted])
        if rows:
            summary = f"{len(rows):,} of {count(len(refused), 'refusal')} needless: {rows[0][1]} was {rows[0][2]}"
            return Finding("VIOLATED", summary, first, tuple(rows))
        again = [op for op in passed if op.status == "ok" and any(op.called >= no.end for no in refused)]
        if not again:
            return _unclear(f"nobody was admitted after a refusal, {count(len(refused), 'refusal')}")
        none = f"{count(len(refused), 'refusal')}, none while there was room"
        return Finding("HELD", f"{none}; {len(again):,} admitted later")

    return check


def linearizable_register(history: History, *, bound: int = 1_000_000) -> Finding:
    """Each read and write takes place at one moment between its call and its return (Wing and Gong 1993).

    The search for such an order is exponential at worst: after `bound` steps it gives up as INCONCLUSIVE.
    """
    ops = [op for op in history if op.name in ("read", "write") and op.status != "fail"]
    ops = [op for op in ops if op.status == "ok" or op.name == "write"]
    ops.sort(key=lambda op: op.called)
    must, total = {i for i, op in enumerate(ops) if op.status == "ok"}, count(len(ops), "operation")
    if len({op.process for op in ops}) < 2 or len({op.name for op in ops}) < 2:
        return _unclear(f"not two processes that read and write, {total}")
    todo: list[tuple[frozenset[int], str, Op | None]]
    todo = [(frozenset(), repr(history.facts.get("initial")), None)]  # ops placed, the value, the write it is from
    seen, deepest, steps = {todo[0][:2]}, todo[0], 0
    while todo:
        placed, value, source = state = todo.pop()
        open_ = [i for i in range(len(ops)) if i not in placed]
        steps += len(ops)
        if must <= placed:
            return Finding("HELD", f"an order explains all of {total}")
        if steps > bound:
            return _unclear(f"search given up after {bound:,} steps, {total}")
        deepest = max(deepest, state, key=lambda s: len(s[0]))
        horizon = min(ops[i].end for i in open_ if i in must)  # what was called later cannot come first
        for i in reversed(open_):
            op = ops[i]
            if op.called <= horizon and (op.name == "write" or repr(op.value) == value):
                then = (placed | {i}, repr(op.value), op if op.name == "write" else source)
                if then[:2] not in seen:
                    seen.add(then[:2])
                    todo.append(then)
    stuck = min((ops[i] for i in must - deepest[0]), key=lambda op: op.end)
    summary = f"{stuck.process}'s {stuck.name} of {stuck.value!r} fits no order of {total}"
    row = (history.at(stuck.called), stuck.process, f"{stuck.name} {stuck.value!r}, the value was {deepest[1]}")
    return Finding("VIOLATED", summary, _in_time([deepest[2], stuck]), (row,))
