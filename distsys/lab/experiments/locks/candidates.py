"""Candidates of the lock experiments: textbook locks, each with the one mistake it is known for, and correct ones."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from distsys.errors import LockNotAcquired
from distsys.lab.run.worker import checkpoint
from distsys.locks.advisory_keys import lock_id
from distsys.locks.advisory_lock import AdvisoryLock
from distsys.locks.redis_lock import RedisLock

OWNED_DEL = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
TRIES = range(3000)  # 10 ms apart: longer than any run


class NoLock:
    """No lock at all."""

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...


class Textbook:
    """SET NX with a TTL, polled, and released by its owner only. The candidates below add mistakes to it."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        self.redis, self.name, self.ttl, self.owner = redis, name, ttl, uuid.uuid4().hex

    async def take(self) -> Any:
        """Try once; return a true value if the lock was free."""
        return await self.redis.set(self.name, self.owner, nx=True, px=int(self.ttl * 1000))

    async def __aenter__(self) -> Any:
        for _ in TRIES:
            if await self.take():
                return self
            await asyncio.sleep(0.01)
        raise TimeoutError(self.name)

    async def __aexit__(self, *_: object) -> None:
        await self.redis.eval(OWNED_DEL, 1, self.name, self.owner)


class TtlNoRenewal(Textbook):
    """Correct except for one detail: the lease of a slow holder is not extended."""


class SetWithoutNx(Textbook):
    """GET, and if there is no key, SET: two workers can both see that there is none."""

    async def take(self) -> Any:
        """Look, and take the lock a moment later."""
        if await self.redis.get(self.name):
            return False
        await checkpoint("between-get-and-set")
        return await self.redis.set(self.name, self.owner, px=int(self.ttl * 1000))


class SetNxWithoutTtl(Textbook):
    """SET NX without a TTL: only its holder can ever remove it."""

    async def take(self) -> Any:
        """Take the lock for ever."""
        return await self.redis.set(self.name, self.owner, nx=True)


class PlainDel(Textbook):
    """Release by DEL, though another worker may hold the lock by now."""

    async def __aexit__(self, *_: object) -> None:
        await self.redis.delete(self.name)


class GetThenDel(Textbook):
    """Release by GET and then DEL: the owner may change in between."""

    async def __aexit__(self, *_: object) -> None:
        if await self.redis.get(self.name) == self.owner.encode():
            await checkpoint("between-get-and-del")
            await self.redis.delete(self.name)


class IncrToken(Textbook):
    """Fencing token by INCR: a failover to a replica that lags turns the counter back."""

    token: int

    async def __aenter__(self) -> Any:
        await super().__aenter__()
        self.token = await self.redis.incr(f"{self.name}:token")
        return self


@contextlib.asynccontextmanager
async def confirmed_by_a_replica(redis: Any, name: str, ttl: float) -> AsyncIterator[Any]:
    """Hold a RedisLock whose grant counts only if a replica confirms it, which narrows the window of a failover."""
    async with RedisLock(redis, name, ttl=ttl) as lease:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.set(f"{{{name}}}:confirmed", lease.token)  # WAIT speaks for earlier writes of its own connection
            pipe.wait(1, int(ttl * 100))
            _, replicas = await pipe.execute()
        if not replicas:
            raise LockNotAcquired(f"{name!r}: no replica confirmed the grant", name=name)
        yield lease


class RawSessionLock:
    """Session lock on a connection of its own: correct, unless a pooler gives the session to other clients too."""

    def __init__(self, conn: Any, name: str) -> None:
        self.conn, self.id = conn, lock_id(name)

    async def execute(self, statement: str) -> None:
        """Execute a statement about this lock."""
        await self.conn.execute(statement, (self.id,))

    async def __aenter__(self) -> None:
        await self.execute("SELECT pg_advisory_lock(%s)")

    async def __aexit__(self, *_: object) -> None:
        await self.execute("SELECT pg_advisory_unlock(%s)")


class PooledSessionLock(RawSessionLock):
    """Session lock on a connection that returns to its pool while the session still holds the lock."""

    def __init__(self, pool: Any, name: str) -> None:
        self.pool, self.id = pool, lock_id(name)

    async def execute(self, statement: str) -> None:
        """Execute a statement about this lock on any connection of the pool."""
        async with self.pool.connection() as conn:
            await conn.execute(statement, (self.id,))


@contextlib.asynccontextmanager
async def select_for_update(conn: Any, name: str) -> AsyncIterator[None]:
    """Lock the row itself, as long as the transaction lasts."""
    async with conn.transaction():
        await conn.execute("SELECT 1 FROM accounts WHERE name = %s FOR UPDATE", (name,))
        yield


@contextlib.asynccontextmanager
async def transaction_lock(conn: Any, name: str) -> AsyncIterator[Any]:
    """Hold an AdvisoryLock in a transaction: the lock always ends with it."""
    async with conn.transaction(), AdvisoryLock(conn, name) as held:
        yield held
