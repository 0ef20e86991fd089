"""Idempotency: ours beside the raw commands and Powertools. `python benchmarks/idempotency.py --quick --only redis`"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from common import Bench, Contender, repeat

STORE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1 end
return 0
"""
DAY_MS = 86_400_000
ANSWER = {"payment": 42, "state": "paid"}
Calls = AsyncIterator[Callable[[str], Any]]  # what a contender yields: a key -> the call with it

_new = itertools.count()


async def first(call: Callable[[str], Any], start: float, seconds: float) -> dict[str, float]:
    """Calls with keys that nobody has used."""
    prefix = os.urandom(8).hex()
    return await repeat(_once(call, lambda: f"{prefix}-{next(_new)}"), seconds)


async def replay(call: Callable[[str], Any], start: float, seconds: float) -> dict[str, float]:
    """Calls with one that is done."""
    once = _once(call, lambda: "replayed")
    await once() if asyncio.iscoroutinefunction(once) else once()
    return await repeat(once, seconds)


def _once(call: Callable[[str], Any], key: Callable[[], str]) -> Callable[[], Any]:
    if not asyncio.iscoroutinefunction(call):
        return lambda: call(key())

    async def once() -> None:
        await call(key())

    return once


# ---- Redis


@asynccontextmanager
async def raw(url: str) -> Calls:
    """The floor: SET NX GET PX claims or answers, EVALSHA keeps the answer."""
    from redis.asyncio import Redis

    async with Redis.from_url(url) as redis:
        sha = await redis.script_load(STORE)

        async def call(key: str) -> Any:
            owner = os.urandom(8)
            known = await redis.set(f"raw:{key}", owner, nx=True, get=True, px=60_000)
            if known is not None:
                return json.loads(known)
            await redis.evalsha(sha, 1, f"raw:{key}", owner, json.dumps(ANSWER), DAY_MS)
            return ANSWER

        yield call


@asynccontextmanager
async def raw_sync(url: str) -> Calls:
    from redis import Redis

    with Redis.from_url(url) as redis:
        sha = redis.script_load(STORE)

        def call(key: str) -> Any:
            owner = os.urandom(8)
            known = redis.set(f"raw:{key}", owner, nx=True, get=True, px=60_000)
            if known is not None:
                return json.loads(known)
            redis.evalsha(sha, 1, f"raw:{key}", owner, json.dumps(ANSWER), DAY_MS)
            return ANSWER

        yield call


@asynccontextmanager
async def claims(url: str) -> Calls:
    from redis.asyncio import Redis

    from distsys.idempotency.claims import Claims
    from distsys.idempotency.redis_store import RedisStore

    async def operation() -> Any:
        return ANSWER

    async with Redis.from_url(url) as redis:
        ours = Claims(RedisStore(redis))

        async def call(key: str) -> Any:
            return await ours.run(key, operation)

        yield call


@asynccontextmanager
async def powertools(url: str) -> Calls:
    os.environ.setdefault("AWS_LAMBDA_FUNCTION_NAME", "bench")
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer
    from redis import Redis

    with Redis.from_url(url) as redis:
        layer = RedisCachePersistenceLayer(client=redis)
        config = IdempotencyConfig(expires_after_seconds=86_400, use_local_cache=False)

        @idempotent_function(data_keyword_argument="order", config=config, persistence_store=layer)
        def pay(order: dict[str, str]) -> Any:
            return ANSWER

        yield lambda key: pay(order={"id": key})


# ---- PostgreSQL


@asynccontextmanager
async def insert(dsn: str, how: str = "") -> Calls:
    """The floor of a claim: an INSERT .. ON CONFLICT of its row that commits; of a new key, or of one that is taken."""
    import psycopg

    from distsys.schema import ensure_schema

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await ensure_schema(conn)
        await conn.execute("CREATE TABLE IF NOT EXISTS raw_claims (key text PRIMARY KEY, expires_at timestamptz)")
        what = "distsys_idempotency (key, fingerprint, scope, endpoint, expires_at) VALUES (%s, %s, '', '/raw', "
        if how == "bare":
            what = "raw_claims (key, expires_at) VALUES (%s, "
        claim = f"INSERT INTO {what}now() + interval '1 day') ON CONFLICT DO NOTHING RETURNING 1"
        prefix, facts = os.urandom(8).hex(), [] if how == "bare" else [b"f" * 32]

        async def call(key: str) -> Any:
            values = [key if how == "taken" else f"{prefix}-{next(_new)}", *facts]
            return await (await conn.execute(claim, values)).fetchone()

        yield call


