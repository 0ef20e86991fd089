"""Faults that a lock on one Redis must withstand, and well-known locks that do not."""

from __future__ import annotations

from distsys.lab.check.locks import progress
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.locks.scripts import AT_ONCE, RULE, locking, overlap, turn
from distsys.lab.experiments.locks.workload import increments_by_tasks
from distsys.lab.experiments.servers import on_both, on_three_nodes
from distsys.lab.run.experiment import Run, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy
from distsys.locks.redlock import Redlock

EXPERIMENTS = experiment = locking()


@experiment(
    "contention",
    "Workers that take turns lose nothing; what differs between the locks is how long they wait.",
    RULE,
    expect_held("redis-py's Lock", lambda redis, name: redis.lock(name, timeout=10)),
    expect_held("Redlock, three nodes", Redlock, prepare=on_three_nodes),
    expect_held("AdvisoryLock, transaction scope", candidates.transaction_lock, prepare=on_both),
    params={"rounds": 10}, check=AT_ONCE, ttl=10.0, alone=True,
)  # fmt: skip
async def crowd(run: Run) -> None:
    """Start all workers at once, without faults."""
    for actor in await run.start(run.workers):
        actor.go()


experiment(
    "no-lock",
    "Two workers that read, think and write lose an update unless something makes them take turns.",
    expect_violated("no lock", candidates.NoLock),
    RULE,
)(overlap)


@experiment(
    "set-without-nx",
    "Check and set must be one step: two workers can both check before either sets.",
    expect_violated("GET, then SET without NX", candidates.SetWithoutNx, point="between-get-and-set"),
    RULE,
    check=AT_ONCE,
)
async def both_between_get_and_set(run: Run) -> None:
    """Let both workers see that the lock is free before either takes it."""
    point = run.point("acquiring")
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


@experiment(
    "killed-holder",
    "A lock without a TTL outlives a holder that was killed: no worker ever enters again.",
    expect_violated("SET NX without a TTL", candidates.SetNxWithoutTtl),
    RULE,
    check=progress, patience=1.0, patience_ttls=3,
)  # fmt: skip
async def killed_holder(run: Run) -> None:
    """Kill w1 with kill -9 while it holds the lock; w2 needs the lock."""
    w1, w2 = await run.start(2)
    w1.go(kill="before-write")
    await w1.reached("before-write")
    if await turn(w2):
        w2.kill()


@experiment(
    "late-release",
    "A holder that comes back late must not release a lock that another worker holds by now.",
    expect_violated("release by plain DEL", candidates.PlainDel),
    expect_violated("release by GET, then DEL", candidates.GetThenDel, point="between-get-and-del"),
    RULE,
    patience_ttls=3,
)
async def late_release(run: Run) -> None:
    """Stop w1 before its release, past its lease; w2 is inside when w1 releases; then w3 comes."""
    point = run.point("before-release")
    w1, w2, w3 = await run.start(3)
    w1.go(stop=point)
    await w1.reached(point)
    await turn(w2, hold="before-write")
    w1.resume()
    await run.until(w1.ended)
    await turn(w3)
    w2.release("before-write")


experiment(
    "slow-holder",
    "Work that takes longer than the TTL loses the lock in the middle, unless the lease is renewed.",
    expect_violated("TTL without renewal", candidates.TtlNoRenewal),
    RULE,
    check=AT_ONCE, patience_ttls=3,
)(overlap)  # fmt: skip


@experiment(
    "shared-by-two-tasks",
    "One lock object used by two tasks must keep their leases apart.",
    expect_violated("redis-py's Lock", candidates.redis_py_lock),
    RULE,
    workload=increments_by_tasks, params={"tasks": "ab"}, patience_ttls=3,
)  # fmt: skip
async def shared_by_two_tasks(run: Run) -> None:
    """Let task a of w1 outlive its lease; task b uses the same object; a releases; w2 comes while b is inside."""
    w1, w2 = await run.start(2)
    for point in ("start-b", "a-before-release", "b-before-write"):
        w1.send(do="arm", point=point, action="hold")
    w1.go()
    await w1.reached("a-before-release")
    w1.release("start-b")
    # With a renewed lease b waits for a instead, and nothing can go wrong.
    if await run.until(w1.at("b-before-write"), w1.waiting("acquire", "w1.b")) == w1.at("b-before-write"):
        w1.release("a-before-release")
        await run.until(w1.did("release", "w1.a"), w1.broke("release", "w1.a"), w1.failed("release", "w1.a"))
    w2.send(do="arm", point="start-b", action="hold")
    w2.go()
    await run.until(w2.did("write", "w2.a"), w2.waiting("acquire", "w2.a"))
    w1.release("a-before-release")
    w1.release("b-before-write")
    w2.release("start-b")


@experiment(
    "cancelled-in-flight",
    "An acquire that is cancelled after the server granted it must be undone, or no worker enters again.",
    expect_violated("redis-py's Lock, no timeout", candidates.redis_py_lock_without_timeout),
    RULE,
    workload=increments_by_tasks, params={"tasks": "a"}, check=progress, patience=1.0, ttl=10.0,
)  # fmt: skip
async def cancelled_in_flight(run: Run) -> None:
    """Cancel w1 after its request reached the server and before the answer reached w1; w2 needs the lock."""
    import redis.asyncio

    server = await run.testbed.servers.redis()
    link = await run.cleanup.enter_async_context(TcpProxy(server.host, server.port))
    w1, w2 = await run.start(2, redis=[link.through(run.urls["redis"]), run.urls["redis"]])
    link.drop_replies()
    w1.go()
    async with redis.asyncio.Redis.from_url(run.urls["redis"]) as client:
        for _ in range(2000):
            if await client.keys(f"*{run.resource}*"):
                break
    w1.cancel("a")
    await run.until(w1.at("cancelled"))
    link.heal()
    if await run.until(w1.broke("acquire", "w1.a"), w1.waiting("acquire", "w1.a")) != w1.broke("acquire", "w1.a"):
        w1.kill()  # Python 3.11's wait_for, inside the client, swallowed the cancellation: it asks for ever
    w2.go()
    if await run.until(w2.did("write", "w2.a"), w2.waiting("acquire", "w2.a")) == w2.waiting("acquire", "w2.a"):
        w2.kill()
