"""An argument, run: a claim, candidates that should hold or break it, faults at exact points, and a check.

The script of an experiment is the interleaving: it lets the workers go, waits for what they did, and strikes at their
checkpoints. It waits for events only, so a bad arm breaks in every run and not in a lucky one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from distsys.lab.history.history import Check, Expected, Fault, History, Op
from distsys.lab.run.worker import Job, Workload

if TYPE_CHECKING:
    from distsys.lab.testbed.processes import Process
    from distsys.lab.testbed.proxy import TcpProxy
    from distsys.lab.testbed.servers import Server
    from distsys.lab.testbed.testbed import Testbed

PAST = {"stop": "stopped", "kill": "killed", "hold": "held", "block": "held", "cancel": "cancelled"}
OUTCOMES = {"call": "called", "ok": "did", "fail": "failed", "info": "broke"}
Signal = tuple[str, str, str]
"""(process, what, name): what is one of OUTCOMES, "ready", "served", "waiting", "at" or "ended"."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One candidate and the verdict expected of it."""

    name: str
    candidate: Any
    expected: Expected | None
    params: Mapping[str, Any] = field(default_factory=dict)  # for the workload, over the experiment's
    point: str = ""  # where this candidate's own weak moment is, for scripts that strike there
    prepare: Callable[[Run], Awaitable[None]] | None = None  # over the experiment's


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`workload` runs in each worker, `script` in the controller, `check` on the history they leave."""

    name: str
    claim: str
    arms: tuple[Arm, ...]
    workload: Workload
    script: Callable[[Run], Awaitable[None]]
    check: Check
    prepare: Callable[[Run], Awaitable[None]]  # servers and starting state; fills run.urls
    final: Callable[[Run], Awaitable[dict[str, Any]]] | None = None  # what the controller reads at the end
    ttl: float = 0.3
    patience: float = 0.2  # a worker that waits longer than this in one call says so ...
    patience_ttls: float = 0.0  # ... and longer than so many TTLs
    params: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False  # it measures: its arms run one after the other


Script = Callable[["Run"], Awaitable[None]]


class Experiments(list[Experiment]):
    """The experiments of one rule. Calling it returns a decorator that makes an experiment of a script, and adds it."""

    def __init__(self, **defaults: Any) -> None:
        self.defaults = defaults

    def __call__(self, name: str, claim: str, *arms: Arm, **options: Any) -> Callable[[Script], Script]:
        """Return the decorator; `options` are fields of Experiment, over the defaults."""

        def add(script: Script) -> Script:
            self.append(Experiment(name=name, claim=claim, arms=arms, script=script, **self.defaults | options))
            return script

        return add


def name_of(candidate: Any) -> str:
    """Return the candidate's name, for verdicts."""
    return getattr(candidate, "__name__", None) or repr(candidate)


class Stalled(RuntimeError):
    """The script waited in vain: nothing of what it expects happened."""


class Actor:
    """A worker process as the script sees it."""

    def __init__(self, run: Run, process: Process, name: str) -> None:
        self.run = run
        self.process = process
        self.name = name
        self.ended: Signal = (name, "ended", "")
        self.crash = ""

    def _said(self, what: str, op: str, task: str = "") -> Signal:
        return (task or self.name, what, op)

    did = partialmethod(_said, "did")
    failed = partialmethod(_said, "failed")
    broke = partialmethod(_said, "broke")
    called = partialmethod(_said, "called")
    waiting = partialmethod(_said, "waiting")
    at = partialmethod(_said, "at")  # a checkpoint

    def order(self, times: int = 1, **options: Any) -> None:
        """Have the worker make so many requests; `options` are those of its workload, `at` sets the virtual clock."""
        self.run.time = max(self.run.time, options.get("at", 0.0))
        self.send(do="order", times=times, **options)

    async def served(self) -> None:
        """Wait until the worker has carried out one order."""
        await self.run.until((self.name, "served", ""), self.ended)

    async def ask(self, times: int = 1, **options: Any) -> None:
        """Give an order, and wait until it is carried out."""
        self.order(times, **options)
        await self.served()

    def go(self, *, hold: str = "", stop: str = "", kill: str = "", block: str = "") -> None:
        """Let the worker start. At the named point it waits, stops (SIGSTOP), is killed, or blocks its event loop."""
        for action, point in {"hold": hold, "stop": stop, "kill": kill, "block": block}.items():
            if point:
                self.send(do="arm", point=point, action=action)
        self.send(do="go")

    async def reached(self, point: str) -> bool:
        """Wait until the worker is at the point, and stopped or dead if that was ordered.

        Return False if the worker ended before it came there.
        """
        if await self.run.until(self.at(point), self.ended) == self.ended:
            return False
        action = self.run.actions[self.name, point]
        if action == "stop":
            await self.process.stopped()
        elif action == "kill":
            await self.process.exited()
        return True

    def release(self, point: str) -> None:
        """Let a worker go on that waits or blocks at this point."""
        self.run.record("released", self.name, point)
        self.send(do="release", point=point)

    def resume(self) -> None:
        """Let a stopped worker go on (SIGCONT)."""
        self.run.record("resumed", self.name)
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End a worker that has shown all it can. This is no fault, and not in the history."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send the process a signal, unless it has ended."""
        if self.process.state != "exited":
            # Between its death and our hearing of it there is a moment in which it can't be signalled any more.
            with contextlib.suppress(ProcessLookupError):
                self.process.signal(number)

    def cancel(self, task: str) -> None:
        """Cancel one of the worker's tasks, by its name."""
        self.send(do="cancel", point=task)

    def send(self, **command: Any) -> None:
        """Send the worker a command, as one JSON line."""
        assert self.process.sock is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended before it heard
            self.process.sock.send(json.dumps(command).encode() + b"\n")


