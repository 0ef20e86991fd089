"""The search: every command of a candidate lock, with one disturbance each, in virtual time; then the confirmation.

It runs in a worker process, because it shows the candidate other clocks, pids and host names than this machine has.
What it finds is VIOLATED only after the same schedule has shown it again in real time, on an unmodified server.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distsys.lab.check.limits import Allowance
from distsys.lab.explore.limiters import BOUNDARY, BURST, HOUR, IMPATIENT, LIMIT, RACE, SKEWED, LimiterRun, asks
from distsys.lab.explore.locks import LockRun
from distsys.lab.explore.run import Deviation, Outcome
from distsys.lab.explore.servers import Sockets, VirtualClock
from distsys.lab.explore.worlds import SKEWED_CLOCKS, WORLDS, World
from distsys.lab.history.history import Status
from distsys.lab.history.words import count
from distsys.lab.run.guard import looks_sync
from distsys.lab.run.worker import ALIASES
from distsys.lab.show.html import escape, table
from distsys.lab.show.verdict import MARK

CONFIRMATIONS = 3  # tries to show a schedule again in real time


@dataclass(frozen=True)
class Scene:
    """One kind of disturbance, and one verdict on it."""

    title: str
    actions: tuple[tuple[str, bool], ...] = ()  # (action, after the step)
    worlds: tuple[World, ...] = WORLDS[:1]
    options: dict[str, Any] = field(default_factory=dict)  # of the run


BOTH = (False, True)
LOCK_SCENES = (
    Scene("nothing is disturbed: three workers take turns", worlds=WORLDS),
    Scene("the work takes longer than the TTL", options={"section": 2.5}),
    Scene("a command is late, by less than half a TTL", (("late", False),)),
    Scene("a command is held back until another worker is inside", (("hold", False),)),
    Scene("a process is killed", tuple(("kill", after) for after in BOTH)),
    Scene("a process stands still until another is inside", tuple(("freeze", after) for after in BOTH)),
    Scene("the server is silent for one worker", tuple(("hang", after) for after in BOTH)),
    Scene("a connection breaks", (("reset", False), ("lost", True), ("cut", False), ("cut", True))),
    Scene("the server forgets everything", (("flush", False),)),
    Scene("a worker is cancelled", tuple(("cancel", after) for after in BOTH)),
    Scene(
        "a connection breaks, and the client does not retry", (("reset", False), ("lost", True)), options={"retries": 0}
    ),
)
LIMITER_SCENES = (
    Scene("three workers ask at once, and come again later", worlds=WORLDS[:2], options={"plan": BURST}),
    Scene("a burst on both sides of a second", options={"plan": BOUNDARY}),
    Scene("an impatient client is refused again and again", options={"plan": IMPATIENT}),
    Scene("the clocks of three hosts are 30 s apart", worlds=(SKEWED_CLOCKS,), options={"plan": SKEWED}),
    Scene("a command is held back until another request is admitted", (("hold", False),), options={"plan": RACE}),
    Scene("a process is killed", tuple(("kill", after) for after in BOTH), options={"plan": RACE}),
    Scene("a process stands still until another is admitted", tuple(("freeze", after) for after in BOTH),
          options={"plan": RACE}),
    Scene("a connection breaks", (("reset", False), ("lost", True), ("cut", True)), options={"plan": RACE}),
    Scene("what is left behind", options={"plan": HOUR, "keys": True}),
)  # fmt: skip


@dataclass
class Found:
    """What one scene showed: how many schedules, and the counterexample if there is one."""

    scene: str
    status: Status
    summary: str
    schedules: int
    schedule: str = ""  # "w1#4 hold"
    story: list[str] = field(default_factory=list)


@dataclass
class Exploration:
    """A lock explored: one verdict for each scene, and how much was searched."""

    candidate: str
    server: str
    found: list[Found]

    @property
    def status(self) -> Status:
        """VIOLATED if one scene is; else INCONCLUSIVE if one is; else HELD."""
        statuses = {found.status for found in self.found}
        return "VIOLATED" if "VIOLATED" in statuses else "INCONCLUSIVE" if statuses - {"HELD"} else "HELD"

    @property
    def schedules(self) -> int:
        """How many schedules were run."""
        return sum(found.schedules for found in self.found)

    @property
    def passed(self) -> bool:
        """Whether every scene held."""
        return self.status == "HELD"

    def __str__(self) -> str:
        searched = f"{count(self.schedules, 'schedule')}: three workers, each command disturbed in turn"
        lines = [f"{self.candidate}: {self.status}, {searched}"]
        for found in self.found:
            what = "" if found.status == "HELD" else f" - {found.summary}"
            lines.append(f"  {MARK[found.status]} {found.scene}{what}")
        lines.append("  A worker that was disturbed is excused; the others must not suffer from it.")
        for found in self.found:
            if found.status == "VIOLATED":
                seen = f"seen again in real time on {self.server}"
                lines += ["", f"  {found.summary}", f"  schedule: {found.schedule or 'no disturbance'}, {seen}"]
                lines += [f"    {line}" for line in found.story]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *_ = str(self).splitlines()
        rows = [
            (MARK[f.status], f.scene, f"{f.schedules:,}", "" if f.status == "HELD" else f.summary) for f in self.found
        ]
        page = f"<p><b>{escape(head)}</b></p>{table(('', 'scene', 'schedules', 'what happened'), rows)}"
        for found in (found for found in self.found if found.status == "VIOLATED"):
            line = f"{found.schedule or 'no disturbance'}: {found.summary}"
            story = escape("\n".join(found.story))
            page += f"<details><summary>{escape(line)}</summary><pre>{story}</pre></details>"
        return f"<div>{page}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON knows it."""
        found = [vars(found) for found in self.found]
        return {"candidate": self.candidate, "status": self.status, "schedules": self.schedules, "scenes": found}


