"""Consumers that acknowledge what Dedup has settled: of Redis Streams groups, and of Kafka.

Both deliver at least once: a message is acknowledged after its effect has committed, so a consumer that dies in between
gets it again, and Dedup knows it. Both run until they are cancelled; what they were handling then is not acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from distsys.idempotency.claims import check_seconds
from distsys.idempotency.dedup import Dedup, Handler
from distsys.redis_scripts import async_client, milliseconds

BLOCK = 1_000  # ms: it must end before the client's socket timeout


async def consume_stream(
    redis: Any,
    stream: str,
    consumer: str,
    dedup: Dedup,
    handler: Handler,
    *,
    min_idle: float = 60.0,
    message_id: Callable[[dict[Any, Any]], str] | None = None,
    batch: int = 10,
) -> None:
    """Entries of `stream` for the group of `dedup`; its own, and those that dead consumers left for `min_idle` seconds.

    handler     gets the connection and the entry's fields. Longer than min_idle and another consumer begins as well
    message_id  of the fields, as the producer made it; None: the entry's id, which differs when a producer sends twice
    """
    redis, idle = async_client(redis), milliseconds(check_seconds("min_idle", min_idle))
    group = dedup.group
    try:
        await redis.xgroup_create(stream, group, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise
    start: Any = "0-0"
    while True:
        start, entries, *_ = await redis.xautoclaim(stream, group, consumer, idle, start, count=batch)
        for _, fresh in await redis.xreadgroup(
            group, consumer, {stream: ">"}, count=batch, block=None if entries else min(BLOCK, idle)
        ):
            entries = [*entries, *fresh]
        for entry, fields in entries:
            if fields is None:  # deleted from the stream while it was pending
                await redis.xack(stream, group, entry)
                continue
            name = message_id(fields) if message_id else entry.decode() if isinstance(entry, bytes) else entry
            if (await dedup.handle(stream, name, handler, fields)).ack:
                await redis.xack(stream, group, entry)


async def consume_kafka(
    consumer: Any, dedup: Dedup, handler: Handler, *, message_id: Callable[[Any], str] | None = None
) -> None:
    """Records of an aiokafka consumer that is started, with enable_auto_commit=False and the group of `dedup`.

    A record that is to come again holds up its partition, as order demands, until it is settled or parked.
    message_id  of the record, as the producer made it; None: partition and offset, which differ when it sends twice
    """
    if consumer._enable_auto_commit:
        raise ValueError("enable_auto_commit=True acknowledges what was never processed: make the consumer with False")
    while True:
        record = await consumer.getone()
        name = message_id(record) if message_id else f"{record.partition}-{record.offset}"
        verdict = await dedup.handle(record.topic, name, handler, record)
        for place in consumer.assignment():  # in which the partition may not be any more
            if (place.topic, place.partition) == (record.topic, record.partition):
                if verdict.ack:
                    await consumer.commit({place: record.offset + 1})
                else:
                    consumer.seek(place, record.offset)
