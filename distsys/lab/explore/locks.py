"""What a lock promises, asked of one run: who was inside with whom, and who of them had been disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from distsys.lab.explore.loop import ExploreLoop, Process, running_process
from distsys.lab.explore.network import COMMAND_SECONDS, Network, Step, redis_client
from distsys.lab.explore.worlds import WORLDS, World, inhabited
from distsys.lab.history.history import Status
from distsys.lab.run.guard import Guard
from distsys.lab.simulate.virtual_loop import Stuck

EXCUSED = {"hold", "freeze", "hang", "kill", "lost", "reset", "cut", "cancel"}
"""Actions after which nothing that happens to the disturbed worker counts against the lock."""
LATE_TTLS = 0.4
CUT_TTLS = 12.0
TIMEOUT_GRANULARITY = 0.003  # seconds: the server rounds a timeout up to the next millisecond, and one more
STARVED_TTLS = 80.0
REAL_STARVED_TTLS = 15.0  # in real time a reader waits for it
SECTION_TTLS = 0.5


class Violated(Exception):
    """A promise is broken; the run ends here."""


@dataclass(frozen=True)
class Deviation:
    """One disturbance: what is done at which step, as in "w1#7 freeze" or "w1#7 kill after"."""

    step: str
    action: str
    after: bool = False

    def __str__(self) -> str:
        return f"{self.step} {self.action}{' after' if self.after else ''}"

    @classmethod
    def parse(cls, text: str) -> Deviation:
        """Read "w1#7 freeze" or "w1#7 freeze after"."""
        step, action, *rest = text.split()
        return cls(step, action, rest == ["after"])


@dataclass
class Outcome:
    """What one run showed."""

    status: Status
    summary: str
    steps: list[tuple[str, str, str]]  # (label, worker's phase, the commands), in order of their sending
    story: list[tuple[float, str, str]]  # (seconds, worker, what it did)
    entered: int = 0


@dataclass(eq=False)
class Worker:
    """A worker of the run: its process, where it stands, and whether it was disturbed."""

    name: str
    process: Process
    phase: str = "asking"  # "asking", "inside", "leaving", "done", "refused", "dead"
    disturbed: bool = False
    token: int | None = None
    steps: int = 0
    gone: bool = False
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class LockRun:
    """Three workers take the lock once each, under a schedule. `real` runs in real time on an unpatched server."""

    load: Callable[[], Any]  # a copy of the candidate of its own for each process
    build: Callable[[Any, Any, float], Any]  # (candidate, redis, ttl) -> lock
    path: str  # the server's unix socket
    schedule: tuple[Deviation, ...] = ()
    world: World = WORLDS[0]
    ttl: float = 0.3
    section: float = SECTION_TTLS  # in TTLs
    real: bool = False
    set_clock: Callable[[float], None] = field(default=lambda now: None)
    seed: int = 7

    def run(self) -> Outcome:
        """Run to the end, or to the first violation."""
        self.steps: list[tuple[str, str, str]] = []
        self.story: list[tuple[float, str, str]] = []
        self.entered = 0
        self._seen: set[Any] = set()
        self._after: dict[Step, Deviation] = {}
        self._waiting_for_entry: list[tuple[Worker, Callable[[], None]]] = []
        self._tokens: list[tuple[int, Worker]] = []
        self._flushed = False
        self._occupied = 0.0  # when somebody was last seen inside
        self._shared: Any = None
        self._patience = (STARVED_TTLS if not self.real else REAL_STARVED_TTLS) * self.ttl
        until = self._patience + 10 * self.ttl
        self.loop = ExploreLoop(step=self._step, until=until, wait=self._wait if self.real else None)
        self.workers = [Worker(name, Process(name)) for name in ("w1", "w2", "w3")]
        people = [worker.process for worker in self.workers]
        outcome: Outcome | None = None
        with inhabited(self.world, people, self.loop.time, self.seed):
            try:
                self.loop.run_until_complete(self._main())
            except Violated as broken:
                outcome = self._outcome("VIOLATED", str(broken))
            except Stuck:
                outcome = self._starved()
            finally:
                self._close()
        return outcome or self._ended()

    # ---- the workers

    async def _main(self) -> None:
        self.network = Network(self.path, self._tell_time)
        self.network.admit = self._admit
        self._tell_time(self.loop.now)
        self.network.control("FLUSHALL")
        self.network.control("SCRIPT", "FLUSH")
        self._over: asyncio.Future[None] = self.loop.create_future()
        try:
            for n, worker in enumerate(self.workers):
                worker.task = self._start(worker, n)
            await self._over
        finally:
            self.network.end()

    def _close(self) -> None:
        """Close every coroutine now: the garbage collector would do it in the middle of the next run."""
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(BaseException):
                task.get_coro().close()
        self.loop.close()
        gc.collect()

    def _start(self, worker: Worker, n: int) -> asyncio.Task[None]:
        context = copy_context()
        context.run(running_process.set, worker.process)
        task = self.loop.create_task(self._work(worker, 0.001 * n), context=context)
        task.add_done_callback(lambda _: self._gone(worker), context=Context())
        return task

    def _gone(self, worker: Worker) -> None:
        """One worker fewer; the run is over when none is left."""
        worker.gone = True
        if all(other.gone for other in self.workers) and not self._over.done():
            self._over.set_result(None)

    async def _work(self, worker: Worker, delay: float) -> None:
        await asyncio.sleep(delay)
        redis = redis_client(self.network)
        if self._shared is None or not self.world.tasks:
            self._shared = self.load()
        lock = self.build(self._shared, redis, self.ttl)
        guard = Guard(lock)
        error: BaseException | None = None
        try:
            lease = await guard.enter()
        except Exception as refused:  # noqa: BLE001  whatever the candidate raises is a refusal
            self._refuse(worker, refused)
            return
        self._enter(worker, lease, lock)
        try:
            await asyncio.sleep(self.section * self.ttl)
        except asyncio.CancelledError as told:
            error = told
            self._told(worker, "its work was cancelled")
        worker.phase = "leaving"
        self._occupied = self.loop.now
        self._tell(worker, "left")
        try:
            await guard.exit(error)
        except asyncio.CancelledError:
            raise
        except Exception as told_late:  # noqa: BLE001  the holder is told
            self._told(worker, f"release raised {type(told_late).__name__}")
        worker.phase = "done"

    # ---- what is promised

    def _enter(self, worker: Worker, lease: Any, lock: Any) -> None:
        others = [other for other in self.workers if other.phase == "inside"]
        worker.phase = "inside"
        self._occupied = self.loop.now
        self.entered += 1
        self._tell(worker, "entered" + (f" while {others[0].name} was inside" if others else ""))
        for other in others:
            if not (worker.disturbed or other.disturbed):
                self._violated(f"{other.name} and {worker.name} were inside at once, and neither had been disturbed")
        for waiting, go_on in list(self._waiting_for_entry):
            if waiting is not worker:
                self._waiting_for_entry.remove((waiting, go_on))
                self.loop.call_soon(go_on, context=Context())

    def _refuse(self, worker: Worker, why: Exception) -> None:
        worker.phase = "refused"
        self._tell(worker, f"was refused: {type(why).__name__}")
        alone = self.loop.now - self._occupied
        if alone > CUT_TTLS * self.ttl and not worker.disturbed:
            self._violated(f"nobody got in for {alone:.3g} s, then {worker.name} was refused, which nothing disturbed")

    def _told(self, worker: Worker, how: str) -> None:
        self._tell(worker, f"was told that it lost the lock: {how}")
        if not worker.disturbed and not self._flushed:
            self._violated(f"{worker.name} was thrown out, though nothing had disturbed it: {how}")

    def _violated(self, why: str) -> None:
        if not self._over.done():
            self._over.set_exception(Violated(why))

    def _starved(self) -> Outcome:
        asking = [w.name for w in self.workers if w.phase == "asking" and not (w.process.dead or w.disturbed)]
        inside = [w.name for w in self.workers if w.phase == "inside" and not w.process.dead]
        if asking and not inside and self.entered:
            return self._outcome(
                "VIOLATED", f"nobody got in any more for {self._patience:g} s, {' and '.join(asking)} asked"
            )
        if asking and not self.entered and self.schedule:
            return self._outcome("VIOLATED", f"nobody ever got in, {' and '.join(asking)} asked")
        if not asking and self.schedule:
            return self._outcome("HELD", "only a disturbed worker never ended")
        return self._outcome("INCONCLUSIVE", "the run did not end")

    def _ended(self) -> Outcome:
        if not self.entered and not self.schedule:
            failed = [str(w.task.exception()) for w in self.workers if w.task and w.task.done() and w.task.exception()]
            return self._outcome("INCONCLUSIVE", failed[0] if failed else "nobody got in")
        return self._outcome("HELD", f"{self.entered} entered, one at a time")

    def _outcome(self, status: Status, summary: str) -> Outcome:
        return Outcome(status, summary, self.steps, self.story, self.entered)

    def _tell(self, worker: Worker, what: str) -> None:
        if not self._over.done():
            self.story.append((self.loop.now, worker.name, what))

    # ---- the network, under the schedule

    def _worker_of(self, process: Process) -> Worker:
        return next(worker for worker in self.workers if worker.process is process)

    def _admit(self, step: Step) -> None:
        worker = self._worker_of(step.process)
        situation = (worker.name, step.signature, tuple(other.phase for other in self.workers))
        deviation = None
        if situation not in self._seen:
            self._seen.add(situation)
            worker.steps += 1
            step.label = f"{worker.name}#{worker.steps}"
            self.steps.append((step.label, worker.phase, str(step)))
            self._tell(worker, f"{step.label} {step}")
            deviation = next((d for d in self.schedule if d.step == step.label), None)
        if deviation is None:
            self.network.pending.append(step)
        elif deviation.after:
            self._after[step] = deviation
            self.network.pending.append(step)
        else:
            self._deviate(deviation, worker, step)

    def _step(self) -> bool:
        pending = self.network.pending
        for n, step in enumerate(pending):
            if step.pipe.silent:
                continue
            del pending[n]
            self._execute(step)
            return True
        return False

    def _execute(self, step: Step) -> None:
        self._tell_time(self.loop.now)
        deviation = self._after.pop(step, None)
        worker = self._worker_of(step.process)
        if deviation and deviation.action in ("hang", "lost"):
            step.pipe.silent = True
        if step.process not in self.network.cut:
            step.pipe.execute(step)
        else:
            step.pipe.reset()
        if not self.real:
            self.loop.now += COMMAND_SECONDS
        if deviation:
            self._deviate(deviation, worker, step)
        if any(pipe.expected for pipe in self.network.pipes):
            self.network.poll()
            timeouts = [_timeout(command) for command in step.commands]
            if any(timeouts):
                self.loop.call_later(max(timeouts) + TIMEOUT_GRANULARITY, self.network.poll, context=Context())

    def _deviate(self, deviation: Deviation, worker: Worker, step: Step) -> None:
        """Disturb the worker at this step; `after` means that the server has executed it already."""
        action, after = deviation.action, deviation.after
        self._tell(worker, f"-- {action}{' after' if after else ''} {step.label}")
        worker.disturbed = worker.disturbed or action in EXCUSED

        def send() -> None:
            if not after:
                self.network.pending.append(step)

        def resume() -> None:
            send()
            self.loop.resume(worker.process)

        if action == "late":
            self.loop.call_later(LATE_TTLS * self.ttl, send, context=Context())
        elif action == "hold":
            self._when_another_enters(worker, send)
        elif action == "freeze":
            worker.process.frozen = True
            self._when_another_enters(worker, resume)
        elif action == "hang":
            self._hang(worker, send)
        elif action == "kill":
            step.pipe.unsent -= not after
            self._kill(worker)
        elif action == "lost" or action == "reset":
            step.pipe.reset()
        elif action == "cut":
            self.network.cut.add(worker.process)
            for pipe in [pipe for pipe in self.network.pipes if pipe.process is worker.process]:
                pipe.reset()
            self.loop.call_later(CUT_TTLS * self.ttl, self.network.cut.discard, worker.process, context=Context())
        elif action == "flush":
            self._flushed = True
            for other in self.workers:
                other.disturbed = other.disturbed or other.phase in ("inside", "asking")
            self.network.control("FLUSHALL")
            send()
        elif action == "cancel":
            send()
            if worker.task:
                self.loop.call_soon(worker.task.cancel, context=Context())

    def _hang(self, worker: Worker, send: Callable[[], None]) -> None:
        pipes = [pipe for pipe in self.network.pipes if pipe.process is worker.process]
        for pipe in pipes:
            pipe.silent = True

        def speak() -> None:
            send()
            for pipe in pipes:
                pipe.speak()

        self._when_another_enters(worker, speak)

    def _kill(self, worker: Worker) -> None:
        worker.process.dead = True
        worker.phase = "dead"
        for pipe in [pipe for pipe in self.network.pipes if pipe.process is worker.process]:
            pipe.close()
        self._gone(worker)

    def _when_another_enters(self, worker: Worker, go_on: Callable[[], None]) -> None:
        entry = (worker, go_on)
        self._waiting_for_entry.append(entry)

        def enough() -> None:
            if entry in self._waiting_for_entry:
                self._waiting_for_entry.remove(entry)
                go_on()

        self.loop.call_later(CUT_TTLS * self.ttl, enough, context=Context())

    # ---- time

    def _tell_time(self, now: float) -> None:
        self.set_clock(now)

    def _wait(self, seconds: float) -> None:
        """Real time: sleep until a timer is due or the server says something."""
        import select

        blocked = [pipe.socket for pipe in self.network.pipes if pipe.expected and not pipe.closed]
        if seconds <= 0:
            return
        if blocked:
            if select.select(blocked, [], [], seconds)[0]:
                self.network.poll()
        else:
            _real_sleep(seconds)


def _timeout(command: list[bytes]) -> float:
    """How long a blocking command may wait, in seconds."""
    name = command[0].upper()
    try:
        if name in (b"BLPOP", b"BRPOP", b"BZPOPMIN", b"BZPOPMAX", b"BLMOVE", b"BRPOPLPUSH"):
            return float(command[-1])
        if name in (b"BLMPOP", b"BZMPOP"):
            return float(command[1])
        if name == b"WAIT":
            return float(command[-1]) / 1000
    except ValueError:
        pass
    return 0.0


from time import sleep as _real_sleep  # noqa: E402  bound before a world changes the module
