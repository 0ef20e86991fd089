"""Database-backed idempotency: the claim commits with the effect, or neither does.

Promise  one effect per (scope, endpoint, key) while the row is kept, however often it is tried and whatever crashes:
         claim, effect and answer are one transaction. Concurrent attempts wait for the row and return its answer.
Not      for effects outside of this database, which a rollback does not undo (steps.py). Nor once the row is deleted:
         `ttl` has to be longer than anybody retries.
Units    seconds.
Errors   KeyReused, BadKey, KeyInProgress. The operation's own errors roll back the claim. psycopg.Error passes; after
         one from COMMIT the next attempt with the same key finds out whether it committed. Above READ COMMITTED an
         attempt that waited for another one gets SerializationFailure, not its answer: begin a new transaction.
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
from distsys.idempotency.claims import DAY, End, Found, check_same_request
from distsys.idempotency.keys import fingerprint_of, parse_key

MAX_READS = 100  # of a row that other attempts claim and free again and again
MAX_COLUMN_BYTES = 700  # three such names and a key fit one entry of an index

# Claims the key if it is free, expired, or given up by owner %(takeover_from)s; else reads the row, and writes nothing.
# The INSERT waits for the transaction that holds the row. If that one commits, its row is younger than this statement's
# snapshot: no row comes back, and the next try reads it. excluded.fence was drawn before the wait, and another attempt
# may have drawn a larger number since: therefore the UPDATE draws a new one.
_FREE_TO_TAKE = """((mine.expires_at <= clock_timestamp() OR mine.fence = %(takeover_from)s AND mine.answer IS NULL)
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
    expires_at = excluded.expires_at, request = coalesce(excluded.request, mine.request)
  WHERE {_FREE_TO_TAKE}
  RETURNING fence
)
SELECT state, fence, fingerprint, coalesce(answer, ''), coalesce(lease, 0)::float FROM known
UNION ALL SELECT 'claimed', fence, %(fingerprint)s, '', %(lease)s FROM claimed
"""  # noqa: S608  one condition, used twice
_HELD = "(scope, endpoint, key, fence) = (%(scope)s, %(endpoint)s, %(key)s, %(fence)s) AND answer IS NULL RETURNING 1"
# Keeps the answer of this transaction's own claim. After a short operation expires_at stays as it is: then no indexed
# column changes, and PostgreSQL updates the row without touching the indexes (HOT).
_KEEP = """
UPDATE distsys_idempotency SET answer = %s,
  expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => %s * 0.99))
WHERE (scope, endpoint, key) = (%s, %s, %s)
"""
_END = f"""
UPDATE distsys_idempotency SET answer = %(answer)s::bytea,
  leased_until = CASE WHEN %(answer)s::bytea IS NULL THEN timestamptz 'epoch' END,
  request = CASE WHEN %(answer)s::bytea IS NULL THEN request END,
  expires_at = clock_timestamp() + make_interval(secs => %(ttl)s) WHERE {_HELD}
"""  # noqa: S608  one condition for three statements
_FREE = f"DELETE FROM distsys_idempotency WHERE {_HELD}"  # noqa: S608
_EXTEND = f"""
UPDATE distsys_idempotency SET leased_until = clock_timestamp() + make_interval(secs => %(lease)s),
  expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => 2 * %(lease)s))
  WHERE leased_until > 'epoch' AND {_HELD}
"""  # noqa: S608  a late heartbeat must not turn an unknown outcome into a running attempt
_IS_DONE_OR_RUNNING = """
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
    """Return what `operation` returned, carried out once per (scope, endpoint, key).

    db         an AsyncConnection: within its transaction, and committed with it (without one, in a new one); or an
               AsyncConnectionPool: in a transaction on one of its connections
    operation  async; gets the connection if it takes an argument. It returns JSON, a pydantic model, a dataclass, or a
               Starlette Response. An error, or a Response with a status that is not 2xx, rolls back all it wrote, and
               frees the key
    request    what has to be equal in all attempts, in JSON: another one raises KeyReused
    scope      whose key it is: a user's, a tenant's. Clients make keys, and two clients may choose the same
    ttl        how long the answer is kept, give or take a hundredth
    """
    check_seconds("ttl", ttl)
    name, fingerprint = parse_key(key), fingerprint_of(request)
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
                result = answer_of(answer)  # as later attempts will get it
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
    takeover_from: int = 0,
    request: str | None = None,
) -> Found:
    """Claim the key, as `Store.claim` says, in the transaction of `conn`.

    lease    None: the claim ends with the transaction; seconds: it outlives the transaction
    request  JSON that `complete_orphans` needs to carry it out again
    """
    check_column("scope", scope, 0)
    check_column("endpoint", endpoint, 0)
    row = {"scope": scope, "endpoint": endpoint, "key": key, "fingerprint": fingerprint, "request": request}
    terms = {"lease": lease, "ttl": ttl + (lease or 0), "takeover_from": takeover_from}
    for _ in range(MAX_READS):
        if found := await rows(conn, _CLAIM, row | terms):
            state, owner, before, answer, left = found[0]
            return Found(state, owner, bytes(before), bytes(answer), left or 0.0)
    text = f"{key!r} was claimed and freed by other attempts {MAX_READS} times in a row"
    raise KeyInProgress(text, key=key, retry_after=1.0)


def answer_to(found: Found, fingerprint: bytes, key: str) -> bytes:
    """Return the answer of an earlier attempt at this request; KeyReused, KeyInProgress."""
    check_same_request(found, fingerprint, key)
    if found.state != "done":
        text = f"{key!r}: an earlier attempt is running"
        raise KeyInProgress(text, key=key, retry_after=max(1.0, found.lease_left))
    return found.answer


