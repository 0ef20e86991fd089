"""Candidates for the idempotency experiments: the usual ways to pay once, each with its known mistake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from uuid import uuid4

from redis.exceptions import ResponseError

from distsys.idempotency.claims import Claims
from distsys.idempotency.consumers import consume_stream
from distsys.idempotency.database import delete_expired, idempotent_execute
from distsys.idempotency.dedup import Dedup
from distsys.idempotency.keys import idempotency_key
from distsys.idempotency.redis_store import RedisStore
from distsys.lab.experiments.idempotency.workload import Declined
from distsys.lab.run.guard import TRIES

Charge = Callable[..., Awaitable[str]]
Pay = Callable[[str, int, str], Awaitable[Any]]
DAY_MS = 86_400_000


def no_key(charge: Charge) -> Pay:
    """Pay in every attempt."""
    return lambda key, amount, user: charge(amount)


def without_key(pool: Any, charge: Charge) -> Pay:
    """Pay in a transaction that records no key."""

    async def pay(key: str, amount: int, user: str) -> str:
        async with pool.connection() as conn, conn.transaction():
            return await charge(amount, conn)

    return pay


def in_one_transaction(pool: Any, charge: Charge, keys: str = "given", ttl: float = 86_400.0) -> Pay:
    """Pay with idempotent_execute, under the key that the client sends, or one made in another way."""

    async def pay(key: str, amount: int, user: str) -> Any:
        made = {"given": key, "per attempt": str(uuid4())}
        made["of the intent"] = idempotency_key(entity_id=key, action="pay", params={"amount": amount, "user": user})
        paid = partial(charge, amount)  # called with the connection
        return await idempotent_execute(pool, made[keys], "/pay", paid, request=amount, scope=user, ttl=ttl)

    return pay


def claimed(redis: Any, charge: Charge, lease: float = 30.0, wait: float = 0.0, on_unknown: Any = "rerun") -> Pay:
    """Pay under a claim in Redis, with a key per user."""
    claims = Claims(RedisStore(redis), lease=lease, wait=wait, on_unknown=on_unknown)
    return lambda key, amount, user: claims.run(f"{user}:{key}", lambda: charge(amount), request=amount)


def mark_after(redis: Any, charge: Charge, scoped: bool = True, checked: bool = True, errors_kept: bool = False) -> Pay:
    """Read, pay, and write the answer for a day; with `errors_kept` also that the card was declined."""

    async def pay(key: str, amount: int, user: str) -> str:
        place = f"answer:{key}:{user if scoped else ''}:{amount if checked else ''}"
        answer = (await redis.get(place) or b"").decode()
        if not answer:
            try:
                answer = await charge(amount)
            except Declined:
                if not errors_kept:
                    raise
                answer = "declined"
            await redis.set(place, answer, px=DAY_MS)
        if answer == "declined":
            raise Declined
        return str(answer)

    return pay


def mark_before(redis: Any, charge: Charge) -> Pay:
    """Write that it is done, and then pay."""

    async def pay(key: str, amount: int, user: str) -> str:
        if not await redis.set(f"done:{key}", "1", nx=True, px=DAY_MS):
            return f"{amount} from {user}, as before"
        return await charge(amount)

    return pay


def select_then_insert(conn: Any, charge: Charge) -> Pay:
    """Read, pay and write the answer in the database: the SELECT finds no row, and locks none."""

    async def pay(key: str, amount: int, user: str) -> str:
        async with conn.transaction():
            rows = await conn.execute("SELECT message_id FROM distsys_processed WHERE source = %s", (key,))
            if known := await rows.fetchone():
                return str(known[0])
            answer = await charge(amount, conn)
            await conn.execute("INSERT INTO distsys_processed VALUES ('pay', %s, %s)", (key, answer + str(uuid4())))
        return answer

    return pay


def set_nx(redis: Any, charge: Charge, lease_ms: int | None = None) -> Pay:
    """Claim with SET NX, mark with SET: without lease_ms the claim never ends; the SET does not check the owner."""

    async def pay(key: str, amount: int, user: str) -> str:
        for _ in range(TRIES):
            if await redis.set(f"claim:{key}", "", nx=True, px=lease_ms):
                answer = await charge(amount)
                await redis.set(f"claim:{key}", answer)
                return answer
            if known := await redis.get(f"claim:{key}"):
                return str(known.decode())
            await asyncio.sleep(0.01)
        raise TimeoutError

    return pay


def two_layers(pool: Any, redis: Any, charge: Charge) -> Pay:
    """Pay with Dedup: the mark commits with the effect, and Redis only knows what has committed."""
    dedup = Dedup("billing", pool, redis=redis, retention=86_400)

    async def pay(key: str, amount: int, user: str) -> str:
        told = await dedup.handle("payments", key, lambda conn, message: charge(amount, conn))
        return f"{amount} from {user}, {told}"

    return pay


class Cleaning:
    """An endpoint whose expired keys are deleted by one DELETE, or by delete_expired."""

    def __init__(self, pool: Any, charge: Charge, at_once: bool = True) -> None:
        self.pool = pool
        self.at_once = at_once
        self.pay = in_one_transaction(pool, charge, ttl=0.05)

    async def clean(self) -> None:
        """Delete expired keys."""
        if self.at_once:
            async with self.pool.connection() as conn:
                await conn.execute("DELETE FROM distsys_idempotency WHERE expires_at <= clock_timestamp()")
        else:
            await delete_expired(self.pool)


# ---- consumers of a stream

GROUP, IDLE_MS = "billing", 50


async def entries(redis: Any, stream: str, consumer: str) -> AsyncIterator[tuple[bytes, Any]]:
    """Yield new entries, and those that other consumers left."""
    with contextlib.suppress(ResponseError):
        await redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
    while True:
        _, left, _ = await redis.xautoclaim(stream, GROUP, consumer, IDLE_MS)
        for _, fresh in await redis.xreadgroup(GROUP, consumer, {stream: ">"}, block=IDLE_MS):
            left = [*left, *fresh]
        for entry, fields in left:
            yield entry, fields


async def ack_first(redis: Any, stream: str, consumer: str, handle: Any) -> None:
    """Acknowledge, then handle: at most once."""
    async for entry, fields in entries(redis, stream, consumer):
        await redis.xack(stream, GROUP, entry)
        await handle(fields)


async def ack_last(redis: Any, stream: str, consumer: str, handle: Any) -> None:
    """Handle, then acknowledge: at least once."""
    async for entry, fields in entries(redis, stream, consumer):
        await handle(fields)
        await redis.xack(stream, GROUP, entry)


async def deduplicated(redis: Any, pool: Any, stream: str, consumer: str, handle: Any) -> None:
    """Handle at least once, and recognise a message by its id."""
    dedup = Dedup(GROUP, pool, redis=redis, retention=86_400)

    await consume_stream(
        redis, stream, consumer, dedup, lambda conn, fields: handle(fields, conn), min_idle=IDLE_MS / 1000
    )
