"""What a lock promises, asked of one run: who was inside with whom, and who of them had been disturbed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from distsys.lab.explore.run import CUT_SPANS, ExploredRun, Outcome, Worker
from distsys.lab.run.guard import Guard


@dataclass(eq=False)
class LockRun(ExploredRun):
    """Three workers take the lock once each. `span` is its TTL, `section` how many TTLs a holder works."""

    section: float = 0.5

    def __post_init__(self) -> None:
        self.entered = 0
        self._occupied = 0.0  # when somebody was last seen inside

    async def work(self, worker: Worker, made: Any) -> None:
        """Take the lock, work, and leave it."""
        guard = Guard(made)
        error: BaseException | None = None
        try:
            await guard.enter()
        except Exception as refused:  # noqa: BLE001  whatever the candidate raises is a refusal
            self._refuse(worker, refused)
            return
        self._enter(worker)
        try:
            await asyncio.sleep(self.section * self.span)
        except asyncio.CancelledError as told:
            error = told
            self._told(worker, "its work was cancelled")
        worker.phase = "leaving"
        self._occupied = self.loop.now
        self.tell(worker, "left")
        try:
            await guard.exit(error)
        except asyncio.CancelledError:
            raise
        except Exception as told_late:  # noqa: BLE001  the holder is told
            self._told(worker, f"release raised {type(told_late).__name__}")
        worker.phase = "done"

    def starved(self) -> Outcome:
        """Return VIOLATED if an undisturbed worker asks for ever while nobody is inside."""
        asking = [w.name for w in self.workers if w.phase == "asking" and not (w.process.dead or w.disturbed)]
        inside = [w for w in self.workers if w.phase == "inside" and not w.process.dead]
        if asking and not inside and (self.entered or self.schedule):
            return self.outcome("VIOLATED", f"nobody got in any more for {self.patience:g} s; {asking[0]} asked")
        if not asking and self.schedule:
            return self.outcome("HELD", "only a disturbed worker never ended")
        return self.outcome("INCONCLUSIVE", "the run did not end")

    def ended(self) -> Outcome:
        """Return HELD, unless nobody ever got in."""
        if not self.entered and not self.schedule:
            return self.outcome("INCONCLUSIVE", (self.crashes() or ["nobody got in"])[0])
        return self.outcome("HELD", f"{self.entered} entered, one at a time")

    # ---- what is promised

    def _enter(self, worker: Worker) -> None:
        others = [other for other in self.workers if other.phase == "inside"]
        worker.phase = "inside"
        self._occupied = self.loop.now
        self.entered += 1
        self.tell(worker, "entered" + (f" while {others[0].name} was inside" if others else ""))
        for other in others:
            if not (worker.disturbed or other.disturbed):
                self.violated(f"{other.name} and {worker.name} were inside at once, and neither had been disturbed")
        self.progressed(worker)

    def _refuse(self, worker: Worker, why: Exception) -> None:
        worker.phase = "refused"
        self.tell(worker, f"was refused: {type(why).__name__}")
        alone = self.loop.now - self._occupied
        if alone > CUT_SPANS * self.span and not worker.disturbed:
            self.violated(f"nobody got in for {alone:.3g} s, then {worker.name} was refused, which nothing disturbed")

    def _told(self, worker: Worker, how: str) -> None:
        self.tell(worker, f"was told that it lost the lock: {how}")
        if not worker.disturbed and not self.flushed:
            self.violated(f"{worker.name} was thrown out, though nothing had disturbed it: {how}")
