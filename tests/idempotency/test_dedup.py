"""Dedup: each message takes effect once per group; Redis only makes it faster."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from redis import exceptions
from redis.asyncio import Redis

from distsys.idempotency import dedup as rule
from distsys.idempotency.dedup import Dedup, Delivery, redelivery_horizon
from distsys.lab.testbed.servers import Server
from tests.bugs import edited, kills
from tests.idempotency.test_database import Connection, charge, effects, ledger, select

__all__ = ["ledger"]
DAY = 86_400.0
FAILURE = "SELECT attempts, error, message, parked_at IS NOT NULL FROM distsys_failures"


async def fails(conn: Connection, message: Any) -> None:
    await charge(conn, str(message))
    raise ValueError("mine")


async def test_a_message_takes_effect_once_with_and_without_redis(ledger: AsyncConnectionPool, redis: Redis) -> None:
    for group, client in (("with", redis), ("without", None)):
        dedup = Dedup(group, ledger, retention=DAY, redis=client)
        verdicts = [await dedup.handle("orders", "m1", charge, group) for _ in range(3)]
        assert verdicts == ["done", "duplicate", "duplicate"]
        assert all(verdict.ack for verdict in verdicts)
        assert await effects(ledger, group) == 1


async def test_redis_answers_a_duplicate_without_the_database(
    ledger: AsyncConnectionPool, redis: Redis, pg: str
) -> None:
    """A pool that was never opened has no database to ask."""
    await Dedup("g", ledger, retention=DAY, redis=redis).handle("orders", "m1", charge, "k")
    never = Dedup("g", AsyncConnectionPool(pg, open=False), retention=DAY, redis=redis)
    assert await never.handle("orders", "m1", charge, "k") is Delivery.DUPLICATE
    [key] = await redis.keys()
    assert 0 < await redis.pttl(key) <= DAY * 1000


@kills(
    "Redis is told before the commit",
    edited(
        Dedup,
        "handle",
        "                if fresh:\n",
        "                await self._ask(self.redis.set, _key(identity), 1)\n                if fresh:\n",
    ),
)
async def test_redis_is_told_after_the_commit_and_never_before(ledger: AsyncConnectionPool, redis: Redis) -> None:
    """Redis is not written within the handler, nor after a failure."""
    dedup, seen = Dedup("g", ledger, retention=DAY, redis=redis), []

    async def looks(conn: Connection, message: Any) -> None:
        seen.append(await redis.dbsize())

    assert await dedup.handle("orders", "bad", fails, "k") is Delivery.NACK
    assert await redis.dbsize() == 0
    assert await dedup.handle("orders", "m1", looks) is Delivery.DONE
    assert (seen, await redis.dbsize()) == ([0], 1)


@pytest.mark.parametrize("fault", ["flushed", "evicted", "killed", "paused", "restarted"])
async def test_whatever_becomes_of_redis_no_message_takes_effect_twice(
    ledger: AsyncConnectionPool, own_redis: Server, fault: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that hangs does not delay messages; new messages are processed meanwhile."""
    monkeypatch.setattr(rule, "REDIS_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(rule, "REDIS_PAUSE_SECONDS", 600)
    caplog.set_level(logging.WARNING)
    async with Redis.from_url(own_redis.url) as redis:
        dedup = Dedup("g", ledger, retention=DAY, redis=redis)
        await dedup.handle("orders", "m1", charge, "k")
        if fault == "flushed":
            await redis.flushall()
        elif fault == "evicted":
            await redis.delete(*await redis.keys())
        else:
            await {"killed": own_redis.kill, "paused": own_redis.pause, "restarted": own_redis.restart}[fault]()
        assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DUPLICATE
        assert await dedup.handle("orders", "m2", charge, "k") is Delivery.DONE
        assert await dedup.handle("orders", "m2", charge, "k") is Delivery.DUPLICATE
        if fault == "paused":
            await own_redis.resume()
    assert await effects(ledger) == 2
    down = [record for record in caplog.records if "only the database finds" in record.message]
    assert len(down) in {"killed": (1,), "paused": (1,), "restarted": (0, 1)}.get(fault, (0,)), "and not asked again"


async def test_redis_is_asked_again_when_the_pause_is_over(
    ledger: AsyncConnectionPool, own_redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "REDIS_PAUSE_SECONDS", 0.0)
    async with Redis.from_url(own_redis.url) as redis:
        dedup = Dedup("g", ledger, retention=DAY, redis=redis)
        await own_redis.kill()
        await dedup.handle("orders", "m1", charge, "k")
        await own_redis.restart()
        await dedup.handle("orders", "m1", charge, "k")
        assert await redis.dbsize() == 1


async def test_a_redis_that_denies_access_is_not_hidden(ledger: AsyncConnectionPool, redis: Redis) -> None:
    """No effect is lost or doubled by it."""
    dedup = Dedup("g", ledger, retention=DAY, redis=redis)
    await redis.execute_command("ACL", "SETUSER", "reader", "on", "nopass", "~*", "+exists", "+client")
    url = redis.connection_pool.connection_kwargs
    async with Redis(host=url["host"], port=url["port"], username="reader", password="x") as reader:
        strict = Dedup("g", ledger, retention=DAY, redis=reader)
        with pytest.raises(exceptions.NoPermissionError):
            await strict.handle("orders", "m1", charge, "k")
    await redis.execute_command("ACL", "DELUSER", "reader")
    assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DUPLICATE
    assert await effects(ledger) == 1


@pytest.mark.parametrize("layers", [1, 2])
async def test_of_twenty_consumers_at_once_one_has_each_effect(
    ledger: AsyncConnectionPool, redis: Redis, layers: int
) -> None:
    """Each message is delivered to all of them, in an order of its own."""
    dedup = Dedup("g", ledger, retention=DAY, redis=redis if layers == 2 else None)

    async def consumer(number: int) -> list[Delivery]:
        ids = [f"m{(number + step) % 10}" for step in range(10)]
        return [await dedup.handle("orders", each, charge, each) for each in ids]

    verdicts = Counter(verdict for each in await asyncio.gather(*map(consumer, range(20))) for verdict in each)
    assert verdicts == {"done": 10, "duplicate": 190}
    assert [await effects(ledger, f"m{number}") for number in range(10)] == [1] * 10


@kills("groups share what Redis knows", edited(rule, "_key", "json_of(identity)", "json_of(identity[1:])"))
async def test_groups_and_sources_process_a_message_each_for_itself(ledger: AsyncConnectionPool, redis: Redis) -> None:
    """Names with braces, colons or letters beyond ASCII do not collide."""
    places = [("g", "s", "m"), ("g", "s:m", "m"), ("g:s", "m", "m"), ("{g}", "s", "m"), ("g", "s", "{m}")]
    places += [("g", "s", "ünï"), ("g", "s", "ün"), ("g", "s", "\U0001f600"), ("g", "s", "m "), ("G", "s", "m")]
    for expected in ("done", "duplicate"):
        for group, source, name in places:
            dedup = Dedup(group, ledger, retention=DAY, redis=redis)
            assert await dedup.handle(source, name, charge, "k") == expected
    assert await effects(ledger) == len(places) == await redis.dbsize()


async def test_the_decorator_takes_the_id_from_the_message(ledger: AsyncConnectionPool) -> None:
    @Dedup("g", ledger, retention=DAY)(source="orders", message_id=lambda message: message["id"])
    async def bill(conn: Connection, message: dict[str, str]) -> None:
        """Bills."""
        await charge(conn, message["what"])

    assert [await bill({"id": "m1", "what": "k"}) for _ in range(2)] == ["done", "duplicate"]
    assert (bill.__name__, bill.__doc__, await effects(ledger)) == ("bill", "Bills.", 1)


# ---- failures


@kills(
    "poison comes again for ever",
    edited(rule, "_COUNT_FAILURE", "mine.attempts + 1 >= %(most)s", "mine.attempts + 1 >= %(most)s + 1000"),
)
async def test_a_message_that_fails_comes_again_until_it_is_parked(ledger: AsyncConnectionPool) -> None:
    """Each failure is counted and leaves no effect; a parked message is acknowledged."""
    dedup = Dedup("g", ledger, retention=DAY, max_attempts=3)
    verdicts = [await dedup.handle("orders", "m1", fails, "k") for _ in range(3)]
    assert verdicts == ["nack", "nack", "parked"]
    assert [verdict.ack for verdict in verdicts] == [False, False, True]
    assert await select(ledger, FAILURE) == (3, "ValueError('mine')", "'k'", True)
    assert await effects(ledger) == 0


async def test_with_one_attempt_the_first_failure_is_parked(ledger: AsyncConnectionPool) -> None:
    dedup = Dedup("g", ledger, retention=DAY, max_attempts=1)
    assert await dedup.handle("orders", "m1", fails, "k") is Delivery.PARKED


@kills(
    "a success leaves the failures before it",
    edited(Dedup, "handle", "await rows(conn, _DELETE_FAILURES, identity)", "pass"),
)
async def test_a_success_deletes_the_failures_before_it(ledger: AsyncConnectionPool) -> None:
    """This holds even after it was parked and somebody fixed the cause."""
    dedup = Dedup("g", ledger, retention=DAY, max_attempts=2)
    for _ in range(3):
        await dedup.handle("orders", "m1", fails, "k")
    assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DONE
    assert await select(ledger, FAILURE) is None
    assert await effects(ledger) == 1


class Awkward:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("said", "message", "shown"),
    [
        ("nul \0", "nul \0", "'nul \\x00'"),
        ("half \ud800", "half \ud800", "'half \\ud800'"),
        (Awkward(), Awkward(), "a Awkward, whose repr raised RuntimeError"),
        (b"\xff\0", b"\xff\0", "b'\\xff\\x00'"),
    ],
)
async def test_a_failure_is_counted_whatever_it_says(
    ledger: AsyncConnectionPool, said: Any, message: Any, shown: str
) -> None:
    """Text that the database can't hold, or a repr that raises, would otherwise end each consumer that gets it."""

    async def handler(conn: Connection, message: Any) -> None:
        raise ValueError(said)

    dedup = Dedup("g", ledger, retention=DAY, max_attempts=1)
    assert await dedup.handle("orders", "m1", handler, message) is Delivery.PARKED
    assert (await select(ledger, FAILURE))[2] == shown


