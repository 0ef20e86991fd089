"""The testbed of one lab: its processes and servers, and a key prefix and schema of its own on them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from distsys.lab.testbed.processes import Processes
from distsys.lab.testbed.servers import Servers


class Testbed:
    """Processes, servers, a key prefix and a schema. All end with `close()`, or with the process that opened it."""

    __test__ = False  # pytest: this is no test class

    def __init__(self, processes: Processes, servers: Servers) -> None:
        self.processes, self.servers = processes, servers
        self.prefix = f"lab:{os.getpid()}-{os.urandom(3).hex()}"
        self.closed = False
        self._schema: str | None = None

    @classmethod
    async def open(cls, *, redis_url: str = "", pg_dsn: str = "", backend: str | None = None) -> Testbed:
        """Start a Redis or Valkey and a PostgreSQL, or use those that the URLs name. Raises ServerUnavailable."""
        processes = await Processes.start()
        try:
            testbed = cls(processes, Servers(processes, redis_url=redis_url, pg_dsn=pg_dsn, backend=backend))
            await asyncio.gather(testbed.servers.redis(), testbed.dsn())
        except BaseException:
            await processes.aclose()
            raise
        return testbed

    async def close(self) -> None:
        """End every process, and remove what was written to servers that the lab did not start. Idempotent."""
        if self.closed:
            return
        self.closed = True
        try:
            await self._sweep()
            await self.servers.aclose()
        finally:
            await self.processes.aclose()

    async def redis_url(self) -> str:
        """Return the URL of this testbed's Redis."""
        return (await self.servers.redis()).url

    async def dsn(self) -> str:
        """Return the DSN of this testbed's PostgreSQL, with a schema of its own first in the search path."""
        from psycopg.conninfo import make_conninfo

        server = await self.servers.postgres()
        if self._schema is None:
            self._schema = self.prefix.replace(":", "_").replace("-", "_")
            table = f'"{self._schema}".accounts (name text PRIMARY KEY, balance bigint NOT NULL, fence_token bigint)'
            schema = f'CREATE SCHEMA IF NOT EXISTS "{self._schema}"'
            await _execute(server.url, schema, f"CREATE TABLE IF NOT EXISTS {table}")
        return make_conninfo(server.url, options=f"-csearch_path={self._schema},public")

    async def _sweep(self) -> None:
        """Remove this testbed's keys and schema from servers that outlive it."""
        for server in self.servers.running.values():
            if server.origin == "url" and server.kind == "redis":
                import redis.asyncio

                async with redis.asyncio.Redis.from_url(server.url) as client:
                    if keys := [key async for key in client.scan_iter(f"*{self.prefix}*", count=1000)]:
                        await client.delete(*keys)
            elif server.origin == "url" and server.kind == "postgres" and self._schema:
                await _execute(server.url, f'DROP SCHEMA IF EXISTS "{self._schema}" CASCADE')


async def _execute(dsn: str, *statements: Any) -> None:
    import psycopg

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        for statement in statements:
            await conn.execute(statement)
