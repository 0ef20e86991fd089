"""What checks, story and timeline read out of a history: who held, who waited, who was kept from running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar

from distsys.lab.history.history import History, Op

T = TypeVar("T")
RECOVERIES = ("resumed", "released", "restarted", "healed")  # "faults" that end one


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one process's time: holding the lock, or busy with something else."""

    process: str
    start: float
    end: float
    op: Op
    lease_end: float | None = None  # when the server may forget the holder, if the history says so


def once_per_history(read: Callable[[History], T]) -> Callable[[History], T]:
    """Keep what was read beside the history: one picture asks for the holds fifteen times."""

    @wraps(read)
    def kept(history: History) -> T:
        known = vars(history)
        if read.__name__ not in known:
            known[read.__name__] = read(history)
        found: T = known[read.__name__]
        return found

    return kept


@once_per_history
def holds(history: History) -> list[Span]:
    """Who believed to hold the lock, and when: from the grant's arrival until the holder lets go, or is killed.

    A stopped process goes on holding: nobody told it. But one that, once it runs again, does nothing but learn from
    its release that it lost the lock held until it was stopped. An "acquire" may say {"ttl": 2.0}.
    """
    found = []
    for process in dict.fromkeys(op.process for op in history):
        ops = history.where(process=process)
        for i, op in enumerate(ops):
            if op.name == "acquire" and op.status == "ok":
                found.append(_hold(history, op, ops[i:]))
    return sorted(found, key=lambda span: span.start)


def _hold(history: History, op: Op, ops: list[Op]) -> Span:
    """The hold that begins with the first of these ops of its process."""
    faults = [f for f in history.faults if is_of(op.process, f.target)]
    end = min((f.at for f in faults if f.kind == "killed" and f.at >= op.end), default=history.end)
    for before, later in pairwise(ops):
        if later.called >= end:
            break
        if later.called >= op.end and later.name == "acquire" and later.status == "ok":
            end = later.end
            break
        if later.called >= op.end and later.name == "release":
            end = later.called
            if later.status != "ok":
                end = min((f.at for f in faults if f.kind == "stopped" and before.end <= f.at < end), default=end)
            break
    ttl = said(op, "ttl")
    return Span(op.process, op.end, max(end, op.end), op, None if ttl is None else op.end + ttl)


def meetings(spans: Iterable[Span]) -> Iterator[tuple[Span, Span]]:
    """Pairs (earlier, later) of different processes that overlap in time."""
    active: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        active = [other for other in active if other.end > span.start]
        yield from ((other, span) for other in active if other.process != span.process)
        active.append(span)


@once_per_history
def conflicts(history: History) -> list[tuple[Span, Span]]:
    """Pairs of holders at once."""
    return list(meetings(holds(history)))


@once_per_history
def expired(history: History) -> list[Span]:
    """The holds that outlived their lease, evidently: another was granted the lock after it, or the holder was dead.

    The end by the clock alone would be no evidence: a renewal that nobody recorded may have moved it.
    """
    taken = [a for a, b in conflicts(history) if a.lease_end is not None and b.start >= a.lease_end]
    dead = [f for f in history.faults if f.kind == "killed"]
    held = holds(history)
    left = [h for h in held if any(is_of(h.process, f.target) and f.at == h.end for f in dead)]
    last = max((h.start for h in held), default=0.0)
    return [*taken, *(h for h in left if h.lease_end is not None and h.end < h.lease_end <= last)]


@once_per_history
def waits(history: History) -> list[Op]:
    """The acquisitions asked for while another process held the lock: where there are none, no lock was tested."""

    def met(op: Op, hold: Span) -> bool:
        return hold.process != op.process and hold.start < history.until(op) and op.called < hold.end

    held = holds(history)
    return [op for op in history.where("acquire") if any(met(op, hold) for hold in held)]


@once_per_history
def pauses(history: History) -> list[tuple[str, str, float, float]]:
    """(process, "stopped" or "held", from, to): each interval in which a worker was kept from running."""
    found = []
    for f in history.faults:
        if ending := {"stopped": "resumed", "held": "released"}.get(f.kind):
            after = [
                g for g in history.faults if g.at >= f.at and g.target == f.target and g.kind in (ending, "killed")
            ]
            found.append((f.target, f.kind, f.at, min((g.at for g in after), default=history.end)))
    return found


def is_of(process: str, target: str) -> bool:
    """A fault hits a process and with it every task in it ("w1" and "w1.a")."""
    return process == target or process.startswith(target + ".")


def said(op: Op, key: str) -> Any:
    return op.value.get(key) if isinstance(op.value, dict) else None
