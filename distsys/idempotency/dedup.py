"""Request dedup: each message takes effect once per consumer group, however often the broker delivers it.

Promise  the mark of a processed message commits with its effect, or neither does. Redis answers the common duplicate
         without the database, and is told only after the commit: flushed, evicted or down it changes speed, not truth.
Not      for effects outside of the database (give them the message id as idempotency key); not for ever: a mark is kept
         for `retention`, which has to be longer than the broker may deliver a message again.
Units    seconds.
Errors   the handler's own are counted and answered by Delivery.NACK; after `max_attempts` the message is parked.
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

from distsys._support.arguments import check_seconds
from distsys._support.cancellation import heard
from distsys._support.postgres import rows
from distsys._support.redis import async_client, hash_tag, milliseconds, unavailable
from distsys.idempotency.answers import json_of
from distsys.idempotency.database import check_column, delete_batch

logger = logging.getLogger("distsys.idempotency")
Handler = Callable[[Any, Any], Awaitable[Any]]  # of the connection and the message
PATIENCE = 0.5  # seconds for a Redis that is only there to be fast
PAUSE = 5.0  # and after it failed, until it is asked again

_MARK = """
INSERT INTO distsys_processed (consumer_group, source, message_id) VALUES (%s, %s, %s)
ON CONFLICT DO NOTHING RETURNING 1
"""
_COUNT = """
INSERT INTO distsys_failures AS mine (consumer_group, source, message_id, attempts, error, message, parked_at)
VALUES (%(group)s, %(source)s, %(id)s, 1, %(error)s, %(message)s, CASE WHEN %(most)s = 1 THEN clock_timestamp() END)
ON CONFLICT (consumer_group, source, message_id) DO UPDATE SET attempts = mine.attempts + 1, error = excluded.error,
  parked_at = CASE WHEN mine.attempts + 1 >= %(most)s THEN clock_timestamp() END
RETURNING parked_at IS NOT NULL
"""
_FORGIVE = "DELETE FROM distsys_failures WHERE (consumer_group, source, message_id) = (%s, %s, %s) RETURNING 1"


class Delivery(StrEnum):
    """What became of a delivery; all but NACK mean that the broker may forget it."""

    DONE = "done"
    DUPLICATE = "duplicate"
    PARKED = "parked"  # it failed too often, and waits in distsys_failures for somebody to look at it
    NACK = "nack"  # to be delivered again

    @property
    def ack(self) -> bool:
        return self is not Delivery.NACK


class Dedup:
    """`await Dedup("billing", pool, retention=7 * 86_400).handle("orders", message_id, handler, message)`

    group         of consumers: each processes every message for itself
    pool          where marks and effects commit together. Needs `ensure_schema`
    retention     how long a message may come again: see redelivery_horizon; delete_old() deletes older marks
    redis         answers duplicates before the database is asked; optional
    max_attempts  after which a message that fails is parked
    """

    def __init__(
        self,
        group: str,
        pool: AsyncConnectionPool[Any],
        *,
        retention: float,
        redis: Any = None,
        max_attempts: int = 5,
    ) -> None:
        if type(max_attempts) is not int or max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts!r}: a whole number, 1 or more")
        self.group, self.pool = check_column("group", group), pool
        self.retention = check_seconds("retention", retention)
        self.redis = None if redis is None else async_client(redis)
        self.max_attempts, self._ask_after = max_attempts, 0.0

    def __call__(
        self, *, source: str, message_id: Callable[[Any], str]
    ) -> Callable[[Handler], Callable[[Any], Awaitable[Delivery]]]:
        """`@dedup(source="orders", message_id=lambda message: message["id"])` above an async handler(conn, message)."""

        def decorate(handler: Handler) -> Callable[[Any], Awaitable[Delivery]]:
            @functools.wraps(handler)
            async def handle(message: Any) -> Delivery:
                return await self.handle(source, message_id(message), handler, message)

            return handle

        return decorate

    async def handle(self, source: str, message_id: str, handler: Handler, message: Any = None) -> Delivery:
        """Runs `handler(connection, message)` unless this message has been processed.

        Cancelled, as at a shutdown, the handler's work is rolled back, and nothing is counted or acknowledged.
        """
        identity = (self.group, check_column("source", source), check_column("message_id", message_id))
        if await self._seen(identity):
            return Delivery.DUPLICATE
        async with self.pool.connection() as conn:
            try:
                async with conn.transaction():
                    fresh = bool(await rows(conn, _MARK, identity))
                    if fresh:
                        await handler(conn, message)
                        await rows(conn, _FORGIVE, identity)
            except Exception as error:
                if conn.closed:  # the database is gone: no fault of the message, and nobody to count it
                    raise
                return await self._failed(conn, identity, error, message)
        await self._remember(identity)
        return Delivery.DONE if fresh else Delivery.DUPLICATE

    async def delete_old(self, *, batch: int = 1_000) -> int:
        """Deletes marks older than the retention, at most so many, and says how many. No consumer waits for it."""
        old = "consumer_group = %s AND processed_at < now() - make_interval(secs => %s)"
        return await delete_batch(self.pool, "distsys_processed", old, (self.group, self.retention), batch)

    async def _failed(self, conn: Any, identity: tuple[str, str, str], error: Exception, message: Any) -> Delivery:
        group, source, message_id = identity
        facts = {"group": group, "source": source, "id": message_id, "message": _shown(message), "error": _shown(error)}
        async with conn.transaction():
            ((parked,),) = await rows(conn, _COUNT, {**facts, "most": self.max_attempts})
        logger.warning("%s of %s failed%s: %s", message_id, source, ", and is parked" if parked else "", facts["error"])
        return Delivery.PARKED if parked else Delivery.NACK

    # ---- the fast layer: what it says "yes" to has been committed

    async def _seen(self, identity: tuple[str, str, str]) -> bool:
        return self.redis is not None and bool(await self._ask(self.redis.exists, _key(identity)))

    async def _remember(self, identity: tuple[str, str, str]) -> None:
        if self.redis is not None:
            await self._ask(self.redis.set, _key(identity), 1, px=milliseconds(self.retention))

    async def _ask(self, command: Callable[..., Awaitable[Any]], *args: Any, **more: Any) -> Any:
        now = asyncio.get_running_loop().time
        if now() < self._ask_after:
            return None
        try:
            async with asyncio.timeout(PATIENCE):
                return await heard(command(*args, **more))
        except Exception as error:
            if not unavailable(error):
                raise
            self._ask_after = now() + PAUSE
            logger.warning("for %g s duplicates are found by the database alone: %r", PAUSE, error)
            return None


def redelivery_horizon(*, consumer_outage: float, redelivery: float, deliveries: int = 1) -> float:
    """How long after a message was processed it may come again, in seconds: the least `retention`.

    consumer_outage  for how long a consumer that has not acknowledged may be away. With Kafka the topic's own
                     retention.ms: who sets an offset back reads all that is there
    redelivery       until an unacknowledged message is given to another: min_idle of a stream, a visibility timeout
    deliveries       how often it may be delivered in vain before it is parked
    """
    seconds = [check_seconds("consumer_outage", consumer_outage, 0), check_seconds("redelivery", redelivery, 0)]
    return seconds[0] + seconds[1] * deliveries


def _key(identity: tuple[str, str, str]) -> str:
    return f"distsys:dedup:{{{hash_tag(json_of(identity))}}}"


def _shown(value: object) -> str:
    """For a column of text, whatever it is: what can't be shown must not keep its failure from being counted."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  a message's own code
        text = f"a {type(value).__name__}, whose repr raised {type(error).__name__}"
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
