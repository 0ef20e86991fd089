"""Consumers of Redis Streams groups and of Kafka, which acknowledge a message after Dedup has settled it.

Both brokers deliver at least once. A message is acknowledged after its effect has committed: a consumer that dies in
between gets it again, and Dedup recognises it. Both functions run until they are cancelled or a server fails; the
message in progress is then not acknowledged, and is delivered again. A message whose id can't be read is counted and
parked under its place in the source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import ResponseError

from distsys._support.arguments import check_seconds, optional
from distsys._support.cancellation import cancel_watch
from distsys._support.redis import async_client, milliseconds
from distsys.idempotency.database import check_column
from distsys.idempotency.dedup import Dedup, Delivery, Handler

MAX_BLOCK_MS = 1_000  # it must end before the client's socket timeout
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
    """Consume the entries of `stream` for the group of `dedup`: new ones, and those that dead consumers left behind.

    handler     gets the connection and the entry's fields
    min_idle    after how many seconds without an acknowledgement an entry is given to another consumer: longer than a
                handler ever takes
    message_id  reads the producer's id from the fields; None: the entry's id, which differs when a producer sends twice
    batch       how many entries are read at a time
    """
    redis = async_client(redis)
    idle = milliseconds(check_seconds("min_idle", min_idle))
    group = dedup.group
    cancelled = cancel_watch()
    try:
        await redis.xgroup_create(stream, group, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise
    start: Any = "0-0"
    while not cancelled():
        start, entries, *_ = await redis.xautoclaim(stream, group, consumer, idle, start, count=batch)
        block = None if entries else min(MAX_BLOCK_MS, idle)
        found = await redis.xreadgroup(group, consumer, {stream: ">"}, count=batch, block=block)
        for fresh in found.values() if isinstance(found, dict) else (listed for _, listed in found):
            entries = [*entries, *(fresh[0] if fresh and isinstance(fresh[0], list) else fresh)]  # RESP3 nests them
        for entry, fields in entries:
            if entry is not None:  # Redis before 7 returns None for an entry deleted while pending
                place = entry.decode() if isinstance(entry, bytes) else entry
                if (await _settle(dedup, stream, place, message_id, handler, fields)).ack:
                    await redis.xack(stream, group, entry)
    raise asyncio.CancelledError


async def consume_kafka(
    consumer: Any, dedup: Dedup, handler: Handler, *, message_id: MessageId = None, pause: float = 1.0
) -> None:
    """Consume the records of a started aiokafka consumer with enable_auto_commit=False and the group of `dedup`.

    A record that failed holds up its partition, to keep the order, until it is settled or parked.
    message_id  reads the producer's id from the record; None: partition and offset, which differ when it sends twice
    pause       seconds after a record that failed
    """
    if getattr(consumer, "_enable_auto_commit", False):  # there is no public way to ask
        raise ValueError("enable_auto_commit=True acknowledges messages before they are processed: set it to False")
    kafka: Any = optional("aiokafka", "kafka")
    check_seconds("pause", pause, least=0.0)
    cancelled = cancel_watch()
    while not cancelled():
        record = await consumer.getone()
        partition, delivery = kafka.TopicPartition(record.topic, record.partition), Delivery.NACK
        try:
            place = f"{record.partition}-{record.offset}"
            delivery = await _settle(dedup, record.topic, place, message_id, handler, record)
        finally:  # also after an error or a cancellation: a consumer that is used again must not skip this record
            if not delivery.ack and partition in consumer.assignment():
                consumer.seek(partition, record.offset)
        if delivery.ack:
            rebalanced = kafka.errors.CommitFailedError, kafka.errors.IllegalStateError
            with suppress(*rebalanced):  # then another consumer gets the record again
                await consumer.commit({partition: record.offset + 1})
        else:
            await asyncio.sleep(pause)
    raise asyncio.CancelledError


async def _settle(
    dedup: Dedup, source: str, place: str, message_id: MessageId, handler: Handler, message: Any
) -> Delivery:
    """Handle the message; if its id can't be read, count a failure under its place in the source."""
    try:
        name = check_column("message_id", message_id(message)) if message_id else place
    except Exception as error:  # noqa: BLE001  counted and logged like an error of the handler
        name, failure = place, error

        async def handler(*_: Any) -> None:
            raise failure

    return await dedup.handle(source, name, handler, message)
