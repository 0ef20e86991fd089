"""Candidates for the experiments: the textbook locks, each with the one mistake it is known for, and two right ones."""

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
MANY = range(3000)  # tries, 10 ms apart: longer than any run


class NoLock:
    """Hope."""

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...


class Textbook:
    """SET NX with a TTL, polled; released by owner. The mistakes below are made on top of it."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        self.redis, self.name, self.ttl, self.owner = redis, name, ttl, uuid.uuid4().hex

    async def take(self) -> Any:
        return await self.redis.set(self.name, self.owner, nx=True, px=int(self.ttl * 1000))

    async def __aenter__(self) -> Any:
        for _ in MANY:
            if await self.take():
                return self
            await asyncio.sleep(0.01)
        raise TimeoutError(self.name)

    async def __aexit__(self, *_: object) -> None:
        await self.redis.eval(OWNED_DEL, 1, self.name, self.owner)


class TtlNoRenewal(Textbook):
    """Right in every detail but one: nobody extends the lease of a slow holder."""


class SetWithoutNx(Textbook):
    """GET, and when there is nothing, SET: two askers see nothing."""

    async def take(self) -> Any:
        if await self.redis.get(self.name):
            return False
        await checkpoint("between-get-and-set")
        return await self.redis.set(self.name, self.owner, px=int(self.ttl * 1000))


class SetNxWithoutTtl(Textbook):
    """SET NX that only its holder can ever remove."""

    async def take(self) -> Any:
        return await self.redis.set(self.name, self.owner, nx=True)


class PlainDel(Textbook):
    """Released with DEL, whoever holds the lock by now."""

    async def __aexit__(self, *_: object) -> None:
        await self.redis.delete(self.name)


class GetThenDel(Textbook):
    """Looks whether the lock is its own, and deletes it a moment later."""

    async def __aexit__(self, *_: object) -> None:
        if await self.redis.get(self.name) == self.owner.encode():
            await checkpoint("between-get-and-del")
            await self.redis.delete(self.name)


class IncrToken(Textbook):
    """Draws its fencing token with INCR: a failover to a replica that lags turns the counter back."""

    token: int

    async def __aenter__(self) -> Any:
        await super().__aenter__()
        self.token = await self.redis.incr(f"{self.name}:token")
        return self


def redis_py_lock(redis: Any, name: str, ttl: float) -> Any:
    """The Lock that redis-py ships."""
    return redis.lock(name, timeout=ttl, sleep=0.01)


def redis_py_lock_without_timeout(redis: Any, name: str) -> Any:
    """The Lock that redis-py ships, with its default: no TTL."""
    return redis.lock(name, sleep=0.01)


@contextlib.asynccontextmanager
async def confirmed_by_a_replica(redis: Any, name: str, ttl: float) -> AsyncIterator[Any]:
    """RedisLock whose grant counts only if a replica confirms it: this narrows the window of a failover."""
    async with RedisLock(redis, name, ttl=ttl) as lease:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.set(f"{{{name}}}:confirmed", lease.token)  # WAIT speaks for earlier writes of its own connection
            pipe.wait(1, int(ttl * 100))
            _, replicas = await pipe.execute()
        if not replicas:
            raise LockNotAcquired(f"{name!r}: no replica confirmed the grant", name=name)
        yield lease


class PooledSessionLock:
    """A session lock on a pooled connection that goes back to the pool while the session still holds the lock."""

    def __init__(self, pool: Any, name: str) -> None:
        self.pool, self.id = pool, lock_id(name)

    async def __aenter__(self) -> None:
        async with self.pool.connection() as conn:
            await conn.execute("SELECT pg_advisory_lock(%s)", (self.id,))

    async def __aexit__(self, *_: object) -> None:
        async with self.pool.connection() as conn:
            await conn.execute("SELECT pg_advisory_unlock(%s)", (self.id,))


class RawSessionLock:
    """pg_advisory_lock on a connection of its own: right, unless a pooler gives its session to another client too."""

    def __init__(self, conn: Any, name: str) -> None:
        self.conn, self.id = conn, lock_id(name)

    async def __aenter__(self) -> None:
        await self.conn.execute("SELECT pg_advisory_lock(%s)", (self.id,))

    async def __aexit__(self, *_: object) -> None:
        await self.conn.execute("SELECT pg_advisory_unlock(%s)", (self.id,))


@contextlib.asynccontextmanager
async def select_for_update(conn: Any, name: str) -> AsyncIterator[None]:
    """The row itself as the lock, for as long as the transaction lasts."""
    async with conn.transaction():
        await conn.execute("SELECT 1 FROM accounts WHERE name = %s FOR UPDATE", (name,))
        yield


@contextlib.asynccontextmanager
async def transaction_lock(conn: Any, name: str) -> AsyncIterator[Any]:
    """AdvisoryLock in the caller's transaction: it ends with the transaction, whatever happens."""
    async with conn.transaction(), AdvisoryLock(conn, name) as held:
        yield held
