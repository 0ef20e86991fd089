"""Fencing tokens: the resource itself refuses a holder that a newer one has overtaken.

Promise  once a write with token t is accepted, no write with a token below t is, while the resource keeps its data: a
         holder that was paused, partitioned or forgotten by a failover can't overwrite its successor's work.
Not      a lock: two holders may both work, only the older one's late writes are refused. A late write that arrives
         after the successor's read and before its write is accepted, unless that read presents its token as well:
         fenced_get, or fence() before SELECT. No help for resources that can't compare tokens (an e-mail, a payment
         provider without idempotency keys). Tokens of two sources can't be compared.
Units    tokens are positive integers below 2^53; TTLs in seconds.
Errors   StaleToken(expected, actual): refused, nothing was written. LookupError: no row matched at all.
Source   Gray & Cheriton 1989; Burrows 2006 (Chubby's sequencers); Kleppmann 2016 "How to do distributed locking".
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import AsyncConnection, sql
from psycopg_pool import AsyncConnectionPool

from distsys._support.postgres import rows
from distsys._support.redis import Script, async_client, milliseconds
from distsys.errors import StaleToken
from distsys.locks.lease import held_leases

if TYPE_CHECKING:
    from redis.asyncio import Redis

# KEYS[1] - the value    KEYS[2] - its guard: the newest token seen    ARGV - value, token, ttl in ms or ""
# Returns 0 when written, else the newer token that forbids it. An equal token is the same holder writing again.
_SET = Script("""
local newest = tonumber(redis.call('GET', KEYS[2]) or 0)
if newest > tonumber(ARGV[2]) then return newest end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3]) end
redis.call('SET', KEYS[2], ARGV[2])
return 0
""")

# KEYS as above    ARGV - token    Returns {newer token or 0, value}; from now on an older token is refused.
_GET = Script("""
local newest = tonumber(redis.call('GET', KEYS[2]) or 0)
if newest > tonumber(ARGV[1]) then return {newest, false} end
redis.call('SET', KEYS[2], ARGV[1])
return {0, redis.call('GET', KEYS[1])}
""")

_ADMIT = """
INSERT INTO distsys_fence AS guard (resource, token) VALUES (%s, %s)
ON CONFLICT (resource) DO UPDATE SET token = excluded.token WHERE guard.token <= excluded.token RETURNING token
"""
# All rows or none: the oldest acceptable token is decided over the whole set, under its row locks.
_UPDATE = """
WITH target AS MATERIALIZED (SELECT {column} AS token FROM {table} WHERE {rows} FOR UPDATE),
  newest AS (SELECT count(*) AS found, coalesce(max(token), 0) AS token FROM target),
  written AS (UPDATE {table} SET {sets}, {column} = {token}
    WHERE {rows} AND {token} >= (SELECT token FROM newest) RETURNING 1)
