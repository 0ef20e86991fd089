"""PostgreSQL's locks: a session owns its session locks, so all clients that share the session share the locks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from distsys.errors import Rejected
from distsys.lab.check.calls import answered
from distsys.lab.check.combine import or_refused
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.locks.scripts import AT_ONCE, locking, overlap
from distsys.lab.experiments.locks.workload import increments_by_tasks
from distsys.lab.experiments.servers import on_postgres, on_redis
from distsys.lab.run.experiment import Run, expect_held, expect_violated
from distsys.lab.run.worker import Worker, checkpoint
from distsys.locks.advisory_lock import AdvisoryLock, advisory_locks

EXPERIMENTS = experiment = locking(prepare=on_postgres)
SESSION = partial(AdvisoryLock, scope="session")

experiment(
    "select-for-update",
    "Where the data is one row of PostgreSQL, the row's own lock is enough: no distributed lock is needed.",
    expect_violated("read, then write", candidates.NoLock),
    expect_held("SELECT ... FOR UPDATE", candidates.select_for_update),
    expect_held("AdvisoryLock, transaction scope", candidates.transaction_lock),
    expect_held("AdvisoryLock, session scope", SESSION),
    params={"account": "postgres"},
)(overlap)


@experiment(
    "session-lock-in-pool",
    "A session lock belongs to its connection: returned to a pool while locked, the next borrower holds it too.",
    expect_violated("pg_advisory_lock, connection returned", candidates.PooledSessionLock),
    expect_held("AdvisoryLock, session scope", SESSION),
    workload=increments_by_tasks, params={"tasks": "ab", "account": "postgres", "pool_size": 1}, check=AT_ONCE,
)  # fmt: skip
async def two_tasks(run: Run) -> None:
    """Start task b while task a of the same process, with the same pool, is between its read and its write."""
    (w1,) = await run.start(1)
    for point in ("start-b", "a-before-write"):
        w1.send(do="arm", point=point, action="hold")
    w1.go()
    await w1.reached("a-before-write")
    w1.release("start-b")
    await run.until(w1.did("write", "w1.b"), w1.waiting("acquire", "w1.b"))
    w1.release("a-before-write")


async def behind_pgbouncer(run: Run) -> None:
    """Start a PostgreSQL behind pgbouncer in transaction mode; the bank is in Redis."""
    await on_redis(run)
    postgres = await run.testbed.servers.postgres()
    run.urls["dsn"] = (await run.testbed.servers.pgbouncer(postgres, pool_size=1)).url


experiment(
    "session-lock-behind-pgbouncer",
    "A pooler in transaction mode gives one session to many clients, and with it their session locks.",
    expect_violated("pg_advisory_lock", candidates.RawSessionLock),
    expect_held("AdvisoryLock, session scope", SESSION),
    expect_held("AdvisoryLock, transaction scope", candidates.transaction_lock),
    check=or_refused(AT_ONCE), prepare=behind_pgbouncer,
)(overlap)  # fmt: skip


@contextlib.asynccontextmanager
async def in_argument_order(conn: Any, name: str, first: str, second: str) -> AsyncIterator[None]:
    """Hold both locks, taken in the order of the arguments."""
    async with conn.transaction(), AdvisoryLock(conn, f"{name}:{first}"):
        await checkpoint("between-locks")
        async with AdvisoryLock(conn, f"{name}:{second}"):
            yield


@contextlib.asynccontextmanager
async def in_sorted_order(conn: Any, name: str, first: str, second: str) -> AsyncIterator[None]:
    """Hold both locks, taken in one order."""
    async with conn.transaction(), advisory_locks(conn, f"{name}:{first}", f"{name}:{second}"):
        await checkpoint("between-locks")
        yield


async def transfer(worker: Worker, candidate: Any) -> None:
    """Transfer from a to b as w1, from b to a as w2: each needs both locks."""
    order = ("a", "b") if worker.name == "w1" else ("b", "a")
    lock = await worker.build(candidate, first=order[0], second=order[1])
    try:
        async with worker.op("acquire"):
            await lock.__aenter__()
    except Rejected:
        return  # on the record
    async with worker.op("release"):
        await lock.__aexit__(None, None, None)


@experiment(
    "lock-order",
    "Two locks taken in opposite orders can deadlock; taken in one order they never do.",
    expect_violated("in the order of the arguments", in_argument_order),
    expect_held("advisory_locks, sorted", in_sorted_order),
    workload=transfer, check=partial(answered, name="acquire"), final=None,
)  # fmt: skip
async def crossing(run: Run) -> None:
    """Let each worker hold its first lock and request the other's."""
    w1, w2 = await run.start(2)
    w1.go(hold="between-locks")
    await w1.reached("between-locks")
    w2.go(hold="between-locks")
    await run.until(w2.at("between-locks"), w2.waiting("acquire"))
    w2.release("between-locks")
    w1.release("between-locks")
