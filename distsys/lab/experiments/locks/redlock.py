"""Faults that a majority of independent nodes withstands, and those that break it, one node, or a failover."""

from __future__ import annotations

from functools import partial

from distsys.lab.check.combine import or_refused
from distsys.lab.check.locks import progress
from distsys.lab.check.updates import no_lost_update
from distsys.lab.experiments.locks.candidates import IncrToken, confirmed_by_a_replica
from distsys.lab.experiments.locks.scripts import AT_ONCE, FENCED, locking, overlap, turn
from distsys.lab.experiments.servers import on_postgres, on_redis, on_three_nodes, own_redis
from distsys.lab.run.experiment import Run, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy
from distsys.locks.fencing import postgres_tokens
from distsys.locks.redis_lock import RedisLock
from distsys.locks.redlock import Redlock
from distsys.schema import ensure_schema

EXPERIMENTS = experiment = locking(prepare=on_three_nodes, patience=1.0)  # for a failed round, and a second one


async def node_restarts_empty(run: Run) -> None:
    """Restart the first node, without its data."""
    await run.nodes[0].restart()
    run.record("server", "node1", "restarted empty")


experiment(
    "node-restarts-empty",
    "A lock on one node is forgotten when that node restarts; a majority of three remembers it.",
    expect_violated("RedisLock, one node", RedisLock),
    # On a busy machine the default of 40 ms can cost a vote, and then two nodes are all that remember.
    expect_held("Redlock, three nodes", partial(Redlock, node_timeout=0.9)),
    check=AT_ONCE, ttl=2.0,
)(partial(overlap, meanwhile=node_restarts_empty))  # fmt: skip


@experiment(
    "node-fails",
    "A dead or hung node stops a lock on one node; with Redlock it costs no more than the node timeout.",
    expect_violated("RedisLock, its node hung", RedisLock, point="hung"),
    expect_held("Redlock, one of three hung", Redlock, point="hung"),
    expect_held("Redlock, one of three killed", Redlock, point="killed"),
    check=progress, ttl=2.0,
)  # fmt: skip
async def first_node_fails(run: Run) -> None:
    """Hang (SIGSTOP) or kill one node before the first request; both workers need the lock, one after the other."""
    w1, w2 = await run.start(2)
    await (run.nodes[0].kill() if run.point() == "killed" else run.nodes[0].pause())
    run.record("server", "node1", run.point())
    for actor in (w1, w2):
        if await turn(actor):
            actor.kill()


@experiment(
    "majority-forgets",
    "Redlock needs nodes that remember: one that restarts empty can be the deciding vote for two holders.",
    # A TTL long enough for w1 not to find out before w2 has written: its next renewal would miss the majority.
    expect_violated("Redlock, restarted at once", Redlock, params={"ttl": 10.0}),
    expect_held("Redlock, restarted after the lease", Redlock, point="delayed"),
    ttl=1.0,
)
async def majority_forgets(run: Run) -> None:
    """Let nodes 1 and 2 grant w1, which is cut off from node 3; restart node 2 empty, so that 2 and 3 grant w2."""
    node1, node2, node3 = run.nodes
    link = await run.cleanup.enter_async_context(TcpProxy(node3.host, node3.port))
    link.drop()
    seen_by_w1 = [node1.url, node2.url, link.through(node3.url)]
    w1, w2 = await run.start(2, nodes=[seen_by_w1, run.urls["nodes"]])
    run.record("server", "node3", "cut off from w1")
    w1.go(hold="before-write")
    await w1.reached("before-write")
    await node2.kill()
    run.record("server", "node2", "killed")
    if run.point() == "delayed":  # with node 2 gone as well no majority renews the lease: w1 is told, and leaves
        w2.go()
        await run.until(w1.broke("release"))
    await node2.restart()
    run.record("server", "node2", "restarted empty")
    await turn(w2)
    w1.release("before-write")


# ---- failover: a primary that dies before its replica has received the grant


async def lagging_replica(run: Run) -> None:
    """Start a primary, and a replica behind a link that can fall silent; the bank is on a server that survives."""
    await on_redis(run)
    if run.arm.params.get("account", "").startswith("postgres"):
        import psycopg

        await on_postgres(run)
        async with await psycopg.AsyncConnection.connect(run.urls["dsn"], autocommit=True) as conn:
            await ensure_schema(conn)
    primary = await own_redis(run, "primary")
    run.link = await run.cleanup.enter_async_context(TcpProxy(primary.host, primary.port))
    replica = await own_redis(run, "replica", replica_of=primary, through=run.link.port)
    run.nodes = [primary, replica]
    run.urls["redis"] = primary.url


async def failover(run: Run) -> None:
    """Silence the link, let w1 be granted the lock, kill the primary and promote the replica; then w2 comes."""
    primary, replica = run.nodes
    w1, w2 = await run.start(2, redis=[primary.url, replica.url])
    assert run.link is not None
    run.link.drop()
    w1.go(hold="before-write")
    await run.until(w1.at("before-write"), w1.ended)
    await primary.kill()
    run.record("server", "primary", "killed")
    await run.testbed.servers.promote(replica)
    run.record("server", "replica", "promoted")
    await turn(w2)
    w1.release("before-write")
    await run.until(w1.did("write"), w1.failed("write"), w1.ended)
    w1.kill()  # only its release is left, which the dead primary can't answer


def lock_with_postgres_tokens(redis, name, ttl, pool):  # type: ignore[no-untyped-def]  # injected by name
    """Return a RedisLock whose tokens come from a sequence, which a failover of Redis can't turn back."""
    return RedisLock(redis, name, ttl=ttl, tokens=postgres_tokens(pool))


experiment(
    "failover",
    "Replication is asynchronous: a failover can forget a lock that was granted, and grant it again.",
    expect_violated("RedisLock, no fence", RedisLock),
    expect_violated("fence, token by INCR", IncrToken, params=FENCED),
    expect_held("fence, RedisLock's token", RedisLock, params=FENCED),
    expect_held("fence, token from PostgreSQL", lock_with_postgres_tokens, params={"account": "postgres, fenced"}),
    expect_held("RedisLock, confirmed by a replica", confirmed_by_a_replica),
    check=or_refused(no_lost_update), prepare=lagging_replica, ttl=5.0, patience=1.0,
)(failover)  # fmt: skip
