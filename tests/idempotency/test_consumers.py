"""Consumers of Redis Streams groups and of Kafka: what is delivered twice takes effect once, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from confluent_kafka import Producer
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis
from testcontainers.community.kafka import KafkaContainer

from distsys.idempotency import consumers
from distsys.idempotency.consumers import consume_kafka, consume_stream
from distsys.idempotency.dedup import Dedup
from distsys.lab.testbed.servers import Server
from tests.bugs import edited, kills
from tests.idempotency.test_database import Connection, charge, effects, ledger, select

__all__ = ["ledger"]
DAY = 86_400.0
IDLE = 0.001
PARKED = "SELECT message_id, attempts, parked_at IS NOT NULL FROM distsys_failures"


async def until(true: Callable[[], Awaitable[Any]], task: asyncio.Task[Any] | None = None) -> None:
    """Wait until it is true; raise the error of a consumer that ends meanwhile."""
    async with asyncio.timeout(60):
        while not await true():
            if task is not None and task.done():
                task.result()
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A consumer that is cancelled at the end, as at a shutdown."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled(), "it ended by itself"


# ---- Redis Streams


@pytest.fixture
async def dedup(ledger: AsyncConnectionPool) -> Dedup:
    return Dedup("g", ledger, retention=DAY, max_attempts=3)


async def settled(redis: Redis, stream: str = "orders") -> bool:
    """Whether all was delivered and acknowledged."""
    groups = await redis.xinfo_groups(stream) if await redis.exists(stream) else []
    return bool(groups) and groups[0]["pending"] == 0 and groups[0]["lag"] == 0


def billed(field: Any = b"what") -> Any:
    async def handler(conn: Connection, fields: dict[Any, Any]) -> None:
        what = fields[field]
        if what in (b"poison", "poison"):
            raise ValueError("poison")
        await charge(conn, what.decode() if isinstance(what, bytes) else what)

    return handler


@pytest.mark.parametrize(
    "options",
    [{}, {"decode_responses": True}, {"protocol": 3}, {"protocol": 2}, {"protocol": 3, "decode_responses": True}],
)
async def test_entries_are_handled_and_acknowledged_whatever_the_client_answers(
    redis: Redis, redis_server: Server, dedup: Dedup, ledger: AsyncConnectionPool, options: dict[str, Any]
) -> None:
    """Entries from before the group count too; in RESP2 and RESP3, as bytes and as text."""
    for number in range(25):
        await redis.xadd("orders", {"what": f"{number}"})
    field = "what" if options.get("decode_responses") else b"what"
    async with Redis.from_url(redis_server.url, **options) as client:
        async with running(consume_stream(client, "orders", "c1", dedup, billed(field), min_idle=IDLE)) as task:
            await until(lambda: settled(redis), task)
    assert [await effects(ledger, f"{number}") for number in range(25)] == [1] * 25


async def test_with_the_producers_id_an_entry_sent_twice_has_one_effect(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    for _ in range(2):
        await redis.xadd("orders", {"id": "m1", "what": "k"})
    work = consume_stream(redis, "orders", "c1", dedup, billed(), min_idle=IDLE, message_id=lambda f: f[b"id"].decode())
    async with running(work) as task:
        await until(lambda: settled(redis), task)
    assert await effects(ledger) == 1


async def test_a_group_that_exists_is_joined_and_shared(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """Three at once: each entry has one effect."""
    await redis.xgroup_create("orders", "g", id="0", mkstream=True)
    for number in range(30):
        await redis.xadd("orders", {"what": f"{number}"})
    at_once = [consume_stream(redis, "orders", f"c{n}", dedup, billed(), min_idle=IDLE, batch=2) for n in range(3)]
    async with running(at_once[0]) as task, running(at_once[1]), running(at_once[2]):
        await until(lambda: settled(redis), task)
    assert [await effects(ledger, f"{number}") for number in range(30)] == [1] * 30


@kills("what failed is acknowledged", edited(consumers, "consume_stream", "fields)).ack:", "fields)):"))
async def test_a_failed_entry_is_delivered_again_and_parked_in_the_end(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """It does not block other entries."""
    poison = (await redis.xadd("orders", {"what": "poison"})).decode()
    await redis.xadd("orders", {"what": "k"})
    async with running(consume_stream(redis, "orders", "c1", dedup, billed(), min_idle=IDLE)) as task:
        await until(lambda: settled(redis), task)
    assert await select(ledger, PARKED) == (poison, 3, True)
    assert await effects(ledger) == 1


@pytest.mark.parametrize(
    "bad",
    [lambda fields: fields[b"id"].decode(), lambda fields: "", lambda fields: "x" * 701],
    ids=["missing", "empty", "too long"],
)
async def test_an_entry_without_an_id_is_parked_and_ends_no_consumer(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool, bad: Any
) -> None:
    place = (await redis.xadd("orders", {"what": "k"})).decode()
    work = consume_stream(redis, "orders", "c1", dedup, billed(), min_idle=IDLE, message_id=bad)
    async with running(work) as task:
        await until(lambda: settled(redis), task)
    assert (await select(ledger, PARKED), await effects(ledger)) == ((place, 3, True), 0)


async def test_entries_that_were_deleted_while_pending_are_forgotten(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """Deleted by hand, or trimmed because the stream is full."""
    await redis.xgroup_create("orders", "g", id="0", mkstream=True)
    names = [await redis.xadd("orders", {"what": f"{number}"}) for number in range(4)]
    await redis.xreadgroup("g", "dead", {"orders": ">"})
    await redis.xdel("orders", names[1])
    await redis.xtrim("orders", minid=names[1], approximate=False)
    async with running(consume_stream(redis, "orders", "c1", dedup, billed(), min_idle=IDLE)) as task:

        async def none_pending() -> bool:
            return bool((await redis.xpending("orders", "g"))["pending"] == 0)

        await until(none_pending, task)
    assert [await effects(ledger, f"{number}") for number in range(4)] == [0, 0, 1, 1]


async def test_a_consumer_that_is_cancelled_acknowledges_nothing_it_has_not_finished(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    began = asyncio.Event()

    async def slow(conn: Connection, fields: Any) -> None:
        await charge(conn)
        began.set()
        await asyncio.Event().wait()

    await redis.xadd("orders", {"what": "k"})
    async with running(consume_stream(redis, "orders", "c1", dedup, slow, min_idle=60)):
        await began.wait()
    assert (await redis.xpending("orders", "g"))["pending"] == 1
    assert (await effects(ledger), await select(ledger, PARKED)) == (0, None)
    async with running(consume_stream(redis, "orders", "c2", dedup, billed(), min_idle=IDLE)) as task:
        await until(lambda: settled(redis), task)
    assert await effects(ledger) == 1


async def ends_its_session(conn: Connection, message: Any) -> None:
    await charge(conn)
    await conn.execute(f"SELECT pg_terminate_backend({conn.info.backend_pid})")


async def test_without_the_database_a_consumer_ends_and_its_entry_comes_again(
    redis: Redis, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    await redis.xadd("orders", {"what": "k"})
    with pytest.raises(psycopg.OperationalError):
        await consume_stream(redis, "orders", "c1", dedup, ends_its_session, min_idle=IDLE)
    async with running(consume_stream(redis, "orders", "c1", dedup, billed(), min_idle=IDLE)) as task:
        await until(lambda: settled(redis), task)
    assert await effects(ledger) == 1


# ---- Kafka


@pytest.fixture(scope="module")
def brokers(request: Any) -> Iterator[str]:
    """The brokers of KAFKA_URL, of a container, or librdkafka's mock of three; the output says which."""
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with ExitStack() as stack:
        url, which = given_brokers(stack)
        with capture.global_and_fixture_disabled():
            print(f"\nKafka: {which}")
        yield url


