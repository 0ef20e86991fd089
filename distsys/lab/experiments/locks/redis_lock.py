"""Faults that a lock on one Redis must withstand, and well-known locks that do not."""

from __future__ import annotations

from distsys.lab.check.combine import all_of
from distsys.lab.check.locks import mutual_exclusion, progress
from distsys.lab.check.updates import no_lost_update
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.locks.scripts import (
    RULE,
    both_between_get_and_set,
    crowd,
    killed_holder,
    late_release,
    locking,
)
from distsys.lab.experiments.locks.workload import increments_by_tasks
from distsys.lab.experiments.servers import on_both, on_three_nodes
from distsys.lab.run.experiment import Run, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy
from distsys.locks.redlock import Redlock

AT_ONCE = all_of(mutual_exclusion, no_lost_update)

contention = locking(
    name="contention",
    claim="Workers that take turns lose nothing; what differs between the locks is how long they wait.",
    arms=(
        RULE,
        expect_held("redis-py's Lock", lambda redis, name: redis.lock(name, timeout=10)),
        expect_held("Redlock, three nodes", Redlock, prepare=on_three_nodes),
        expect_held("AdvisoryLock, transaction scope", candidates.transaction_lock, prepare=on_both),
    ),
    params={"rounds": 10},
    script=crowd,
    check=AT_ONCE,
    ttl=10.0,
    alone=True,
)

no_lock = locking(
    name="no-lock",
    claim="Two workers that read, think and write lose an update unless something makes them take turns.",
    arms=(expect_violated("no lock", candidates.NoLock), RULE),
)

check_then_set = locking(
    name="set-without-nx",
    claim="Check and set must be one step: two workers can both check before either sets.",
    arms=(
        expect_violated("GET, then SET without NX", candidates.SetWithoutNx, point="between-get-and-set"),
        RULE,
    ),
    script=both_between_get_and_set,
    check=AT_ONCE,
)

killed = locking(
    name="killed-holder",
    claim="A lock without a TTL outlives a holder that was killed: no worker ever enters again.",
    arms=(expect_violated("SET NX without a TTL", candidates.SetNxWithoutTtl), RULE),
    script=killed_holder,
    check=progress,
    patience=1.0,
    patience_ttls=3,
)

late = locking(
    name="late-release",
    claim="A holder that comes back late must not release a lock that another worker holds by now.",
    arms=(
        expect_violated("release by plain DEL", candidates.PlainDel),
        expect_violated("release by GET, then DEL", candidates.GetThenDel, point="between-get-and-del"),
        RULE,
    ),
    script=late_release,
    patience_ttls=3,
)

slow = locking(
    name="slow-holder",
    claim="Work that takes longer than the TTL loses the lock in the middle, unless the lease is renewed.",
    arms=(expect_violated("TTL without renewal", candidates.TtlNoRenewal), RULE),
    check=AT_ONCE,
    patience_ttls=3,
)


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


shared_object = locking(
    name="shared-by-two-tasks",
    claim="One lock object used by two tasks must keep their leases apart.",
    arms=(expect_violated("redis-py's Lock", candidates.redis_py_lock), RULE),
    workload=increments_by_tasks,
    params={"tasks": "ab"},
    script=shared_by_two_tasks,
    patience_ttls=3,
)


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


cancelled = locking(
    name="cancelled-in-flight",
    claim="An acquire that is cancelled after the server granted it must be undone, or no worker enters again.",
    arms=(
        expect_violated("redis-py's Lock, no timeout", candidates.redis_py_lock_without_timeout),
        RULE,
    ),
    workload=increments_by_tasks,
    params={"tasks": "a"},
    script=cancelled_in_flight,
    check=progress,
    patience=1.0,
    ttl=10.0,
)

EXPERIMENTS = (contention, no_lock, check_then_set, killed, late, slow, shared_object, cancelled)
