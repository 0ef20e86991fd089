"""Locks: ours beside the raw commands and the peers. `python benchmarks/locks.py --quick --rounds 3 --only redlock`"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

from common import Bench, Contender, Table, judge, median, percentile, ratios, repeat

NAME, TTL = "bench", 30.0
WAITERS, HOLD = 8, 0.001
POLL = 0.1  # seconds between two tries: redis-py's default, and the polled advisory lock's
RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"

Locks = AsyncIterator[Callable[[int], Any]]  # what a contender yields: the number of a waiter -> a lock to enter
Goal = tuple[str, Callable[[dict[str, float]], bool]]


# ---- Redis


class Raw:
    """The floor: SET NX PX, then compare-and-delete by EVALSHA."""

    def __init__(self, redis: Any, sha: str) -> None:
        self.redis, self.sha = redis, sha

    async def __aenter__(self) -> None:
        self.owner = os.urandom(16)
        assert await self.redis.set(NAME, self.owner, nx=True, px=30_000)

    async def __aexit__(self, *_: object) -> None:
        await self.redis.evalsha(self.sha, 1, NAME, self.owner)


class RawSync:
    def __init__(self, redis: Any, sha: str) -> None:
        self.redis, self.sha = redis, sha

    def __enter__(self) -> None:
        self.owner = os.urandom(16)
        assert self.redis.set(NAME, self.owner, nx=True, px=30_000)

    def __exit__(self, *_: object) -> None:
        self.redis.evalsha(self.sha, 1, NAME, self.owner)


class RawNodes:
    """The same on several nodes at once."""

    def __init__(self, nodes: list[Any], sha: str) -> None:
        self.nodes, self.sha = nodes, sha

    async def __aenter__(self) -> None:
        self.owner = os.urandom(16)
        assert all(await asyncio.gather(*(node.set(NAME, self.owner, nx=True, px=30_000) for node in self.nodes)))

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(node.evalsha(self.sha, 1, NAME, self.owner) for node in self.nodes))


class ByHand:
    """acquire() and release() in place of `async with`."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    async def __aenter__(self) -> None:
        self.lease = await self.lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        await self.lease.release()


class Anew:
    """A lock made for each use, as people write it: `async with RedisLock(redis, name)`."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    async def __aenter__(self) -> None:
        self.lock = self.make()
        await self.lock.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self.lock.__aexit__(None, None, None)


@asynccontextmanager
async def clients(*urls: str) -> AsyncIterator[list[Any]]:
    from redis.asyncio import Redis

    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Redis.from_url(url)) for url in urls]


@asynccontextmanager
async def raw(*urls: str) -> Locks:
    async with clients(*urls) as nodes:
        (sha,) = {await node.script_load(RELEASE) for node in nodes}
        yield lambda _: Raw(nodes[0], sha) if len(nodes) == 1 else RawNodes(nodes, sha)


@asynccontextmanager
async def raw_sync(url: str) -> Locks:
    from redis import Redis

    with Redis.from_url(url) as redis:
        sha = redis.script_load(RELEASE)
        yield lambda _: RawSync(redis, sha)


@asynccontextmanager
async def redis_lock(url: str) -> Locks:
    from distsys.locks.redis_lock import RedisLock

    async with clients(url) as (redis,):
        yield lambda _: RedisLock(redis, NAME)


@asynccontextmanager
async def redis_lock_by_hand(url: str) -> Locks:
    async with redis_lock(url) as lock:
        yield lambda waiter: ByHand(lock(waiter))


@asynccontextmanager
async def redis_lock_anew(url: str) -> Locks:
    async with redis_lock(url) as lock:
        yield lambda waiter: Anew(lambda: lock(waiter))


@asynccontextmanager
async def redlock(*urls: str) -> Locks:
    from distsys.locks.redlock import Redlock

    async with clients(*urls) as nodes:
        yield lambda _: Redlock(nodes, NAME, ttl=TTL)


@asynccontextmanager
async def redis_py(url: str) -> Locks:
    async with clients(url) as (redis,):
        yield lambda _: redis.lock(NAME, timeout=TTL, sleep=POLL)


@asynccontextmanager
async def python_redis_lock(url: str) -> Locks:
    from redis import Redis
    from redis_lock import Lock

    with Redis.from_url(url) as redis:
        yield lambda _: Lock(redis, NAME, expire=int(TTL))


@asynccontextmanager
async def pottery(*urls: str) -> Locks:
    from pottery import AIORedlock

    async with clients(*urls) as nodes:
        masters = set(nodes)
        yield lambda _: AIORedlock(key=NAME, masters=masters, auto_release_time=TTL)


# ---- PostgreSQL: a connection for each waiter


class Statements:
    """The floor: statements to enter with, and one to leave with."""

    def __init__(self, connection: Any, *enter: str, leave: str) -> None:
        self.connection, self.enter, self.leave = connection, enter, leave

    async def __aenter__(self) -> None:
        for statement in self.enter:
            await self.connection.execute(statement)

    async def __aexit__(self, *_: object) -> None:
        await self.connection.execute(self.leave)


class Polled(Statements):
    """One that says whether it was granted, and is tried again until it is."""

    async def __aenter__(self) -> None:
        for _ in range(10_000):
            cursor = await self.connection.execute(self.enter[0])
            if (await cursor.fetchone())[0]:
                return
            await asyncio.sleep(POLL)
        raise TimeoutError


class Committed:
    """A transaction lock of ours, and the commit that ends it."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    async def __aenter__(self) -> None:
        await self.lock.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self.lock.__aexit__(None, None, None)
        await self.lock.source.commit()


