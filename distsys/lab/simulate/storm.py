"""A retry storm in virtual time: thousands of clients, one dependency, and the policies as they run in production.

The trigger takes servers away for some seconds. Meanwhile requests pile up in the dependency's queue, and it also
serves requests whose client has given up. Once the trigger is gone there is capacity for every call; whether the calls
get it depends on the retries. A system that stays down is *metastable*.
"""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from distsys._support.arguments import check_number
from distsys.errors import DistsysError
from distsys.lab.history.history import Finding, History, Status
from distsys.lab.show.verdict import Verdict
from distsys.lab.simulate import virtual_loop
from distsys.resilience.bulkhead import Bulkhead
from distsys.resilience.circuit_breaker import CircuitBreaker
from distsys.resilience.composed import Resilient
from distsys.resilience.retry import Retry, RetryBudget

SERVERS = 10  # of the dependency: failure_share counts in tenths
RECOVERED_SHARE = 0.9  # good calls of those begun in a second, from which the system counts as recovered
Curve = list[int]  # a count for each second


@dataclass(frozen=True, kw_only=True)
class Storm:
    """The settings of a storm: durations in seconds, rates in calls per second of all clients together."""

    outage: float = 5.0  # how long the trigger lasts
    failure_share: float = 1.0  # of the servers, gone during the outage; busy ones finish first
    clients: int = 10_000
    rate: float = 0.0  # 0: each client calls every 20 seconds
    processes: int = 0  # each with its own breaker, budget and bulkhead; 0: one for 25 calls a second
    deadline: float = 4.0  # of a call: a later answer is worth nothing
    timeout: float = 1.0  # of a request
    utilisation: float = 0.7  # rate / capacity, in calm times
    queue: float = 2.0  # seconds of work that the dependency queues; it refuses the rest
    error_rate: float = 0.01  # of requests, lost even in calm times: what retries are for
    calm: float = 4.0  # before the trigger
    after: float = 20.0
    recover_within: float = 10.0  # seconds that the claim allows

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", self.rate or self.clients / 20)
        object.__setattr__(self, "processes", self.processes or math.ceil(self.rate / 25))
        bounds = {"outage": (0.1, 3_600), "failure_share": (0, 1), "rate": (100, 1e6)}
        bounds |= {"deadline": (0.01, 600), "timeout": (0.01, 600), "utilisation": (0.01, 0.99), "queue": (0, 600)}
        bounds |= {"error_rate": (0, 0.05), "calm": (1, 3_600), "recover_within": (1, 3_600)}
        bounds |= {"after": (self.recover_within + 2, 7_200), "clients": (1, 1e7), "processes": (1, 1e5)}
        for name, (least, most) in bounds.items():
            check_number(name, getattr(self, name), least, most, "seconds, a share or how many")

    @property
    def capacity(self) -> float:
        """Requests per second that the dependency can serve."""
        return self.rate / self.utilisation

    @property
    def over(self) -> float:
        """The second at which the trigger is gone."""
        return self.calm + self.outage

    @property
    def end(self) -> float:
        """The second at which the storm ends."""
        return self.over + self.after

    def __str__(self) -> str:
        rate = f"{self.rate:,.0f} calls/s, {self.utilisation:.0%} of what the dependency can do"
        trigger = f"{self.failure_share:.0%} of it gone for {self.outage:g} s"
        return f"{self.clients:,} clients, {rate}; {trigger}"

    @property
    def claim(self) -> str:
        """The sentence that an arm holds or violates."""
        good = f"at least {RECOVERED_SHARE:.0%} of the calls succeed again, and it stays so"
        return f"within {self.recover_within:g} s after the trigger is gone {good}"


class Process:
    """A process that serves some of the clients. Each process makes its own policy, by `make(process)`.

    `process.retry(...)`, `.budget(...)`, `.breaker(...)`, `.bulkhead(...)` and `.resilient(...)` are those of
    distsys.resilience, with the clock and the random numbers of the simulation.
    """

    def __init__(self, storm: Storm, clock: Callable[[], float], rng: random.Random) -> None:
        self.storm, self.clock, self.rng = storm, clock, rng
        self.retry = partial(Retry, rng=rng.random)
        self.budget = partial(RetryBudget, clock=clock)
        self.breaker = partial(CircuitBreaker, clock=clock, rng=rng.random)
        self.bulkhead = partial(Bulkhead, clock=clock)
        self.resilient = Resilient


Make = Callable[[Process], Callable[[Any], Any]]
"""A policy: it returns a decorator for `async def request()`."""


