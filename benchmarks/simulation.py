"""Simulation: the virtual loop beside a peer's, and whole storms. `python benchmarks/simulation.py --quick --rounds 3`

A client call is a wait, a call through `retry` and `circuit_breaker`, and in it a request with a timeout.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from common import Bench, Contender, Table, judge, median, ratios

CLIENTS, EACH = 2_000, 5
GOAL = 15_000  # client calls per CPU second

Work = Callable[[], int]  # its client calls


async def program(clients: int) -> int:
    from distsys.resilience.circuit_breaker import CircuitBreaker
    from distsys.resilience.composed import Resilient
    from distsys.resilience.retry import Retry

    loop, rng = asyncio.get_running_loop(), random.Random(7)
    breaker = CircuitBreaker(10, 1.0, window=20, clock=loop.time, rng=rng.random)

    @Resilient(circuit_breaker=breaker, retry=Retry(3, 0.1, rng=rng.random))
    async def request() -> None:
        async with asyncio.timeout(1):
            await asyncio.sleep(rng.expovariate(100))
        if rng.random() < 0.1:
            raise ConnectionResetError

    async def client() -> None:
        for _ in range(EACH):
            await asyncio.sleep(rng.expovariate(0.1))
            with suppress(ConnectionResetError):
                await request()

    await asyncio.gather(*(client() for _ in range(clients)))
    return clients * EACH


@asynccontextmanager
async def ours(clients: str) -> AsyncIterator[Work]:
    from distsys.lab.simulate import virtual_loop

    yield lambda: virtual_loop.run(program(int(clients)))


@asynccontextmanager
async def looptime(clients: str) -> AsyncIterator[Work]:
    from looptime import patch_event_loop

    def work() -> int:
        with asyncio.Runner(loop_factory=lambda: patch_event_loop(asyncio.new_event_loop(), start=0)) as runner:
            return runner.run(program(int(clients)))

    yield work


@asynccontextmanager
async def storm(arm: str) -> AsyncIterator[Work]:
    from distsys.lab.simulate.simulation import simulate

    def work() -> int:
        (done,) = simulate([arm]).arms
        return max(sum(done.requests), sum(done.calls))  # a breaker answers calls without a request

    yield work


async def measure(work: Work, start: float) -> dict[str, float]:
    cpu = time.process_time()
    count = await asyncio.to_thread(work)
    return {"count": count, "cpu": time.process_time() - cpu}


async def table(bench: Bench, title: str, contenders: list[Contender], axis: str, note: str) -> None:
    if not bench.wanted(title):
        return
    answers = await bench.rounds(title, contenders, "measure")
    found = {name: [{"rate": one.answers[0]["count"] / one.answers[0]["cpu"]} for one in each]
             for name, each in answers.items()}  # fmt: skip
    rates = {name: [one["rate"] for one in each] for name, each in found.items()}
    base = contenders[0].name
    rows = [
        [name, f"{median(each):,.0f}", f"{median(ratios(each, rates[base])):.2f}",
         judge((f"≥ {GOAL:,}", median(each) >= GOAL)) if ", ours" in name else ""]
        for name, each in rates.items()
    ]  # fmt: skip
    columns = ["", axis, f"to {base}", "goal"]
    bench.show(Table(title, columns, rows, note, rates, axis, GOAL, samples=found))


async def main() -> None:
    async with Bench.open("simulation") as bench:
        loops = [Contender("virtual loop, ours", "ours", [str(CLIENTS)])]
        loops.append(Contender("looptime", "looptime", [str(CLIENTS // 10)], needs="looptime"))
        per = "client calls per CPU second"
        await table(
            bench, "Loop", loops, per, f"{CLIENTS:,} clients, {EACH} calls each; looptime with a tenth of them."
        )
        arms = ("no retries", "full jitter", "full jitter + breaker", "all of them")
        storms = [Contender(f"{arm}, ours", "storm", [arm]) for arm in arms]
        note = "10,000 clients, 29 s of virtual time, set-up and verdict included; every attempt counts."
        await table(bench, "Storm", storms, "client calls per CPU second", note)


if __name__ == "__main__":
    asyncio.run(main())