async def test_a_failed_statement_and_a_failed_commit_are_failures(ledger: AsyncConnectionPool) -> None:
    """So is a failed statement that the handler hides, and one that only COMMIT finds."""

    async def hides(conn: Connection, message: Any) -> None:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1/0")

    async def deferred(conn: Connection, message: Any) -> None:
        await conn.execute("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        await conn.execute("INSERT INTO late VALUES (1), (1)")

    dedup = Dedup("g", ledger, retention=DAY)
    for name, handler in (("m1", hides), ("m2", deferred)):
        assert await dedup.handle("orders", name, handler) is Delivery.NACK
        assert await dedup.handle("orders", name, charge, "k") is Delivery.DONE


async def test_a_serialization_failure_is_a_failure_and_comes_again(ledger: AsyncConnectionPool) -> None:
    async def overtaken(conn: Connection, message: Any) -> None:
        await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await charge(conn, message)

    async def late(conn: Connection, message: Any) -> None:
        await conn.execute("DO $$BEGIN RAISE EXCEPTION 'could not serialize' USING ERRCODE = '40001'; END$$")

    dedup = Dedup("g", ledger, retention=DAY)
    for handler in (overtaken, late):  # the first sets it too late: after the mark was written
        assert await dedup.handle("orders", "m1", handler, "k") is Delivery.NACK
    assert (await select(ledger, FAILURE))[0] == 2
    assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DONE


@kills(
    "a shutdown is a failure", edited(Dedup, "handle", "except Exception as error:", "except BaseException as error:")
)
async def test_a_cancelled_handler_is_neither_done_nor_counted(ledger: AsyncConnectionPool) -> None:
    """As at a shutdown: what it wrote is rolled back, and the message comes again."""
    began = asyncio.Event()

    async def slow(conn: Connection, message: Any) -> None:
        await charge(conn, message)
        began.set()
        await asyncio.Event().wait()

    dedup = Dedup("g", ledger, retention=DAY, max_attempts=1)
    handling = asyncio.create_task(dedup.handle("orders", "m1", slow, "k"))
    await began.wait()
    handling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handling
    assert await select(ledger, FAILURE) is None
    assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DONE
    assert await effects(ledger) == 1


async def test_a_lost_database_is_an_error_and_not_a_failure_of_the_message(
    ledger: AsyncConnectionPool, redis: Redis
) -> None:
    """Not counted, not remembered, not done: it comes again."""

    async def ended(conn: Connection, message: Any) -> None:
        await charge(conn, message)
        await conn.execute(f"SELECT pg_terminate_backend({conn.info.backend_pid})")

    dedup = Dedup("g", ledger, retention=DAY, redis=redis, max_attempts=1)
    with pytest.raises(psycopg.OperationalError):
        await dedup.handle("orders", "m1", ended, "k")
    assert (await select(ledger, FAILURE), await redis.dbsize()) == (None, 0)
    assert await dedup.handle("orders", "m1", charge, "k") is Delivery.DONE
    assert await effects(ledger) == 1


async def test_no_connection_to_be_had_is_an_error(redis: Redis) -> None:
    async with AsyncConnectionPool("host=127.0.0.1 port=1", timeout=0.1, open=False, min_size=0, max_size=1) as pool:
        with pytest.raises(PoolTimeout):
            await Dedup("g", pool, retention=DAY, redis=redis).handle("orders", "m1", charge, "k")
    assert await redis.dbsize() == 0


async def test_a_connection_that_is_closed_on_its_return_is_no_lost_database(
    pg: str, ledger: AsyncConnectionPool
) -> None:
    """A pool closes connections that are old: the failure is counted all the same, on the connection it came from."""
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, max_lifetime=0.0, timeout=5, open=False) as pool:
        dedup = Dedup("g", pool, retention=DAY)
        assert await dedup.handle("orders", "m1", fails, "k") is Delivery.NACK
    assert (await select(ledger, FAILURE))[0] == 1


