"""Breakers and retries: one guarded call before a scripted dependency, in virtual time. No server takes part.

The candidate is given those of call, clock, sleep and its kind's settings that its parameters name. It returns the
guarded call, or is a decorator, or has a method call(fn, ...). A setting that it does not name is its own affair: a
breaker without failure_threshold may open when it likes, if only it opens.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distsys.lab.explore.build import WrongShape, build, method_of, named
from distsys.lab.explore.loop import ExploreLoop, Hung, Process, running_process
from distsys.lab.explore.run import Outcome, Scene, Violated
from distsys.lab.explore.worlds import World, inhabited
from distsys.lab.history.history import Fault, Finding, History, Op
from distsys.lab.run.guard import plain
from distsys.lab.simulate.virtual_loop import Stuck

ONE_PROCESS = World("one process", ("host1",), (101,), (0.0,))
REQUEST_SECONDS = 0.001  # what an answer takes
MOST_REQUESTS = 1000  # of one call: then it will never give up
PLENTY = 1e7  # virtual seconds

_caller: ContextVar[Result | None] = ContextVar("distsys_explored_caller", default=None)


class HttpError(Exception):
    """An error response. It remembers which of its facts the candidate has looked at."""

    def __init__(self, status: int, what: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status} {what}".rstrip())
        self.facts = {"status": status, "retry_after": retry_after}
        self.looked: set[str] = set()

    def _fact(self, name: str) -> Any:
        self.looked.add(name)
        return self.facts[name]

    status = property(partial(_fact, name="status"))
    status_code = status
    retry_after = property(partial(_fact, name="retry_after"))


TRANSIENT: tuple[tuple[Any, ...], ...] = (
    (ConnectionResetError, 104), (HttpError, 503), (ConnectionRefusedError, 111), (TimeoutError,),
)  # fmt: skip
"""Failures that pass, each as a class and its first arguments."""


@dataclass(eq=False)
class Result:
    """What a caller got: an answer or an error, how often its call was sent, and after how many seconds."""

    answer: Any = None
    error: BaseException | None = None
    sent: list[float] = field(default_factory=list)  # when
    failures: list[BaseException] = field(default_factory=list)  # what the dependency raised, in turn
    asked: tuple[Any, ...] = ("/",)  # the arguments of the call
    ended: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether it got an error without having been sent."""
        return self.error is not None and not self.sent

    @property
    def tells(self) -> bool:
        """Whether the caller hears of the last failure: as its error, or as the reason of it."""
        error, seen = self.error, set[int]()
        last = self.failures[-1]
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            if error is last or repr(last) in repr(error):
                return True
            error = error.__cause__ or error.__context__
        return False

    @property
    def gaps(self) -> list[float]:
        """The seconds between an answer and the next attempt."""
        return [b - a - REQUEST_SECONDS for a, b in zip(self.sent, self.sent[1:], strict=False)]