class Run:
    """One run of one arm: its workers, what they did, and what was done to them."""

    def __init__(
        self, testbed: Testbed, experiment: Experiment, arm: Arm, seed: int, number: int, workers: int
    ) -> None:
        self.testbed = testbed
        self.experiment = experiment
        self.arm = arm
        self.seed = seed
        self.number = number  # of the run in its lab
        self.workers = workers  # how many a crowd has
        self.params = {**experiment.params, **arm.params}
        self.ttl: float = self.params.pop("ttl", experiment.ttl)
        self.virtual = self.params.get("clock") == "virtual"
        self.time = 0.0  # that the virtual clock shows
        self.resource = f"{testbed.prefix}:{number}"
        self.urls: dict[str, Any] = {}
        self.actors: list[Actor] = []
        self.services: list[Actor] = []
        self.actions: dict[tuple[str, str], str] = {}
        self.nodes: list[Server] = []  # servers of this run alone
        self.link: TcpProxy | None = None
        self.cleanup = contextlib.AsyncExitStack()
        self._open: dict[tuple[str, int], Op] = {}  # calls without an answer so far
        self._done: list[Op] = []
        self._faults: list[Fault] = []
        self._seen: Counter[Signal] = Counter()
        self._news = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []
        self.started = 0.0
        self.point_read = False
        self._checkpoint = ""  # that the arm names, and the script waits for

    async def __aenter__(self) -> Run:
        return self

    async def __aexit__(self, *_: object) -> None:
        for actor in (*self.actors, *self.services):
            actor.kill()
            await actor.process.exited()
        await asyncio.gather(*self._readers)
        for actor in (*self.actors, *self.services):
            actor.process.close()
        await self.cleanup.aclose()

    # ---- for scripts

    async def start(self, count: int, **urls: list[Any]) -> list[Actor]:
        """Fork `count` workers that are connected and wait for go().

        `urls` may give each worker a server of its own: redis=[url1, url2].
        """
        new = list[Actor]()
        for i in range(count):
            own = {kind: each[i] for kind, each in urls.items()}
            name = f"w{len(self.actors) + 1}"
            new.append(await self._fork(name, self.experiment.workload, self.arm.candidate, own))
            self.actors.append(new[-1])
        for actor in new:
            await self.until((actor.name, "ready", ""), actor.ended)
        return new

    async def serve(self, name: str, workload: Workload) -> Actor:
        """Fork a service that the workers call, and wait until it serves. It ends after them."""
        service = await self._fork(name, workload, None, {})
        self._seen[service.ended] = 0  # of one before it
        self.services.append(service)
        service.go()
        await service.served()
        return service

    async def _fork(self, name: str, workload: Workload, candidate: Any, urls: dict[str, Any]) -> Actor:
        from cloudpickle import dumps

        self.started = self.started or self.now()
        patience = max(self.experiment.patience, self.experiment.patience_ttls * self.ttl)
        work = (workload, candidate, {**self.urls, **urls}, self.resource, self.ttl, patience, self.params)
        payload = dumps(Job(name, self.seed, *work))
        actor = Actor(self, await self.testbed.processes.fork("distsys.lab.run.worker:main", payload, name=name), name)
        self._readers.append(asyncio.create_task(self._listen(actor)))
        return actor

    async def until(self, *signals: Signal) -> Signal:
        """Wait for the first of `signals`; each occurrence counts once. Raises Stalled."""
        timeout = 10 + 5 * self.ttl
        try:
            async with asyncio.timeout(timeout):
                while True:
                    for one in signals:
                        if self._seen[one] > 0:
                            self._seen[one] -= one[1] != "ended"
                            return one
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            wanted = " or ".join(f"{process} {what} {name}".strip() for process, what, name in signals)
            raise Stalled(f"waited {timeout:g} s in vain for: {wanted}") from None

    def point(self, default: str = "") -> str:
        """Return where the arm's weak moment is: a checkpoint of the candidate's, where the script has a `default`."""
        self.point_read = True
        self._checkpoint = self.arm.point if default else ""
        return self.arm.point or default

    def point_missed(self) -> str:
        """Return why the point that the arm names had no effect; nothing if it had."""
        if self.arm.point and not self.point_read:
            return f"point={self.arm.point!r}: {self.experiment.name!r} strikes at points of its own; leave it out"
        if self._checkpoint and not any(point == self._checkpoint for _, point in self.actions):
            return f"point={self._checkpoint!r}: no worker came to a checkpoint of this name"
        return ""

    def now(self) -> float:
        """Return the time of the record: monotonic seconds, or what the virtual clock shows."""
        return self.time if self.virtual else time.monotonic()

    def record(self, kind: str, target: str, detail: str = "") -> None:
        """Put a fault into the history."""
        self._faults.append(Fault(self.now(), kind, target, detail))

    async def finish(self) -> list[str]:
        """Wait for every worker to end; return the names of those that did not, and are killed afterwards."""
        stuck = []
        for actors in (self.actors, self.services):
            for actor in actors:
                actor.send(do="finish")
            for actor in actors:
                try:
                    await self.until(actor.ended)
                except Stalled:
                    stuck.append(actor.name)
        return stuck

    def crashes(self) -> list[str]:
        """Return what workers raised that no script expected."""
        return [f"{actor.name}: {actor.crash}" for actor in self.actors if actor.crash]

    def history(self, **facts: Any) -> History:
        """Return what happened so far; `facts` are what the controller has read from the servers."""
        ops = sorted([*self._done, *self._open.values()], key=lambda op: op.called)
        faults = sorted(self._faults, key=lambda fault: fault.at)
        return History(tuple(ops), tuple(faults), self.started, self.now(), facts)

    # ---- what the workers say

    async def _listen(self, actor: Actor) -> None:
        sock, loop, rest = actor.process.sock, asyncio.get_running_loop(), b""
        assert sock is not None
        try:
            while data := await loop.sock_recv(sock, 65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(actor, json.loads(line))
        except ConnectionResetError:
            rest = b""  # killed with unread commands in its socket
        finally:
            self._signal(actor.ended)

    def _hear(self, actor: Actor, event: dict[str, Any]) -> None:
        kind = event["e"]
        if kind == "crash":
            actor.crash = event["detail"]
        elif kind == "at":
            self.actions[actor.name, event["point"]] = event["action"]
            self._faults.append(Fault(event["t"], PAST[event["action"]], actor.name, event["point"]))
            self._signal(actor.at(event["point"]))
        else:
            process = event.get("task") or actor.name
            if kind == "call":
                op = Op(process, event["name"], "info", event["t"], None, event["value"], event["token"])
                self._open[process, event["id"]] = op
            elif kind in OUTCOMES:
                told = {name: event[name] for name in ("detail", "value", "token") if name in event}
                op = self._open.pop((process, event["id"]))
                self._done.append(replace(op, status=kind, returned=event["t"], **told))
            self._signal((process, OUTCOMES.get(kind, kind), event.get("name", "")))

    def _signal(self, one: Signal) -> None:
        self._seen[one] += 1
        self._news.set()


def expect_violated(name: str, candidate: Any, **more: Any) -> Arm:
    """Return an arm that has to break its promise: the mistake."""
    return Arm(name=name, candidate=candidate, expected="VIOLATED", **more)


def expect_held(name: str, candidate: Any, **more: Any) -> Arm:
    """Return an arm that has to keep its promise: the rule."""
    return Arm(name=name, candidate=candidate, expected="HELD", **more)
