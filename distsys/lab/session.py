"""The lab a notebook opens: servers, workers, verdicts; none of it outlives `close()` or the kernel."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from distsys.lab import experiments, ladder
from distsys.lab.advise import Advice, advise
from distsys.lab.experiment import Arm, Expected, Experiment, Run, Stalled, name_of
from distsys.lab.history import Finding, History
from distsys.lab.ladder import Climb
from distsys.lab.processes import Process, Processes
from distsys.lab.servers import Servers, ServerUnavailable
from distsys.lab.simulate import ARMS, Simulation, line_to, side_by_side, simulate
from distsys.lab.verdict import Verdict, Verdicts, table
from distsys.locks.lease import check_ttl

Profile = Literal["quick", "full"]
MANY = 20  # acquisitions, for their percentiles to say anything
AT_ONCE = 2  # arms of an experiment: its scripts wait for events, so a busy machine changes no verdict
RUNS = {"quick": 1, "full": 5}  # of each arm: the script fixes the interleaving, so more runs look for luck


class Lab:
    """`lab = await Lab.open()`; then lab.run(name), lab.test(MyLock, name), lab.try_lock(MyLock), all awaited."""

    def __init__(self, processes: Processes, servers: Servers, profile: Profile, seed: int, workers: int) -> None:
        self.processes, self.servers = processes, servers
        self.profile, self.seed, self.workers = profile, seed, workers
        self.prefix = f"lab:{os.getpid()}-{os.urandom(3).hex()}"
        self.verdicts: list[Verdict] = []
        self._number = 0
        self._schema: str | None = None
        self._closed = False

    @classmethod
    async def open(
        cls, *, redis_url: str = "", pg_dsn: str = "", profile: Profile = "quick", seed: int = 7, workers: int = 4,
        backend: str | None = None,
    ) -> Lab:  # fmt: skip
        """Starts a Redis or Valkey and a PostgreSQL, or uses those that the URLs name. Raises ServerUnavailable."""
        if profile not in RUNS:
            raise ValueError(f"profile={profile!r}: 'quick' runs each arm once, 'full' five times")
        if not 2 <= workers <= 64:
            raise ValueError(f"workers={workers}: between 2, for there to be a race, and 64")
        processes = await Processes.start()
        try:
            servers = Servers(processes, redis_url=redis_url, pg_dsn=pg_dsn, backend=backend)
            lab = cls(processes, servers, profile, seed, workers)
            await asyncio.gather(servers.redis(), lab.dsn())
        except BaseException:
            await processes.aclose()
            raise
        return lab

    async def __aenter__(self) -> Lab:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every process and removes what was written to servers that are not ours. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._sweep()
            await self.servers.aclose()
        finally:
            await self.processes.aclose()

    # ---- experiments

    async def run(self, experiment: str | Experiment, *, runs: int | None = None, seed: int | None = None) -> Verdicts:
        """All arms of an experiment, each with the verdict expected of it."""
        chosen = experiments.load(experiment) if isinstance(experiment, str) else experiment
        at_once = asyncio.Semaphore(1 if chosen.alone else AT_ONCE)

        async def judge(arm: Arm) -> Verdict:
            async with at_once:
                return await self.judge(chosen, arm, runs, seed)

        try:
            async with asyncio.TaskGroup() as arms:
                judged = [arms.create_task(judge(arm)) for arm in chosen.arms]
        except ExceptionGroup as errors:  # the first ended the others
            raise errors.exceptions[0] from None
        verdicts = Verdicts(one.result() for one in judged)
        self.verdicts += verdicts
        return verdicts

    async def test(
        self, candidate: Any, experiment: str | Experiment, *, expected: Expected | None = None, name: str = "",
        runs: int | None = None, seed: int | None = None, point: str = "", keep: bool = True, **params: Any,
    ) -> Verdict:  # fmt: skip
        """One candidate of yours under an experiment's workload, faults and check.

        `point` is a checkpoint of yours, where the fault strikes; `params` (ttl=, account=, rounds=) go to the
        workload; `keep=False` leaves the verdict out of the summary.
        """
        chosen = experiments.load(experiment) if isinstance(experiment, str) else experiment
        arm = Arm(name=name or name_of(candidate), candidate=candidate, expected=expected, point=point, params=params)
        verdict = await self.judge(chosen, arm, runs, seed)
        if keep:
            self.verdicts.append(verdict)
        return verdict

    async def try_lock(self, candidate: Any, *, ttl: float = 0.3, upto: int | None = None) -> Climb:
        """Climbs the ladder of faults with a lock of yours and stops at the first level it fails.

        `ttl` is what the candidate is given, or the TTL it has built in.
        """
        # What counts is the damage: two holders at once are no failure when the account refuses the older one.
        return await ladder.climb(self, candidate, ladder.LOCK, upto, account=ladder.ACCOUNT, ttl=check_ttl(ttl))

    async def try_limiter(self, candidate: Any, *, upto: int | None = None) -> Climb:
        """The same with a limiter of yours: ten requests in any second, whoever asks."""
        return await ladder.climb(self, candidate, ladder.LIMITER, upto)

    async def try_breaker(self, candidate: Any, *, upto: int | None = None) -> Climb:
        """The same with a breaker of yours: a decorator, a class with call(fn, ...), or a function of `call`."""
        return await ladder.climb(self, candidate, ladder.BREAKER, upto)

    async def try_retry(self, candidate: Any, *, upto: int | None = None) -> Climb:
        """The same with a retry of yours: three attempts, and none where it does harm."""
        return await ladder.climb(self, candidate, ladder.RETRY, upto)

    async def try_endpoint(self, candidate: Any, *, upto: int | None = None) -> Climb:
        """The same with an idempotent endpoint of yours: see distsys.lab.intents."""
        return await ladder.climb(self, candidate, ladder.ENDPOINT, upto)

    async def simulate(self, policies: Any = tuple(ARMS), *, seed: int | None = None, **storm: Any) -> Simulation:
        """Retry policies in a storm, in virtual time: see distsys.lab.simulate."""
        seed = self.seed if seed is None else seed
        simulation: Simulation = await self._in_virtual_time(simulate, policies, seed=seed, **storm)
        self.verdicts += simulation.verdicts
        return simulation

    async def advise(self, **workload: Any) -> Advice:
        """Settings for an outage and a workload of yours: see distsys.lab.advise."""
        advice: Advice = await self._in_virtual_time(advise, **{"seed": self.seed, **workload})
        return advice

    async def _in_virtual_time(self, work: Callable[..., Any], *args: Any, **how: Any) -> Any:
        """In a thread, which has its arms simulated in processes; cancelled, it leaves none of them."""
        forked = list[Process]()
        try:
            for _ in range(AT_ONCE):
                forked.append(await self.processes.fork("distsys.lab.simulate:serve", b"", name="storm"))
            lines = [line_to(process.sock) for process in forked if process.sock]
            return await asyncio.to_thread(work, *args, each=side_by_side(lines), **how)
        finally:
            for process in forked:
                await process.end()

    def summary(self) -> str:
        """A line per verdict so far, in words only: the same on every machine."""
        return Verdicts(self.verdicts).summary()

    async def judge(
        self, experiment: Experiment, arm: Arm, runs: int | None = None, seed: int | None = None
    ) -> Verdict:
        """Runs one arm `runs` times; one violation is enough."""
        if self._closed:
            raise RuntimeError("this lab is closed: open another with `await Lab.open()`")
        seed, runs = self.seed if seed is None else seed, runs or RUNS[self.profile]
        began = time.monotonic()
        found = [await self._once(experiment, arm, seed + i) for i in range(runs)]
        seconds = round(time.monotonic() - began, 2)
        return Verdict.of(
            found,
            title=arm.name,
            claim=experiment.claim,
            expected=arm.expected,
            seed=seed,
            params={"experiment": experiment.name, "ttl": experiment.ttl, **experiment.params, **arm.params},
            servers={s.name: str(s) for s in self.servers.running.values()},
            replay=f"distsys run {experiment.name} --seed {seed} --runs {runs}",
            stats={"seconds": seconds, **_latencies([history for history, _ in found])},
        )

    async def _once(self, experiment: Experiment, arm: Arm, seed: int) -> tuple[History, Finding]:
        self._number += 1
        async with Run(self, experiment, arm, seed, self._number) as run:
            try:
                await (arm.prepare or experiment.prepare)(run)
                await experiment.script(run)
                stuck = await run.finish()
            except ServerUnavailable as error:
                return run.history(), Finding("INCONCLUSIVE", f"not run: {error}")
            except Stalled as error:
                return run.history(), Finding("INCONCLUSIVE", "; ".join([str(error), *run.crashes()]))
            facts = await experiment.final(run) if experiment.final else {}
            history = run.history(**facts)
            finding, crashes = experiment.check(history), run.crashes()
            if finding.status == "INCONCLUSIVE":
                words = [finding.summary, *crashes, *(f"{name} never ended" for name in stuck)]
                finding = replace(finding, summary="; ".join(words))
            elif finding.status == "HELD" and crashes and not any(f.kind == "server" for f in history.faults):
                finding = Finding("INCONCLUSIVE", f"{crashes[0]} (else: {finding.summary})")
            return history, finding

    # ---- servers

    async def redis_url(self) -> str:
        return (await self.servers.redis()).url

    async def dsn(self) -> str:
        """Of PostgreSQL, with a schema of this lab's own first in its search path."""
        from psycopg.conninfo import make_conninfo

        server = await self.servers.postgres()
        if self._schema is None:
            self._schema = self.prefix.replace(":", "_").replace("-", "_")
            table = f'"{self._schema}".accounts (name text PRIMARY KEY, balance bigint NOT NULL, fence_token bigint)'
            await _execute(
                server.url, f'CREATE SCHEMA IF NOT EXISTS "{self._schema}"', f"CREATE TABLE IF NOT EXISTS {table}"
            )
        return make_conninfo(server.url, options=f"-csearch_path={self._schema},public")

    async def _sweep(self) -> None:
        """On servers that outlive the lab: its keys and its schema."""
        for server in self.servers.running.values():
            if server.origin == "url" and server.kind == "redis":
                import redis.asyncio

                async with redis.asyncio.Redis.from_url(server.url) as client:
                    if keys := [key async for key in client.scan_iter(f"*{self.prefix}*", count=1000)]:
                        await client.delete(*keys)
            elif server.origin == "url" and server.kind == "postgres" and self._schema:
                await _execute(server.url, f'DROP SCHEMA IF EXISTS "{self._schema}" CASCADE')

    def __str__(self) -> str:
        return "\n".join(f"{s.name}: {s} at {s.address}" for s in self.servers.running.values())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(s.name, s.version, _ORIGINS[s.origin], s.address) for s in self.servers.running.values()]
        return table(("server", "version", "from", "address"), rows)


_ORIGINS = {
    "embedded": "a wheel, started for this lab",
    "system": "this machine's installation, started for this lab",
    "docker": "a container, started for this lab",
    "url": "your URL: the lab can't kill or pause it",
}


def _latencies(histories: list[History]) -> dict[str, Any]:
    """Of the successful acquires, in seconds, when there were many."""
    granted = (op for history in histories for op in history.where("acquire", status="ok"))
    took = sorted(op.returned - op.called for op in granted if op.returned is not None)
    if len(took) < MANY:
        return {}
    return {"acquires": len(took), "p50": statistics.median(took), "p99": took[int(0.99 * len(took))]}


async def _execute(dsn: str, *statements: Any) -> None:
    import psycopg

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        for statement in statements:
            await conn.execute(statement)
