"""Faults that a lock on one Redis must withstand, and well-known locks that do not."""

from __future__ import annotations

from distsys.lab.check.locks import progress
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.locks.scripts import AT_ONCE, RULE, locking, overlap, turn
from distsys.lab.experiments.servers import on_both, on_three_nodes
from distsys.lab.run.experiment import Run, expect_held, expect_violated
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
