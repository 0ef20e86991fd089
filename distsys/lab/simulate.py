"""A retry storm in virtual time: thousands of clients, one dependency, and the policies as production runs them.

The trigger takes servers away for some seconds (or brings more calls). Meanwhile requests pile up in the dependency's
queue, and it goes on to serve those whose client has given up. Once the trigger is gone there is capacity for every
call; whether it is used for them depends on the retries. A system that stays down is *metastable*.
"""

from __future__ import annotations

import asyncio
import base64
import math
import random
import socket
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from distsys.arguments import check_number
from distsys.errors import DistsysError
from distsys.lab import virtual_loop
from distsys.lab.experiment import Expected
from distsys.lab.history import Finding, History
from distsys.lab.svg import WIDTH, box, document, path, put
from distsys.lab.verdict import COLOUR, MARK, Status, Verdict, Verdicts, escape, table
from distsys.resilience.bulkhead import Bulkhead
from distsys.resilience.circuit_breaker import CircuitBreaker
from distsys.resilience.composed import Resilient
from distsys.resilience.retry import Retry, RetryBudget

SERVERS = 10  # of the dependency: failure_share counts in tenths
WELL = 0.9  # of the calls begun in a second: from there on it counts as recovered
WIDE, HIGH = 300.0, 84.0  # of a panel
Curve = list[int]


@dataclass(frozen=True, kw_only=True)
class Storm:
    """Seconds, and calls per second of all clients together."""

    outage: float = 5.0  # how long the trigger lasts
    failure_share: float = 1.0  # of the servers, gone meanwhile; those that are busy finish first
    spike: float = 1.0  # times as many calls meanwhile
    clients: int = 10_000
    rate: float = 0.0  # 0: each client calls every twenty seconds
    processes: int = 0  # that serve them, each with its breaker, budget and bulkhead; 0: one for 25 calls a second
    deadline: float = 4.0  # of a call: a later answer is worth nothing
    timeout: float = 1.0  # of a request
    utilisation: float = 0.7  # rate / capacity, in calm times
    queue: float = 2.0  # seconds of work that the dependency lets wait; it refuses the rest
    error_rate: float = 0.01  # of requests, lost even in calm times: what retries are for
    calm: float = 4.0  # before the trigger
    after: float = 20.0
    recover_within: float = 10.0  # what the claim allows

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", self.rate or self.clients / 20)
        object.__setattr__(self, "processes", self.processes or math.ceil(self.rate / 25))
        bounds = {"outage": (0.1, 3_600), "failure_share": (0, 1), "spike": (1, 100), "rate": (100, 1e6)}
        bounds |= {"deadline": (0.01, 600), "timeout": (0.01, 600), "utilisation": (0.01, 0.99), "queue": (0, 600)}
        bounds |= {"error_rate": (0, 0.05), "calm": (1, 3_600), "recover_within": (1, 3_600)}
        bounds |= {"after": (self.recover_within + 2, 7_200), "clients": (1, 1e7), "processes": (1, 1e5)}
        for name, (least, most) in bounds.items():
            check_number(name, getattr(self, name), least, most, "seconds, a share or how many")

    @property
    def capacity(self) -> float:
        """Requests per second."""
        return self.rate / self.utilisation

    @property
    def over(self) -> float:
        """When the trigger is gone."""
        return self.calm + self.outage

    @property
    def end(self) -> float:
        return self.over + self.after

    def __str__(self) -> str:
        rate = f"{self.rate:,.0f} calls/s, {self.utilisation:.0%} of what the dependency can do"
        trigger = f"{self.failure_share:.0%} of it gone for {self.outage:g} s" if self.failure_share else ""
        more = f"{self.spike:g} times the calls for {self.outage:g} s" if self.spike > 1 else ""
        return f"{self.clients:,} clients, {rate}; {' and '.join(filter(None, (trigger, more)))}"

    @property
    def claim(self) -> str:
        return (
            f"within {self.recover_within:g} s after the trigger is gone at least {WELL:.0%} of the calls succeed "
            "again, and it stays so"
        )


class Process:
    """One of the processes that serve the clients. A policy is made in each, by `make(process)`.

    `process.retry(...)`, `.budget(...)`, `.breaker(...)`, `.bulkhead(...)` and `.resilient(...)` are those of
    distsys.resilience, with the clock and the generator of random numbers of the simulation.
    """

    def __init__(self, storm: Storm, clock: Callable[[], float], rng: random.Random) -> None:
        self.storm, self.clock, self.rng = storm, clock, rng
        self.retry = partial(Retry, rng=rng.random)
        self.budget = partial(RetryBudget, clock=clock)
        self.breaker = partial(CircuitBreaker, clock=clock, rng=rng.random)
        self.bulkhead = partial(Bulkhead, clock=clock)
        self.resilient = Resilient