class Dependency:
    """SERVERS behind one FIFO queue. A request whose client has left is served all the same."""

    def __init__(self, storm: Storm, loop: Any, rng: random.Random) -> None:
        self.storm, self.loop, self.rng = storm, loop, rng
        self.idle = SERVERS  # below 0 while servers that are gone still finish a request
        self.queue = deque[asyncio.Future[None]]()
        self.max_queued = round(storm.queue * storm.capacity)
        self.speed = storm.capacity / SERVERS  # requests per second of one server
        self.requests = array("d")  # when each arrived
        self.wasted = array("d")  # when a request was served whose client had left
        lost = round(storm.failure_share * SERVERS)
        loop.call_at(storm.calm, self._add_servers, -lost)
        loop.call_at(storm.over, self._add_servers, lost)

    async def request(self) -> None:
        """Make one request as a client library does, with its timeout. Raises an OSError if it fails."""
        loop = self.loop
        self.requests.append(loop.now)
        if self.rng.random() < self.storm.error_rate:
            raise ConnectionResetError("lost on the way")
        answer, took = loop.create_future(), math.inf
        if self.idle > 0:
            took = self._serve(answer)
        elif len(self.queue) < self.max_queued:
            self.queue.append(answer)
        else:
            raise ConnectionRefusedError("the queue is full")
        if took > self.storm.timeout:
            loop.call_later(self.storm.timeout, _too_late, answer)
        await answer

    def _serve(self, answer: asyncio.Future[None]) -> float:
        """Begin to serve a request, and return the seconds that it will take."""
        self.idle -= 1
        took = self.rng.expovariate(self.speed)
        self.loop.call_later(took, self._served, answer)
        return took

    def _served(self, answer: asyncio.Future[None]) -> None:
        if answer.done():
            self.wasted.append(self.loop.now)
        else:
            answer.set_result(None)
        self._add_servers(1)

    def _add_servers(self, servers: int) -> None:
        self.idle += servers
        while self.idle > 0 and self.queue:
            self._serve(self.queue.popleft())


def _too_late(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError("no answer"))


@dataclass(frozen=True)
class Arm:
    """The result of one policy. Curves are per second; a call counts in the second in which it began."""

    name: str
    verdict: Verdict
    requests: Curve  # that reached the dependency
    calls: Curve
    good: Curve  # calls answered within their deadline
    wasted: Curve  # requests served after their client had left
    peak: int  # requests per second
    goodput: float  # the share of good calls, from the trigger to the end
    p99: float  # of the seconds that callers waited
    recovery: float | None  # seconds after the trigger; None: not before the end
    metastable: bool
    digest: str  # of the whole trace

    def __str__(self) -> str:
        return str(self.verdict)


def simulate_arm(name: str, make: Make, storm: Storm, seed: int, expected: Any = None) -> Arm:
    """Simulate one policy. The demand depends on the seed alone, so every policy meets the same calls."""
    demand, at = random.Random(seed), 0.0
    times: dict[int, list[float]] = {}
    while at < storm.end:
        times.setdefault(demand.randrange(storm.clients), []).append(at)
        at += demand.expovariate(storm.rate)
    calls: list[tuple[float, float, bool]] = []  # begun, ended, good

    last = storm.end + storm.deadline

    async def main() -> Dependency:
        loop: Any = asyncio.get_running_loop()
        dependency = Dependency(storm, loop, random.Random(f"{seed}/dependency"))
        processes = [Process(storm, loop.time, random.Random(f"{seed}/{n}")) for n in range(storm.processes)]
        wrapped = [make(process)(dependency.request) for process in processes]

        async def client(times: list[float], call: Any) -> None:
            for at in times:
                if at > loop.now:
                    await asyncio.sleep(at - loop.now)
                begun, good = loop.now, False
                try:
                    await call()
                    good = loop.now - begun <= storm.deadline
                except (OSError, DistsysError):
                    pass  # TimeoutError is an OSError; any other error is a mistake in the policy
                finally:  # also for a call that hangs until it is cancelled at the end
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
    bad = [second for second in range(len(began)) if good[second] < RECOVERED_SHARE * began[second]]
    first, recovery = int(storm.calm), max(0.0, bad[-1] + 1 - storm.over) if bad else 0.0
    recovered = None if recovery > storm.after - 2 else recovery
    tail, lost = requests[-5:], 1 - sum(good[-5:]) / max(1, sum(began[-5:]))
    metastable = recovered is None and sum(tail) > len(tail) * storm.capacity
    status: Status = "HELD" if recovered is not None and recovered <= storm.recover_within else "VIOLATED"
    summary = f"recovered {recovery:g} s after the trigger was gone"
    if recovered is None:
        summary = f"{lost:.0%} of the calls fail {storm.after:g} s after the trigger is gone"
        if metastable:
            amount = f"{sum(tail) / len(tail) / storm.capacity:.1f} times the capacity"
            summary = f"metastable: {summary}, for {amount} is asked of the dependency"
    elif not bad:
        status, summary = "INCONCLUSIVE", "the trigger did no harm"
    waited = sorted(call[1] - call[0] for call in calls)
    # Sorted, because calls that were cut off at the end come in any order.
    trace = array("d", [number for call in sorted(calls) for number in call])
    digest = blake2b(trace.tobytes() + dependency.requests.tobytes() + dependency.wasted.tobytes(), digest_size=8)
    peak, goodput = max(requests), sum(good[first:]) / max(1, sum(began[first:]))
    p99 = waited[int(0.99 * len(waited))]
    stats = {"peak_requests_per_second": peak, "goodput": round(goodput, 3), "p99": round(p99, 3)}
    result = [(History(), Finding(status, summary))]
    verdict = Verdict.of(result, title=name, claim=storm.claim, expected=expected, seed=seed, stats=stats)
    counted = (requests, began, good, wasted, peak, goodput, p99)
    return Arm(name, verdict, *counted, recovered, metastable, digest.hexdigest())


def _curve(storm: Storm, times: Any) -> Curve:
    """Return how many of the times lie in each second."""
    counts = Counter(map(int, times))
    return [counts[second] for second in range(int(storm.end))]
