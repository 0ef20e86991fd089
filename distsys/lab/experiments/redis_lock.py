"""What a lock on one Redis must withstand, and the well-known locks that do not."""

from __future__ import annotations

from distsys.lab.checks import all_of, mutual_exclusion, no_lost_update, progress
from distsys.lab.experiment import Arm, Experiment, Run
from distsys.lab.experiments import candidates
from distsys.lab.experiments.candidates import transaction_lock
from distsys.lab.experiments.lock_scripts import (
    both_between_get_and_set,
    crowd,
    killed_holder,
    late_release,
    on_both,
    on_redis,
    on_three_nodes,
    overlap,
    redis_balance,
)
from distsys.lab.workloads import increments, increments_by_tasks
from distsys.locks.redis_lock import RedisLock
from distsys.locks.redlock import Redlock

RULE = Arm(name="RedisLock", candidate=RedisLock, expected="HELD")

contention = Experiment(
    name="contention",
    claim="Workers that take turns lose nothing; what differs between the locks is how long they wait.",
    arms=(
        RULE,
        Arm(name="redis-py's Lock", candidate=lambda redis, name: redis.lock(name, timeout=10), expected="HELD"),
        Arm(name="Redlock, three nodes", candidate=Redlock, expected="HELD", prepare=on_three_nodes),
        Arm(name="AdvisoryLock, transaction scope", candidate=transaction_lock, expected="HELD", prepare=on_both),
    ),
    workload=increments,
    params={"rounds": 10},
    script=crowd,
    check=all_of(mutual_exclusion, no_lost_update),
    prepare=on_redis,
    final=redis_balance,
    ttl=10.0,
    alone=True,
)

no_lock = Experiment(
    name="no-lock",
    claim="Two workers that read, think and write lose an update unless something makes them take turns.",
    arms=(Arm(name="no lock", candidate=candidates.NoLock, expected="VIOLATED"), RULE),
    workload=increments,
    script=overlap,
    check=no_lost_update,
    prepare=on_redis,
    final=redis_balance,
)

check_then_set = Experiment(
    name="set-without-nx",
    claim="Looking and taking must be one step: two workers can both look before either takes.",
    arms=(
        Arm(
            name="GET, then SET without NX",
            candidate=candidates.SetWithoutNx,
            expected="VIOLATED",
            point="between-get-and-set",
        ),
        RULE,
    ),
    workload=increments,
    script=both_between_get_and_set,
    check=all_of(mutual_exclusion, no_lost_update),
    prepare=on_redis,
    final=redis_balance,
)

killed = Experiment(
    name="killed-holder",
    claim="A lock without a TTL outlives a holder that was killed: nobody ever enters again.",
    arms=(Arm(name="SET NX without a TTL", candidate=candidates.SetNxWithoutTtl, expected="VIOLATED"), RULE),
    workload=increments,
    script=killed_holder,
    check=progress,
    prepare=on_redis,
    patience=1.0,
    patience_ttls=3,
)

late = Experiment(
    name="late-release",
    claim="A holder that comes back late must not release what somebody else holds by now.",
    arms=(
        Arm(name="release by plain DEL", candidate=candidates.PlainDel, expected="VIOLATED"),
        Arm(
            name="release by GET, then DEL",
            candidate=candidates.GetThenDel,
            expected="VIOLATED",
            point="between-get-and-del",
        ),
        RULE,
    ),
    workload=increments,
    script=late_release,
    check=no_lost_update,
    prepare=on_redis,
    final=redis_balance,
    patience_ttls=3,
)

slow = Experiment(
    name="slow-holder",
    claim="Work that takes longer than the TTL loses the lock in the middle, unless the lease is renewed.",
    arms=(Arm(name="TTL without renewal", candidate=candidates.TtlNoRenewal, expected="VIOLATED"), RULE),
    workload=increments,
    script=overlap,
    check=all_of(mutual_exclusion, no_lost_update),
    prepare=on_redis,
    final=redis_balance,
    patience_ttls=3,
)


async def shared_by_two_tasks(run: Run) -> None:
    """Task a of w1 outlives its lease; task b takes the same object; a releases; w2 comes while b is inside."""
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


shared_object = Experiment(
    name="shared-by-two-tasks",
    claim="One lock object used by two tasks must keep their leases apart.",
    arms=(Arm(name="redis-py's Lock", candidate=candidates.redis_py_lock, expected="VIOLATED"), RULE),
    workload=increments_by_tasks,
    params={"tasks": "ab"},
    script=shared_by_two_tasks,
    check=no_lost_update,
    prepare=on_redis,
    final=redis_balance,
    patience_ttls=3,
)


async def cancelled_in_flight(run: Run) -> None:
    """w1's request reaches the server, its answer never reaches w1, and w1 is cancelled; w2 needs the lock."""
    import redis.asyncio

    from distsys.lab.proxy import TcpProxy

    async with redis.asyncio.Redis.from_url(run.urls["redis"]) as client:
        host, port = client.connection_pool.connection_kwargs["host"], client.connection_pool.connection_kwargs["port"]
        proxy = await run.cleanup.enter_async_context(TcpProxy(host, port))
        through = f"redis://127.0.0.1:{proxy.port}/{client.connection_pool.connection_kwargs.get('db', 0)}"
        w1, w2 = await run.start(2, redis=[through, run.urls["redis"]])
        proxy.drop_replies()
        w1.go()
        for _ in range(2000):
            if await client.keys(f"*{run.resource}*"):
                break
        w1.cancel("a")
        await run.until(w1.at("cancelled"))
        proxy.heal()
        if await run.until(w1.broke("acquire", "w1.a"), w1.waiting("acquire", "w1.a")) != w1.broke("acquire", "w1.a"):
            w1.kill()  # Python 3.11's wait_for, inside the client, swallowed the cancellation: it asks on, for ever
    w2.go()
    if await run.until(w2.did("write", "w2.a"), w2.waiting("acquire", "w2.a")) == w2.waiting("acquire", "w2.a"):
        w2.kill()


cancelled = Experiment(
    name="cancelled-in-flight",
    claim="An acquire that is cancelled after the server granted it must be taken back, or nobody enters again.",
    arms=(
        Arm(
            name="redis-py's Lock, no timeout", candidate=candidates.redis_py_lock_without_timeout, expected="VIOLATED"
        ),
        RULE,
    ),
    workload=increments_by_tasks,
    params={"tasks": "a"},
    script=cancelled_in_flight,
    check=progress,
    prepare=on_redis,
    patience=1.0,
    ttl=10.0,
)

EXPERIMENTS = (contention, no_lock, check_then_set, killed, late, slow, shared_object, cancelled)
