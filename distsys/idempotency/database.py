"""Database-backed idempotency: the claim commits with the effect, or neither does.

Promise  one effect per (scope, endpoint, key) while the row is kept, however often it is tried and whatever crashes:
         claim, effect and answer are one transaction. Attempts at once wait for the row, and are answered with it.
Not      for effects outside of this database: those are told nothing of a rollback (steps.py); for an answer that is
         lost with its row: `ttl` has to be longer than anybody retries.
Units    seconds.
Errors   KeyReused, BadKey; the operation's own errors roll back the claim; psycopg.Error passes, and from COMMIT leaves
         the outcome to the next attempt with the same key. Above READ COMMITTED who waited for another attempt gets
         SerializationFailure, not its answer: begin a new transaction.
Source   Helland 2012 "Idempotence is not a medical condition"; PostgreSQL documentation, INSERT .. ON CONFLICT.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import psycopg
from psycopg import AsyncConnection, Rollback
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from distsys._support.arguments import check_count, check_seconds, check_text
from distsys._support.cancellation import in_background
from distsys._support.postgres import Database, connection, rows
from distsys.errors import KeyInProgress
from distsys.idempotency.answers import answer_of, is_response, kept, status_of
from distsys.idempotency.claims import DAY, End, Found, check_same
from distsys.idempotency.keys import fingerprint_of, parse_key

TRIES = 100  # to read a row that others claim and free in the meantime
MAX_COLUMN_BYTES = 700  # bytes: three such names and a key fit one entry of an index

# Claims what is free, expired, or given up under the number %(over)s; else reads what is there, and writes nothing.
# It waits for the transaction that holds the row. If that committed, its row is younger than this statement: no row
# comes back, and the next look sees it. While it waited, another may have drawn a number above excluded.fence.
_FREE_TO_TAKE = """((mine.expires_at <= clock_timestamp() OR mine.fence = %(over)s AND mine.answer IS NULL)
    AND coalesce(mine.leased_until, '-infinity') <= clock_timestamp())"""
_CLAIM = f"""
WITH known AS (
  SELECT CASE WHEN answer IS NOT NULL THEN 'done' WHEN leased_until <= clock_timestamp() THEN 'unknown'
    ELSE 'running' END AS state, fence, fingerprint, answer,
    extract(epoch FROM leased_until - clock_timestamp()) AS lease
  FROM distsys_idempotency AS mine
  WHERE (scope, endpoint, key) = (%(scope)s, %(endpoint)s, %(key)s) AND NOT {_FREE_TO_TAKE}
), claimed AS (
  INSERT INTO distsys_idempotency AS mine (scope, endpoint, key, fingerprint, leased_until, request, expires_at)
  SELECT %(scope)s, %(endpoint)s, %(key)s, %(fingerprint)s,
    clock_timestamp() + make_interval(secs => %(lease)s), %(request)s,
    clock_timestamp() + make_interval(secs => %(ttl)s)
  WHERE NOT EXISTS (SELECT FROM known)
  ON CONFLICT (scope, endpoint, key) DO UPDATE SET fingerprint = excluded.fingerprint, answer = NULL,
    fence = nextval('distsys_idempotency_fence'), leased_until = excluded.leased_until,
    expires_at = excluded.expires_at,
    request = coalesce(excluded.request, mine.request)
  WHERE {_FREE_TO_TAKE}
  RETURNING fence
)
SELECT state, fence, fingerprint, coalesce(answer, ''), coalesce(lease, 0)::float FROM known
UNION ALL SELECT 'claimed', fence, %(fingerprint)s, '', %(lease)s FROM claimed
"""  # noqa: S608  a condition that stands in it twice
_MINE = "(scope, endpoint, key, fence) = (%(scope)s, %(endpoint)s, %(key)s, %(fence)s) AND answer IS NULL RETURNING 1"
# Of a transaction's own claim. After a short operation its end stays, nothing changes that an index is made of, and the
# row is updated where it is (HOT).
_KEEP = """
UPDATE distsys_idempotency SET answer = %s,
  expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => %s * 0.99))
WHERE (scope, endpoint, key) = (%s, %s, %s)
"""
_END = f"""
UPDATE distsys_idempotency SET answer = %(answer)s::bytea,
  leased_until = CASE WHEN %(answer)s::bytea IS NULL THEN timestamptz 'epoch' END,
  request = CASE WHEN %(answer)s::bytea IS NULL THEN request END,
  expires_at = clock_timestamp() + make_interval(secs => %(ttl)s) WHERE {_MINE}
