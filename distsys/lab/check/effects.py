"""Does each intent take effect exactly once, and is every caller told what it asked for?"""

from __future__ import annotations

from collections import Counter

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count, error


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


def somebody_answered(history: History) -> Finding:
    """An endpoint that never answers does nothing twice; that proves nothing."""
    if told := history.where("told"):
        return Finding("HELD", count(len(told), "answer"))
    failed = [error(op) for op in history.where("request") if op.status != "ok"]
    return Finding("INCONCLUSIVE", f"nobody was answered: {failed[0] if failed else 'nobody asked'}")


def right_answers(history: History) -> Finding:
    """Who asks is told of what it asked, not of what another did with the same key."""
    told = [(op, *_parts(op)) for op in history.where("told")]
    wrong = [(op, asked, got) for op, _, asked, got in told if not got.startswith(asked)]
    if wrong:
        rows = [(history.at(op.end), op.process, f"asked for {asked}, was told: {got}") for op, asked, got in wrong]
        summary = f"{count(len(wrong), 'wrong answer')}: {rows[0][2]}"
        return Finding("VIOLATED", summary, tuple(op for op, *_ in wrong), tuple(rows))
    if not told:
        return somebody_answered(history)
    if len(asked := history.where("request")) < 2:
        return Finding("INCONCLUSIVE", f"only {count(len(asked), 'request')}")
    return Finding("HELD", f"{count(len(told), 'answer')} to {count(len(asked), 'request')}, none of them another's")


def one_answer(history: History) -> Finding:
    """All attempts at an intent are told the same."""
    told: dict[str, list[tuple[Op, str]]] = {}
    for op in history.where("told"):
        intent, _, got = _parts(op)
        told.setdefault(intent, []).append((op, got))
    for intent, answers in told.items():
        if (ways := len({got for _, got in answers})) > 1:
            rows = tuple((history.at(op.end), op.process, got) for op, got in answers)
            return Finding("VIOLATED", f"{intent} was answered in {ways} ways", tuple(op for op, _ in answers), rows)
    if not any(len(answers) > 1 for answers in told.values()):
        return Finding("INCONCLUSIVE", "no intent was answered twice")
    return Finding("HELD", f"{count(len(told), 'intent')}, one answer each, {sum(map(len, told.values()))} times")


def _parts(op: Op) -> tuple[str, str, str]:
    """The intent, what was asked, what was told."""
    intent, _, rest = str(op.value).partition(": ")
    asked, _, got = rest.partition(" → ")
    return intent, asked, got