@dataclass(frozen=True)
class Kind:
    """A kind of rule that can be explored: its scenes, and how a run of it is made."""

    scenes: tuple[Scene, ...]
    run: Callable[[Any, float], Any]  # (candidate, span) -> a run that lacks the server and the schedule


def lock_run(candidate: Any, span: float) -> Any:
    """Return a run of a lock, to be completed."""
    return partial(LockRun, loader(candidate), build_lock, span=span)


def limiter_run(candidate: Any, span: float) -> Any:
    """Return a run of a limiter, to be completed: a bucket if it takes a capacity, else a window."""
    bucket = "capacity" in inspect.signature(candidate).parameters
    allowance = Allowance(LIMIT, refill_rate=LIMIT / span) if bucket else Allowance(LIMIT, span)
    return partial(LimiterRun, loader(candidate), build_limiter, span=span, allowance=allowance)


KINDS = {"lock": Kind(LOCK_SCENES, lock_run), "limiter": Kind(LIMITER_SCENES, limiter_run)}


def explore(kind: Kind, candidate: Any, sockets: Sockets, span: float, tell: Callable[[Found], None]) -> None:
    """Run every scene, and tell of each; called in a worker process."""
    clock = VirtualClock(sockets.page)
    run = kind.run(candidate, span)
    for scene in kind.scenes:
        found = _explore_scene(scene, run, sockets, clock)
        tell(found)
        if scene is kind.scenes[0] and found.status != "HELD":
            return  # it does not even work undisturbed: a disturbance would show nothing new


def replay(kind: Kind, candidate: Any, sockets: Sockets, span: float, schedule: str) -> Found:
    """Run one schedule in real time, on the unmodified server."""
    deviations = tuple(Deviation.parse(part) for part in schedule.split(",") if part.strip())
    outcome = kind.run(candidate, span)(sockets.real, deviations, real=True).run()
    return Found("one schedule", outcome.status, outcome.summary, 1, schedule, tell_story(outcome))


def _explore_scene(scene: Scene, run: Any, sockets: Sockets, clock: VirtualClock) -> Found:
    tried, unclear = 0, ""
    for schedule, world in _schedules(scene, partial(run, sockets.virtual, set_clock=clock.set)):
        options = {"schedule": schedule, "world": world, **scene.options}
        outcome = run(sockets.virtual, set_clock=clock.set, **options).run()
        tried += 1
        words = ", ".join(map(str, schedule))
        if outcome.status == "VIOLATED":
            for _ in range(CONFIRMATIONS):
                real = run(sockets.real, real=True, **options).run()
                if real.status == "VIOLATED":
                    return Found(scene.title, "VIOLATED", real.summary, tried, words, tell_story(real))
            unclear = unclear or f"in the model only: {outcome.summary} ({words or 'no disturbance'})"
        elif outcome.status == "INCONCLUSIVE":
            unclear = unclear or f"{outcome.summary}{f' ({words})' if words else ''}"
            if not schedule:
                break
    if unclear or not tried:
        return Found(scene.title, "INCONCLUSIVE", unclear or "no command was seen to disturb", tried)
    return Found(scene.title, "HELD", f"{count(tried, 'schedule')}, no violation", tried)


