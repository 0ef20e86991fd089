"""The lab a notebook opens: a testbed, a judge, and the doors to experiments, ladders and simulations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from distsys._support.arguments import check_seconds
from distsys.lab import experiments
from distsys.lab.explore.build import named
from distsys.lab.explore.exploration import Exploration, SceneVerdict
from distsys.lab.explore.explorer import KINDS, Order, explored
from distsys.lab.explore.servers import start_servers
from distsys.lab.history.history import Expected
from distsys.lab.run.experiment import Arm, Experiment, name_of
from distsys.lab.run.judge import Judge, Profile
from distsys.lab.show.html import table
from distsys.lab.show.verdict import Verdict, Verdicts
from distsys.lab.simulate.advise import Advice, advise
from distsys.lab.simulate.side_by_side import line_to, side_by_side
from distsys.lab.simulate.simulation import ARMS, Simulation, simulate
from distsys.lab.testbed.processes import Process
from distsys.lab.testbed.testbed import Testbed
from distsys.locks.lease import check_ttl

ARMS_AT_ONCE = 2  # scripts wait for events, not for times, so a busy machine changes no verdict
ORIGINS = {
    "embedded": "a wheel, started for this lab",
    "system": "this machine's installation, started for this lab",
    "docker": "a container, started for this lab",
    "url": "your URL: the lab can't kill or pause it",
}


class Lab:
    """`lab = await Lab.open()`; then lab.run(name), lab.test(MyLock, name), lab.try_lock(MyLock), all awaited."""

    def __init__(self, testbed: Testbed, judge: Judge) -> None:
        self.testbed = testbed
        self.judge = judge
        self.verdicts: list[Verdict] = []

    @classmethod
    async def open(
        cls, *, redis_url: str = "", pg_dsn: str = "", profile: Profile = "quick", seed: int = 7, workers: int = 4,
        backend: str | None = None,
    ) -> Lab:  # fmt: skip
        """Start a Redis or Valkey and a PostgreSQL, or use those that the URLs name.

        profile  "quick" runs each arm once, "full" five times
        seed     of the first run; the next runs take the next numbers
        workers  processes in experiments with a crowd, 2 to 64
        backend  "" (wheels, then this machine), "system" or "docker"; None reads DISTSYS_BACKEND
        Raises ServerUnavailable, which names the one command to run.
        """
        settings: dict[str, Any] = {"profile": profile, "seed": seed, "workers": workers}
        Judge(testbed=None, **settings)  # type: ignore[arg-type]  # bad settings are refused before servers start
        testbed = await Testbed.open(redis_url=redis_url, pg_dsn=pg_dsn, backend=backend)
        return cls(testbed, Judge(testbed, **settings))

    async def __aenter__(self) -> Lab:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every process, and remove what was written to servers that are not ours. Idempotent."""
        await self.testbed.close()

    @property
    def seed(self) -> int:
        """The seed of the first run of each arm."""
        return self.judge.seed

    @property
    def prefix(self) -> str:
        """What every key of this lab contains: use it for the names of your own rules on the lab's Redis."""
        return self.testbed.prefix

    async def redis_url(self) -> str:
        """Return the URL of the lab's Redis."""
        return await self.testbed.redis_url()

    async def dsn(self) -> str:
        """Return the DSN of the lab's PostgreSQL, with the lab's own schema first in the search path."""
        return await self.testbed.dsn()

    # ---- experiments

    async def run(
        self, experiment: str | Experiment, *, runs: int | None = None, seed: int | None = None, keep: bool = True
    ) -> Verdicts:
        """Run all arms of an experiment, and return each one's verdict beside the one expected of it.

        `keep=False` leaves the verdicts out of the summary, as for a server that not every machine has.
        """
        chosen = experiments.load(experiment) if isinstance(experiment, str) else experiment
        at_once = asyncio.Semaphore(1 if chosen.alone else ARMS_AT_ONCE)

        async def judge(arm: Arm) -> Verdict:
            async with at_once:
                return await self.judge.verdict_on(chosen, arm, runs, seed)

        try:
            async with asyncio.TaskGroup() as arms:
                judged = [arms.create_task(judge(arm)) for arm in chosen.arms]
        except ExceptionGroup as errors:  # the first ended the others
            raise errors.exceptions[0] from None
        verdicts = Verdicts(task.result() for task in judged)
        self.verdicts += verdicts if keep else ()
        return verdicts

    async def test(
        self, candidate: Any, experiment: str | Experiment, *, expected: Expected | None = None, name: str = "",
        runs: int | None = None, seed: int | None = None, point: str = "", keep: bool = True, **params: Any,
    ) -> Verdict:  # fmt: skip
        """Judge one candidate of yours under an experiment's workload, faults and check.

        point   a checkpoint of your candidate, where the fault strikes. ValueError if the experiment strikes elsewhere,
                or if no worker came to it
        params  ttl=, account=, rounds= and so on, for the workload
        keep    False leaves the verdict out of the summary
        """
        chosen = experiments.load(experiment) if isinstance(experiment, str) else experiment
        arm = Arm(name=name or name_of(candidate), candidate=candidate, expected=expected, point=point, params=params)
        verdict = await self.judge.verdict_on(chosen, arm, runs, seed)
        if keep:
            self.verdicts.append(verdict)
        return verdict

    # ---- candidates of yours

    async def explore(
        self, candidate: Any, *, kind: str = "lock", ttl: float = 0.3, window: float = 1.0, promise: str | None = None,
        schedule: str | None = None, seed: int | None = None, setup: str = "", only: tuple[int, ...] = (),
        to_the_end: bool = True, heard: Callable[[SceneVerdict], None] | None = None,
    ) -> Exploration:  # fmt: skip
        """Search for a schedule that breaks a promise of your lock, limiter, breaker, retry or endpoint.

        Locks, limiters and endpoints are searched in virtual time on a real Valkey, and PostgreSQL if they ask for it,
        whose clocks the lab sets: each command with one disturbance. A violation counts only after the same schedule
        has shown it again in real time on unmodified servers. Breakers and retries stand before a scripted dependency,
        in virtual time. What a candidate is given and must have, says `distsys prove --help`.
        kind        "lock", "limiter", "endpoint", "breaker" or "retry"
        ttl         of a lock, seconds: what the candidate is given, or the TTL it has built in
        window      of a limiter, seconds: ten requests in it, or a bucket of ten that is full again after it
        promise     of a limiter: "window", "bucket" or "approximate"; None finds out by what the candidate names
        schedule    "w1#4 hold": run this one alone, in real time, in the scene that `only` names, or else in the first
        setup       SQL that makes the tables that the candidate needs
        seed        of chance, as the candidate sees it; the lab's own seed by default
        only        numbers of scenes, from 1; () for all
        to_the_end  go on after a scene that is violated, unless that is the first
        heard       called with each scene's verdict as soon as there is one
        Raises WrongShape for a candidate that can't be used so, ServerUnavailable without Linux and a C compiler.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: one of {', '.join(map(repr, KINDS))}")
        if promise not in (None, "window", "bucket", "approximate"):
            raise ValueError(f"promise={promise!r}: 'window', 'bucket' or 'approximate'")
        chosen = KINDS[kind]
        if wrong := [n for n in only if not 1 <= n <= len(chosen.scenes)]:
            raise ValueError(f"only={wrong[0]}: the scenes of a {kind} have the numbers 1 to {len(chosen.scenes)}")
        if schedule is not None and not chosen.served:
            raise ValueError(f"schedule={schedule!r}: a {kind} has scenes, and no schedules")
        span = check_seconds("window", window) if kind == "limiter" else check_ttl(ttl)
        sockets = None
        if chosen.served:
            postgres = bool(named(candidate) & {"conn", "pool"})
            sockets = await start_servers(self.testbed.servers, postgres=postgres)
        seed = self.judge.seed if seed is None else seed
        order = Order(kind, candidate, span, sockets, schedule, tuple(only), to_the_end, seed, promise, setup)
        return await explored(self.testbed.processes, name_of(candidate), order, heard)

    async def try_lock(self, candidate: Any, *, ttl: float = 0.3, upto: int | None = None) -> Exploration:
        """Explore a lock of yours up to the first scene that breaks it; `upto` is the last scene to try."""
        return await self._climb("lock", candidate, upto, ttl=ttl)

    async def try_limiter(self, candidate: Any, *, upto: int | None = None) -> Exploration:
        """Explore a limiter of yours up to the first scene that breaks it: ten requests in any second."""
        return await self._climb("limiter", candidate, upto)

    async def try_breaker(self, candidate: Any, *, upto: int | None = None) -> Exploration:
        """Explore a breaker of yours up to the first scene that breaks it."""
        return await self._climb("breaker", candidate, upto)

    async def try_retry(self, candidate: Any, *, upto: int | None = None) -> Exploration:
        """Explore a retry of yours up to the first scene that breaks it."""
        return await self._climb("retry", candidate, upto)

    async def try_endpoint(self, candidate: Any, *, setup: str = "", upto: int | None = None) -> Exploration:
        """Explore an idempotent endpoint of yours up to the first scene that breaks it; `setup` makes its tables."""
        return await self._climb("endpoint", candidate, upto, setup=setup)

    async def _climb(self, kind: str, candidate: Any, upto: int | None, **more: Any) -> Exploration:
        scenes = len(KINDS[kind].scenes)
        if upto is not None and not 1 <= upto <= scenes:
            raise ValueError(f"upto={upto}: a {kind} has the scenes 1 to {scenes}")
        only = tuple(range(1, (upto or scenes) + 1))
        return await self.explore(candidate, kind=kind, only=only, to_the_end=False, **more)

    # ---- simulations

    async def simulate(self, policies: Any = tuple(ARMS), *, seed: int | None = None, **storm: Any) -> Simulation:
        """Run retry policies through a storm in virtual time; `storm` has the fields of `Storm`."""
        seed = self.judge.seed if seed is None else seed
        simulation: Simulation = await self._in_virtual_time(simulate, policies, seed=seed, **storm)
        self.verdicts += simulation.verdicts
        return simulation

    async def advise(self, **workload: Any) -> Advice:
        """Return settings for an outage and a workload of yours, with the curve that argues for them."""
        advice: Advice = await self._in_virtual_time(advise, **{"seed": self.judge.seed, **workload})
        return advice

    async def _in_virtual_time(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run `work` in a thread, its arms in forked processes, which end with it, cancelled or not."""
        forked = list[Process]()
        try:
            for _ in range(ARMS_AT_ONCE):
                serving = "distsys.lab.simulate.side_by_side:serve"
                forked.append(await self.testbed.processes.fork(serving, b"", name="storm"))
            lines = [line_to(process.sock) for process in forked if process.sock]
            return await asyncio.to_thread(work, *args, each=side_by_side(lines), **options)
        finally:
            for process in forked:
                await process.end()

    # ---- shown

    def summary(self) -> str:
        """Return one line for each verdict so far, in words only: the same on every machine."""
        return Verdicts(self.verdicts).summary()

    def __str__(self) -> str:
        return "\n".join(f"{s.name}: {s} at {s.address}" for s in self.testbed.servers.running.values())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(s.name, s.version, ORIGINS[s.origin], s.address) for s in self.testbed.servers.running.values()]
        return table(("server", "version", "from", "address"), rows)
