"""Checks of idempotency: does each intent take effect exactly once, and does every caller get its own answer?"""

from __future__ import annotations

from collections import Counter, defaultdict

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count, error_text


def exactly_once(history: History) -> Finding:
    """Check that each key with a successful "request" was applied once, however often it was requested, or who died.

    The key is the value of an op. facts["applied"] = {key: times}, as read from the store at the end, replaces the
    count of the "apply" ops.
    """
    stored = history.facts.get("applied")
    recorded = Counter(str(op.value) for op in history.where("apply", status="ok"))
    applied = recorded if stored is None else Counter({str(key): int(times) for key, times in stored.items()})
    perhaps = Counter(str(op.value) for op in history.where("apply", status="info") if stored is None)
    requests: dict[str, list[Op]] = {key: [] for key in applied}
    for op in history.where("request"):
        requests.setdefault(str(op.value), []).append(op)
    rows = []
    for key, ops in requests.items():
        least, most = any(op.status == "ok" for op in ops), any(op.status != "fail" for op in ops)
        if applied[key] > most or applied[key] + perhaps[key] < least:
            wanted = f"should be {most:d}" if least == most else "should be 0 or 1"
            when = history.at(ops[0].called) if ops else ""
            rows.append((when, key, f"applied {count(applied[key], 'time')}, {wanted}"))
    if rows:
        summary = f"{len(rows):,} of {count(len(requests), 'key')} not applied exactly once: {rows[0][1]} {rows[0][2]}"
        witness = [op for op in history if op.name in ("request", "apply") and str(op.value) == rows[0][1]]
        return violated(summary, witness, *rows)
    repeated = sum(len(ops) > 1 for ops in requests.values())
    lost = sum(len(ops) == 1 and ops[0].status == "info" and applied[key] > 0 for key, ops in requests.items())
    if not (repeated or lost or any(fault.kind == "killed" for fault in history.faults)):
        requested = count(len(history.where("request")), "request")
        return inconclusive(f"no request was repeated and nobody was killed, {requested}")
    unknown = f", {lost:,} without an answer" if lost else ""
    keys = count(len(requests), "key")
    return Finding("HELD", f"{keys} applied as asked, {repeated:,} asked for more than once{unknown}")


def somebody_answered(history: History) -> Finding:
    """Check that at least one caller got an answer: an endpoint that never answers does nothing twice."""
    if told := history.where("told"):
        return Finding("HELD", count(len(told), "answer"))
    failed = [error_text(op) for op in history.where("request") if op.status != "ok"]
    return inconclusive(f"nobody was answered: {failed[0] if failed else 'nobody asked'}")


def right_answers(history: History) -> Finding:
    """Check that every answer is about what its caller asked for, not about what another did with the same key."""
    told = [(op, *_parts(op)) for op in history.where("told")]
    wrong = [(op, asked, answer) for op, _, asked, answer in told if not answer.startswith(asked)]
    if wrong:
        texts = [f"asked for {asked}, was told: {answer}" for _, asked, answer in wrong]
        rows = [(history.at(op.end), op.process, text) for (op, *_), text in zip(wrong, texts, strict=True)]
        return violated(f"{count(len(wrong), 'wrong answer')}: {rows[0][2]}", [op for op, *_ in wrong], *rows)
    if not told:
        return somebody_answered(history)
    requests = count(len(asked := history.where("request")), "request")
    if len(asked) < 2:
        return inconclusive(f"only {requests}")
    return Finding("HELD", f"{count(len(told), 'answer')} to {requests}, none of them another's")


def one_answer(history: History) -> Finding:
    """Check that all attempts at an intent get the same answer."""
    told: dict[str, list[tuple[Op, str]]] = defaultdict(list)
    for op in history.where("told"):
        intent, _, answer = _parts(op)
        told[intent].append((op, answer))
    for intent, answers in told.items():
        if (ways := len({answer for _, answer in answers})) > 1:
            rows = [(history.at(op.end), op.process, answer) for op, answer in answers]
            return violated(f"{intent} was answered in {ways} ways", [op for op, _ in answers], *rows)
    if not any(len(answers) > 1 for answers in told.values()):
        return inconclusive("no intent was answered twice")
    return Finding("HELD", f"{count(len(told), 'intent')}, one answer each, {sum(map(len, told.values()))} times")


def _parts(op: Op) -> tuple[str, str, str]:
    """Return (intent, what was asked for, the answer) of a "told" op."""
    intent, _, rest = str(op.value).partition(": ")
    asked, _, answer = rest.partition(" → ")
    return intent, asked, answer
