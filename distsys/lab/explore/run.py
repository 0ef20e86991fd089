"""One run of a candidate under a schedule: three workers, one network, and at most a few disturbances."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distsys.lab.explore.blocking import blocking_redis_client, in_greenlet
from distsys.lab.explore.build import WrongShape, blocks, named
from distsys.lab.explore.loop import ExploreLoop, Process, running_process
from distsys.lab.explore.network import COMMAND_SECONDS, Network, Step, redis_client, timeout_of
from distsys.lab.explore.postgres import Postgres
from distsys.lab.explore.worlds import EPOCH, WORLDS, World, inhabited
from distsys.lab.history.history import Fault, Finding, History, Op, Status
from distsys.lab.simulate.virtual_loop import Stuck

EXCUSED = {"hold", "freeze", "hang", "kill", "lost", "reset", "cut", "cancel"}
"""Actions after which nothing that happens to the disturbed worker counts against the candidate."""
FAULT_KINDS = {"late": "held", "hold": "held", "hang": "held", "freeze": "stopped", "kill": "killed", "flush": "server",
               "lost": "without a reply", "reset": "disconnected", "cut": "cut off", "cancel": "cancelled"}  # fmt: skip
"""What a history calls these actions."""
UNNOTICED = {"hold", "freeze", "hang"}
"""Actions that a worker can't notice. After one that it does notice, an error, it must not enter beside another."""
LATE_SPANS = 0.4
CUT_SPANS = 12.0
TIMEOUT_GRANULARITY = 0.003  # seconds: the server rounds a timeout up to the next millisecond, and one more
STARVED_SPANS = 80.0
PATIENCE, MANY_SECONDS = 3.0, 100.0  # a longer wait is leapt over, in real and in virtual time
LOCK_SECONDS = 1.0  # until a statement that waits for a lock is looked at again; then twice as long each time
AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
end
"""
"""Makes every key older by so many milliseconds."""
REAL_STARVED_SPANS = 15.0  # in real time a reader waits for it


class Violated(Exception):
    """A promise is broken; the run ends here. `witness` are the ops that broke it together."""

    def __init__(self, why: str, *witness: Op) -> None:
        super().__init__(why)
        self.witness = witness


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


@dataclass(frozen=True)
class Scene:
    """One kind of disturbance, and one verdict on it."""

    title: str
    actions: tuple[tuple[str, bool], ...] = ()  # (action, after the step)
    worlds: tuple[World, ...] = WORLDS[:1]
    options: dict[str, Any] = field(default_factory=dict)  # of the run
    hint: str = ""  # for those whose candidate breaks here, without giving the answer away


BOTH = (False, True)


@dataclass
class Outcome:
    """What one run showed: as a finding, as lines, and as a history that can be drawn."""

    finding: Finding
    steps: list[tuple[str, str, str]]  # (label, worker's phase, the commands), in order of their sending
    story: list[tuple[float, str, str]]  # (seconds, worker, what it did)
    history: History

    @property
    def status(self) -> Status:
        """The status of the finding."""
        return self.finding.status

    @property
    def summary(self) -> str:
        """The summary of the finding."""
        return self.finding.summary


@dataclass(eq=False)
class Worker:
    """A worker of the run: its process, where it stands, and whether it was disturbed."""

    name: str
    process: Process
    phase: str = "asking"  # "asking", "inside", "leaving", "done", "refused", "dead"
    disturbed: bool = False
    steps: int = 0
    gone: bool = False
    unaware: bool = False  # it was disturbed without a chance to notice
    delay: float = 0.0  # seconds for which it, or a command of it, was held up
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class ExploredRun:
    """Three workers under a schedule; a subclass says what they do and what was promised.

    load    makes a copy of the candidate's module for each process
    span    seconds: the TTL of a lock, the window of a limiter
    real    run in real time, on an unmodified server
    """

    load: Callable[[], Any]
    path: str  # the server's unix socket
    schedule: tuple[Deviation, ...] = ()
    world: World = WORLDS[0]
    span: float = 0.3
    real: bool = False
    set_clock: Callable[[float], None] = field(default=lambda now: None)
    dsn: str = ""  # of the PostgreSQL beside it
    seed: int = 7
    retries: int = 3  # of the client: they hide some faults, and cause others
    starved_spans: float = STARVED_SPANS  # after so many the run has no end
    aligned: bool = False  # begin at a whole second of the clock, in real time too

    # ---- for a subclass

    def build(self, candidate: Any, **clients: Any) -> Any:
        """Call the candidate with what it names."""
        raise NotImplementedError

    async def work(self, worker: Worker, made: Any) -> None:
        """Use what was built, as one worker."""
        raise NotImplementedError

    def repeated(self, worker: Worker) -> None:
        """Hear that a packet was executed whose reply is lost: a client that asks again has asked twice."""

    async def over(self) -> None:
        """Look at the server when all workers are gone."""

    def starved(self) -> Outcome:
        """Return what a run shows that does not end."""
        raise NotImplementedError

    def ended(self) -> Outcome:
        """Return what a run shows that ended without a violation."""
        raise NotImplementedError

    def common_time(self) -> float:
        """Return the seconds since 1970 by a clock that all workers share: what a candidate gets that names `clock`."""
        return EPOCH + self.loop.now

    def progressed(self, worker: Worker) -> None:
        """Let those go on that wait for another worker to get what it asked for."""
        for waiting, go_on in list(self._waiting):
            if waiting is not worker:
                self._waiting.remove((waiting, go_on))
                self.loop.call_soon(go_on, context=Context())

    def violated(self, why: str, *witness: Op) -> None:
        """End the run: a promise is broken."""
        if not self._over.done():
            self._over.set_exception(Violated(why, *witness))

    def begin(self, worker: Worker, name: str, value: Any = None) -> int:
        """Record that a call is made; `end` records its outcome under the number that this returns."""
        self.ops.append(Op(worker.name, name, "info", self.loop.now, None, value))
        return len(self.ops) - 1

    def end(self, number: int, status: Any, detail: str = "", value: Any = None) -> Op:
        """Record the outcome of a call."""
        op = self.ops[number]
        value = op.value if value is None else value
        self.ops[number] = Op(op.process, op.name, status, op.called, self.loop.now, value, detail=detail)
        return self.ops[number]

    def history(self) -> History:
        """Return what was recorded."""
        ops = tuple(sorted(self.ops, key=lambda op: op.called))
        return History(ops, tuple(self.faults), 0.0, self.loop.now)

    def tell(self, worker: Worker, what: str) -> None:
        """Put a line into the story."""
        if not self._over.done():
            self.story.append((self.loop.now, worker.name, what))

    def outcome(self, status: Status, summary: str, *witness: Op) -> Outcome:
        """Return an outcome of this run."""
        rows = ((self.history().at(self.loop.now), "", summary),) if status == "VIOLATED" else ()
        return self.found(Finding(status, summary, witness, rows))

    def found(self, finding: Finding) -> Outcome:
        """Return the outcome with this finding."""
        return Outcome(finding, self.steps, self.story, self.history())

    def crashes(self) -> list[str]:
        """Return what workers raised that no scene expects."""
        return [str(w.task.exception()) for w in self.workers if w.task and w.task.done() and w.task.exception()]

    # ---- the run

    def run(self) -> Outcome:
        """Run to the end, or to the first violation."""
        self.steps: list[tuple[str, str, str]] = []
        self.story: list[tuple[float, str, str]] = []
        self.ops: list[Op] = []
        self.faults: list[Fault] = []
        self.flushed = False
        self._seen: set[Any] = set()
        self._after: dict[Step, Deviation] = {}
        self._waiting: list[tuple[Worker, Callable[[], None]]] = []
        self._shared: Any = None
        self.patience = (self.starved_spans if not self.real else REAL_STARVED_SPANS) * self.span
        until = self.patience + 10 * self.span
        self.loop = ExploreLoop(step=self._step, until=until, wait=self._wait if self.real else None)
        self._over: asyncio.Future[None] = self.loop.create_future()
        self.workers = [Worker(name, Process(name)) for name in ("w1", "w2", "w3")]
        people = [worker.process for worker in self.workers]
        outcome: Outcome | None = None
        with inhabited(self.world, people, self.loop.time, self.seed, self._block):
            try:
                self.loop.run_until_complete(self._main())
            except Violated as broken:
                outcome = self.outcome("VIOLATED", str(broken), *broken.witness)
            except Stuck:
                outcome = self.starved()
            finally:
                self._over.cancel()  # what dying coroutines still do is not told
                self.loop.end()
        return outcome or self.ended()

    async def _main(self) -> None:
        self.network = Network(self.path, self.set_clock)
        self.network.admit = self._admit
        self.wants = named(self.load())
        self.postgres = Postgres(self.network, self.dsn) if self.wants & {"conn", "pool"} else None
        self.set_clock(self.loop.now)
        self.network.control("FLUSHALL")
        self.network.control("SCRIPT", "FLUSH")
        if self.real and self.aligned:
            self.loop.begin_at_whole_second()
        try:
            for n, worker in enumerate(self.workers):
                worker.task = self._start(worker, n)
            await self._over
            await self.over()
        finally:
            self.network.end()
            if self.postgres:
                self.postgres.end()

    def _start(self, worker: Worker, n: int) -> asyncio.Task[None]:
        context = copy_context()
        context.run(running_process.set, worker.process)
        task = self.loop.create_task(self._live(worker, 0.001 * n), context=context)
        task.add_done_callback(lambda _: self._gone(worker), context=Context())
        return task

    async def _live(self, worker: Worker, delay: float) -> None:
        await asyncio.sleep(delay)
        if self._shared is None or not self.world.tasks:
            self._shared = self.load()
        clients = {"redis_sync": blocking_redis_client(self.network, self.retries)}
        clients["redis"] = clients["redis_sync"] if blocks(self._shared) else redis_client(self.network, self.retries)
        if self.postgres:
            for kind in self.wants & {"conn", "pool"}:
                clients[kind] = await self.postgres.open(kind)
        await self.work(worker, await in_greenlet(partial(self.build, self._shared, **clients)))

    def _gone(self, worker: Worker) -> None:
        """One worker fewer; the run is over when none is left."""
        worker.gone = True
        task = worker.task
        error = task.exception() if task and task.done() and not task.cancelled() else None
        if isinstance(error, WrongShape) and not self.schedule and not self._over.done():
            self._over.set_exception(error)
        if all(other.gone for other in self.workers) and not self._over.done():
            self._over.set_result(None)

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
            self.tell(worker, f"{step.label} {step}")
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
        self.set_clock(self.loop.now)
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
        if any(pipe.expected for pipe in list(self.network.pipes)):
            self.network.poll()
            timeouts = [timeout_of(command) for command in step.commands]
            if any(timeouts):
                self.loop.call_later(max(timeouts) + TIMEOUT_GRANULARITY, self.network.poll, context=Context())
            if step.pipe.expected and not step.commands:
                self.loop.call_later(LOCK_SECONDS, self._look_again, 2 * LOCK_SECONDS, context=Context())

    def _look_again(self, later: float) -> None:
        """Let the server notice a timeout or a deadlock of statements that wait for locks."""
        self.set_clock(self.loop.now)
        if self.postgres and self.postgres.look_again():
            self.loop.call_later(later, self._look_again, 2 * later, context=Context())

    async def leap(self, seconds: float) -> None:
        """Let time pass. A long time is leapt over when nobody is served: clocks and TTLs move on at once."""
        if seconds <= (PATIENCE if self.real else MANY_SECONDS):
            await asyncio.sleep(seconds)
            return
        for _ in range(1000):
            if not any(worker.phase == "asking" and not worker.gone for worker in self.workers):
                break
            await asyncio.sleep(0.02)
        if self.real:
            self.loop.leap(seconds)
            self.network.control("EVAL", AGE, "0", str(int(seconds * 1000)))
        else:
            self.loop.now += seconds
        await asyncio.sleep(0.001)

    def _deviate(self, deviation: Deviation, worker: Worker, step: Step) -> None:
        """Disturb the worker at this step; `after` means that the server has executed it already."""
        action, after = deviation.action, deviation.after
        if after and action in ("lost", "cut"):
            self.repeated(worker)
        when = f"{'after' if after else 'before'} {step.label}"
        self.tell(worker, f"-- {action}{' after' if after else ''} {step.label}")
        kind, target = FAULT_KINDS.get(action, action), "redis" if action == "flush" else worker.name
        self.faults.append(Fault(self.loop.now, kind, target, "forgets everything" if action == "flush" else when))
        worker.disturbed = worker.disturbed or action in EXCUSED
        worker.unaware = worker.unaware or action in UNNOTICED
        began = self.loop.now

        def send() -> None:
            worker.delay += self.loop.now - began
            self.faults.append(Fault(self.loop.now, "released", worker.name))
            if not after:
                self.network.pending.append(step)

        def resume() -> None:
            worker.delay += self.loop.now - began
            self.faults.append(Fault(self.loop.now, "resumed", worker.name))
            if not after:
                self.network.pending.append(step)
            self.loop.resume(worker.process)

        if action == "late":
            self.loop.call_later(LATE_SPANS * self.span, send, context=Context())
        elif action == "hold":
            self._when_another_gets_on(worker, send)
        elif action == "freeze":
            worker.process.frozen = True
            self._when_another_gets_on(worker, resume)
        elif action == "hang":
            self._hang(worker, send)
        elif action == "kill":
            step.pipe.unsent -= not after
            self._kill(worker)
        elif action == "lost" or action == "reset":
            step.pipe.reset()
        elif action == "cut":
            self.network.cut.add(worker.process)
            for pipe in [pipe for pipe in list(self.network.pipes) if pipe.process is worker.process]:
                pipe.reset()
            self.loop.call_later(CUT_SPANS * self.span, self.network.cut.discard, worker.process, context=Context())
        elif action == "flush":
            self.flushed = True
            for other in self.workers:
                other.disturbed = other.disturbed or other.phase in ("inside", "asking")
            self.network.control("FLUSHALL")
            self.network.pending.append(step)
        elif action == "cancel":
            if not after:
                self.network.pending.append(step)
            if worker.task:
                worker.task.cancel()

    def _hang(self, worker: Worker, send: Callable[[], None]) -> None:
        pipes = [pipe for pipe in list(self.network.pipes) if pipe.process is worker.process]
        for pipe in pipes:
            pipe.silent = True

        def speak() -> None:
            send()
            for pipe in pipes:
                pipe.speak()

        self._when_another_gets_on(worker, speak)

    def _kill(self, worker: Worker) -> None:
        worker.process.dead = True
        worker.phase = "dead"
        for pipe in [pipe for pipe in list(self.network.pipes) if pipe.process is worker.process]:
            pipe.close()
        self._gone(worker)

    def _when_another_gets_on(self, worker: Worker, go_on: Callable[[], None]) -> None:
        entry = (worker, go_on)
        self._waiting.append(entry)

        def enough() -> None:
            if entry in self._waiting:
                self._waiting.remove(entry)
                go_on()

        self.loop.call_later(CUT_SPANS * self.span, enough, context=Context())

    # ---- time

    def _block(self, seconds: float) -> None:
        """Stand for time.sleep."""
        if not self.real:
            self.loop.now += seconds
        else:
            _real_sleep(seconds)

    def _wait(self, seconds: float) -> None:
        """Real time: sleep until a timer is due or the server says something."""
        import select

        blocked = [pipe.socket for pipe in list(self.network.pipes) if pipe.expected and not pipe.closed]
        if seconds <= 0:
            return
        if blocked:
            if select.select(blocked, [], [], seconds)[0]:
                self.network.poll()
        else:
            _real_sleep(seconds)


from time import sleep as _real_sleep  # noqa: E402  bound before a world changes the module