SELECT found, token, (SELECT count(*) FROM written) FROM newest
"""


def current_token(name: str | None = None) -> int:
    """Return the fencing token of the innermost lease held here (of the lock `name`), for code without the lease.

    Raises LockLost if that lease was lost, and LookupError if there is none with a token.
    """
    for lease in reversed(held_leases.get()):
        if lease.token is not None and name in (None, lease.name):
            lease.check()
            return lease.token
    wanted = f"of {name!r} " if name else ""
    raise LookupError(f"no lease with a fencing token {wanted}is held here; write under a lock")


async def fenced_set(redis: Redis, key: str, value: Any, *, token: int, ttl: float | None = None) -> None:
    """SET the key, or raise StaleToken if a newer token was seen. The guard, see `guard_key`, does not expire.

    ttl  of the value, in seconds
    """
    ttl_ms = "" if ttl is None else milliseconds(ttl)
    newest = await _SET.run(async_client(redis), [key, guard_key(key)], value, check_token(token), ttl_ms)
    if newest:
        raise _stale(key, newest, token)


async def fenced_get(redis: Redis, key: str, *, token: int) -> Any:
    """GET the key and present the token, or raise StaleToken if a newer one was seen.

    From then on an older holder's write is refused: it can't change what was read.
    """
    newest, value = await _GET.run(async_client(redis), [key, guard_key(key)], check_token(token))
    if newest:
        raise _stale(key, newest, token)
    return value


def guard_key(key: str) -> str:
    """Return the Redis key of the newest token for `key`: in the same cluster slot, and of no other key."""
    if not isinstance(key, str):
        raise TypeError(f"key={key!r} is a {type(key).__name__}; give a str: the guard is named after it")
    tag = re.search(r"\{(.*?)\}", key, re.DOTALL)
    if tag and tag[1]:  # what Redis hashes instead of the whole key
        return f"distsys:fence:{key}"
    if not key or "}" in key:
        raise ValueError(f"key={key!r} is empty or has braces around nothing: no guard can be kept in its slot")
    return f"distsys:fence={{{key}}}"


async def fence(conn: AsyncConnection[Any], resource: str, token: int) -> None:
    """Admit `token` for `resource` inside the caller's transaction, or raise StaleToken. Needs `ensure_schema`.

    The guard's row stays locked until that transaction ends, so this work commits before a newer token is admitted.
    """
    if conn.autocommit and conn.info.transaction_status.name == "IDLE":
        advice = "`async with conn.transaction():`"
        raise ValueError(f"fence() guards the rest of a transaction, and there is none: {advice}")
    if not await rows(conn, _ADMIT, (resource, check_token(token))):
        ((newest,),) = await rows(conn, "SELECT token FROM distsys_fence WHERE resource = %s", (resource,))
        raise _stale(resource, newest, token)


async def fenced_update(
    conn: AsyncConnection[Any],
    table: str,
    values: Mapping[str, Any],
    *,
    where: Mapping[str, Any],
    token: int,
    column: str = "fence_token",
) -> int:
    """UPDATE the rows `where`, and return how many changed. Raise StaleToken if one of them carries a newer token.

    The token is in the row itself (`column`, a bigint), so the check and the write are one atomic statement.
    Raises LookupError if no row matches.
    """
    if not values or not where:
        raise ValueError(f"fenced_update needs columns to set and a condition; got values={values!r}, where={where!r}")
    place = {"table": sql.Identifier(*table.split(".")), "column": sql.Identifier(column)}
    equations = {"sets": _equations(values, ", "), "rows": _equations(where, " AND ")}
    update = sql.SQL(_UPDATE).format(**place, **equations, token=sql.Literal(check_token(token)))
    ((found, newest, written),) = await rows(conn, update)
    if not found:
        raise LookupError(f"no row of {table} matches {dict(where)!r}: nothing was written")
    if newest > token:
        raise _stale(f"{table} {dict(where)!r}", newest, token)
    return int(written)


def postgres_tokens(pool: AsyncConnectionPool[Any]) -> Callable[[], Awaitable[int]]:
    """Return a source of tokens for `RedisLock(..., tokens=postgres_tokens(pool))`. Needs `ensure_schema`.

    They come from a sequence, which a failover of Redis can't turn back.
    """

    async def draw() -> int:
        async with pool.connection() as conn:
            ((token,),) = await rows(conn, "SELECT nextval('distsys_fence_token')")
        return int(token)

    return draw


@dataclass(frozen=True, kw_only=True)
class TtlAdvice:
    """Advice for a TTL: 2-3 times the expected operation. `ttl in advice` tells whether a TTL follows it.

    A shorter one loses leases to jitter, a longer one delays recovery after a crash. All fields are seconds.
    """

    expected: float
    shortest: float
    longest: float

    def __contains__(self, ttl: float) -> bool:
        return self.shortest <= ttl <= self.longest


def ttl_advice(expected: float) -> TtlAdvice:
    """Return the TTL for an operation expected to take `expected` seconds (its p99, not its mean)."""
    if not expected > 0:
        raise ValueError(f"expected={expected!r}: an operation takes more than 0 s; measure its p99")
    return TtlAdvice(expected=expected, shortest=2 * expected, longest=3 * expected)


def check_token(token: int) -> int:
    """Return the token if it is a positive integer below 2^53, which Lua compares exactly."""
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"token={token!r} is a {type(token).__name__}; pass lease.token (Redlock leases carry none)")
    if not 0 < token < 2**53:
        raise ValueError(f"token={token}: tokens are positive and below 2^53, the largest integer Lua compares exactly")
    return token


def _equations(values: Mapping[str, Any], separator: str) -> sql.Composed:
    equations = (sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in values.items())
    return sql.SQL(separator).join(equations)


def _stale(resource: str, newest: int, token: int) -> StaleToken:
    message = f"{resource}: token {token} is older than {newest}, which has written already; nothing was written"
    return StaleToken(message, resource=resource, expected=newest, actual=token)