def given_brokers(stack: ExitStack) -> tuple[str, str]:
    if url := os.environ.get("KAFKA_URL"):
        return url, f"{url}, of KAFKA_URL"
    try:
        container = stack.enter_context(KafkaContainer().with_kraft().with_env("KAFKA_NUM_PARTITIONS", "4"))
        return container.get_bootstrap_server(), f"a container of {container.image}"
    except Exception as error:  # noqa: BLE001  no engine, no image: each with an error of its own library
        why = type(error).__name__
    mock = Producer({"test.mock.num.brokers": 3})
    stack.callback(mock.flush, 0)
    url = ",".join(f"{each.host}:{each.port}" for each in mock.list_topics(timeout=10).brokers.values())
    return url, f"the mock brokers in confluent-kafka, for there is no container ({why}); KAFKA_URL names a real one"


class Kafka:
    """A topic and a group for one test."""

    def __init__(self, brokers: str) -> None:
        self.brokers, self.topic = brokers, f"orders-{os.urandom(6).hex()}"
        self.options = {"bootstrap_servers": brokers, "group_id": self.topic, "auto_offset_reset": "earliest"}
        self.options |= {"session_timeout_ms": 6_000, "heartbeat_interval_ms": 200, "retry_backoff_ms": 20}
        self.options |= {"metadata_max_age_ms": 500, "fetch_max_wait_ms": 20}

    async def send(self, *values: bytes, partition: int = 0) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.brokers, retry_backoff_ms=20) as producer:
            for value in values:
                await producer.send_and_wait(self.topic, value, partition=partition)

    @asynccontextmanager
    async def consumer(self, **more: Any) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(self.topic, **({"enable_auto_commit": False} | self.options | more))
        await consumer.start()
        try:
            yield consumer
        finally:
            await consumer.stop()

    async def committed(self, consumer: AIOKafkaConsumer, partition: int = 0) -> int | None:
        answer: int | None = await consumer.committed(TopicPartition(self.topic, partition))
        return answer


