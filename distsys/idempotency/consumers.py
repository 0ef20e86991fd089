"""Consumers that acknowledge what Dedup has settled: of Redis Streams groups, and of Kafka.

Both deliver at least once: a message is acknowledged after its effect has committed, so a consumer that dies in between
gets it again, and Dedup knows it. Both run until they are cancelled or a server fails; what they were handling then is
not acknowledged, and comes again. A message whose id can't be had is counted and parked by its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import ResponseError

from distsys._support.arguments import check_seconds, optional
from distsys._support.cancellation import cancellation
from distsys._support.redis import async_client, milliseconds
from distsys.idempotency.database import check_column
from distsys.idempotency.dedup import Dedup, Delivery, Handler

BLOCK = 1_000  # ms: it must end before the client's socket timeout
MessageId = Callable[[Any], str] | None


async def consume_stream(
    redis: Any,
    stream: str,
    consumer: str,
    dedup: Dedup,
    handler: Handler,
    *,
    min_idle: float = 60.0,
    message_id: MessageId = None,
    batch: int = 10,
) -> None:
    """Entries of `stream` for the group of `dedup`; its own, and those that dead consumers left for `min_idle` seconds.

    handler     gets the connection and the entry's fields. Longer than min_idle and another consumer begins as well
    message_id  of the fields, as the producer made it; None: the entry's id, which differs when a producer sends twice
    """
    redis, idle = async_client(redis), milliseconds(check_seconds("min_idle", min_idle))
    group, cancelled = dedup.group, cancellation()
    try:
        await redis.xgroup_create(stream, group, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise
    start: Any = "0-0"
    while not cancelled():
        start, entries, *_ = await redis.xautoclaim(stream, group, consumer, idle, start, count=batch)
        block = None if entries else min(BLOCK, idle)
        found = await redis.xreadgroup(group, consumer, {stream: ">"}, count=batch, block=block)
        for fresh in found.values() if isinstance(found, dict) else (each for _, each in found):
            entries = [*entries, *(fresh[0] if fresh and isinstance(fresh[0], list) else fresh)]  # RESP3 nests them
        for entry, fields in entries:
            if entry is not None:  # deleted from the stream while it was pending, as a Redis before 7 tells
                place = entry.decode() if isinstance(entry, bytes) else entry
                if (await _settle(dedup, stream, place, message_id, handler, fields)).ack:
                    await redis.xack(stream, group, entry)
    raise asyncio.CancelledError


async def consume_kafka(
    consumer: Any, dedup: Dedup, handler: Handler, *, message_id: MessageId = None, pause: float = 1.0
) -> None:
    """Records of an aiokafka consumer that is started, with enable_auto_commit=False and the group of `dedup`.

    A record that is to come again holds up its partition, as order demands, until it is settled or parked.
    message_id  of the record, as the producer made it; None: partition and offset, which differ when it sends twice
    pause       seconds before the next record after one that failed
    """
    if getattr(consumer, "_enable_auto_commit", False):  # there is no public way to ask, and it would lose messages
        raise ValueError("enable_auto_commit=True acknowledges what was never processed: make the consumer with False")
    kafka: Any = optional("aiokafka", "kafka")
    check_seconds("pause", pause, least=0.0)
    cancelled = cancellation()
    while not cancelled():
        record = await consumer.getone()
        place, verdict = kafka.TopicPartition(record.topic, record.partition), Delivery.NACK
        try:
            name = f"{record.partition}-{record.offset}"
            verdict = await _settle(dedup, record.topic, name, message_id, handler, record)
        finally:  # after an error or a cancellation, too: this consumer may be used again, and must not skip it
            if not verdict.ack and place in consumer.assignment():
                consumer.seek(place, record.offset)
        if verdict.ack:
            rebalanced = kafka.errors.CommitFailedError, kafka.errors.IllegalStateError
            with suppress(*rebalanced):  # then it comes again, to another
                await consumer.commit({place: record.offset + 1})
        else:
            await asyncio.sleep(pause)
    raise asyncio.CancelledError


async def _settle(
    dedup: Dedup, source: str, place: str, message_id: MessageId, handler: Handler, message: Any
) -> Delivery:
    """Without an id that can be read a message fails as by its handler, under its place."""
    try:
        name = check_column("message_id", message_id(message)) if message_id else place
    except Exception as error:  # noqa: BLE001  counted, and told, as the handler's
        name, failure = place, error

        async def handler(*_: Any) -> None:
            raise failure

    return await dedup.handle(source, name, handler, message)
