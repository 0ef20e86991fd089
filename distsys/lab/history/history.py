"""What happened, as every check sees it: one `Op` per call, in one order of time, and the faults beside them.

A worker writes two events per call, one *before* the step it announces and one after, so that a call cut short by
SIGKILL is still in the history, with status "info": it may have happened. Times are CLOCK_MONOTONIC, which all
processes share.
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
    """One call. "ok" happened, "fail" certainly did not, "info" may have (no answer, or an Indeterminate error)."""

    process: str  # "w1", "w2", ...; a worker that runs several tasks names them "w1.a", "w1.b"
    name: str  # "acquire", "read", "write", "release", ...
    status: Outcome
    called: float
    returned: float | None  # None when no answer was ever seen
    value: Any = None  # what was written or read
    token: int | None = None  # the fencing token under which it ran
    detail: str = ""  # the error, in words

    @property
    def end(self) -> float:
        """When its answer was seen, or else when it began: the last moment known of it."""
        return self.called if self.returned is None else self.returned

    def precedes(self, other: Op) -> bool:
        """Return True if it certainly came first. Two with one clock reading are concurrent: clocks repeat."""
        return self.end < other.called


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
    facts: dict[str, Any] = field(default_factory=dict)  # as read at the end: {"final": 3, "initial": 0, ...}

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def where(self, name: str | None = None, *, process: str | None = None, status: Outcome | None = None) -> list[Op]:
        """The ops that match, by the time of their call."""
        wanted = {"name": name, "process": process, "status": status}
        return [op for op in self.ops if all(v is None or v == getattr(op, key) for key, v in wanted.items())]

    @cached_property
    def end(self) -> float:
        """The last moment known: an op without an answer is open until here."""
        return max([self.started, self.ended, *(op.end for op in self.ops), *(f.at for f in self.faults)])

    def until(self, op: Op) -> float:
        """When its answer came: an op without one is open to the end."""
        return self.end if op.returned is None else op.returned

    @property
    def processes(self) -> list[str]:
        return sorted({op.process for op in self.ops} | {f.target for f in self.faults if f.target.startswith("w")})

    # ---- in words

    def at(self, t: float, unit: str = " s") -> str:
        """A moment as the reader sees it: seconds since the start, as fine as the run is short."""
        length = self.end - self.started
        return f"{max(0.0, t - self.started):.{3 if length < 0.5 else 2 if length < 60 else 1}f}{unit}"

    @cached_property
    def labels(self) -> dict[int | None, str]:
        """Fencing tokens have 16 digits, and only their order matters: the smallest in this history is #1."""
        return {token: f"#{n}" for n, token in enumerate(sorted({op.token for op in self if op.token is not None}), 1)}

    def label(self, op: Op) -> str:
        """Of its token; empty without one."""
        return self.labels.get(op.token, "")

    def who(self, op: Op) -> str:
        """Its process and its token: "w1 (#2)"."""
        return f"{op.process} ({self.label(op)})" if op.token is not None else op.process


Check = Callable[[History], "Finding"]
"""A pure function of a history. Its answer is one of three, so that a run that never reached the danger cannot pass."""


@dataclass(frozen=True)
class Finding:
    status: Status
    summary: str  # one line: "2 holders at once, 2 of 40 acquisitions"
    witness: tuple[Op, ...] = ()  # the counterexample: the ops that together break the promise, in order of time
    violations: tuple[tuple[str, ...], ...] = ()  # rows for the table under the story