def _schedules(scene: Scene, run: Any) -> Iterator[tuple[tuple[Deviation, ...], World]]:
    """Yield the schedules of a scene: one deviation at each distinct step of an undisturbed run."""
    for world in scene.worlds:
        if not scene.actions:
            yield (), world
            continue
        for label, *_ in run(world=world, **scene.options).run().steps:
            for action, after in scene.actions:
                yield (Deviation(label, action, after),), world


def tell_story(outcome: Outcome, most: int = 16) -> list[str]:
    """Return the run as lines; what repeats is folded."""
    lines, before = list[str](), ""
    for at, worker, what in outcome.story:
        text = f"{worker}  {what}"
        if text.partition("#")[2].partition(" ")[2] != before or "#" not in text:
            lines.append(f"{at:7.3f} s  {text}")
        before = text.partition("#")[2].partition(" ")[2]
    return lines if len(lines) <= most else [*lines[: most // 2 - 1], "      ...", *lines[-most // 2 :]]


def loader(candidate: Any) -> Callable[[], Any]:
    """Return a function that makes a copy of the candidate's module for each process; libraries are shared."""
    from cloudpickle import cloudpickle

    module = sys.modules.get(getattr(candidate, "__module__", "") or "")
    own = module is not None and not _is_library(module)
    if own and module is not None and module.__name__ != "__main__":
        cloudpickle.register_pickle_by_value(module)
    data = cloudpickle.dumps(candidate)

    def load() -> Any:
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.clear()  # or every process gets the same class
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.clear()
        return cloudpickle.loads(data)

    return load


def _is_library(module: Any) -> bool:
    path = getattr(module, "__file__", None) or ""
    return module.__name__.partition(".")[0] == "distsys" or any(
        path.startswith(folder) for folder in sysconfig.get_paths().values() if folder
    )


def build_lock(candidate: Any, redis: Any, ttl: float) -> Any:
    """Call the candidate with what its parameters name: redis, name and ttl."""
    lock = _build(candidate, "a lock", redis=redis, name="explored", ttl=ttl)
    if looks_sync(lock):
        raise TypeError("it blocks: only async locks can be explored")
    return lock


def build_limiter(candidate: Any, redis: Any, window: float) -> Any:
    """Call the candidate with what its parameters name: redis, limit and window, or capacity and refill_rate."""
    facts = {"limit": LIMIT, "window": window, "capacity": LIMIT, "refill_rate": LIMIT / window, "name": "explored"}
    limiter = _build(candidate, "a limiter", redis=redis, **facts)
    if not inspect.iscoroutinefunction(asks(limiter)):
        raise TypeError("it blocks: only async limiters can be explored")
    return limiter


def _build(candidate: Any, what: str, **facts: Any) -> Any:
    arguments = dict[str, Any]()
    given = getattr(candidate, "keywords", ())
    for name, parameter in inspect.signature(candidate).parameters.items():
        kind = ALIASES.get(name, name)
        if kind in facts and name not in given:
            arguments[name] = facts[kind]
        elif parameter.default is parameter.empty and name not in given and "VAR_" not in parameter.kind.name:
            raise TypeError(f"it asks for {name!r}; {what} that is explored is given {', '.join(facts)}")
    return candidate(**arguments)


def serve(payload: bytes, sock: socket.socket) -> None:
    """Explore what the payload names, in a worker process: one JSON line for each scene."""
    import cloudpickle

    sock.setblocking(True)
    logging.disable(logging.CRITICAL)  # a disturbed candidate logs thousands of failures; the story tells of them

    def tell(found: Found) -> None:
        sock.sendall(json.dumps(vars(found)).encode() + b"\n")

    kind, candidate, sockets, span, schedule = cloudpickle.loads(payload)
    if schedule is None:
        explore(KINDS[kind], candidate, sockets, span, tell)
    else:
        tell(replay(KINDS[kind], candidate, sockets, span, schedule))


async def explored(
    processes: Any, sockets: Sockets, kind: str, candidate: Any, name: str, span: float, schedule: str | None,
    heard: Callable[[Found], None] | None = None,
) -> Exploration:  # fmt: skip
    """Fork the worker that explores, and gather what it tells."""
    import cloudpickle

    payload = cloudpickle.dumps((kind, candidate, sockets, span, schedule))
    process = await processes.fork("distsys.lab.explore.explorer:serve", payload, name="explorer")
    found, rest, loop = list[Found](), b"", asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(process.sock, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                found.append(Found(**json.loads(line)))
                if heard is not None:
                    heard(found[-1])
        if await process.exited():
            raise RuntimeError(f"the explorer failed:\n{process.tail()}")
    finally:
        await process.end()
        process.close()
    return Exploration(name, sockets.version, found)
