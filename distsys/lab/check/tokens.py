"""Do fencing tokens grow, and is a stale write refused?"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from operator import attrgetter

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count

Pairs = list[tuple[Op, Op]]


_token = attrgetter("token")


def _older(ops: list[Op]) -> Pairs:
    """(newer, older): an older token certainly came after a newer one, which was in before the older one was sent."""
    done = deque(sorted((op for op in ops if op.status == "ok" and op.returned is not None), key=lambda op: op.end))
    found: Pairs = []
    newest: Op | None = None
    for op in sorted(ops, key=lambda op: op.called):
        while done and done[0].precedes(op):
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
