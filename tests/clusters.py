"""A Redis Cluster, for the tests of rules that run on one."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from redis.asyncio import Redis

from distsys.lab.testbed.servers import Server, Servers, free_port, linked, poll


async def start_cluster(
    servers: Servers, masters: int = 3, *, replicas: int = 0, name: str = "cluster"
) -> list[Server]:
    """Return first the masters, then `replicas` of each. It takes 2 to 3 s."""
    size = masters * (1 + replicas)
    bus = [free_port() for _ in range(size)]
    args = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port"]
    nodes = await asyncio.gather(*(servers.redis(f"{name}{i}", args=[*args, str(bus[i])]) for i in range(size)))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Redis.from_url(node.url, decode_responses=True)) for node in nodes]
        for i, client in enumerate(clients):
            await client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            if i < masters:
                slots = 16384 * i // masters, 16384 * (i + 1) // masters - 1
                await client.execute_command("CLUSTER ADDSLOTSRANGE", *slots)
            if i:
                await client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, bus[0])
        for client in clients:
            await poll(partial(_knows, client, size), "a node did not meet the others")
        for i in range(masters, size):
            master = await clients[i % masters].execute_command("CLUSTER MYID")
            await clients[i].execute_command("CLUSTER REPLICATE", master)
            await linked(nodes[i])
    return nodes


async def _knows(client: Redis, size: int) -> bool:
    info = await client.execute_command("CLUSTER INFO")
    return {"cluster_state": "ok", "cluster_known_nodes": str(size)}.items() <= info.items()
