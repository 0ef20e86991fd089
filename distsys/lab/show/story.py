"""The story: three to five sentences computed from a history, about the counterexample or about what was survived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from distsys.lab.history.history import Fault, Finding, History, Op
from distsys.lab.history.spans import RECOVERIES, Span, conflicts, expired, holds, is_task_of, pauses, waits
from distsys.lab.history.words import FAULT_WORDS, count, duration_text, error_text, fault_text, refusal_text

MAX_SENTENCES = 5


def story(history: History, finding: Finding) -> list[str]:
    """Return up to five sentences, in the order of time: first of the counterexample, then of the run as a whole."""
    acts = _counterexample(history, finding) if finding.status == "VIOLATED" else ()
    best = sorted(acts, key=lambda act: (act[1], act[0]))[:MAX_SENTENCES]
    told = [sentence for *_, sentence in sorted(best)]
    more = _overview(history, finding) if len(told) < 3 else ()
    beginnings = tuple(text.rstrip(".").partition(",")[0] for text in told)
    return [*told, *(text for text in more if not text.startswith(beginnings))][:MAX_SENTENCES]


def involved(history: History, finding: Finding) -> list[Span]:
    """Return the holds in which the counterexample took place, at most three."""
    found = []
    for hold in holds(history):
        own = [op for op in finding.witness if op.process == hold.process]
        if any(op == hold.op or hold.start <= op.called < hold.end for op in own):
            found.append(hold)
    return found[:3]


def key_ops(history: History, finding: Finding) -> tuple[list[Op], list[Op]]:
    """Return the writes that the picture and the story show, and the release that may have let the second holder in.

    The writes are those of the counterexample, or else the last two of the processes that held at the same time. The
    release is by a third process, inside the first hold and before the second.
    """
    writes, spans = [op for op in finding.witness if op.name == "write"], involved(history, finding)
    if len(spans) < 2 or finding.status != "VIOLATED":
        return writes, []
    first, second = spans[:2]
    others = [op for op in history.where("release") if op.process not in (first.process, second.process)]
    late = [op for op in others if first.start < op.end < second.start][-1:]
    both = max(span.start for span in spans)
    done = [op for op in history.where("write") if op.status != "fail" and op.end >= both]
    inside = [op for op in done if any(op.process == s.process and s.start <= op.called < s.end for s in spans)]
    return writes or sorted(inside, key=lambda op: op.end)[-2:], late


def _counterexample(history: History, finding: Finding) -> Iterator[tuple[float, int, str]]:
    """Yield (when, rank, sentence) of what led to the counterexample; the lowest ranks are kept."""
    at, spans, witness = history.at, involved(history, finding), finding.witness
    processes, overlaps, late = {op.process for op in witness}, conflicts(history), expired(history)
    times = [t for op in witness for t in (op.called, history.until(op))] + [hold.start for hold in spans]
    begin, until = min(times, default=history.started), max(times, default=history.end)
    for hold in spans:
        label = history.label(hold.op)
        token = f" ({'token ' if hold is spans[0] else ''}{label})" if label else ""
        other = next((a.process for a, b in overlaps if b == hold), None)
        still = f" while {other} still held the lock" if other else ""
        yield hold.start, 0, f"t={at(hold.start)}: {hold.process} acquired{token}{still}."
        if hold.lease_end is not None and hold in late:
            during = [p for p in pauses(history) if is_task_of(hold.process, p[0]) and p[2] <= hold.lease_end < p[3]]
            why = f" while it was {FAULT_WORDS[during[0][1]]}" if during else ""
            yield hold.lease_end, 0, f"{hold.process}'s lease ended at {at(hold.lease_end)}{why}."
    for target, kind, a, b in pauses(history):
        if any(is_task_of(process, target) for process in processes) and a <= until and b >= begin:
            yield a, 2, f"{target} was {FAULT_WORDS[kind]} at {at(a)}, for {duration_text(b - a)}."
    for age, fault in enumerate(reversed([f for f in _other_faults(history) if f.at <= until])):
        yield fault.at, 1 + age, f"t={at(fault.at)}: {fault_text(fault)}."
    for process, status in dict.fromkeys((op.process, op.status) for op in witness if op.name == "admit"):
        row = [op for op in witness if (op.name, op.process, op.status) == ("admit", process, status)]
        first, last = at(row[0].called, ""), at(row[-1].end)
        if status == "fail":
            yield row[-1].end, 0, f"{process} was {refusal_text(finding)} at {last}."
        else:
            when = f"at {last}" if last.startswith(first) else f"from {first} to {last}"
            yield row[0].called, 1, f"{process} was admitted {count(len(row), 'time')} {when}."
    for op in witness:
        if op.name == "read":
            yield op.end, 3, f"{op.process} read {op.value!r} at {at(op.end)}."
        elif op.name == "acquire" and op.status != "ok":
            end, outcome = history.until(op), "was refused" if op.status == "fail" else "still had no answer"
            yield end, 0, f"{op.process} asked at {at(op.called)} and {outcome} at {at(end)}."
        elif op.name == "apply":
            yield op.end, 0, f"{op.process} carried out {op.value} at {at(op.end)}."
        elif op.name == "told":
            yield op.end, 0, f"{op.process} answered {op.value}."
    writes, releases = key_ops(history, finding)
    done = [op for op in history.where("write") if op.status != "fail"]
    for op in writes:
        before = [w for w in done if w.process != op.process and w.end < op.end]
        lapsed = any(s.process == op.process and s.lease_end is not None and s.lease_end < op.called for s in spans)
        text = f"{op.process} {'still ' if lapsed else ''}wrote {op.value!r} at {at(op.end)}"
        if before and op is writes[-1] and len(writes) > 1:
            over = before[-1]
            newer = over.token is not None and op.token is not None and op.token < over.token
            text += f", over {over.process}'s {over.value!r}{' and its newer token' if newer else ''}"
            seen = [r.end for r in history.where("read", process=op.process, status="ok") if r.end <= op.called]
            text += ": one update is lost" if seen and seen[-1] <= over.called else ""
        yield op.end, 0, text + ("." if op.status == "ok" else ", perhaps.")
    for op in releases:
        yield op.end, 0, f"{op.process}'s release came at {at(op.end)}, while {spans[0].process} held."
    for hold, other_hold in overlaps[:1]:
        if hold.op in witness and other_hold.op in witness:
            end = min(hold.end, other_hold.end)
            yield end, 3, f"For {duration_text(end - other_hold.start)}, until {at(end)}, both were inside."


def _tally(asked: list[Op], history: History) -> str:
    """Return the admissions of each process: "w1 was admitted 10 of 12 times, last at 0.90 s; w2 0 of 12." """
    told = []
    for process in sorted({op.process for op in asked})[:MAX_SENTENCES]:
        own = history.where("admit", process=process)
        passed = [op for op in own if op.status == "ok"]
        last = f", last at {history.at(passed[-1].end)}" if passed else ""
        told.append(f"{process} {len(passed):,} of {count(len(own), 'time')}{last}")
    return "; ".join(told).replace(" ", " was admitted ", 1) + "."


def _calls(history: History) -> Iterator[str]:
    """Yield the calls of each process by outcome: "w1 called 15 times: 5 failed (TimeoutError), 10 refused." """

    def outcome(op: Op) -> str:
        if op.status == "info":
            return "never answered" if op.returned is None else f"failed ({error_text(op)})"
        return "answered" if op.status == "ok" else "refused"

    for process in list(dict.fromkeys(op.process for op in history.where("call")))[:MAX_SENTENCES]:
        own = history.where("call", process=process)
        ends = ", ".join(f"{n:,} {text}" for text, n in Counter(map(outcome, own)).items())
        longest = duration_text(max(history.until(op) - op.called for op in own))
        yield f"{process} called {count(len(own), 'time')}, for{' up to' * (len(own) > 1)} {longest}: {ends}."
    sent, arrived, done = (len(history.where(name)) for name in ("request", "arrive", "apply"))
    waited = f"; {count(len(slept), 'wait')} in between" if (slept := history.where("wait")) else ""
    if sent:
        yield f"{count(sent, 'request')} sent: {arrived:,} arrived, {done:,} took effect{waited}."


def _other_faults(history: History) -> list[Fault]:
    """Return the faults that are neither pauses nor recoveries."""
    return [f for f in history.faults if f.kind not in (*RECOVERIES, "stopped", "held")]


def _overview(history: History, finding: Finding) -> Iterator[str]:
    """Yield sentences about the run as a whole: the load, the faults, and what came of them."""
    at, held, asked, met = history.at, holds(history), history.where("acquire"), waits(history)
    if finding.status == "INCONCLUSIVE":
        yield "The danger was not reached, so this shows nothing either way."
    if held:
        who = count(len({hold.process for hold in held}), "process", "processes")
        alone = ", never two at once" if len(held) > 1 and not conflicts(history) else ""
        others = f"; {len(met):,} of {count(len(asked), 'request')} came while another held" if met else ""
        yield f"{who} acquired {count(len(held), 'time')}{alone}{others}."
    elif asked:
        yield f"Nobody acquired, {len({op.process for op in asked}):,} tried."
    elif history.where("call"):
        yield from _calls(history)
    else:
        by = {status: sum(op.status == status for op in history) for status in ("ok", "fail", "info")}
        text = f"{count(len(history.ops), 'operation')} by {count(len(history.processes), 'process', 'processes')}"
        if asked := history.where("admit"):
            unknown = f", {by['info']:,} of unknown outcome" if by["info"] else ""
            text = text.replace("operation", "request")
            yield f"{text}: {by['ok']:,} admitted, {by['fail']:,} refused{unknown}."
            if finding.status != "VIOLATED" or any(op.status == "fail" for op in finding.witness):
                yield _tally(asked, history)
        else:
            yield f"{text}: {by['ok']:,} done, {by['fail']:,} refused, {by['info']:,} of unknown outcome."
    times = [(any(is_task_of(h.process, p[0]) and h.start <= p[2] <= h.end for h in held), *p) for p in pauses(history)]
    for inside, process, kind, a, b in sorted(times, key=lambda k: (not k[0], k[3] - k[4]))[:2]:
        lock = " while it held the lock" if inside else ""
        yield f"{process} was {FAULT_WORDS[kind]} at {at(a)} for {duration_text(b - a)}{lock}{_next(held, a)}."
    ends = {hold.end: hold.lease_end for hold in expired(history)}
    for fault in _other_faults(history)[:2]:
        lease = ends.get(fault.at) if fault.kind == "killed" else None
        until = "" if lease is None else f", its lease ran until {at(lease)}"
        yield f"t={at(fault.at)}: {fault_text(fault)}{until}{_next(held, fault.at)}."
    for op in history.where("write", status="fail")[:1]:
        token = f" under {history.label(op)}" if op.token is not None else ""
        yield f"{op.process}'s write of {op.value!r}{token} was refused at {at(op.end)}."
    if "final" in history.facts and (sure := history.where("write", status="ok")):
        first, last = history.facts.get("initial", 0), history.facts["final"]
        yield f"The counter went from {first!r} to {last!r} in {count(len(sure), 'write')}."
    if answered := [op for op in met if op.returned is not None]:
        slow = max(answered, key=lambda op: op.end - op.called)
        yield f"The longest wait was {slow.process}'s, {duration_text(slow.end - slow.called)}."


def _next(held: list[Span], t: float) -> str:
    """Return who acquired first after a moment, and how much later; empty if nobody did."""
    after = next((h for h in held if h.start > t), None)
    return f"; {after.process} acquired {duration_text(after.start - t)} later" if after else ""
