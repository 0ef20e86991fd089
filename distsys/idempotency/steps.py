"""Operations in steps, with effects outside of the database: after a crash they go on where they were.

Promise  a step that has ended is never carried out again: its result is replayed. A crash inside of a step leaves that
         one step to be carried out again, with the same `step.key`: pass it on as the idempotency key of that call.
Not      a rollback of earlier steps: they have happened. One transaction: each step commits by itself.
Units    seconds.
Errors   KeyInProgress while another attempt has the lease; OutcomeUnknown from one that was overtaken.
Source   Leach 2017 "Implementing Stripe-like Idempotency Keys in Postgres" (recovery points, completer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from distsys._support.postgres import rows
from distsys.errors import OutcomeUnknown
from distsys.idempotency.answers import answer_of, json_of, kept
from distsys.idempotency.claims import DAY, Claim, Claims, check_same
from distsys.idempotency.database import PostgresStore, answer_to, check_column, claim
from distsys.idempotency.keys import fingerprint_of, parse_key

Operation = Callable[["Steps", Any], Awaitable[Any]]

_ORPHANS = """
SELECT scope, key, request, extract(epoch FROM expires_at - clock_timestamp())::float FROM distsys_idempotency
WHERE endpoint = %s AND answer IS NULL AND request IS NOT NULL
  AND coalesce(leased_until, '-infinity') <= clock_timestamp() AND expires_at > clock_timestamp()
ORDER BY fence LIMIT %s
"""
_KNOWN = "SELECT result FROM distsys_steps WHERE (scope, endpoint, key, step) = (%s, %s, %s, %s)"
_FORGET = "DELETE FROM distsys_steps WHERE (scope, endpoint, key) = (%s, %s, %s) RETURNING 1"
_KEEP = """
INSERT INTO distsys_steps (scope, endpoint, key, step, result) SELECT scope, endpoint, key, %s, %s
FROM distsys_idempotency
WHERE (scope, endpoint, key, fence) = (%s, %s, %s, %s) AND leased_until > 'epoch' FOR UPDATE RETURNING 1
"""


class Step:
    """`pending`: set `result`, which is kept as JSON when the block ends. Else it is there from an earlier attempt.

    `key` is the same in every attempt: the idempotency key for what is called here.
    """

    def __init__(self, key: str, known: list[Any], connection: AsyncConnection[Any] | None) -> None:
        self.key, self.pending, self._connection = key, not known, connection
        self.result: Any = known[0][0] if known else None

    @property
    def connection(self) -> AsyncConnection[Any]:
        """What is written on it commits with the result."""
        if self._connection is None:
            raise RuntimeError("this step has no transaction: steps.step(name, transaction=True)")
        return self._connection


class Steps:
    """Of one attempt: `async with steps.step("charge") as charge: if charge.pending: charge.result = await ...`"""

    def __init__(self, pool: AsyncConnectionPool[Any], identity: tuple[str, str, str], fence: int) -> None:
        self._pool, self._identity, self.fence = pool, identity, fence
        self._ended: set[str] = set()

    @asynccontextmanager
    async def step(self, name: str, *, transaction: bool = False) -> AsyncIterator[Step]:
        """With `transaction`, for steps that write here: it holds a connection, which calls to others should not."""
        if check_column("step", name) in self._ended:
            raise ValueError(f"step {name!r} has ended in this attempt: in a loop give each a name, as {name + '-1'!r}")
        key = hashlib.sha256(json.dumps([*self._identity, name]).encode()).hexdigest()
        async with self._begin() if transaction else nullcontext() as held:
            async with nullcontext(held) if held else self._begin() as conn:
                step = Step(key, await rows(conn, _KNOWN, (*self._identity, name)), held)
            yield step
            if step.pending:
                async with nullcontext(held) if held else self._begin() as conn:
                    if not await rows(conn, _KEEP, (name, json_of(step.result), *self._identity, self.fence)):
                        raise OutcomeUnknown(f"step {name!r} was overtaken: it was silent for longer than the lease")
        self._ended.add(name)

    @asynccontextmanager
    async def _begin(self) -> AsyncIterator[AsyncConnection[Any]]:
        async with self._pool.connection() as conn, conn.transaction():
            yield conn


async def execute_steps(
    pool: AsyncConnectionPool[Any],
    key: str,
    endpoint: str,
    operation: Operation,
    *,
    request: Any = None,
    scope: str = "",
    ttl: float = DAY,
    lease: float = 30.0,
) -> Any:
    """What `operation(steps, request)` answered, carried out once per (scope, endpoint, key), over several attempts.

    A failed attempt is over at once: the next one, or `complete_orphans`, goes on after the steps that have ended.
    """
    return await _execute(pool, scope, endpoint, parse_key(key), operation, json.loads(json_of(request)), ttl, lease)


async def complete_orphans(
    pool: AsyncConnectionPool[Any], operations: Mapping[str, Operation], *, batch: int = 10, lease: float = 30.0
) -> list[Any]:
    """Goes on with what crashed attempts left, at most so many of each endpoint; their answers or errors."""
    answers: list[Any] = []
    for endpoint, operation in operations.items():
        async with pool.connection() as conn:
            orphans = await rows(conn, _ORPHANS, (endpoint, batch))
        for scope, key, request, ttl in orphans:
            try:
                left = max(0.001, ttl - lease)  # with each lease added, what kills its worker would never expire
                answers.append(await _execute(pool, scope, endpoint, key, operation, request, left, lease))
            except Exception as error:  # noqa: BLE001  one of several: it is among the answers
                answers.append(error)
    return answers


async def _execute(
    pool: AsyncConnectionPool[Any],
    scope: str,
    endpoint: str,
    key: str,
    operation: Operation,
    request: Any,
    ttl: float,
    lease: float,
) -> Any:
    identity, fingerprint = (scope, endpoint, key), fingerprint_of(request)
    claims = Claims(PostgresStore(pool, scope=scope, endpoint=endpoint), ttl=ttl, lease=lease)
    async with pool.connection() as conn, conn.transaction():
        found = await claim(conn, *identity, fingerprint, ttl=ttl, lease=lease, request=json_of(request))
        if found.state == "claimed":
            await rows(conn, _FORGET, identity)  # of the same key, before it expired
        elif found.state == "unknown":
            check_same(found, fingerprint, key)
            found = await claim(conn, *identity, fingerprint, ttl=ttl, lease=lease, over=found.owner)
        if found.state != "claimed":
            return answer_of(answer_to(found, fingerprint, key))
    async with Claim(claims, key, found.owner) as mine:
        mine.effect_began = True  # what a failure leaves is no free key, but steps to go on with
        answer = kept(await operation(Steps(pool, identity, found.owner), request))
        await mine.done(answer)
    return answer_of(answer)
