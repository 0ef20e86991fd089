"""Request dedup: each message takes effect once per consumer group, however often the broker delivers it.

Promise  the mark of a processed message commits with its effect, or neither does. Redis recognises the common duplicate
         without the database. It is written only after the commit, so a Redis that is flushed, evicted or down costs
         time, never correctness.
Not      for effects outside of the database (give them the message id as idempotency key); not for ever: a mark is kept
         for `retention`, which has to be longer than the broker may deliver a message again.
Units    seconds.
Errors   errors of the handler are counted and returned as Delivery.NACK; after `max_attempts` the message is parked.
         Errors of the database pass.
Source   Hohpe & Woolf 2003 (Idempotent Receiver); Richardson (Transactional inbox); Redis XAUTOCLAIM.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from psycopg_pool import AsyncConnectionPool

from distsys._support.arguments import check_count, check_seconds
from distsys._support.cancellation import reraise_swallowed_cancel
from distsys._support.postgres import rows
from distsys._support.redis import async_client, hash_tag, milliseconds, unavailable
from distsys.idempotency.answers import json_of
from distsys.idempotency.database import check_column, delete_batch

logger = logging.getLogger("distsys.idempotency")
Identity = tuple[str, str, str]  # consumer group, source, message id
Handler = Callable[[Any, Any], Awaitable[Any]]  # of the connection and the message
REDIS_TIMEOUT_SECONDS = 0.5  # for a Redis that is only there to be fast
REDIS_PAUSE_SECONDS = 5.0  # after it failed, until it is asked again

_MARK = """
INSERT INTO distsys_processed (consumer_group, source, message_id) VALUES (%s, %s, %s)
ON CONFLICT DO NOTHING RETURNING 1
"""
_COUNT_FAILURE = """
INSERT INTO distsys_failures AS mine (consumer_group, source, message_id, attempts, error, message, parked_at)
VALUES (%(group)s, %(source)s, %(id)s, 1, %(error)s, %(message)s, CASE WHEN %(most)s = 1 THEN clock_timestamp() END)
ON CONFLICT (consumer_group, source, message_id) DO UPDATE SET attempts = mine.attempts + 1, error = excluded.error,
  parked_at = CASE WHEN mine.attempts + 1 >= %(most)s THEN clock_timestamp() END
