"""Resilience: what a decorator adds to a call, and its peers. `python benchmarks/resilience.py --quick --rounds 3`"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from common import Bench, Contender, Table, judge, median

CALLS = 500  # between two looks at the clock
BARE = "the function alone"
NOTE = """
CPU time per call, less that of the function alone. Ours classifies errors, honours Retry-After, keeps budgets and
deadlines, hands tickets to probes and serves waiters in order; the peers do not, the first row less."""

Call = Callable[[], Awaitable[Any]]


async def nothing() -> None: ...


async def no_wait(seconds: float) -> None: ...


def fails_twice() -> Call:
    count = 0

    async def call() -> None:
        nonlocal count
        count += 1
        if count % 3:
            raise ConnectionError

    return call


# ---- what is called: ours, and each peer's plainest decorator


def minimal_retry(fn: Call) -> Call:
    async def call() -> Any:
        for attempt in range(3):
            try:
                return await fn()
            except ConnectionError:
                if attempt == 2:
                    raise
                await asyncio.sleep(0)
        return None

    return call


def minimal_breaker(fn: Call) -> Call:
    failures, until = 0, 0.0

    async def call() -> Any:
        nonlocal failures, until
        if until and time.monotonic() < until:
            raise RuntimeError("open")
        try:
            result = await fn()
        except Exception:
            failures += 1
            if failures >= 5:
                until = time.monotonic() + 30
            raise
        failures = 0
        return result

    return call


def minimal_bulkhead(fn: Call) -> Call:
    free = 8

    async def call() -> Any:
        nonlocal free
        if not free:
            raise RuntimeError("full")
        free -= 1
        try:
            return await fn()
        finally:
            free += 1

    return call


def semaphore(fn: Call) -> Call:
    permits = asyncio.Semaphore(8)

    async def call() -> Any:
        async with permits:
            return await fn()

    return call


def ours_retry(fn: Call) -> Call:
    from distsys import retry

    return retry(sleep=no_wait)(fn)


def ours_breaker(fn: Call) -> Call:
    from distsys import circuit_breaker

    return circuit_breaker()(fn)


def ours_breaker_of_a_minute(fn: Call) -> Call:
    from distsys import TimeWindow, circuit_breaker

    return circuit_breaker(window=TimeWindow(60), failure_rate=0.5)(fn)


def ours_bulkhead(fn: Call) -> Call:
    from distsys import bulkhead

    return bulkhead()(fn)


def ours_resilient(fn: Call) -> Call:
    from distsys import bulkhead, circuit_breaker, resilient, retry

    return resilient(bulkhead=bulkhead(), circuit_breaker=circuit_breaker(), retry=retry())(fn)


def tenacity(fn: Call) -> Call:
    from tenacity import retry, stop_after_attempt, wait_none

    return retry(stop=stop_after_attempt(3), wait=wait_none())(fn)


def stamina(fn: Call) -> Call:
    from stamina import retry

    return retry(on=ConnectionError, attempts=3, wait_initial=0, wait_max=0, wait_jitter=0)(fn)


def backoff(fn: Call) -> Call:
    from backoff import constant, on_exception

    return on_exception(constant, ConnectionError, max_tries=3, interval=0, jitter=None)(fn)


def hyx_retry(fn: Call) -> Call:
    from hyx.retry import retry

    return retry(on=ConnectionError, attempts=3, backoff=[0.0, 0.0, 0.0])(fn)


def circuitbreaker(fn: Call) -> Call:
    from circuitbreaker import circuit

    return circuit(name="bench")(fn)


def aiobreaker(fn: Call) -> Call:
    from aiobreaker import CircuitBreaker

    return CircuitBreaker(fail_max=5)(fn)


def purgatory(fn: Call) -> Call:
    from purgatory import AsyncCircuitBreakerFactory

    return AsyncCircuitBreakerFactory()("bench")(fn)


def hyx_breaker(fn: Call) -> Call:
    from hyx.circuitbreaker import consecutive_breaker

    return consecutive_breaker()(fn)


def hyx_bulkhead(fn: Call) -> Call:
    from hyx.bulkhead import bulkhead

    return bulkhead(8, 12)(fn)


@asynccontextmanager
async def decorated(*decorators: str) -> AsyncIterator[Call]:
    """The function, decorated from the inside out."""
    fn: Call = nothing
    for name in decorators:
        fn = globals()[name](fn)
    yield fn


@asynccontextmanager
async def flaky(decorator: str = "") -> AsyncIterator[Call]:
    fn = fails_twice()
    yield globals()[decorator](fn) if decorator else fn


# ---- what is measured, in the child


async def called(fn: Call, start: float, seconds: float) -> dict[str, float]:
    count, begin, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < begin + seconds:
        for _ in range(CALLS):
            await fn()
        count += CALLS
    return {"count": count, "ns": 1e9 * (time.process_time() - cpu) / count}


async def added(
    bench: Bench, title: str, rows: Sequence[Contender], goals: dict[str, float], unit: str = "ns", ratio: bool = False
) -> None:
    """A table of CPU time per call, less that of the function alone; a `ratio` is a goal in first rows."""
    if not bench.wanted(title):
        return
    alone = [Contender(BARE, "decorated", [])]
    answers = await bench.rounds(title, [*alone, *rows], "called", times=3, seconds=0.05)
    took = {name: [one.answers[0]["ns"] for one in each] for name, each in answers.items()}
    scale = 1e3 if unit == "µs" else 1.0
    bars = {
        name: [(one - bare) / scale for one, bare in zip(each, took[BARE], strict=True)]
        for name, each in took.items()
        if name != BARE
    }
    table = []
    for name, values in bars.items():
        goal = [(f"≤ {goals[name]:,g}", median(values) <= goals[name])] if name in goals else []
        if goal and ratio:
            times = median([ours / floor for ours, floor in zip(values, bars[rows[0].name], strict=True)])
            goal = [(f"≤ {goals[name]:,g} x the first row; {times:.2f}", times <= goals[name])]
        table.append([name, f"{median(values):,.1f}" if scale > 1 else f"{median(values):,.0f}", judge(*goal)])
    samples = {name: [{"ns": one} for one in each] for name, each in took.items()}
    goal_line = None if ratio else next(iter(goals.values()), None)
    bench.show(
        Table(title, ["", f"{unit} added", "goal"], table, NOTE, bars, f"{unit} added", goal_line, True, samples)
    )


async def main() -> None:
    def one(name: str, *makes: str, needs: str = "") -> Contender:
        return Contender(name, "decorated", makes, needs=needs)

    async with Bench.open("resilience") as bench:
        ours = "retry, ours"
        rows = [
            one("a loop with try and except", "minimal_retry"),
            one(ours, "ours_retry"),
            one("tenacity", "tenacity", needs="tenacity"),
            one("stamina", "stamina", needs="stamina"),
            one("backoff", "backoff", needs="backoff"),
            one("hyx", "hyx_retry", needs="hyx"),
        ]
        await added(bench, "Retry, the call succeeds", rows, {ours: 500})
        flaky_rows = [Contender(row.name, "flaky", row.args, needs=row.needs) for row in rows]
        await added(bench, "Retry, the call fails twice, then succeeds; no waits", flaky_rows, {ours: 1.38}, "µs", True)
        ours = "circuit_breaker, ours"
        rows = [
            one("a counter and a time", "minimal_breaker"),
            one(ours, "ours_breaker"),
            one("circuit_breaker, ours, failure rate of a minute", "ours_breaker_of_a_minute"),
            one("circuitbreaker", "circuitbreaker", needs="circuitbreaker"),
            one("aiobreaker", "aiobreaker", needs="aiobreaker"),
            one("purgatory", "purgatory", needs="purgatory"),
            one("hyx", "hyx_breaker", needs="hyx"),
        ]
        await added(bench, "Circuit breaker, closed", rows, {ours: 800})
        ours = "bulkhead, ours"
        rows = [
            one("a counter", "minimal_bulkhead"),
            one(ours, "ours_bulkhead"),
            one("asyncio.Semaphore", "semaphore"),
            one("hyx", "hyx_bulkhead", needs="hyx"),
        ]
        await added(bench, "Bulkhead, permits left", rows, {ours: 700})
        ours = "resilient, ours"
        rows = [
            one("minimal, stacked", "minimal_retry", "minimal_breaker", "minimal_bulkhead"),
            one(ours, "ours_resilient"),
            one("ours, stacked", "ours_retry", "ours_breaker", "ours_bulkhead"),
            one("hyx, stacked", "hyx_retry", "hyx_breaker", "hyx_bulkhead", needs="hyx"),
            one(
                "tenacity, circuitbreaker, Semaphore", "tenacity", "circuitbreaker", "semaphore", needs="circuitbreaker"
            ),
        ]
        await added(bench, "All three", rows, {ours: 1500})


if __name__ == "__main__":
    asyncio.run(main())