@asynccontextmanager
async def connections(url: str, autocommit: bool = True) -> AsyncIterator[list[Any]]:
    from psycopg import AsyncConnection

    async with AsyncExitStack() as stack:
        connecting = [AsyncConnection.connect(url, autocommit=autocommit) for _ in range(WAITERS)]
        yield [await stack.enter_async_context(await one) for one in connecting]


@asynccontextmanager
async def raw_session(url: str) -> Locks:
    lock, unlock = "SELECT pg_advisory_lock(42)", "SELECT pg_advisory_unlock(42)"
    async with connections(url) as conns:
        yield lambda waiter: Statements(conns[waiter], lock, leave=unlock)


@asynccontextmanager
async def raw_transaction(url: str) -> Locks:
    async with connections(url) as conns:
        yield lambda waiter: Statements(conns[waiter], "BEGIN", "SELECT pg_advisory_xact_lock(42)", leave="COMMIT")


@asynccontextmanager
async def polled(url: str) -> Locks:
    lock, unlock = "SELECT pg_try_advisory_lock(42)", "SELECT pg_advisory_unlock(42)"
    async with connections(url) as conns:
        yield lambda waiter: Polled(conns[waiter], lock, leave=unlock)


@asynccontextmanager
async def session(url: str) -> Locks:
    from distsys.locks.advisory_lock import AdvisoryLock

    async with connections(url) as conns:
        yield lambda waiter: AdvisoryLock(conns[waiter], NAME, scope="session")


@asynccontextmanager
async def transaction(url: str) -> Locks:
    from distsys.locks.advisory_lock import AdvisoryLock

    async with connections(url, autocommit=False) as conns:
        yield lambda waiter: Committed(AdvisoryLock(conns[waiter], NAME))


# ---- what is measured, in the child


async def pairs(new: Callable[[int], Any], start: float, seconds: float) -> dict[str, float]:
    """Nobody else wants the lock: it is entered and left over and over."""
    lock = new(0)

    async def once() -> None:
        async with lock:
            pass

    def once_sync() -> None:
        with lock:
            pass

    return await repeat(once if hasattr(lock, "__aenter__") else once_sync, seconds)