# ---- retention


async def test_marks_are_deleted_after_the_retention_of_their_group(ledger: AsyncConnectionPool) -> None:
    """In batches; a message that comes later than that takes effect again."""
    short, long = Dedup("short", ledger, retention=0.001), Dedup("long", ledger, retention=DAY)
    for number in range(3):
        await short.handle("orders", f"m{number}", charge, "k")
    await long.handle("orders", "m0", charge, "k")
    old = "SELECT max(processed_at) < now() - interval '0.001' FROM distsys_processed"
    while not (await select(ledger, old))[0]:
        pass
    assert [await short.delete_old(batch=2) for _ in range(3)] == [2, 1, 0]
    assert await long.delete_old() == 0
    assert await short.handle("orders", "m0", charge, "k") is Delivery.DONE
    assert await long.handle("orders", "m0", charge, "k") is Delivery.DUPLICATE


async def test_deleting_waits_for_no_writer(ledger: AsyncConnectionPool) -> None:
    """Rows that another transaction has locked are left to the next call."""
    dedup = Dedup("g", ledger, retention=0.001)
    await dedup.handle("orders", "m1", charge, "k")
    async with ledger.connection() as conn:
        await conn.execute("SELECT FROM distsys_processed FOR UPDATE")
        assert await dedup.delete_old() == 0
    while not await dedup.delete_old():
        pass


