"""What a lock promises, asked of one run: who was inside with whom, and who of them had been disturbed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from distsys.lab.explore.blocking import in_greenlet
from distsys.lab.explore.build import WrongShape, build
from distsys.lab.explore.run import BOTH, CUT_SPANS, ExploredRun, Outcome, Scene, Worker
from distsys.lab.explore.worlds import WORLDS
from distsys.lab.history.history import Op
from distsys.lab.run.guard import Guard


@dataclass(eq=False)
class LockRun(ExploredRun):
    """Three workers take the lock once each. `span` is its TTL, `section` how many TTLs a holder works.

    overrun  the work is longer than the TTL: of two holders the one whose lease is over must be told of it, at the
             latest when it leaves
    """

    section: float = 0.5
    overrun: bool = False

    def __post_init__(self) -> None:
        self.entered = 0
        self._joined: dict[str, tuple[str, Op]] = {}  # whose lease is over -> who is inside beside it
        self._inside: dict[str, Op] = {}
        self._occupied = 0.0  # when somebody was last seen inside

    def build(self, candidate: Any, **clients: Any) -> Any:
        """Call the candidate with what its parameters name of the clients, name and ttl."""
        return build(candidate, **clients, name="explored", ttl=self.span)

    async def work(self, worker: Worker, made: Any) -> None:
        """Take the lock, work, and leave it."""
        try:
            guard = Guard(made, in_greenlet)
        except TypeError as wrong:
            raise WrongShape(str(wrong)) from None
        error: BaseException | None = None
        asked = self.begin(worker, "acquire")
        try:
            await guard.enter()
        except Exception as refused:  # noqa: BLE001  whatever the candidate raises is a refusal
            self._refuse(worker, self.end(asked, "fail", f"{type(refused).__name__}: {refused}"))
            return
        self._enter(worker, self.end(asked, "ok"))
        try:
            await asyncio.sleep(self.section * self.span)
        except asyncio.CancelledError as told:
            error = told
            self._told(worker, "its work was cancelled")
        worker.phase = "leaving"
        self._occupied = self.loop.now
        self.tell(worker, "left")
        left = self.begin(worker, "release")
        try:
            await guard.exit(error)
        except asyncio.CancelledError:
            raise
        except Exception as told_late:  # noqa: BLE001  the holder is told
            self.end(left, "fail", f"{type(told_late).__name__}: {told_late}")
            self._told(worker, f"release raised {type(told_late).__name__}")
        else:
            op = self.end(left, "ok")
            if error is None and worker.name in self._joined:
                other, entered = self._joined[worker.name]
                why = f"{worker.name} worked beyond its lease, beside {other}, and was never told"
                self.violated(why, self._inside[worker.name], entered, op)
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
            refused = [op.detail for op in self.ops if op.name == "acquire" and op.detail]
            return self.outcome(
                "INCONCLUSIVE", f"nobody got in: {(self.crashes() or refused or ['no reason given'])[0]}"
            )
        return self.outcome("HELD", f"{self.entered} entered, one at a time")

    # ---- what is promised

    def _enter(self, worker: Worker, op: Op) -> None:
        others = [other for other in self.workers if other.phase == "inside"]
        worker.phase = "inside"
        self._occupied = self.loop.now
        self.entered += 1
        self.tell(worker, "entered" + (f" while {others[0].name} was inside" if others else ""))
        for other in others:
            if self.overrun:  # the one that stood still has lost its lease, or else the one that came first
                late, beside = (worker, other) if worker.disturbed else (other, worker)
                self._joined.setdefault(late.name, (beside.name, op))
            elif not (worker.unaware or other.disturbed):
                how = f"{worker.name} entered after an error" if worker.disturbed else "neither had been disturbed"
                why = f"{other.name} and {worker.name} were inside at once, and {how}"
                self.violated(why, self._inside[other.name], op)
        self._inside[worker.name] = op
        self.progressed(worker)

    def _refuse(self, worker: Worker, op: Op) -> None:
        worker.phase = "refused"
        self.tell(worker, f"was refused: {op.detail.partition(':')[0]}")
        alone = self.loop.now - self._occupied
        if alone > CUT_SPANS * self.span and not worker.disturbed:
            self.violated(
                f"nobody got in for {alone:.3g} s, then {worker.name} was refused, which nothing disturbed", op
            )

    def _told(self, worker: Worker, how: str) -> None:
        self.tell(worker, f"was told that it lost the lock: {how}")
        if not (worker.disturbed or self.flushed or self.overrun):
            self.violated(f"{worker.name} was thrown out, though nothing had disturbed it: {how}")


LOCK_SCENES = (
    Scene("nothing is disturbed: three workers take turns", worlds=WORLDS,
          hint="Who may enter is decided by one atomic step at the server. What tells one holder from another?"),
    Scene("the work takes longer than the TTL", options={"section": 2.5, "overrun": True},
          hint="The lease has to last as long as the work. Who extends it, and who is told when that fails?"),
    Scene("a command is late, by less than half a TTL", (("late", False),),
          hint="From when on does the holder count its lease: from its asking, or from the answer?"),
    Scene("a command is held back until another worker is inside", (("hold", False),),
          hint="Between your look and your act the lock can change hands. Only the server can do both at once."),
    Scene("a process is killed", tuple(("kill", after) for after in BOTH),
          hint="A dead process releases nothing. Who else can end its lock, and when?"),
    Scene("a process stands still until another is inside", tuple(("freeze", after) for after in BOTH),
          hint="It wakes up and goes on with what it knew. What of the others does its next command touch?"),
    Scene("the server is silent for one worker", tuple(("hang", after) for after in BOTH),
          hint="The command that is not answered may still be carried out. What does it do, so much later?"),
    Scene("a connection breaks", (("reset", False), ("lost", True), ("cut", False), ("cut", True)),
          hint="A reply that is lost is not a command that is lost. What does the client's second try find?"),
    Scene("the server forgets everything", (("flush", False),),
          hint="The lock is gone, and its waiters are still there. What do they wait for?"),
    Scene("a worker is cancelled", tuple(("cancel", after) for after in BOTH),
          hint="A task can end between any two commands. What has it taken by then, and who gives it back?"),
    Scene("a connection breaks, and the client does not retry", (("reset", False), ("lost", True)),
          options={"retries": 0},
          hint="The command may have been carried out although its caller got an error. What is left behind?"),
    Scene("a process stands still in the midst of long work, and goes on", (("freeze", False), ("freeze", True)),
          options={"section": 2.5, "overrun": True},
          hint="When it wakes up, its lock may be another's. Which of its next commands could tell, and whom?"),
)  # fmt: skip