"""  # noqa: S608  which rows, in three statements
_FREE = f"DELETE FROM distsys_idempotency WHERE {_MINE}"  # noqa: S608
_EXTEND = f"""
UPDATE distsys_idempotency SET leased_until = clock_timestamp() + make_interval(secs => %(lease)s),
  expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => 2 * %(lease)s))
  WHERE leased_until > 'epoch' AND {_MINE}
"""  # noqa: S608  a late heartbeat must not make an unknown outcome a running attempt
_IS = """
SELECT FROM distsys_idempotency
WHERE (scope, endpoint, key, fence) = (%(scope)s, %(endpoint)s, %(key)s, %(fence)s)
  AND CASE WHEN %(done)s THEN answer IS NOT NULL ELSE leased_until > 'epoch' END
"""


async def idempotent_execute(
    db: Database,
    key: str,
    endpoint: str,
    operation: Callable[..., Any],
    *,
    request: Any = None,
    scope: str = "",
    ttl: float = DAY,
) -> Any:
    """What `operation` answered, carried out once per (scope, endpoint, key).

    db         an AsyncConnection: within its transaction, and committed with it (without one, in one of its own); or an
               AsyncConnectionPool: a transaction on a connection of its own
    operation  async; gets the connection if it takes an argument. It answers JSON, a pydantic model, a dataclass, or a
               Starlette Response. An error, or a Response with a status that is not 2xx, rolls back all it wrote, and
               frees the key
    request    what has to be the same in all attempts, in JSON: another one raises KeyReused
    scope      whose key it is: a user's, a tenant's. Keys are made by clients, and two may choose the same
    ttl        how long the answer is kept, give or take a hundredth
    """
    name, fingerprint, _ = parse_key(key), fingerprint_of(request), check_seconds("ttl", ttl)
    result: Any = None
    async with connection(db) as conn, conn.transaction() as transaction:
        found = await claim(conn, scope, endpoint, name, fingerprint, ttl=ttl)
        if found.state != "claimed":
            result = answer_of(answer_to(found, fingerprint, name))
        else:
            result = operation(conn) if _takes_argument(operation) else operation()
            if inspect.isawaitable(result):
                result = await result
            if not 200 <= status_of(result) < 300:
                raise Rollback(transaction)
            answer = kept(result)
            await conn.execute(_KEEP, (answer, ttl, scope, endpoint, name))
            if not is_response(result):
                result = answer_of(answer)  # as later attempts will be answered
    return result


async def claim(
    conn: AsyncConnection[Any],
    scope: str,
    endpoint: str,
    key: str,
    fingerprint: bytes,
    *,
    ttl: float,
    lease: float | None = None,
    over: int = 0,
    request: str | None = None,
) -> Found:
    """Without a lease it is that of the transaction. One that is running for others has a lease."""
    facts = {
        "scope": check_column("scope", scope, 0),
        "endpoint": check_column("endpoint", endpoint, 0),
        "key": key,
        "fingerprint": fingerprint,
        "request": request,
        "ttl": ttl + (lease or 0),
        "lease": lease,
        "over": over,
    }
    for _ in range(TRIES):
        if found := await rows(conn, _CLAIM, facts):
            state, owner, before, answer, left = found[0]
            return Found(state, owner, bytes(before), bytes(answer), left or 0.0)
    raise KeyInProgress(f"{key!r} was claimed and freed by others {TRIES} times", key=key, retry_after=1.0)


def answer_to(found: Found, fingerprint: bytes, key: str) -> bytes:
    """The answer that is there, if it is one to this request."""
    check_same(found, fingerprint, key)
    if found.state != "done":
        raise KeyInProgress(f"{key!r}: an earlier attempt is running", key=key, retry_after=max(1.0, found.left))
    return found.answer


class PostgresStore:
    """`Claims(PostgresStore(pool))`: for answers that have to survive Redis. Needs `ensure_schema`.

    Who waits for another's answer takes a connection of the pool, and gives it back now and then: owners need one, too.
    """

    def __init__(self, pool: AsyncConnectionPool[Any], *, scope: str = "", endpoint: str = "") -> None:
        self._pool, self._scope, self._endpoint = pool, scope, endpoint

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, over: int = 0, waits: bool = False
    ) -> Found:
        """Cancelled, it goes on in the background, and gives back what it claimed: nobody would carry that out.

        In a transaction, whatever the pool does: when the reply to its COMMIT is lost, the owner is known.
        """
        found: Found | None = None

        async def ask() -> Found:
            nonlocal found
            async with self._pool.connection() as conn, conn.transaction():
                found = await claim(
                    conn, self._scope, self._endpoint, key, fingerprint, lease=lease, ttl=ttl, over=over
                )
            return found

        async def give_back() -> None:
            await asyncio.wait([asking])
            if found and found.state == "claimed":
                await self.end(key, found.owner, "unknown" if over else "free", b"", ttl)

        asking = asyncio.ensure_future(ask())
        try:
            return await asyncio.shield(asking)
        except BaseException:
            in_background(give_back(), f"giving back what may be claimed of {key!r}")
            raise

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        facts = {"answer": answer if state == "done" else None, "ttl": ttl}
        async with self._pool.connection() as conn:
            ended = await self._rows(conn, _FREE if state == "free" else _END, key, owner, **facts)
            if not ended and state == "done":  # said again, by one who was not heard
                ended = await self._rows(conn, _IS, key, owner, done=True)
            await conn.execute("SELECT pg_notify(%s, '')", (_channel(key),))
        return bool(ended)

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        async with self._pool.connection() as conn:
            return bool(await self._rows(conn, _EXTEND, key, owner, lease=lease))

    async def fence(self, key: str, owner: int) -> int:
        async with self._pool.connection() as conn:
            return owner if await self._rows(conn, _IS, key, owner, done=False) else 0

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        slice_ = min(timeout, max(0.02, min(1.0, timeout / 6)))  # so that no pool is full of those who wait for a lease
        async with self._pool.connection() as conn:
            before, listening = conn.autocommit, f'LISTEN "{_channel(key)}"'
            await conn.set_autocommit(True)
            try:
                await conn.execute(listening.encode())
                if await self._rows(conn, _IS, key, owner, done=False):  # else it ended before anybody listened
                    async for _ in conn.notifies(timeout=slice_, stop_after=1):
                        pass
            finally:
                try:
                    await conn.execute(f"UN{listening}".encode())
                finally:  # cancelled, too: a connection that commits by itself would be given to others
                    if not conn.closed:
                        await conn.set_autocommit(before)

    async def _rows(self, conn: AsyncConnection[Any], query: str, key: str, owner: int, **facts: Any) -> list[Any]:
        return await rows(
            conn, query, {"scope": self._scope, "endpoint": self._endpoint, "key": key, "fence": owner, **facts}
        )

    def unavailable(self, error: Exception) -> bool:
        """Not by what another transaction did: that may be an attempt at the same key (classes 40 and 55)."""
        other = isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] in ("40", "55")
        return isinstance(error, (psycopg.OperationalError, PoolTimeout, OSError)) and not other


async def delete_expired(db: Database, *, batch: int = 1_000) -> int:
    """Deletes expired rows, at most so many, and says how many: call it until none is left. No writer waits for it."""
    expired = "expires_at <= now() AND coalesce(leased_until, '-infinity') <= now()"
    return await delete_batch(db, "distsys_idempotency", expired, (), batch)


async def delete_batch(db: Database, table: str, condition: str, parameters: tuple[Any, ...], batch: int) -> int:
    """What others have locked is left to the next time. For clock_timestamp() no index would be used: now() it is."""
    check_count("batch", batch, 1, "rows")
    chosen = f"SELECT ctid FROM {table} WHERE {condition} LIMIT %s FOR UPDATE SKIP LOCKED"  # noqa: S608  names of ours
    delete = f"DELETE FROM {table} WHERE ctid = ANY(ARRAY({chosen})) RETURNING 1"  # noqa: S608
    async with connection(db) as conn, conn.transaction():
        return len(await rows(conn, delete, (*parameters, batch)))


def check_column(name: str, value: object, least: int = 1) -> str:
    """Return the text if it can be part of a primary key."""
    return check_text(name, value, least=least, most=MAX_COLUMN_BYTES)


def _takes_argument(operation: Callable[..., Any]) -> bool:
    if type(operation) is FunctionType and not hasattr(operation, "__wrapped__"):  # signature() takes 20 times as long
        return bool(operation.__code__.co_argcount or operation.__code__.co_flags & inspect.CO_VARARGS)
    kinds = {parameter.kind.name for parameter in inspect.signature(operation).parameters.values()}
    return bool(kinds - {"KEYWORD_ONLY", "VAR_KEYWORD"})


def _channel(key: str) -> str:
    return f"distsys_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
