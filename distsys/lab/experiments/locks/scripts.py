"""Interleavings that break locks. w1 is the unlucky holder, w2 comes after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from distsys.lab.check.combine import all_of
from distsys.lab.check.locks import mutual_exclusion
from distsys.lab.check.updates import no_lost_update
from distsys.lab.experiments.locks.workload import increments
from distsys.lab.experiments.servers import on_redis
from distsys.lab.run.experiment import Actor, Experiments, Run, expect_held
from distsys.locks.redis_lock import RedisLock

AT_ONCE = all_of(mutual_exclusion, no_lost_update)
FENCED = {"account": "redis, fenced"}
RULE = expect_held("RedisLock", RedisLock)

# ---- interleavings


async def turn(actor: Actor, *, hold: str = "") -> bool:
    """Let a worker run until it has written, is at `hold`, waits for the lock or has ended. Return whether it waits."""
    actor.go(hold=hold)
    there = actor.at(hold) if hold else actor.did("write")
    return await actor.run.until(there, actor.waiting("acquire"), actor.ended) == actor.waiting("acquire")


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


locking = partial(Experiments, workload=increments, check=no_lost_update, prepare=on_redis, final=balance)