async def contend(new: Callable[[int], Any], start: float, seconds: float, waiters: int) -> list[Any]:
    """Every waiter wants it over and over: (waiter, got, left) of each hold, by the clock that all processes share."""
    held: list[Any] = []

    async def wait(waiter: int) -> None:
        lock = new(waiter)
        while time.monotonic() < start + seconds:
            async with lock:
                got = time.monotonic()
                await asyncio.sleep(HOLD)
                left = time.monotonic()
            held.append((f"{os.getpid()}.{waiter}", got, left))

    def wait_sync(waiter: int) -> None:
        lock = new(waiter)
        while time.monotonic() < start + seconds:
            with lock:
                got = time.monotonic()
                time.sleep(HOLD)
                left = time.monotonic()
            held.append((f"{os.getpid()}.{waiter}", got, left))

    await asyncio.sleep(max(0.0, start - time.monotonic()))
    if hasattr(new(0), "__aenter__"):
        await asyncio.gather(*map(wait, range(waiters)))
    else:
        with ThreadPoolExecutor(waiters) as threads:
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(threads, wait_sync, number) for number in range(waiters)))
    return held


# ---- the tables


def handed_on(name: str, answers: list[list[Any]]) -> dict[str, float]:
    """One round: how often and how fast the lock went from one waiter to another, and how evenly."""
    holds = sorted((tuple(hold) for of in answers for hold in of), key=lambda hold: hold[1])
    for one, other in pairwise(holds):
        if other[1] < one[2]:
            sys.exit(f"OVERLAP: {name} let {other[0]} in {1e3 * (one[2] - other[1]):.3f} ms before {one[0]} had left")
    gaps = [other[1] - one[2] for one, other in pairwise(holds) if one[0] != other[0]]
    shares = Counter(hold[0] for hold in holds).values()
    return {
        "rate": len(gaps) / (holds[-1][2] - holds[0][1]),
        "p50_ms": 1e3 * percentile(gaps, 50) if gaps else math.inf,
        "p99_ms": 1e3 * percentile(gaps, 99) if gaps else math.inf,
        "uneven": max(shares) / min(shares) if len(shares) == WAITERS else math.inf,
    }


async def contended(
    bench: Bench, title: str, contenders: list[Contender], *, processes: int, goals: list[Goal], note: str
) -> None:
    """The floor is a peer that polls; the goals are for the rows that have one for the ratio."""
    if not bench.wanted(title):
        return
    answers = await bench.rounds(
        title,
        contenders,
        "contend",
        processes=processes,
        seconds=bench.seconds(1.5),
        waiters=WAITERS // processes,
    )
    found = {name: [handed_on(name, one.answers) for one in rounds] for name, rounds in answers.items()}
    rates = {name: [one["rate"] for one in each] for name, each in found.items()}
    rows, bars = [], {}
    for contender in (c for c in contenders if c.name in found):
        one = {key: median([each[key] for each in found[contender.name]]) for key in found[contender.name][0]}
        bars[contender.name] = ratios(rates[contender.name], rates[contender.floor or contender.name])
        one |= {"ratio": median(bars[contender.name]), "spread": one["p99_ms"] / one["p50_ms"]}
        judged = ""
        if contender.goal:
            judged = judge(
                (f"≥ {contender.goal:g}x", one["ratio"] >= contender.goal), *((text, met(one)) for text, met in goals)
            )
        numbers = [f"{one['rate']:,.0f}", f"{one['ratio']:.1f}x", f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}"]
        rows.append([contender.name, *numbers, f"{one['spread']:.1f}", f"{one['uneven']:.2f}", "0", judged])
    columns = ["", "hand-offs/s", "to polling", "p50 ms", "p99 ms", "p99/p50", "busiest/idlest", "overlaps", "goal"]
    goal = next((c.goal for c in contenders if c.goal), None)
    axis = "hand-offs/s, ratio to polling"
    bench.show(Table(title, columns, rows, note, bars, axis, goal, log=True, samples=found))