class PostgresStore:
    """Store for `Claims(PostgresStore(pool))`: for answers that have to survive Redis. Needs `ensure_schema`.

    A waiter holds a connection for at most a second at a time, so that owners get one.
    """

    def __init__(self, pool: AsyncConnectionPool[Any], *, scope: str = "", endpoint: str = "") -> None:
        self._pool, self._scope, self._endpoint = pool, scope, endpoint

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, takeover_from: int = 0, notify: bool = False
    ) -> Found:
        """Claim the key, as `Store.claim` says; every end is notified.

        If cancelled, claiming finishes in the background and is then released. It runs in a transaction even if the
        pool's connections are in autocommit: so the owner is known if the reply to COMMIT is lost.
        """
        found: Found | None = None

        async def ask() -> Found:
            nonlocal found
            async with self._pool.connection() as conn, conn.transaction():
                row = self._scope, self._endpoint, key, fingerprint
                found = await claim(conn, *row, lease=lease, ttl=ttl, takeover_from=takeover_from)
            return found

        async def give_back() -> None:
            await asyncio.wait([asking])
            if found and found.state == "claimed":
                await self.end(key, found.owner, "unknown" if takeover_from else "free", b"", ttl)

        asking = asyncio.ensure_future(ask())
        try:
            return await asyncio.shield(asking)
        except BaseException:
            in_background(give_back(), f"giving back what may be claimed of {key!r}")
            raise

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        """End the claim; return False, without effect, if this owner no longer holds it. Idempotent for 'done'."""
        facts = {"answer": answer if state == "done" else None, "ttl": ttl}
        async with self._pool.connection() as conn:
            ended = await self._rows(conn, _FREE if state == "free" else _END, key, owner, **facts)
            if not ended and state == "done":  # retry after a lost reply
                ended = await self._rows(conn, _IS_DONE_OR_RUNNING, key, owner, done=True)
            await conn.execute("SELECT pg_notify(%s, '')", (_channel(key),))
        return bool(ended)

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        """Extend the lease; return False, without effect, if this owner no longer holds the claim."""
        async with self._pool.connection() as conn:
            return bool(await self._rows(conn, _EXTEND, key, owner, lease=lease))

    async def fence(self, key: str, owner: int) -> int:
        """Return the claim's number, which is its owner; 0 if this owner no longer holds the claim."""
        async with self._pool.connection() as conn:
            return owner if await self._rows(conn, _IS_DONE_OR_RUNNING, key, owner, done=False) else 0

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        """Wait for the end of the claim: at most a second, and at most a sixth of a short timeout."""
        seconds = min(timeout, max(0.02, min(1.0, timeout / 6)))
        listen = f'LISTEN "{_channel(key)}"'
        async with self._pool.connection() as conn:
            before = conn.autocommit
            await conn.set_autocommit(True)
            try:
                await conn.execute(listen.encode())
                if await self._rows(conn, _IS_DONE_OR_RUNNING, key, owner, done=False):  # it may end before LISTEN
                    async for _ in conn.notifies(timeout=seconds, stop_after=1):
                        pass
            finally:
                try:
                    await conn.execute(f"UN{listen}".encode())
                finally:  # also if cancelled: the pool must not give a connection in autocommit to others
                    if not conn.closed:
                        await conn.set_autocommit(before)

    def unavailable(self, error: Exception) -> bool:
        """Return whether the error means that the database could not be reached.

        SQLSTATE classes 40 and 55 come from other transactions, which may be attempts at the same key: no outage.
        """
        conflict = isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] in ("40", "55")
        return isinstance(error, (psycopg.OperationalError, PoolTimeout, OSError)) and not conflict

    async def _rows(self, conn: AsyncConnection[Any], query: str, key: str, owner: int, **facts: Any) -> list[Any]:
        claim = {"scope": self._scope, "endpoint": self._endpoint, "key": key, "fence": owner}
        return await rows(conn, query, claim | facts)


async def delete_expired(db: Database, *, batch: int = 1_000) -> int:
    """Delete at most `batch` expired rows and return how many: call it until it returns 0. No writer waits for it."""
    expired = "expires_at <= now() AND coalesce(leased_until, '-infinity') <= now()"
    return await delete_batch(db, "distsys_idempotency", expired, (), batch)


async def delete_batch(db: Database, table: str, condition: str, parameters: tuple[Any, ...], batch: int) -> int:
    """Delete at most `batch` rows that meet the condition and return how many. Skip rows that others have locked.

    Use now() in the condition: it is stable, so the index applies; clock_timestamp() is volatile.
    """
    check_count("batch", batch, 1, "rows")
    chosen = f"SELECT ctid FROM {table} WHERE {condition} LIMIT %s FOR UPDATE SKIP LOCKED"  # noqa: S608  names of ours
    delete = f"DELETE FROM {table} WHERE ctid = ANY(ARRAY({chosen})) RETURNING 1"  # noqa: S608
    async with connection(db) as conn, conn.transaction():
        return len(await rows(conn, delete, (*parameters, batch)))


def check_column(name: str, value: object, least: int = 1) -> str:
    """Return the text if it has at least `least` characters and can be part of a primary key."""
    return check_text(name, value, least=least, most=MAX_COLUMN_BYTES)


def _takes_argument(operation: Callable[..., Any]) -> bool:
    if type(operation) is FunctionType and not hasattr(operation, "__wrapped__"):  # signature() takes 20 times as long
        return bool(operation.__code__.co_argcount or operation.__code__.co_flags & inspect.CO_VARARGS)
    kinds = {parameter.kind.name for parameter in inspect.signature(operation).parameters.values()}
    return bool(kinds - {"KEYWORD_ONLY", "VAR_KEYWORD"})


def _channel(key: str) -> str:
    return f"distsys_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
