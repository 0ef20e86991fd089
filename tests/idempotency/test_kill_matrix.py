"""SIGKILL at each exchange with a server, twenty times: the ledger shows exactly one effect, always.

A real worker process is killed between two of its statements; then, or while it still holds the row, others retry. The
rules know nothing of it: the worker's connections are of a class that reaches a checkpoint of the lab after each one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import cloudpickle
import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis

from distsys.idempotency.consumers import consume_stream
from distsys.idempotency.database import idempotent_execute
from distsys.idempotency.dedup import Dedup
from distsys.lab.run.worker import Job, Worker, checkpoint
from distsys.lab.testbed.processes import Process, Processes
from distsys.lab.testbed.servers import Server
from tests.idempotency.test_database import ledger, select

__all__ = ["ledger"]
SEEDS = 20
AT_ONCE = 4  # workers


class CheckedConnection(AsyncConnection[Any]):
    async def wait(self, *args: Any, **more: Any) -> Any:
        answer = await super().wait(*args, **more)
        await checkpoint(f"step {next(Worker.steps)}")  # type: ignore[attr-defined]
        return answer


class CheckedRedis(Redis):
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = await super().execute_command(*args, **options)
        await checkpoint(f"step {next(Worker.steps)}")  # type: ignore[attr-defined]
        return answer


async def effect(conn: AsyncConnection[Any], what: Any) -> str:
    name = what if isinstance(what, str) else what[b"what"].decode()
    await conn.execute("INSERT INTO ledger (what) VALUES (%s)", (name,))
    return name


async def executes(worker: Any, candidate: Any, dsn: str, url: str, key: str) -> None:
    """Step 0 is before all; then BEGIN, claim, effect, mark, COMMIT, and the pool's own."""
    Worker.steps = itertools.count(1)  # type: ignore[attr-defined]
    await checkpoint("step 0")
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False, connection_class=CheckedConnection) as pool:
        await idempotent_execute(pool, key, "e", lambda conn: effect(conn, key))
    await checkpoint("step last")


async def consumes(worker: Any, candidate: Any, dsn: str, url: str, key: str) -> None:
    """A consumer of a stream: the look into Redis, transaction, the word to Redis, XACK."""
    Worker.steps = itertools.count(1)  # type: ignore[attr-defined]
    await checkpoint("step 0")
    async with (
        AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False, connection_class=CheckedConnection) as pool,
        CheckedRedis.from_url(url) as redis,
    ):
        dedup = Dedup("g", pool, retention=3_600, redis=redis)
        await consume_stream(redis, key, "killed", dedup, effect, min_idle=0.001, message_id=None)


@pytest.fixture(scope="module")
async def processes() -> AsyncIterator[Processes]:
    processes = await Processes.start()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that a worker imports no test, and starts at once
    yield processes
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    await processes.aclose()


async def killed(processes: Processes, workload: Any, point: str, seed: int, **params: Any) -> bool:
    """Whether a worker came to that point, and died there."""
    job = Job(params["key"], seed, workload, None, {}, "", 1.0, 1.0, params)
    worker = await processes.fork("distsys.lab.run.worker:main", cloudpickle.dumps(job), name=f"w-{params['key']}")
    try:
        return await _struck(worker, point)
    finally:
        if worker.state != "exited":
            await worker.end()
        worker.close()


async def _struck(worker: Process, point: str) -> bool:
    assert worker.sock is not None
    loop, said = asyncio.get_running_loop(), b""
    orders = {"do": "arm", "point": point, "action": "kill"}, {"do": "go"}
    await loop.sock_sendall(worker.sock, b"".join(json.dumps(order).encode() + b"\n" for order in orders))
    while data := await loop.sock_recv(worker.sock, 1 << 16):
        said += data
    assert b'"crash"' not in said, said
    return await worker.exited() == -signal.SIGKILL


async def in_groups(number: int, attempt: Any) -> list[Any]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> Any:
        async with turn:
            return await attempt(seed)

    return await asyncio.gather(*map(one, range(number)))


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, "last"])
async def test_idempotent_execute_has_one_effect_wherever_it_is_killed(
    processes: Processes, ledger: AsyncConnectionPool, pg: str, step: int | str
) -> None:
    """Before and after BEGIN, claim, effect, mark and COMMIT. Odd seeds retry at once with the attempt, in pairs."""

    async def attempt(seed: int) -> tuple[bool, set[Any], int]:
        key = f"key-{seed}"
        dying = killed(processes, executes, f"step {step}", seed, dsn=pg, url="", key=key)
        retries = [idempotent_execute(ledger, key, "e", lambda conn: effect(conn, key)) for _ in range(2)]
        if seed % 2:
            struck, *answers = await asyncio.gather(dying, *retries)
        else:
            struck, answers = await dying, [await retry for retry in retries]
        (count,) = await select(ledger, "SELECT count(*) FROM ledger WHERE what = %s", key)
        return struck, set(answers), count

    found = await in_groups(SEEDS, attempt)
    assert [count for _, _, count in found] == [1] * SEEDS
    assert [answers for _, answers, _ in found] == [{f"key-{seed}"} for seed in range(SEEDS)]
    assert all(struck for struck, _, _ in found if step in (0, 1, "last")), "the worker outlived its checkpoint"
    assert all(struck for struck, _, _ in found[::2]), "the worker outlived its checkpoint"


# xgroup, xautoclaim, xreadgroup; exists, BEGIN, mark, effect, forgive, COMMIT, the pool's own, set, xack, and once more
@pytest.mark.parametrize("step", range(14))
async def test_a_consumer_has_one_effect_wherever_it_is_killed(
    processes: Processes, ledger: AsyncConnectionPool, pg: str, redis_server: Server, redis: Redis, step: int
) -> None:
    """Another consumer of the stream claims the entry that it left, and acknowledges it."""

    async def attempt(seed: int) -> tuple[bool, int]:
        key = f"key-{seed}"
        await redis.xadd(key, {"what": key})
        assert await killed(processes, consumes, f"step {step}", seed, dsn=pg, url=redis_server.url, key=key)
        if seed % 3 == 0:
            await redis.delete(*[name async for name in redis.scan_iter("distsys:*")] or ["none"])  # evicted
        dedup = Dedup("g", ledger, retention=3_600, redis=redis if seed % 2 else None)
        consumer = asyncio.create_task(consume_stream(redis, key, "next", dedup, effect, min_idle=0.001))
        while not await settled(redis, key):
            assert not consumer.done(), consumer.exception()
        consumer.cancel()
        await asyncio.wait([consumer])
        return True, (await select(ledger, "SELECT count(*) FROM ledger WHERE what = %s", key))[0]

    assert await in_groups(SEEDS, attempt) == [(True, 1)] * SEEDS


async def settled(redis: Redis, stream: str) -> bool:
    """Whether all was delivered and acknowledged."""
    groups = await redis.xinfo_groups(stream)
    return bool(groups) and groups[0]["pending"] == 0 and groups[0]["lag"] == 0
