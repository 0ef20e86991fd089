"""Operations in steps, with effects outside of the database: after a crash they resume at the step that was running.

Promise  a step that has ended is never carried out again: its result is replayed. After a crash inside of a step, that
         one step is carried out again, with the same `step.key`: pass it on as the idempotency key of that call.
Not      a rollback of earlier steps: they have happened. Not one transaction: each step commits by itself.
Units    seconds.
Errors   KeyReused, BadKey; KeyInProgress while another attempt has the lease; OutcomeUnknown if another attempt has
         taken over; the operation's own errors pass, and the next attempt resumes.
Source   Leach 2017 "Implementing Stripe-like Idempotency Keys in Postgres" (recovery points, completer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from distsys._support.postgres import rows
from distsys.errors import OutcomeUnknown
from distsys.idempotency.answers import answer_of, json_of, kept
from distsys.idempotency.claims import DAY, Claim, Claims, check_same_request
from distsys.idempotency.database import PostgresStore, answer_to, check_column, claim
from distsys.idempotency.keys import fingerprint_of, parse_key

Identity = tuple[str, str, str]  # scope, endpoint, key
Operation = Callable[["Steps", Any], Awaitable[Any]]

_ORPHANS = """
SELECT scope, key, request, extract(epoch FROM expires_at - clock_timestamp())::float FROM distsys_idempotency
WHERE endpoint = %s AND answer IS NULL AND request IS NOT NULL
  AND coalesce(leased_until, '-infinity') <= clock_timestamp() AND expires_at > clock_timestamp()
ORDER BY fence LIMIT %s
"""
_RESULT = "SELECT result FROM distsys_steps WHERE (scope, endpoint, key, step) = (%s, %s, %s, %s)"
_DELETE_STEPS = "DELETE FROM distsys_steps WHERE (scope, endpoint, key) = (%s, %s, %s) RETURNING 1"
_KEEP = """
INSERT INTO distsys_steps (scope, endpoint, key, step, result) SELECT scope, endpoint, key, %s, %s
FROM distsys_idempotency
WHERE (scope, endpoint, key, fence) = (%s, %s, %s, %s) AND leased_until > 'epoch' FOR UPDATE RETURNING 1
"""


@dataclass
class Step:
    """One step of an attempt.

    If `pending`, set `result`: it is kept as JSON when the block ends. Else `result` is that of an earlier attempt.
    `key` is the same in every attempt: the idempotency key for what is called here.
    """

    key: str
    pending: bool
    result: Any
    _connection: AsyncConnection[Any] | None

    @property
    def connection(self) -> AsyncConnection[Any]:
        """The connection of this step's transaction: what is written on it commits with the result.

        RuntimeError without transaction=True.
        """
        if self._connection is None:
            raise RuntimeError("this step has no transaction: use steps.step(name, transaction=True)")
        return self._connection


@dataclass
class Steps:
    """Steps of one attempt.

    `async with steps.step("charge") as charge: if charge.pending: charge.result = await ...`
    """

    _pool: AsyncConnectionPool[Any]
    _identity: Identity
    fence: int
    _ended: set[str] = field(default_factory=set)

    @asynccontextmanager
    async def step(self, name: str, *, transaction: bool = False) -> AsyncIterator[Step]:
        """Begin the step of this name, and keep its result when the block ends.

        transaction  for steps that write here; it holds a connection, so don't call other services in such a step

        ValueError if the step has ended in this attempt; OutcomeUnknown if another attempt has taken over.
        """
        if check_column("step", name) in self._ended:
            raise ValueError(f"step {name!r} has ended in this attempt: in a loop name each, as in {name + '-1'!r}")
        key = hashlib.sha256(json.dumps([*self._identity, name]).encode()).hexdigest()
        async with self._transaction() if transaction else nullcontext() as held:
            async with self._transaction(held) as conn:
                known = await rows(conn, _RESULT, (*self._identity, name))
            step = Step(key, not known, known[0][0] if known else None, held)
            yield step
            if step.pending:
                async with self._transaction(held) as conn:
                    if not await rows(conn, _KEEP, (name, json_of(step.result), *self._identity, self.fence)):
                        text = f"step {name!r}: the lease ended without a heartbeat and another took over"
                        raise OutcomeUnknown(text)
        self._ended.add(name)

    @asynccontextmanager
    async def _transaction(self, held: AsyncConnection[Any] | None = None) -> AsyncIterator[AsyncConnection[Any]]:
        """Give the connection of the transaction that is open, or one in a new transaction."""
        if held:
            yield held
        else:
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
    """Return what `operation(steps, request)` returned, carried out once per (scope, endpoint, key).

    request  JSON; another one with the same key raises KeyReused
    ttl      how long the answer is kept, in seconds
    lease    how long an attempt counts as alive without a heartbeat, in seconds; a step may take longer

    A failed attempt ends at once: the next one, or `complete_orphans`, resumes after the steps that have ended.
    """
    identity = scope, endpoint, parse_key(key)
    return await _execute(pool, identity, operation, json.loads(json_of(request)), ttl, lease)


async def complete_orphans(
    pool: AsyncConnectionPool[Any], operations: Mapping[str, Operation], *, batch: int = 10, lease: float = 30.0
) -> list[Any]:
    """Resume what crashed attempts left, at most `batch` of each endpoint; return the answers or errors of all."""
    answers: list[Any] = []
    for endpoint, operation in operations.items():
        async with pool.connection() as conn:
            orphans = await rows(conn, _ORPHANS, (endpoint, batch))
        for scope, key, request, ttl in orphans:
            try:
                # Each attempt adds its lease to the ttl: without the subtraction a request that kills its worker each
                # time would never expire.
                left = max(0.001, ttl - lease)
                answers.append(await _execute(pool, (scope, endpoint, key), operation, request, left, lease))
            except Exception as error:  # noqa: BLE001  one of several: it is among the answers
                answers.append(error)
    return answers


async def _execute(
    pool: AsyncConnectionPool[Any], identity: Identity, operation: Operation, request: Any, ttl: float, lease: float
) -> Any:
    (scope, endpoint, key), fingerprint = identity, fingerprint_of(request)
    claims = Claims(PostgresStore(pool, scope=scope, endpoint=endpoint), ttl=ttl, lease=lease)
    async with pool.connection() as conn, conn.transaction():
        found = await claim(conn, *identity, fingerprint, ttl=ttl, lease=lease, request=json_of(request))
        if found.state == "claimed":
            await rows(conn, _DELETE_STEPS, identity)  # those of the same key before it expired
        elif found.state == "unknown":
            check_same_request(found, fingerprint, key)
            found = await claim(conn, *identity, fingerprint, ttl=ttl, lease=lease, takeover_from=found.owner)
        if found.state != "claimed":
            return answer_of(answer_to(found, fingerprint, key))
    async with Claim(claims, key, found.owner) as mine:
        mine.effect_began = True  # a failure must not free the key: there are steps to resume
        answer = kept(await operation(Steps(pool, identity, found.owner), request))
        await mine.done(answer)
    return answer_of(answer)
