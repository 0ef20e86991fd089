"""Servers for experiments; each function prepares a run and fills `run.urls`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from distsys.lab.run.experiment import Run
from distsys.lab.testbed.servers import Server


async def on_redis(run: Run) -> None:
    """Prepare one Redis for the lock and the account."""
    run.urls["redis"] = run.urls["bank"] = await run.testbed.redis_url()


async def on_postgres(run: Run) -> None:
    """Prepare one PostgreSQL with the run's account."""
    import psycopg

    run.urls["dsn"] = await run.testbed.dsn()
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"], autocommit=True) as conn:
        await conn.execute("INSERT INTO accounts VALUES (%s, 0, NULL)", (run.resource,))


async def on_both(run: Run) -> None:
    """Prepare one Redis and one PostgreSQL, each with an account; the candidate takes what its parameters name."""
    await on_redis(run)
    await on_postgres(run)


async def on_three_nodes(run: Run) -> None:
    """Prepare three empty nodes; locks on one Redis use the first of them, and the account is on another server."""
    await on_redis(run)
    run.nodes = list(await asyncio.gather(*(own_redis(run, f"node{i}") for i in (1, 2, 3))))
    run.urls |= {"redis": run.nodes[0].url, "nodes": [node.url for node in run.nodes]}


async def own_redis(run: Run, name: str, *, replica_of: Server | None = None, through: int = 0) -> Server:
    """Start a Redis for this run alone, which it may kill; a replica may reach its primary `through` a proxy's port."""
    if replica_of is not None and through:
        replica_of = replace(replica_of, port=through)
    server = await run.testbed.servers.redis(f"{name}-{run.number}", replica_of=replica_of)

    async def end() -> None:
        run.testbed.servers.running.pop(server.name, None)
        if server.process is not None and server.process.state != "exited":
            await server.kill()

    run.cleanup.push_async_callback(end)
    return server
