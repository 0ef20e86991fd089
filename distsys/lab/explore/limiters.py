"""What a limiter promises, asked of one run: how much was admitted when, and who was refused while there was room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distsys.lab.check.combine import all_of
from distsys.lab.check.limits import Allowance, at_most, no_needless_refusal
from distsys.lab.explore.run import ExploredRun, Outcome, Worker
from distsys.lab.history.history import History, Op
from distsys.lab.run.guard import plain

LIMIT = 10
Plan = tuple[tuple[str, float, int], ...]
"""What the workers ask for: (worker, when in windows, how many requests one after the other)."""

BURST: Plan = (("w1", 0.0, 6), ("w2", 0.0, 6), ("w3", 0.0, 6), ("w1", 2.5, 6), ("w2", 2.5, 6))
BOUNDARY: Plan = (("w1", 0.9, 10), ("w2", 1.05, 10), ("w3", 3.5, 2))
IMPATIENT: Plan = (("w1", 0.0, 10), *(("w2", 0.1 * n, 1) for n in range(1, 15)))
RACE: Plan = (("w1", 0.0, 4), ("w2", 0.0, 4), ("w3", 0.0, 4), ("w2", 3.5, 3), ("w3", 3.6, 3))
SKEWED: Plan = (("w1", 0.0, 10), ("w2", 0.2, 10), ("w3", 0.4, 10), ("w1", 2.5, 2))
HOUR: Plan = (("w1", 0.0, 4), ("w2", 0.0, 4), ("w3", 0.0, 4))

LEFT_FOR_EVER = """
local left = 0
for _, key in ipairs(redis.call('KEYS', '*')) do if redis.call('PTTL', key) == -1 then left = left + 1 end end
return left
"""


@dataclass(eq=False)
class LimiterRun(ExploredRun):
    """Three workers ask a limiter as planned; `span` is its window in seconds.

    allowance  what the limiter promises: so many in any window, or a bucket
    """

    plan: Plan = BURST
    allowance: Allowance = field(default_factory=lambda: Allowance(LIMIT, 1.0))
    aligned: bool = True
    keys: bool = False  # look for keys that are left behind for ever

    def __post_init__(self) -> None:
        self.ops: list[Op] = []
        self.left_behind = 0

    async def work(self, worker: Worker, made: Any) -> None:
        """Make the requests that the plan has for this worker."""
        ask = asks(made)
        for _, at, times in (part for part in self.plan if part[0] == worker.name):
            await asyncio.sleep(max(0.0, at * self.span - self.loop.now))
            for _ in range(times):
                await self._request(worker, ask)
        worker.phase = "done"

    async def _request(self, worker: Worker, ask: Callable[..., Any]) -> None:
        called, number = self.loop.now, len(self.ops)
        self.ops.append(Op(worker.name, "admit", "info", called, None))
        try:
            answer = bool(await plain(ask, "explored"))
        except Exception as error:  # noqa: BLE001  whatever the candidate raises is no answer
            self.ops[number] = Op(worker.name, "admit", "info", called, self.loop.now, detail=type(error).__name__)
            self.tell(worker, f"got no answer: {type(error).__name__}")
            return
        self.ops[number] = Op(worker.name, "admit", "ok" if answer else "fail", called, self.loop.now)
        self.tell(worker, "was admitted" if answer else "was refused")
        if answer:
            self.progressed(worker)

    def repeated(self, worker: Worker) -> None:
        """Count the lost request as one more that may have been admitted."""
        self.ops.append(Op(worker.name, "admit", "info", self.loop.now, None))

    async def over(self) -> None:
        """Count the keys that no TTL will ever remove."""
        if self.keys:
            self.left_behind = int(self.network.control("EVAL", LEFT_FOR_EVER, "0"))

    def starved(self) -> Outcome:
        """Return what was decided so far: a request that never ends is no violation of a limit."""
        return self.ended()

    def ended(self) -> Outcome:
        """Check the admissions and the refusals against the model."""
        if self.left_behind:
            return self.outcome("VIOLATED", f"{self.left_behind} keys are left behind that no TTL will ever remove")
        if not any(op.status == "ok" for op in self.ops):
            return self.outcome("INCONCLUSIVE", (self.crashes() or ["nobody was admitted"])[0])
        history = History(tuple(sorted(self.ops, key=lambda op: op.called)), (), 0.0, self.loop.now)
        finding = all_of(at_most(self.allowance), no_needless_refusal(self.allowance))(history)
        if finding.status == "VIOLATED":
            return self.outcome("VIOLATED", finding.summary)
        admitted = sum(op.status == "ok" for op in self.ops)
        return self.outcome("HELD", f"{admitted} of {len(self.ops)} admitted")


def asks(limiter: Any) -> Callable[..., Any]:
    """Return the method that decides: allow, try_acquire or is_allowed, or the limiter itself if it is a function."""
    for name in ("allow", "try_acquire", "is_allowed"):
        if (found := getattr(limiter, name, None)) is not None:
            return found  # type: ignore[no-any-return]
    if callable(limiter):
        return limiter  # type: ignore[no-any-return]
    raise TypeError(f"{type(limiter).__name__} is no limiter: it needs an async allow(key), try_acquire or is_allowed")