RETURNING parked_at IS NOT NULL
"""
_DELETE_FAILURES = "DELETE FROM distsys_failures WHERE (consumer_group, source, message_id) = (%s, %s, %s) RETURNING 1"


class Delivery(StrEnum):
    """The outcome of a delivery. After all but NACK the broker may forget the message."""

    DONE = "done"
    DUPLICATE = "duplicate"
    PARKED = "parked"  # it failed too often, and stays in distsys_failures until somebody looks at it
    NACK = "nack"  # to be delivered again

    @property
    def ack(self) -> bool:
        """Whether to acknowledge the message."""
        return self is not Delivery.NACK


class Dedup:
    """Messages that one consumer group has processed.

    `await Dedup("billing", pool, retention=7 * 86_400).handle("orders", message_id, handler, message)`

    group         name of the consumer group: each group processes every message once
    pool          an AsyncConnectionPool; marks and effects commit together. Needs `ensure_schema`
    retention     how long a message may be delivered again, in seconds: see redelivery_horizon
    redis         recognises duplicates before the database is asked; optional
    max_attempts  after so many failures a message is parked
    """

    def __init__(
        self, group: str, pool: AsyncConnectionPool[Any], *, retention: float, redis: Any = None, max_attempts: int = 5
    ) -> None:
        self.group, self.pool = check_column("group", group), pool
        self.retention = check_seconds("retention", retention)
        self.redis = None if redis is None else async_client(redis)
        self.max_attempts = check_count("max_attempts", max_attempts, 1, "attempts")
        self._ask_redis_after = 0.0  # by the event loop's clock

    def __call__(
        self, *, source: str, message_id: Callable[[Any], str]
    ) -> Callable[[Handler], Callable[[Any], Awaitable[Delivery]]]:
        """Decorate an async handler(conn, message): `@dedup(source="orders", message_id=lambda message: message["id"])`

        The decorated function takes the message and returns its Delivery.
        """

        def decorate(handler: Handler) -> Callable[[Any], Awaitable[Delivery]]:
            @functools.wraps(handler)
            async def handle(message: Any) -> Delivery:
                return await self.handle(source, message_id(message), handler, message)

            return handle

        return decorate

    async def handle(self, source: str, message_id: str, handler: Handler, message: Any = None) -> Delivery:
        """Run `handler(connection, message)` unless this message has been processed.

        If cancelled, as at a shutdown, the handler's work is rolled back, and nothing is counted or acknowledged.
        """
        identity = (self.group, check_column("source", source), check_column("message_id", message_id))
        if self.redis is not None and await self._ask(self.redis.exists, _key(identity)):
            return Delivery.DUPLICATE
        async with self.pool.connection() as conn:
            try:
                async with conn.transaction():
                    fresh = bool(await rows(conn, _MARK, identity))
                    if fresh:
                        await handler(conn, message)
                        await rows(conn, _DELETE_FAILURES, identity)
            except Exception as error:
                if conn.closed:  # the database is gone: the message is not at fault, and nothing can count it
                    raise
                return await self._count_failure(conn, identity, error, message)
        if self.redis is not None:
            await self._ask(self.redis.set, _key(identity), 1, px=milliseconds(self.retention))
        return Delivery.DONE if fresh else Delivery.DUPLICATE

    async def delete_old(self, *, batch: int = 1_000) -> int:
        """Delete at most `batch` marks older than the retention and return how many. No consumer waits for it."""
        old = "consumer_group = %s AND processed_at < now() - make_interval(secs => %s)"
        return await delete_batch(self.pool, "distsys_processed", old, (self.group, self.retention), batch)

    async def _count_failure(self, conn: Any, identity: Identity, error: Exception, message: Any) -> Delivery:
        group, source, message_id = identity
        facts = {"group": group, "source": source, "id": message_id, "message": _shown(message), "error": _shown(error)}
        async with conn.transaction():
            ((parked,),) = await rows(conn, _COUNT_FAILURE, {**facts, "most": self.max_attempts})
        logger.warning("%s of %s failed%s: %s", message_id, source, ", and is parked" if parked else "", facts["error"])
        return Delivery.PARKED if parked else Delivery.NACK

    # ---- the fast layer: a message that Redis knows has been committed

    async def _ask(self, command: Callable[..., Awaitable[Any]], *args: Any, **more: Any) -> Any:
        """Return Redis's answer; None if it fails, and without asking for a while after that."""
        now = asyncio.get_running_loop().time
        if now() < self._ask_redis_after:
            return None
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                return await reraise_swallowed_cancel(command(*args, **more))
        except Exception as error:
            if not unavailable(error):
                raise
            self._ask_redis_after = now() + REDIS_PAUSE_SECONDS
            logger.warning("for %g s only the database finds duplicates: %r", REDIS_PAUSE_SECONDS, error)
            return None


def redelivery_horizon(*, consumer_outage: float, redelivery: float, deliveries: int = 1) -> float:
    """Return how long after its processing a message may be delivered again, in seconds: the least `retention`.

    consumer_outage  how long a consumer that has not acknowledged may be away, in seconds. With Kafka the topic's own
                     retention.ms: setting an offset back delivers everything again that is still there
    redelivery       after how many seconds an unacknowledged message is given to another consumer: min_idle of a
                     stream, a visibility timeout
    deliveries       how often it may fail before it is parked
    """
    check_seconds("consumer_outage", consumer_outage, 0)
    check_seconds("redelivery", redelivery, 0)
    return consumer_outage + redelivery * deliveries


def _key(identity: Identity) -> str:
    return f"distsys:dedup:{{{hash_tag(json_of(identity))}}}"


def _shown(value: object) -> str:
    """Return the repr as PostgreSQL can store it. A value without one must not keep its failure from being counted."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  a message's own code
        text = f"a {type(value).__name__}, whose repr raised {type(error).__name__}"
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
