"""What happened, as every check sees it: one `Op` per call, in one order of time, and the faults beside them.

A worker writes two events per call, one *before* the step it announces and one after, so that a call cut short by
SIGKILL is still in the history, with status "info": it may have happened. Times are CLOCK_MONOTONIC, which all
processes share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Status = Literal["ok", "fail", "info"]


@dataclass(frozen=True, slots=True)
class Op:
    """One call. "ok" happened, "fail" certainly did not, "info" may have (no answer, or an Indeterminate error)."""

    process: str  # "w1", "w2", ...; a worker that runs several tasks names them "w1.a", "w1.b"
    name: str  # "acquire", "read", "write", "release", "lost", ...
    status: Status
    called: float
    returned: float | None  # None when no answer was ever seen
    value: Any = None  # what was written or read
    token: int | None = None  # the fencing token under which it ran
    detail: str = ""  # the error, in words

    @property
    def end(self) -> float:
        """When its answer was seen, or else when it began: the last moment known of it."""
        return self.called if self.returned is None else self.returned


@dataclass(frozen=True, slots=True)
class Fault:
    """Something done to a process or a server: kind is "stopped", "resumed", "killed", "held", "server", ..."""

    at: float
    kind: str
    target: str  # a process ("w1") or a server ("redis")
    detail: str = ""


@dataclass(frozen=True)
class History:
    ops: tuple[Op, ...] = ()
    faults: tuple[Fault, ...] = ()
    started: float = 0.0
    ended: float = 0.0
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # what the controller read at the end: {"final": 3, "initial": 0, ...}

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def where(self, name: str | None = None, *, process: str | None = None, status: Status | None = None) -> list[Op]:
        """The ops that match, by the time of their call."""
        return [
            op
            for op in self.ops
            if (name is None or op.name == name)
            and (process is None or op.process == process)
            and (status is None or op.status == status)
        ]

    @cached_property
    def end(self) -> float:
        """The last moment known: an op without an answer is open until here."""
        return max([self.started, self.ended, *(op.end for op in self.ops), *(f.at for f in self.faults)])

    @property
    def processes(self) -> list[str]:
        return sorted({op.process for op in self.ops} | {f.target for f in self.faults if f.target.startswith("w")})


class Recorder:
    """Turns the events of many workers into a History. Feed it in any order; `history()` may be asked at any time."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], Op] = {}
        self._done: list[Op] = []
        self._faults: list[Fault] = []

    def event(self, process: str, event: dict[str, Any]) -> Op | None:
        """One event as a worker sent it; returns the op it completed, if any."""
        key = (event.get("task") or process, event["id"])
        if event["e"] == "call":
            self._open[key] = Op(
                key[0], event["name"], "info", event["t"], None, event.get("value"), event.get("token")
            )
            return None
        op = replace(self._open.pop(key), status=event["e"], returned=event["t"], detail=event.get("detail", ""))
        op = replace(op, value=event.get("value", op.value), token=event.get("token", op.token))
        self._done.append(op)
        return op

    def fault(self, at: float, kind: str, target: str, detail: str = "") -> None:
        self._faults.append(Fault(at, kind, target, detail))

    def history(self, *, started: float = 0.0, ended: float = 0.0, **facts: Any) -> History:
        ops = sorted([*self._done, *self._open.values()], key=lambda op: op.called)
        faults = sorted(self._faults, key=lambda f: f.at)
        return History(tuple(ops), tuple(faults), started, ended, facts)


Check = Callable[[History], "Finding"]
"""A pure function of a history. Its answer is one of three, so that a run that never reached the danger cannot pass."""


@dataclass(frozen=True)
class Finding:
    status: Literal["HELD", "VIOLATED", "INCONCLUSIVE"]
    summary: str  # one line: "2 holders at once, 2 of 40 acquisitions"
    witness: tuple[Op, ...] = ()  # the counterexample: the ops that together break the promise, in order of time
    violations: tuple[tuple[str, ...], ...] = ()  # rows for the table under the story


def first(items: Iterable[Op]) -> Op | None:
    return next(iter(items), None)