def test_the_horizon_is_the_outage_and_all_redeliveries() -> None:
    assert redelivery_horizon(consumer_outage=DAY, redelivery=60, deliveries=5) == DAY + 300
    assert redelivery_horizon(consumer_outage=0, redelivery=0) == 0
    with pytest.raises(ValueError, match="redelivery=-1"):
        redelivery_horizon(consumer_outage=0, redelivery=-1)


@pytest.mark.parametrize(
    ("mistake", "error", "text"),
    [
        ({"group": ""}, ValueError, "group='' is empty"),
        ({"group": None}, TypeError, "group=None is a NoneType; give a str"),
        ({"retention": 0}, ValueError, "retention=0: give seconds"),
        ({"max_attempts": 0}, ValueError, "max_attempts=0: give attempts, 1 or more"),
        ({"max_attempts": 1.5}, TypeError, "max_attempts=1.5 is a float; give attempts as a whole number"),
        ({"redis": "redis://"}, TypeError, "is not an asyncio client"),
    ],
)
def test_a_mistake_is_named(mistake: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Dedup(**({"group": "g", "pool": None, "retention": DAY} | mistake))


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (("", "m"), ValueError, "source='' is empty"),
        (("s", ""), ValueError, "message_id='' is empty"),
        (("s", 7), TypeError, "message_id=7 is a int; give a str"),
        (("s", "a\0"), ValueError, r"message_id='a\\x00': give at most 700 bytes, without NUL"),
    ],
)
async def test_a_message_without_a_name_is_refused(
    ledger: AsyncConnectionPool, names: tuple[Any, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await Dedup("g", ledger, retention=DAY).handle(*names, charge)