Make = Callable[[Process], Callable[[Any], Any]]
"""A policy: what it returns decorates `async def request()`."""


class Dependency:
    """SERVERS behind one queue, first come first served. A request whose client has left is served all the same."""

    def __init__(self, storm: Storm, loop: Any, rng: random.Random) -> None:
        self.storm, self.loop, self.rng = storm, loop, rng
        self.idle, self.queue = SERVERS, deque[asyncio.Future[None]]()
        self.room, self.speed = round(storm.queue * storm.capacity), storm.capacity / SERVERS
        self.requests, self.wasted = array("d"), array("d")
        lost = round(storm.failure_share * SERVERS)
        loop.call_at(storm.calm, self._add, -lost)
        loop.call_at(storm.over, self._add, lost)

    async def request(self) -> None:
        """One request as a client's library makes it, with its timeout."""
        loop = self.loop
        self.requests.append(loop.now)
        if self.rng.random() < self.storm.error_rate:
            raise ConnectionResetError("lost on the way")
        answer, took = loop.create_future(), math.inf
        if self.idle > 0:
            took = self._serve(answer)
        elif len(self.queue) < self.room:
            self.queue.append(answer)
        else:
            raise ConnectionRefusedError("the queue is full")
        if took > self.storm.timeout:
            loop.call_later(self.storm.timeout, _too_late, answer)
        await answer

    def _serve(self, answer: asyncio.Future[None]) -> float:
        """The seconds it takes."""
        self.idle -= 1
        took = self.rng.expovariate(self.speed)
        self.loop.call_later(took, self._served, answer)
        return took

    def _served(self, answer: asyncio.Future[None]) -> None:
        if answer.done():
            self.wasted.append(self.loop.now)
        else:
            answer.set_result(None)
        self._add(1)

    def _add(self, servers: int) -> None:
        self.idle += servers
        while self.idle > 0 and self.queue:
            self._serve(self.queue.popleft())


def _too_late(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError("no answer"))


@dataclass(frozen=True)
class Arm:
    """What one policy made of the storm. Curves are per second; calls count in the second in which they began."""

    name: str
    verdict: Verdict
    requests: Curve  # that reached the dependency
    calls: Curve
    good: Curve  # calls answered within their deadline
    wasted: Curve  # requests served although their client had left
    peak: int  # requests per second
    goodput: float  # the share of good calls, from the trigger to the end
    p99: float  # seconds that callers waited
    recovery: float | None  # seconds after the trigger; None: not before the end
    metastable: bool
    digest: str  # of the whole trace

    def __str__(self) -> str:
        return str(self.verdict)