@pytest.fixture
def kafka(brokers: str) -> Kafka:
    return Kafka(brokers)


async def bills(conn: Connection, record: Any) -> None:
    if record.value == b"poison":
        raise ValueError("poison")
    await charge(conn, record.value.decode())


async def consumed(kafka: Kafka, consumer: AIOKafkaConsumer, dedup: Dedup, upto: int, **more: Any) -> None:
    async with running(consume_kafka(consumer, dedup, bills, pause=0, **more)) as task:

        async def there() -> bool:
            return (await kafka.committed(consumer) or 0) >= upto

        await until(there, task)


async def test_records_are_handled_in_order_and_committed(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    await kafka.send(*(str(number).encode() for number in range(5)))
    async with kafka.consumer() as consumer:
        await consumed(kafka, consumer, dedup, 5)
    async with ledger.connection() as conn:
        rows = await (await conn.execute("SELECT what FROM ledger ORDER BY number")).fetchall()
    assert [what for (what,) in rows] == ["0", "1", "2", "3", "4"]


async def test_a_record_sent_twice_or_read_again_has_one_effect(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """It is recognised by the producer's id, or by its place if the offset was set back."""
    await kafka.send(b"k", b"k")
    async with kafka.consumer() as consumer:
        await consumed(kafka, consumer, dedup, 2, message_id=lambda record: record.value.decode())
        assert await effects(ledger) == 1
        await kafka.send(b"l")
        await consumed(kafka, consumer, dedup, 3)
        await consumer.seek_to_beginning()
        await kafka.send(b"m")
        await consumed(kafka, consumer, dedup, 4)
    assert [await effects(ledger, what) for what in "lm"] == [1, 1]


async def test_a_record_that_fails_is_handled_again_before_those_behind_it(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """It blocks its partition until it is parked; so does a record without an id."""
    await kafka.send(b"poison", b"k")
    async with kafka.consumer() as consumer:
        await consumed(kafka, consumer, dedup, 2)
        assert await select(ledger, PARKED) == ("0-0", 3, True)
        assert await effects(ledger) == 1
        await kafka.send(b"l")
        await consumed(kafka, consumer, dedup, 3, message_id=lambda record: record.key.decode())
    assert await select(ledger, PARKED + " WHERE message_id = '0-2'") == ("0-2", 3, True)


@kills(
    "what was under way is skipped",
    edited(consumers, "consume_kafka", "consumer.seek(partition, record.offset)", "pass"),
)
async def test_a_cancelled_handler_commits_nothing_and_its_record_comes_again(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """The same consumer gets it again, or the next one."""
    began = asyncio.Event()

    async def slow(conn: Connection, record: Any) -> None:
        await charge(conn)
        began.set()
        await asyncio.Event().wait()

    await kafka.send(b"k", b"l")
    async with kafka.consumer() as consumer:
        async with running(consume_kafka(consumer, dedup, slow)):
            await began.wait()
        assert await kafka.committed(consumer) is None
        await consumed(kafka, consumer, dedup, 2)
    assert [await effects(ledger, what) for what in "kl"] == [1, 1]


async def test_without_the_database_no_record_is_skipped(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """A program that catches the error and continues with the same consumer gets the record again."""
    await kafka.send(b"k", b"l")
    async with kafka.consumer() as consumer:
        with pytest.raises(psycopg.OperationalError):
            await consume_kafka(consumer, dedup, ends_its_session)
        await consumed(kafka, consumer, dedup, 2)
    assert [await effects(ledger, what) for what in "kl"] == [1, 1]


async def test_a_partition_that_is_taken_away_meanwhile_is_left_to_its_new_owner(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """The commit is too late and the consumer continues; the new owner recognises what it gets again."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(conn: Connection, record: Any) -> None:
        await bills(conn, record)
        began.set()
        await go_on.wait()

    await kafka.send(b"k", b"l")
    async with kafka.consumer() as first, running(consume_kafka(first, dedup, slow)) as task:
        await began.wait()
        first.unsubscribe()
        go_on.set()
        await until(lambda: _counted(ledger), task)
        async with kafka.consumer() as second:
            await consumed(kafka, second, dedup, 2)
    assert [await effects(ledger, what) for what in "kl"] == [1, 1]


async def _counted(pool: AsyncConnectionPool) -> bool:
    return await effects(pool) == 1


async def test_two_consumers_of_a_group_that_come_and_go_lose_and_double_nothing(
    kafka: Kafka, dedup: Dedup, ledger: AsyncConnectionPool
) -> None:
    """Each start and stop is a rebalance, with records under way."""
    if "," in kafka.brokers and "KAFKA_URL" not in os.environ:
        pytest.skip("mock brokers refuse a second consumer's SyncGroup: KAFKA_URL, or a container engine")
    values = [str(number).encode() for number in range(40)]
    await kafka.send(*values[:20], partition=0)
    await kafka.send(*values[20:], partition=1)
    async with kafka.consumer() as first, running(consume_kafka(first, dedup, bills)) as task:
        for _ in range(2):
            async with kafka.consumer() as second, running(consume_kafka(second, dedup, bills)):
                await until(lambda: _assigned(second), task)

        async def all_done() -> bool:
            return bool((await select(ledger, "SELECT count(*) FROM ledger"))[0] >= 40)

        await until(all_done, task)
    assert [await effects(ledger, value.decode()) for value in values] == [1] * 40


async def _assigned(consumer: AIOKafkaConsumer) -> bool:
    return bool(consumer.assignment())


async def test_a_consumer_that_commits_by_itself_is_refused(kafka: Kafka, dedup: Dedup) -> None:
    """It may acknowledge records that were never processed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(ValueError, match="enable_auto_commit=True acknowledges messages before they are processed"):
            await consume_kafka(AIOKafkaConsumer(kafka.topic, **kafka.options), dedup, bills)