@asynccontextmanager
async def claimed(dsn: str) -> Calls:
    """The statement of ours: it claims, or reads what is there."""
    import psycopg

    from distsys.idempotency.database import claim
    from distsys.schema import ensure_schema

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await ensure_schema(conn)

        async def call(key: str) -> Any:
            return await claim(conn, "", "/claim", key, b"f" * 32, ttl=86_400)

        yield call


@asynccontextmanager
async def raw_transaction(dsn: str) -> Calls:
    """The floor: a claim, the answer and nothing else, in one transaction."""
    import psycopg

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        columns = "key text PRIMARY KEY, answer text, expires_at timestamptz"
        await conn.execute(f"CREATE TABLE IF NOT EXISTS raw_keys ({columns})")
        claim = "INSERT INTO raw_keys VALUES (%s, NULL, now() + interval '1 day') ON CONFLICT DO NOTHING RETURNING 1"

        async def call(key: str) -> Any:
            async with conn.transaction():
                if not await (await conn.execute(claim, (key,))).fetchone():
                    row = await (await conn.execute("SELECT answer FROM raw_keys WHERE key = %s", (key,))).fetchone()
                    return json.loads(row[0]) if row else None
                await conn.execute("UPDATE raw_keys SET answer = %s WHERE key = %s", (json.dumps(ANSWER), key))
            return ANSWER

        yield call


@asynccontextmanager
async def executed(dsn: str, pooled: str) -> Calls:
    import psycopg
    from psycopg_pool import AsyncConnectionPool

    from distsys.idempotency.database import idempotent_execute
    from distsys.schema import ensure_schema

    async def operation() -> Any:
        return ANSWER

    async with (
        AsyncConnectionPool(dsn, min_size=1, open=False, kwargs={"autocommit": True}) as pool,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn,
    ):
        await ensure_schema(conn)

        async def call(key: str) -> Any:
            return await idempotent_execute(pool if pooled else conn, key, "/bench", operation)

        yield call


async def main() -> None:
    async with Bench.open("idempotency") as bench:
        url, dsn = (await bench.servers.redis()).url, (await bench.servers.postgres()).url
        floor, floor_sync = "SET NX GET, EVALSHA", "the same, blocking client"
        for title, do in ("first call", "first"), ("replay", "replay"):
            await bench.speed(
                f"Claims in Redis, {title}",
                "calls",
                [
                    Contender(floor, "raw", [url]),
                    Contender("Claims, ours", "claims", [url], floor, 0.9),
                    Contender(floor_sync, "raw_sync", [url]),
                    Contender("Powertools", "powertools", [url], floor_sync, needs="aws-lambda-powertools"),
                ],
                do=do,
                note="""
Ours compares the request's fingerprint, has a fencing number, keeps a heartbeat and wakes who waits; Powertools
compares nothing unless told to, and has no fence. The raw commands do neither.""",
            )
        floor = "INSERT .. ON CONFLICT of such a row"
        async with bench.durable_postgres() as durable:
            ours = Contender("claim, ours", "claimed", [durable.url], floor, 0.9)
            await bench.speed(
                "A claim in PostgreSQL, first",
                "claims",
                [
                    Contender(floor, "insert", [durable.url]),
                    Contender("of a key and a time alone", "insert", [durable.url, "bare"], floor),
                    ours,
                ],
                do="first",
                waits=True,
                note="""
Commits wait for the disk, so this is a ratio of rates. Ours also says what is there when the key is taken: its state,
number, fingerprint and answer; the INSERT says only that it is.""",
            )
            await bench.speed(
                "A claim in PostgreSQL, again",
                "claims",
                [
                    Contender(floor, "insert", [durable.url]),
                    Contender("of one that is taken", "insert", [durable.url, "taken"], floor),
                    replace(ours, goal=4),
                ],
                do="replay",
                waits=True,
                note="""
The floor is a first claim, which waits for the disk; a second one writes nothing and waits for none. So the ratio is
the disk's, and the goal of 4 that of one on which a first claim took 880 us.""",
            )
        floor = "BEGIN, INSERT .. ON CONFLICT, UPDATE, COMMIT"
        for title, do in ("first call", "first"), ("replay", "replay"):
            await bench.speed(
                f"idempotent_execute, {title}",
                "calls",
                [
                    Contender(floor, "raw_transaction", [dsn]),
                    Contender("idempotent_execute, ours, a connection", "executed", [dsn, ""], floor),
                    Contender("idempotent_execute, ours, a pool", "executed", [dsn, "pool"], floor),
                ],
                do=do,
                note="""
Ours compares the request's fingerprint, forgets what has expired, and answers a replay without a write. The floor's
replay is an INSERT that conflicts, and a SELECT.""",
            )


if __name__ == "__main__":
    asyncio.run(main())
