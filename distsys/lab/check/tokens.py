"""Checks of fencing: do the tokens grow, and is a stale write refused?"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from operator import attrgetter

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count

Pairs = list[tuple[Op, Op]]
_token = attrgetter("token")


def _token_order_violations(ops: list[Op]) -> Pairs:
    """Return the pairs (newer, older) whose older token was sent after an op with the newer one had succeeded."""
    done = deque(sorted((op for op in ops if op.status == "ok" and op.returned is not None), key=lambda op: op.end))
    found: Pairs = []
    newest: Op | None = None
    for op in sorted(ops, key=lambda op: op.called):
        while done and done[0].precedes(op):
            newest = max(filter(None, (newest, done.popleft())), key=_token)
        if newest is not None and _token(newest) > _token(op):
            found.append((newest, op))
    return found


def _violated(history: History, pairs: Pairs, summary: str, relation: str = "after") -> Finding:
    rows = [(history.at(b.end), history.who(b), f"{relation} {history.who(a)}") for a, b in pairs]
    return violated(summary, pairs[0], *rows)


def monotonic_tokens(history: History) -> Finding:
    """Check that each grant has a newer token than every earlier grant, and that no accepted write has an older one."""
    grants = [op for op in history.where("acquire", status="ok") if op.token is not None]
    writes = [op for op in history.where("write", status="ok") if op.token is not None]
    total = count(len(grants), "token")
    if same := [(a, b) for a, b in pairwise(sorted(grants, key=_token)) if a.token == b.token]:
        twice = f"{count(len(same), 'token')} handed out twice, {len(grants):,} in all"
        return _violated(history, same, twice, "same as")
    if older := _token_order_violations(grants):
        return _violated(history, older, f"{len(older):,} of {total} older than the last")
    if stale := _token_order_violations(writes):
        return _violated(history, stale, f"{len(stale):,} of {count(len(writes), 'write')} under an old token")
    if len({op.process for op in grants}) < 2:
        return inconclusive(f"fewer than two processes were given a token, {total}")
    return Finding("HELD", f"{total}, each newer than the last")


def no_stale_write(history: History) -> Finding:
    """Check that after a write under a newer token, every write under an older one is refused."""
    stale = _token_order_violations([op for op in history.where("write") if op.token is not None])
    if accepted := [(a, b) for a, b in stale if b.status == "ok"]:
        return _violated(history, accepted, f"{count(len(accepted), 'stale write')} accepted, {len(stale):,} tried")
    if refused := [b for _, b in stale if b.status == "fail"]:
        return Finding("HELD", f"{count(len(refused), 'stale write')} refused")
    return inconclusive("no write came under an older token than one before it")
