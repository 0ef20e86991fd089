"""The record of one run, as every check sees it: one `Op` per call, and the faults that were injected.

A worker writes two events per call, one *before* the step that it announces and one after. So a call that SIGKILL cut
short is still in the history, with status "info": it may have happened. Times are seconds of CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Outcome = Literal["ok", "fail", "info"]
Status = Literal["HELD", "VIOLATED", "INCONCLUSIVE"]
Expected = Literal["HELD", "VIOLATED"]


@dataclass(frozen=True, slots=True)
class Op:
    """One call. "ok": it happened. "fail": it certainly did not. "info": it may have (no answer, or Indeterminate)."""

    process: str  # "w1", "w2", ...; a worker that runs several tasks names them "w1.a", "w1.b"
    name: str  # "acquire", "read", "write", "release", ...
    status: Outcome
    called: float
    returned: float | None  # None when no answer was ever seen
    value: Any = None  # what was written or read
    token: int | None = None  # the fencing token under which it ran
    detail: str = ""  # the error as text

    @property
    def end(self) -> float:
        """Return when its answer was seen; without an answer, when it was called."""
        return self.called if self.returned is None else self.returned

    def precedes(self, other: Op) -> bool:
        """Return True if it certainly came first. Equal times are concurrent, because a clock may repeat a reading."""
        return self.end < other.called

    def get(self, key: str) -> Any:
        """Return the entry of a value that is a dict; None without one."""
        return self.value.get(key) if isinstance(self.value, dict) else None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something done to a process or a server: kind is "stopped", "resumed", "killed", "held", "server", ..."""

    at: float
    kind: str
    target: str  # a process ("w1") or a server ("redis")
    detail: str = ""


@dataclass(frozen=True, eq=False)
class History:
    """All calls of one run by the time they were made, its faults, and what the stores held at the end.

    Two histories are never equal: what is derived from one is cached by its identity.
    """

    ops: tuple[Op, ...] = ()
    faults: tuple[Fault, ...] = ()
    started: float = 0.0
    ended: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # as read at the end: {"final": 3, "initial": 0, ...}

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def where(self, name: str | None = None, *, process: str | None = None, status: Outcome | None = None) -> list[Op]:
        """Return the ops that match every argument given, by the time of their call."""
        wanted = {"name": name, "process": process, "status": status}
        return [op for op in self.ops if all(v is None or v == getattr(op, key) for key, v in wanted.items())]

    @cached_property
    def end(self) -> float:
        """The last moment of the run. An op without an answer is open until then."""
        return max([self.started, self.ended, *(op.end for op in self.ops), *(f.at for f in self.faults)])

    def until(self, op: Op) -> float:
        """Return when its answer came, or the end of the run if none came."""
        return self.end if op.returned is None else op.returned

    @property
    def processes(self) -> list[str]:
        """The names of all workers, also of those that a fault hit before their first call."""
        return sorted({op.process for op in self.ops} | {f.target for f in self.faults if f.target.startswith("w")})

    # ---- as text

    def at(self, t: float, unit: str = " s") -> str:
        """Return a moment as seconds since the start, with more digits for a shorter run."""
        length = self.end - self.started
        return f"{max(0.0, t - self.started):.{3 if length < 0.5 else 2 if length < 60 else 1}f}{unit}"

    @cached_property
    def labels(self) -> dict[int | None, str]:
        """A short name for each fencing token, because only their order matters: "#1" for the smallest."""
        return {token: f"#{n}" for n, token in enumerate(sorted({op.token for op in self if op.token is not None}), 1)}

    def label(self, op: Op) -> str:
        """Return the short name of its token; empty without one."""
        return self.labels.get(op.token, "")

    def who(self, op: Op) -> str:
        """Return its process and the short name of its token: "w1 (#2)"."""
        return f"{op.process} ({self.label(op)})" if op.token is not None else op.process


Check = Callable[[History], "Finding"]
"""A pure function of a history. It has three answers, so that a run that never reached the danger cannot pass."""


@dataclass(frozen=True)
class Finding:
    """The answer of a check, with the counterexample if the promise was broken."""

    status: Status
    summary: str  # one line: "2 holders at once, 2 of 40 acquisitions"
    witness: tuple[Op, ...] = ()  # the counterexample: the ops that together break the promise, in order of time
    violations: tuple[tuple[str, ...], ...] = ()  # rows of a table, each (when, who, what)
