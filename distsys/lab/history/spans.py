"""Intervals that checks, story and timeline derive from a history: holds, conflicts, waits, pauses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from distsys.lab.history.history import History, Op

once_per_history = lru_cache(maxsize=8)  # one picture asks for the holds fifteen times
RECOVERIES = ("resumed", "released", "restarted", "healed")  # "faults" that end one


@dataclass(frozen=True, slots=True)
class Span:
    """An interval in which one process held the lock, or did something else."""

    process: str
    start: float
    end: float
    op: Op
    lease_end: float | None = None  # when the server may drop the grant, if the history records a TTL


@once_per_history
def holds(history: History) -> list[Span]:
    """Return when each process believed that it held the lock: from the grant to its release, or until it was killed.

    A stopped process goes on holding, because it cannot know that its lease ended. If its first act after the stop is
    a release that reports the loss, then it held only until the stop. The value of an "acquire" may be {"ttl": 2.0}.
    """
    found = []
    for process in dict.fromkeys(op.process for op in history):
        ops = history.where(process=process)
        for i, op in enumerate(ops):
            if op.name == "acquire" and op.status == "ok":
                found.append(_hold(history, op, ops[i:]))
    return sorted(found, key=lambda span: span.start)


def _hold(history: History, op: Op, ops: list[Op]) -> Span:
    """Return the hold that the first of these ops begins; `ops` are all later ones of the same process."""
    faults = [f for f in history.faults if is_task_of(op.process, f.target)]
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
    ttl = op.get("ttl")
    return Span(op.process, op.end, max(end, op.end), op, None if ttl is None else op.end + ttl)


def meetings(spans: Iterable[Span]) -> Iterator[tuple[Span, Span]]:
    """Yield the pairs (earlier, later) of spans of different processes that overlap in time."""
    active: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        active = [other for other in active if other.end > span.start]
        yield from ((other, span) for other in active if other.process != span.process)
        active.append(span)


@once_per_history
def conflicts(history: History) -> list[tuple[Span, Span]]:
    """Return the pairs of holds that overlap."""
    return list(meetings(holds(history)))


@once_per_history
def expired(history: History) -> list[Span]:
    """Return the holds whose lease certainly ended: another process was granted the lock, or the holder was dead.

    The clock alone is no evidence, because a renewal that was not recorded may have moved the end of the lease.
    """
    taken = [a for a, b in conflicts(history) if a.lease_end is not None and b.start >= a.lease_end]
    dead = [f for f in history.faults if f.kind == "killed"]
    held = holds(history)
    left = [h for h in held if any(is_task_of(h.process, f.target) and f.at == h.end for f in dead)]
    last = max((h.start for h in held), default=0.0)
    return [*taken, *(h for h in left if h.lease_end is not None and h.end < h.lease_end <= last)]


@once_per_history
def waits(history: History) -> list[Op]:
    """Return the acquires that were called while another process held the lock. Without one, no lock was tested."""

    def met(op: Op, hold: Span) -> bool:
        return hold.process != op.process and hold.start < history.until(op) and op.called < hold.end

    held = holds(history)
    return [op for op in history.where("acquire") if any(met(op, hold) for hold in held)]


@once_per_history
def pauses(history: History) -> list[tuple[str, str, float, float]]:
    """Return (process, "stopped" or "held", start, end) for each interval in which a worker could not run."""
    found = []
    for f in history.faults:
        if ending := {"stopped": "resumed", "held": "released"}.get(f.kind):
            after = [
                g for g in history.faults if g.at >= f.at and g.target == f.target and g.kind in (ending, "killed")
            ]
            found.append((f.target, f.kind, f.at, min((g.at for g in after), default=history.end)))
    return found


def is_task_of(process: str, target: str) -> bool:
    """Return True if a fault on `target` hits this process: "w1" is hit with all its tasks ("w1.a")."""
    return process == target or process.startswith(target + ".")
