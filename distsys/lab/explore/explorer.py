"""The search: every scene of a kind, each with every schedule that belongs to it, and the confirmation.

It runs in a worker process, because it shows the candidate other clocks, pids and host names than this machine has.
What it finds is VIOLATED only after the same schedule has shown it again in real time, on an unmodified server.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from distsys.lab.explore import breakers, retries
from distsys.lab.explore.build import WrongShape, loader, named
from distsys.lab.explore.endpoints import ENDPOINT_SCENES, EndpointRun
from distsys.lab.explore.exploration import Exploration, SceneVerdict
from distsys.lab.explore.guards import GuardRun, Scripts
from distsys.lab.explore.limiters import LIMITER_SCENES, LimiterRun
from distsys.lab.explore.locks import LOCK_SCENES, LockRun
from distsys.lab.explore.loop import Hung
from distsys.lab.explore.postgres import make_tables
from distsys.lab.explore.run import Deviation, Outcome, Scene
from distsys.lab.explore.servers import Sockets, VirtualClock
from distsys.lab.explore.worlds import World, deceive
from distsys.lab.history.history import Finding, History, Status
from distsys.lab.history.words import count
from distsys.lab.show.verdict import Verdict

CONFIRMATIONS = 3  # tries to show a schedule again in real time
THREE_WORKERS = (
    "three workers, each command disturbed in turn; who was disturbed is excused, the others must not suffer"
)
SCRIPTED = "each scene once, in virtual time, before a dependency that does as the scene says"


@dataclass(frozen=True)
class Kind:
    """A kind of rule that can be explored: its scenes, and how a run of it is made."""

    scenes: tuple[Scene, ...]
    run: Callable[[Any, float], Any]  # (candidate, span) -> a run that lacks the server and the schedule
    searched: str = THREE_WORKERS
    served: bool = True  # by servers, in virtual time and again in real time
    seconds: int = 60  # of real time: a run that takes longer hangs


def _lock(candidate: Any, span: float) -> Any:
    return partial(LockRun, loader(candidate), span=span)


def _limiter(candidate: Any, span: float) -> Any:
    return partial(LimiterRun, loader(candidate), span=span)


def _guard(candidate: Any, span: float, settings: dict[str, Any]) -> Any:
    return partial(GuardRun, loader(candidate), settings=settings, learned={})


def _endpoint(candidate: Any, span: float) -> Any:
    return partial(EndpointRun, loader(candidate), learned={})


def _scripted(scripts: Scripts, settings: dict[str, Any]) -> Kind:
    return Kind(tuple(scripts), partial(_guard, settings=settings), SCRIPTED, served=False, seconds=5)


KINDS = {
    "lock": Kind(LOCK_SCENES, _lock),
    "limiter": Kind(LIMITER_SCENES, _limiter),
    "endpoint": Kind(ENDPOINT_SCENES, _endpoint),
    "breaker": _scripted(breakers.SCENES, breakers.SETTINGS),
    "retry": _scripted(retries.SCENES, retries.SETTINGS),
}


@dataclass(frozen=True)
class Order:
    """What a worker process is to explore."""

    kind: str
    candidate: Any
    span: float
    sockets: Sockets | None
    schedule: str | None = None  # this one alone, in real time
    only: tuple[int, ...] = ()  # the numbers of the scenes; () for all
    to_the_end: bool = True  # go on after a scene that is violated
    seed: int = 7
    promise: str | None = None  # of a limiter
    setup: str = ""  # SQL that makes the candidate's tables


class Search:
    """The scenes of one order, one after the other."""

    def __init__(self, order: Order) -> None:
        self.kind, self.sockets = KINDS[order.kind], order.sockets
        self.hung = False
        self.make = partial(self.kind.run(order.candidate, order.span), seed=order.seed)
        self.clock = VirtualClock(order.sockets.page) if order.sockets else None
        for dsn in (order.sockets.virtual_dsn, order.sockets.real_dsn) if order.sockets else ():
            if dsn:
                make_tables(dsn, order.setup)
        if order.kind == "limiter":
            self.make = partial(self.make, promise=order.promise or self._promise(named(order.candidate)))

    def _promise(self, names: set[str]) -> str:
        """Return what a limiter promises: by what it names, or else by what it does undisturbed."""
        if names & {"limit", "window", "capacity", "refill_rate"}:
            return "bucket" if names & {"capacity", "refill_rate"} else "window"
        undisturbed = self.kind.scenes[0].options
        return "window" if self.run(promise="window", **undisturbed).status != "VIOLATED" else "bucket"

    def run(self, *, real: bool = False, **options: Any) -> Outcome:
        """Run once, in virtual or in real time; not for ever, whatever the candidate does."""

        def stop(*_: Any) -> None:
            raise Hung

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.kind.seconds, 1.0)
        try:
            return self._run(real, options)
        except Hung:
            self.hung = True
            status: Status = "INCONCLUSIVE" if self.kind.served else "VIOLATED"
            finding = Finding(status, f"it blocked its process for {self.kind.seconds} s: nothing else could run")
            return Outcome(finding, [], [], History())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _run(self, real: bool, options: dict[str, Any]) -> Outcome:
        if self.sockets is None or self.clock is None:
            return self.make(**options).run()  # type: ignore[no-any-return]
        if real:
            return self.make(self.sockets.real, dsn=self.sockets.real_dsn, real=True, **options).run()  # type: ignore[no-any-return]
        own = {"dsn": self.sockets.virtual_dsn, "set_clock": self.clock.set}
        return self.make(self.sockets.virtual, **own, **options).run()  # type: ignore[no-any-return]

    def scene(self, scene: Scene) -> SceneVerdict:
        """Search one scene, up to the first violation that is confirmed."""
        tried, unclear = 0, ""
        for schedule, world in self._schedules(scene):
            options = {"schedule": schedule, "world": world, **scene.options} if self.kind.served else scene.options
            outcome = self.run(**options)
            tried += 1
            words = ", ".join(map(str, schedule))
            if outcome.status == "VIOLATED":
                for _ in range(CONFIRMATIONS):
                    again = self.run(real=True, **options) if self.kind.served else outcome
                    if again.status == "VIOLATED":
                        return self._found(scene, again, tried, words)
                unclear = unclear or f"in the model only: {outcome.summary} ({words or 'no disturbance'})"
            elif outcome.status == "INCONCLUSIVE":
                unclear = unclear or f"{outcome.summary}{f' ({words})' if words else ''}"
                if not schedule:
                    break
        if unclear or not tried:
            return SceneVerdict(scene.title, "INCONCLUSIVE", unclear or "no command was seen to disturb", tried)
        return SceneVerdict(scene.title, "HELD", f"{count(tried, 'schedule')}, no violation", tried)

    def _found(self, scene: Scene, outcome: Outcome, tried: int, schedule: str) -> SceneVerdict:
        verdict = Verdict.of(
            [(outcome.history, outcome.finding)], title=scene.title, claim=schedule or "no disturbance", stats={}
        )
        return SceneVerdict(
            scene.title, "VIOLATED", outcome.summary, tried, 0, schedule, tell_story(outcome), scene.hint, verdict
        )

    def _schedules(self, scene: Scene) -> Iterator[tuple[tuple[Deviation, ...], World | None]]:
        """Yield the schedules of a scene: one deviation at each distinct step of an undisturbed run."""
        for world in scene.worlds:
            yield (), world
            if not scene.actions:
                continue
            steps = self.run(world=world, **scene.options).steps
            for label in _protocol(steps):
                for action, after in scene.actions:
                    yield (Deviation(label, action, after),), world


def _protocol(steps: list[tuple[str, str, str]]) -> list[str]:
    """Return the labels of the steps without those that make tables, and the advisory lock around them.

    Every copy of a candidate makes its tables in its first call; in production that is done once, at a deployment.
    """
    making = set[str]()
    for worker in dict.fromkeys(label.partition("#")[0] for label, *_ in steps):
        own = [(label, text) for label, _, text in steps if label.startswith(f"{worker}#")]
        for n, (label, text) in enumerate(own):
            if text.upper().startswith(("CREATE ", "ALTER ", "DROP ")):
                making |= {label, *(near for near, other in own[max(0, n - 1) : n + 2] if "advisory" in other)}
    return [label for label, *_ in steps if label not in making]


def search(order: Order, tell: Callable[[SceneVerdict], None]) -> None:
    """Run every scene that was ordered, and tell of each; called in a worker process."""
    found = Search(order)
    if order.schedule is not None:
        deviations = tuple(Deviation.parse(part) for part in order.schedule.split(",") if part.strip())
        scene = found.kind.scenes[order.only[0] - 1 if order.only else 0]
        outcome = found.run(real=True, schedule=deviations, world=scene.worlds[0], **scene.options)
        shown = found._found(scene, outcome, 1, order.schedule)
        shown.status, shown.number = outcome.status, found.kind.scenes.index(scene) + 1
        tell(shown)
        return
    scenes = found.kind.scenes
    for n, scene in enumerate(scenes):
        if order.only and n + 1 not in order.only:
            continue
        one = found.scene(scene)
        one.number = n + 1
        tell(one)
        if found.hung or (one.status != "HELD" and (n == 0 or not order.to_the_end)):
            return  # if it does not even work undisturbed, a disturbance would show nothing new


def tell_story(outcome: Outcome, most: int = 16) -> list[str]:
    """Return the run as lines; what repeats is folded."""
    lines, before = list[str](), ""
    for at, worker, what in outcome.story:
        text = f"{worker}  {what}".rstrip()
        rest = text.partition("#")[2].partition(" ")[2] if "#" in text else text
        if rest != before:
            lines.append(f"{at:7.3f} s  {text}")
        before = rest
    return lines if len(lines) <= most else [*lines[: most // 2 - 1], "      ...", *lines[-most // 2 :]]


def serve(payload: bytes, sock: socket.socket) -> None:
    """Explore what the payload names, in a worker process: one pickle for each scene, or for an error."""
    import cloudpickle

    sock.setblocking(True)
    logging.disable(logging.CRITICAL)  # a disturbed candidate logs thousands of failures; the story tells of them

    def tell(found: Any) -> None:
        data = pickle.dumps(found)
        sock.sendall(struct.pack("<I", len(data)) + data)

    deceive()  # before the candidate and its libraries are loaded
    gc.freeze()  # each run collects its garbage; what is here already is none
    try:
        search(cloudpickle.loads(payload), tell)
    except WrongShape as wrong:
        tell(str(wrong))


async def explored(
    processes: Any, name: str, order: Order, heard: Callable[[SceneVerdict], None] | None = None
) -> Exploration:
    """Fork the worker that explores, and gather what it tells. Raises WrongShape if the candidate can't be tried."""
    import cloudpickle

    process = await processes.fork("distsys.lab.explore.explorer:serve", cloudpickle.dumps(order), name="explorer")
    found, data, loop = list[SceneVerdict](), b"", asyncio.get_running_loop()
    try:
        while more := await loop.sock_recv(process.sock, 1 << 16):
            data += more
            while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack_from("<I", data)[0]):
                told, data = pickle.loads(data[4 : 4 + size]), data[4 + size :]  # noqa: S301  from our own fork
                if isinstance(told, str):
                    raise WrongShape(f"{name}: {told}")
                found.append(told)
                if heard is not None:
                    heard(told)
        if await process.exited():
            raise RuntimeError(f"the explorer failed:\n{process.tail()}")
    finally:
        await process.end()
        process.close()
    kind = KINDS[order.kind]
    chosen = order.only or range(1, len(kind.scenes) + 1)
    titles = {n: kind.scenes[n - 1].title for n in chosen}
    if order.schedule is not None:
        titles = {found[0].number: found[0].scene}
    return Exploration(name, kind.searched, order.sockets.version if order.sockets else "", titles, found)