@dataclass(eq=False)
class Stage:
    """A guarded call and the dependency behind it. `answers` is asked for what each request is answered.

    An answer that is an exception is raised, a future is awaited.
    """

    loop: ExploreLoop
    settings: dict[str, Any]
    candidate: Any
    learned: dict[str, Any]  # what earlier scenes found out: early and late of a breaker, transient of a retry
    answers: Callable[[], Any] = lambda: "done"
    ops: list[Op] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    failures: int = 0

    def __post_init__(self) -> None:
        self.given = named(self.candidate)
        self.guarded = self.another()

    def another(self, **settings: Any) -> Callable[..., Any]:
        """Return the dependency's call, guarded by the candidate anew."""

        async def call(*path: Any, **more: Any) -> Any:
            return await self.dependency(*path, **more)

        facts = {"call": call, "clock": self.loop.time, "sleep": asyncio.sleep}
        made = build(self.candidate, **facts, **self.settings | settings)
        if "call" not in self.given:
            guard = made if callable(made) else method_of(made, "call", "execute", "call_async")
            if guard is None:
                raise WrongShape(f"{type(made).__name__} guards nothing: no decorator, and no method call(fn, ...)")
            made = guard(call) if guard is made else partial(guard, call)
            if inspect.iscoroutine(made):  # it was no decorator: it calls what it is given
                made.close()
                made = partial(guard, call)
        if not callable(made):
            raise WrongShape(f"it returned {made!r} for a guarded call: that is no function")
        return made  # type: ignore[no-any-return]

    @property
    def early(self) -> float:
        """For so many seconds after it opened a breaker refuses."""
        return float(self.learned.get("early", 15.0))

    @property
    def late(self) -> float:
        """So many seconds after it opened a breaker has admitted a probe."""
        return float(self.learned.get("late", 45.0))

    @property
    def request_number(self) -> int:
        """How many requests of the same call came before the one that is answered."""
        caller = _caller.get()
        return len(caller.sent) - 1 if caller else 0

    async def dependency(self, *path: Any, **more: Any) -> Any:
        """Answer one request."""
        caller = _caller.get() or Result(asked=path)
        caller.sent.append(self.loop.now)
        must(
            path == caller.asked and not more,
            f"called with {caller.asked}, it called the dependency with {path} {more}",
        )
        if len(caller.sent) > MOST_REQUESTS:
            raise Violated(f"it does not give up: {len(caller.sent):,} requests for one call")
        with self.recorded("arrive", "dependency"):
            await asyncio.sleep(REQUEST_SECONDS)
            answer = self.answers()
            if isinstance(answer, asyncio.Future):
                answer = await answer
            if isinstance(answer, BaseException):
                caller.failures.append(answer)
                raise answer
            return answer

    @contextmanager
    def recorded(self, name: str, process: str) -> Iterator[None]:
        """Record one op."""
        called, n = self.loop.now, len(self.ops)
        self.ops.append(Op(process, name, "info", called, None))
        try:
            yield
        except BaseException as error:
            self.ops[n] = Op(process, name, "info", called, self.loop.now, detail=f"{type(error).__name__}: {error}")
            raise
        self.ops[n] = Op(process, name, "ok", called, self.loop.now)

    def happened(self, what: str) -> None:
        """Put what the scene does into the record."""
        self.faults.append(Fault(self.loop.now, "server", "dependency", what))

    async def one(self, *path: Any) -> Result:
        """Make one guarded call, and return what came of it."""
        result, n = Result(asked=path or ("/",)), len(self.ops)
        _caller.set(result)
        try:
            with self.recorded("call", "w1"):
                result.answer = await plain(self.guarded, *result.asked)
        except (Violated, Stuck, Hung):
            raise
        except BaseException as error:
            result.error = error
            if isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
                raise
        result.ended = self.loop.now
        if result.refused:
            op = self.ops[n]
            self.ops[n] = Op(op.process, op.name, "fail", op.called, op.returned, detail=op.detail)
        return result

    async def ask(self, times: int = 1, *, together: bool = False) -> list[Result]:
        """Make guarded calls, one after the other or all at once."""
        if together:
            return await asyncio.gather(*(self.one() for _ in range(times)))
        return [await self.one() for _ in range(times)]

    def begin(self, times: int = 1) -> list[asyncio.Task[Result]]:
        """Begin guarded calls, each in a task of its own."""
        return [asyncio.create_task(self.one()) for _ in range(times)]

    async def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    def hangs(self) -> list[asyncio.Future[Any]]:
        """Let every request wait, and return what they wait for."""
        waiting = list[asyncio.Future[Any]]()

        def wait() -> asyncio.Future[Any]:
            waiting.append(self.loop.create_future())
            return waiting[-1]

        self.answers = wait
        return waiting

    def failure(self) -> BaseException:
        """Return a failure that passes: of the kind that a retry was seen to try again."""
        self.failures += 1
        kind, *values = self.learned.get("transient", TRANSIENT[0])
        return kind(*values, f"number {self.failures}")  # type: ignore[no-any-return]

    def fails(self) -> None:
        """Let every request fail from now on."""
        self.answers = self.failure
        self.happened("fails")

    def works(self) -> None:
        """Let every request succeed from now on."""
        self.answers = lambda: "done"
        self.happened("works")


Script = Callable[[Stage], Awaitable[None]]


class Scripts(list[Scene]):
    """The scenes of a kind. As a decorator it adds one."""

    def __call__(self, title: str, hint: str) -> Callable[[Script], Script]:
        """Return a decorator that adds a scene; the hint is for those whose candidate breaks in it."""

        def add(script: Script) -> Script:
            self.append(Scene(title, options={"script": script}, hint=hint))
            return script

        return add


@dataclass(eq=False)
class GuardRun:
    """One scene, played with a fresh copy of the candidate."""

    load: Callable[[], Any]
    script: Script
    settings: dict[str, Any]
    learned: dict[str, Any]
    seed: int = 7

    def run(self) -> Outcome:
        """Play the scene to its end, or to the first broken promise."""
        loop = ExploreLoop(step=lambda: False, until=PLENTY)
        process, stage, blocked = Process("w1"), list[Stage](), 0.0

        def block(seconds: float) -> None:
            nonlocal blocked
            loop.now += seconds
            blocked += seconds

        async def play() -> None:
            running_process.set(process)
            stage.append(Stage(loop, self.settings, self.load(), self.learned))
            await self.script(stage[0])

        finding = Finding("HELD", "")
        with inhabited(ONE_PROCESS, [process], loop.time, self.seed, block):
            try:
                loop.run_until_complete(play())
            except Violated as broken:
                finding = Finding("VIOLATED", str(broken))
            except Stuck:
                finding = Finding(
                    "VIOLATED", f"at {loop.now:.3g} s callers wait, and nothing is left that could wake them"
                )
            finally:
                loop.end()
        if finding.status == "HELD" and blocked:
            finding = Finding("VIOLATED", f"it blocked the event loop for {blocked:.3g} s: nothing else could run")
        ops, faults = (stage[0].ops, stage[0].faults) if stage else ([], [])
        history = History(tuple(ops), tuple(faults), 0.0, loop.now)
        return Outcome(finding, [], _told(history), history)


def _told(history: History) -> list[tuple[float, str, str]]:
    """Return the record as lines."""
    lines = [(f.at, "", f"-- the dependency {f.detail}") for f in history.faults]
    for op in history:
        if op.name == "call":
            how = {"ok": "was answered", "fail": "was refused", "info": "failed"}[op.status]
            how = how if op.returned is not None else "has no answer"
            lines.append((history.until(op), op.process, f"{how}{f': {op.detail}' if op.detail else ''}"))
        else:
            lines.append((op.called, "", "   a request arrived"))
    return sorted(lines, key=lambda line: line[0])


def must(kept: Any, otherwise: str) -> None:
    """End the scene as VIOLATED unless a promise was kept."""
    if not kept:
        raise Violated(otherwise)