def simulate_arm(name: str, make: Make, storm: Storm, seed: int, expected: Any = None) -> Arm:
    """One policy. The demand depends on the seed alone: every policy meets the same calls."""
    demand, at = random.Random(seed), 0.0
    times: dict[int, list[float]] = {}
    while at < storm.end:
        times.setdefault(demand.randrange(storm.clients), []).append(at)
        at += demand.expovariate(storm.rate * (storm.spike if storm.calm <= at < storm.over else 1))
    calls: list[tuple[float, float, bool]] = []  # begun, ended, good

    last = storm.end + storm.deadline

    async def main() -> Dependency:
        loop: Any = asyncio.get_running_loop()
        dependency = Dependency(storm, loop, random.Random(f"{seed}/dependency"))
        each = [Process(storm, loop.time, random.Random(f"{seed}/{n}")) for n in range(storm.processes)]
        wrapped = [make(process)(dependency.request) for process in each]

        async def client(times: list[float], call: Any) -> None:
            for at in times:
                if at > loop.now:
                    await asyncio.sleep(at - loop.now)
                begun, good = loop.now, False
                try:
                    await call()
                    good = loop.now - begun <= storm.deadline
                except (OSError, DistsysError):  # TimeoutError is an OSError; any other is a mistake in the policy
                    pass
                finally:  # also of a call that hangs to the end and is cancelled
                    calls.append((begun, loop.now, good))

        clients = [loop.create_task(client(times[n], wrapped[n % storm.processes])) for n in sorted(times)]
        done, _ = await asyncio.wait(clients, timeout=last, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return dependency

    dependency = virtual_loop.run(main(), limit=100_000 + 100 * storm.clients, until=2 * last)
    return _judge(name, storm, seed, expected, dependency, calls)


def _judge(
    name: str, storm: Storm, seed: int, expected: Any, dependency: Dependency, calls: list[tuple[float, float, bool]]
) -> Arm:
    began, good = _curve(storm, [call[0] for call in calls]), _curve(storm, [call[0] for call in calls if call[2]])
    requests, wasted = _curve(storm, dependency.requests), _curve(storm, dependency.wasted)
    bad = [second for second in range(len(began)) if good[second] < WELL * began[second]]
    first, recovery = int(storm.calm), max(0.0, bad[-1] + 1 - storm.over) if bad else 0.0
    recovered = None if recovery > storm.after - 2 else recovery
    tail, lost = requests[-5:], 1 - sum(good[-5:]) / max(1, sum(began[-5:]))
    metastable = recovered is None and sum(tail) > len(tail) * storm.capacity
    status: Status = "VIOLATED"
    if recovered is None:
        summary = f"{lost:.0%} of the calls fail {storm.after:g} s after the trigger is gone"
        if metastable:
            amount = f"{sum(tail) / len(tail) / storm.capacity:.1f} times the capacity"
            summary = f"metastable: {summary}, for {amount} is asked of the dependency"
    elif recovered > storm.recover_within:
        summary = f"recovered {recovered:g} s after the trigger was gone"
    elif not bad:
        status, summary = "INCONCLUSIVE", "the trigger did no harm"
    else:
        status, summary = "HELD", f"recovered {recovered:g} s after the trigger was gone"
    waited = sorted(call[1] - call[0] for call in calls)
    trace = array("d", [number for call in sorted(calls) for number in call])  # those cut off at the end, in any order
    digest = blake2b(trace.tobytes() + dependency.requests.tobytes() + dependency.wasted.tobytes(), digest_size=8)
    peak, goodput = max(requests), sum(good[first:]) / max(1, sum(began[first:]))
    p99 = waited[int(0.99 * len(waited))]
    stats = {"peak_requests_per_second": peak, "goodput": round(goodput, 3), "p99": round(p99, 3)}
    result = [(History(), Finding(status, summary))]
    verdict = Verdict.of(result, title=name, claim=storm.claim, expected=expected, seed=seed, stats=stats)
    hashed = digest.hexdigest()
    return Arm(name, verdict, requests, began, good, wasted, peak, goodput, p99, recovered, metastable, hashed)


def _curve(storm: Storm, times: Any) -> Curve:
    """How many in each second."""
    counts = [0] * int(storm.end)
    for at in times:
        if at < len(counts):
            counts[int(at)] += 1
    return counts


def policy(
    max_attempts: int = 4, base_delay: float = 0.1, *, deadline: bool = True, budget: float = 0.0, breaker: int = 0,
    recovery_timeout: float = 2.0, permits: int = 0, **retry: Any,
) -> Make:  # fmt: skip
    """The three rules in the usual order; 0 leaves one out. `budget` is its ratio, `breaker` its failure threshold."""

    def make(process: Process) -> Any:
        storm = process.storm
        shared = process.budget(budget) if budget else None
        limit = storm.deadline if deadline else None
        return process.resilient(
            bulkhead=process.bulkhead(max_concurrent=permits, timeout=storm.timeout) if permits else None,
            circuit_breaker=process.breaker(breaker, recovery_timeout) if breaker else None,
            retry=process.retry(max_attempts, base_delay, timeout=limit, budget=shared, **retry),
        )

    return make


ARMS: dict[str, tuple[Make, Expected | None]] = {
    "no retries": (policy(1, deadline=False), "HELD"),
    "fixed retries": (policy(deadline=False, max_delay=0.1, jitter="none"), "VIOLATED"),
    "exponential, no jitter": (policy(deadline=False, jitter="none"), "VIOLATED"),
    "full jitter": (policy(), "VIOLATED"),
    "full jitter + budget": (policy(budget=0.1), "HELD"),
    "full jitter + breaker": (policy(breaker=5), "HELD"),
    "full jitter + bulkhead": (policy(permits=10), "HELD"),
    "all of them": (policy(budget=0.1, breaker=5, permits=10), "HELD"),
}


@dataclass(frozen=True)
class Simulation:
    """The arms of one storm, side by side."""

    storm: Storm
    seed: int
    arms: tuple[Arm, ...]

    def __getitem__(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def verdicts(self) -> Verdicts:
        return Verdicts(arm.verdict for arm in self.arms)

    def rows(self) -> list[tuple[str, ...]]:
        """As a table, with the names of its columns first. Good calls: from the trigger on."""
        rows: list[tuple[str, ...]] = [("policy", "verdict", "peak/s", "good", "p99 wait", "recovered")]
        for arm in self.arms:
            back = "metastable" if arm.metastable else "never" if arm.recovery is None else f"after {arm.recovery:g} s"
            expected = "" if arm.verdict.expected is None else " (as expected)"
            expected = expected if arm.verdict.as_expected else f", EXPECTED: {arm.verdict.expected}"
            verdict = f"{MARK[arm.verdict.status]} {arm.verdict.status}{expected}"
            rows.append((arm.name, verdict, f"{arm.peak:,}", f"{arm.goodput:.0%}", f"{arm.p99:.1f} s", back))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([str(self.storm), *lines])

    __repr__ = __str__

    def svg(self) -> str:
        """A panel per arm: what is asked of the dependency, and which calls are answered in time."""
        storm, out = self.storm, list[str]()
        lines, ticks = -(-len(self.arms) // 2), 5 * math.ceil(storm.end / 50)  # seconds
        right, up = WIDE / int(storm.end), HIGH / (1.05 * max(max(*arm.requests, *arm.calls) for arm in self.arms))
        for n, arm in enumerate(self.arms):
            x, y = (46.0, 402.0)[n % 2], n // 2 * (HIGH + 36) + HIGH + 22
            can = y - storm.capacity * up
            out.append(box(x + storm.calm * right, y - HIGH, storm.outage * right, HIGH, "p", 0))
            for curve, css in ((arm.calls, "x"), (arm.good, "f"), (arm.requests, "k")):
                steps = "".join(f"V{y - each * up:.1f}h{right:.1f}" for each in curve)
                out.append(path(f"M{x} {y}{steps}" + f"V{y}Z" * (css != "k"), css))
            out += [path(f"M{x} {y}h{WIDE}", "g"), path(f"M{x} {can:.1f}h{WIDE}", "d")]
            status = arm.verdict.status
            out.append(put(x, y - HIGH - 6, f"{MARK[status]} {arm.name}", "b", f"fill:{COLOUR[status]}"))
            out.append(put(x - 4, can + 4, f"{storm.capacity:,.0f}", "s e"))
            out += [put(x + at * right, y + 13, str(at), "s m") for at in range(0, int(storm.end) + 1, ticks)]
        height = lines * (HIGH + 36) + 22
        out.append(put(WIDTH / 2, height - 8, "seconds across, per second upwards", "s m"))
        return document("".join(out), height, str(storm))

    def _repr_html_(self) -> str:
        head, *rows = self.rows()
        source = base64.b64encode(self.svg().encode()).decode()
        alt = escape(f"{self.storm}. " + " ".join(f"{arm}." for arm in self.arms))
        return (
            f"<div><b>{escape(str(self.storm))}</b><br>{escape(self.storm.claim)}<br>"
            f'<img width="{WIDTH}" style="max-width:100%" alt="{alt}" src="data:image/svg+xml;base64,{source}">'
            "<p>Black line: requests that reach the dependency, per second; dashed: what it can do. Blue: calls "
            f"answered in time; crossed out: calls that fail. Hatched: the trigger.</p>{table(head, rows)}</div>"
        )


Job = partial[Arm]  # of simulate_arm
Each = Callable[[Iterable[Job]], Iterable[Arm]]
"""How jobs are done: `one_by_one`, or `side_by_side` in processes."""


def one_by_one(jobs: Iterable[Job]) -> Iterable[Arm]:
    return (job() for job in jobs)


def line_to(sock: socket.socket) -> Connection:
    """Takes the socket over."""
    sock.setblocking(True)
    return Connection(sock.detach())


def side_by_side(lines: Sequence[Connection]) -> Each:
    """In the processes at the other ends of these `lines`, which run `serve`: a seed gives the same trace anywhere."""
    from cloudpickle import dumps

    idle = SimpleQueue[Connection]()
    for line in lines:
        idle.put(line)

    def ask(job: Job) -> Arm:
        line = idle.get()
        try:
            line.send_bytes(dumps(job))
            answer: Arm | Exception = line.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process that simulated {job.args[0]!r} was killed: out of memory?") from None
        finally:
            idle.put(line)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def each(jobs: Iterable[Job]) -> list[Arm]:
        with ThreadPoolExecutor(len(lines)) as threads:  # they wait; a line each
            return list(threads.map(ask, jobs))

    return each


def serve(_: bytes, sock: socket.socket) -> None:
    """In a process of its own: one job after the other, until it is ended."""
    with line_to(sock) as line, suppress(EOFError):
        while True:
            try:
                line.send(line.recv()())
            except (RuntimeError, ValueError, MemoryError) as error:  # Stuck is a RuntimeError
                line.send(error)


def simulate(
    policies: Mapping[str, Make] | Iterable[str] = tuple(ARMS), *, seed: int = 7, each: Each = one_by_one, **storm: Any
) -> Simulation:
    """Policies of yours by name, or names of ARMS, in a Storm. The same seed gives the same trace.

    simulate(outage=10, clients=10_000)
    simulate({"mine": lambda process: process.retry(3, 0.2, budget=process.budget(0.1))})
    """
    how = Storm(**storm)
    if isinstance(policies, Mapping):
        jobs, each = [partial(simulate_arm, name, make, how, seed) for name, make in policies.items()], one_by_one
    else:
        jobs = [partial(simulate_arm, name, ARMS[name][0], how, seed, ARMS[name][1]) for name in policies]
    return Simulation(how, seed, tuple(each(jobs)))
