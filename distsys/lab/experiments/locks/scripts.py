"""Interleavings that break locks. w1 is the unlucky holder, w2 comes after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from distsys.lab.check.updates import no_lost_update
from distsys.lab.experiments.locks.workload import increments
from distsys.lab.experiments.servers import on_redis
from distsys.lab.run.experiment import Actor, Experiment, Run, expect_held
from distsys.locks.redis_lock import RedisLock

FENCED = {"account": "redis, fenced"}
RULE = expect_held("RedisLock", RedisLock)

# ---- interleavings


async def turn(actor: Actor, *, hold: str = "") -> bool:
    """Let a worker run until it has written, is at `hold`, waits for the lock or has ended. Return whether it waits."""
    actor.go(hold=hold)
    there = actor.at(hold) if hold else actor.did("write")
    return await actor.run.until(there, actor.waiting("acquire"), actor.ended) == actor.waiting("acquire")


async def crowd(run: Run) -> None:
    """Start all workers at once, without faults."""
    for actor in await run.start(run.workers):
        actor.go()


async def overlap(
    run: Run, *, fault: str = "hold", meanwhile: Callable[[Run], Awaitable[None]] | None = None, hold: str = ""
) -> None:
    """Start w2 while w1 is between its read and its write; let w1 go on when w2 has written, or waits as it should.

    fault      "hold" only holds w1 there; "stop" pauses its process; "block" blocks its event loop, so that no timer
               can renew its lease or cancel its body
    meanwhile  what happens to the servers before w2 comes
    hold       the point where w2 is held until w1 has written, or tried to
    """
    w1, w2 = await run.start(2)
    w1.go(**{fault: "before-write"})
    await w1.reached("before-write")
    if meanwhile is not None:
        await meanwhile(run)
    await turn(w2, hold=hold)
    w1.resume() if fault == "stop" else w1.release("before-write")
    if hold:
        await run.until(w1.did("write"), w1.failed("write"), w1.broke("write"), w1.ended)
        w2.release(hold)


async def both_between_get_and_set(run: Run) -> None:
    """Let both workers see that the lock is free before either takes it."""
    point = run.arm.point or "acquiring"
    w1, w2 = await run.start(2)
    for actor in (w1, w2):
        actor.go(hold=point)
        await actor.reached(point)
    w2.send(do="arm", point="before-write", action="hold")
    w2.release(point)
    await w2.reached("before-write")
    w1.release(point)
    await run.until(w1.did("write"), w1.waiting("acquire"), w1.ended)
    w2.release("before-write")


async def killed_holder(run: Run) -> None:
    """Kill w1 with kill -9 while it holds the lock; w2 needs the lock."""
    w1, w2 = await run.start(2)
    w1.go(kill="before-write")
    await w1.reached("before-write")
    if await turn(w2):
        w2.kill()


async def late_release(run: Run) -> None:
    """Stop w1 before its release, past its lease; w2 is inside when w1 releases; then w3 comes."""
    point = run.arm.point or "before-release"
    w1, w2, w3 = await run.start(3)
    w1.go(stop=point)
    await w1.reached(point)
    await turn(w2, hold="before-write")
    w1.resume()
    await run.until(w1.ended)
    await turn(w3)
    w2.release("before-write")


# ---- servers


async def balance(run: Run) -> dict[str, Any]:
    """Return the final balance, from the store in which the arm keeps the account."""
    import psycopg
    import redis.asyncio

    final: Any
    if run.params.get("account", "").startswith("postgres"):
        async with await psycopg.AsyncConnection.connect(run.urls["dsn"], autocommit=True) as conn:
            cursor = await conn.execute("SELECT balance FROM accounts WHERE name = %s", (run.resource,))
            (final,) = await cursor.fetchone() or (None,)
    else:
        async with redis.asyncio.Redis.from_url(run.urls["bank"]) as client:
            final = int(await client.get(f"{{{run.resource}}}:balance") or 0)
    return {"initial": 0, "final": final}


locking = partial(
    Experiment, workload=increments, script=overlap, check=no_lost_update, prepare=on_redis, final=balance
)