async def main() -> None:
    async with Bench.open("locks") as bench:
        one = (await bench.servers.redis()).url
        five = [(await bench.servers.redis(f"node{number}")).url for number in range(1, 6)]
        database = (await bench.servers.postgres()).url
        closed_loop = f"{WAITERS} waiters in a closed loop, each holds for {1e3 * HOLD:g} ms. "
        even: Goal = "busiest/idlest ≤ 1.2", lambda one: one["uneven"] <= 1.2

        floor, floor_sync = "SET NX PX + EVALSHA", "the same, blocking client"
        await bench.speed(
            "RedisLock, nobody waits",
            "pairs",
            [
                Contender(floor, "raw", [one]),
                Contender("RedisLock, ours", "redis_lock", [one], floor, 0.85),
                Contender("RedisLock, ours, acquire() and release()", "redis_lock_by_hand", [one], floor, 0.85),
                Contender("RedisLock, ours, made anew each time", "redis_lock_anew", [one], floor),
                Contender("redis-py Lock", "redis_py", [one], floor),
                Contender("pottery AIORedlock, 1 node", "pottery", [one], floor, needs="pottery"),
                Contender(floor_sync, "raw_sync", [one]),
                Contender("python-redis-lock", "python_redis_lock", [one], floor_sync, needs="python-redis-lock"),
            ],
            do="pairs",
            note="""
What only RedisLock does: hand out a fencing token, keep a queue, renew by itself (python-redis-lock can, in a thread),
tell the holder of a loss before the lease ends, take back what a cancelled acquire was granted.""",
        )
        note = """
redis-py and pottery poll, and the lock goes to whoever comes by; python-redis-lock wakes one waiter, but whoever asks
first gets it. Only RedisLock keeps an order. An overlap, two holders at once, would end the benchmark with an error."""
        poller = f"redis-py Lock, polls every {POLL:g} s"
        rivals = [
            Contender(poller, "redis_py", [one]),
            Contender("RedisLock, ours", "redis_lock", [one], poller, 40),
            Contender("python-redis-lock", "python_redis_lock", [one], poller, needs="python-redis-lock"),
            Contender("pottery AIORedlock, 1 node", "pottery", [one], poller, needs="pottery"),
        ]
        steady: Goal = "p99/p50 ≤ 5", lambda one: one["spread"] <= 5
        for processes, who in ((1, "tasks"), (WAITERS, "processes")):
            await contended(
                bench,
                f"RedisLock, {WAITERS} {who} wait",
                rivals,
                processes=processes,
                goals=[steady, even],
                note=closed_loop + note.lstrip(),
            )

        floor = "gather of 5x SET NX PX, 5x EVALSHA"
        await bench.speed(
            "Redlock, 5 nodes, nobody waits",
            "pairs",
            [
                Contender(floor, "raw", five),
                Contender("Redlock, ours", "redlock", five, floor, 0.9),
                Contender("pottery AIORedlock", "pottery", five, floor, needs="pottery"),
            ],
            do="pairs",
            note="""
pottery has no timeout for a single node, does not renew, and leaves grants that come after the decision to their TTL.
Ours answers at the first majority; the slower nodes' answers come in while the body runs.""",
        )

        lock, begin = "pg_advisory_lock, pg_advisory_unlock", "BEGIN, pg_advisory_xact_lock, COMMIT"
        await bench.speed(
            "AdvisoryLock, nobody waits",
            "pairs",
            [
                Contender(lock, "raw_session", [database]),
                Contender("AdvisoryLock, ours, session", "session", [database], lock, 0.9),
                Contender(begin, "raw_transaction", [database]),
                Contender("AdvisoryLock, ours, transaction", "transaction", [database], begin, 0.9),
            ],
            do="pairs",
            note="""
The statements alone do not notice that the connection died under the body, that a pool gets a locked session back, or
that a proxy gives the session to others; after a timeout or a deadlock their transaction can only be rolled back.""",
        )
        poller = f"pg_try_advisory_lock, polled every {POLL:g} s"
        await contended(
            bench,
            f"AdvisoryLock, {WAITERS} tasks wait",
            [
                Contender(poller, "polled", [database]),
                Contender("pg_advisory_lock", "raw_session", [database], poller),
                Contender("AdvisoryLock, ours, session", "session", [database], poller, 40),
                Contender("AdvisoryLock, ours, transaction", "transaction", [database], poller, 40),
            ],
            processes=1,
            goals=[("p50 ≤ 0.5 ms", lambda one: one["p50_ms"] <= 0.5), even],
            note=closed_loop + "Each has a connection of its own; the server keeps the queue.",
        )


if __name__ == "__main__":
    asyncio.run(main())
