"""Fencing: what a resource accepts, what it refuses, and that nothing is written when it refuses."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest
import redis.asyncio
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from redis import Redis as BlockingRedis
from redis.crc import key_slot
from redis.exceptions import ResponseError

from distsys.errors import LockLost, Rejected, StaleToken
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server
from distsys.locks import fencing
from distsys.locks.fencing import (
    _GET,
    _SET,
    check_token,
    current_token,
    fence,
    fenced_get,
    fenced_set,
    fenced_update,
    guard_key,
    postgres_tokens,
    ttl_advice,
)
from distsys.locks.redis_lock import RedisLock
from distsys.schema import ensure_schema
from tests.bugs import edited, in_script, kills, replaced
from tests.locks.broken import outermost_token, token_without_check

Redis = redis.asyncio.Redis
Connect = Callable[..., Awaitable[AsyncConnection[Any]]]
TOKENS = st.lists(st.integers(1, 9) | st.integers(2**53 - 3, 2**53 - 1), min_size=1, max_size=12)
many = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
_numbers = itertools.count()
THIS_MODULE = sys.modules[__name__]


@pytest.fixture
async def connect(pg: str) -> AsyncIterator[Connect]:
    """Opens connections to the test's database, which has the schema and a table of accounts."""
    async with AsyncExitStack() as exits:

        async def open_one(**options: Any) -> AsyncConnection[Any]:
            conn = await AsyncConnection.connect(pg, **{"autocommit": True, **options})
            exits.push_async_callback(conn.close)
            return conn

        admin = await open_one()
        await ensure_schema(admin)
        await admin.execute("CREATE TABLE accounts (name text PRIMARY KEY, balance int, fence_token bigint)")
        await admin.execute("INSERT INTO accounts VALUES ('a', 0, NULL), ('b', 0, NULL)")
        yield open_one


@pytest.fixture
async def conn(connect: Connect) -> AsyncConnection[Any]:
    return await connect()


async def rows(conn: AsyncConnection[Any], query: str) -> list[Any]:
    cursor = await conn.cursor(row_factory=psycopg.rows.tuple_row).execute(query.encode())
    return await cursor.fetchall()


async def blocked(conn: AsyncConnection[Any]) -> None:
    """Until a session of this database waits for a row that another one has locked."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(20):
        while await rows(conn, waiting) != [(1,)]:
            await asyncio.sleep(0)


# ---- Redis


@kills("the token is not remembered", in_script(_SET, "redis.call('SET', KEYS[2], ARGV[2])", ""))
@kills(
    "written, and then refused",
    in_script(
        _SET,
        "if newest > tonumber(ARGV[2]) then return newest end",
        "redis.call('SET', KEYS[1], ARGV[1])if newest > tonumber(ARGV[2]) then return newest end",
    ),
)
@kills("nothing is refused", in_script(_SET, "if newest > tonumber(ARGV[2]) then return newest end", ""))
async def test_an_older_token_is_refused_and_nothing_is_written(redis: Redis) -> None:
    """StaleToken says what was expected and what came; the value and the guard are as before."""
    await fenced_set(redis, "balance", 90, token=34)
    with pytest.raises(StaleToken, match=r"balance: token 33 is older than 34, .* nothing was written") as refused:
        await fenced_set(redis, "balance", 10, token=33)
    assert (refused.value.expected, refused.value.actual, refused.value.resource) == (34, 33, "balance")
    assert isinstance(refused.value, Rejected)
    assert await redis.get("balance") == b"90"
    assert await redis.get(guard_key("balance")) == b"34"


@kills(
    "an equal token is refused",
    in_script(
        _SET,
        "if newest > tonumber(ARGV[2]) then return newest end",
        "if newest >= tonumber(ARGV[2]) then return newest end",
    ),
)
async def test_an_equal_token_is_the_same_holder_writing_again(redis: Redis) -> None:
    """As often as it likes; a newer one takes over at once."""
    for value in (1, 2, 3):
        await fenced_set(redis, "again", value, token=7)
    await fenced_set(redis, "again", 4, token=8)
    assert await redis.get("again") == b"4"


@given(tokens=TOKENS)
@many
async def test_for_any_order_of_writes_accepted_tokens_never_decrease(redis: Redis, tokens: list[int]) -> None:
    """Each is accepted unless a larger one was; the value is the last accepted one. Exact up to 2^53."""
    key, newest = f"order-{next(_numbers)}", 0
    for token in tokens:
        if token >= newest:
            await fenced_set(redis, key, token, token=token)
            newest = token
        else:
            with pytest.raises(StaleToken) as refused:
                await fenced_set(redis, key, token, token=token)
            assert (refused.value.expected, refused.value.actual) == (newest, token)
        assert await redis.get(key) == str(newest).encode()


@kills(
    "tokens compared as text",
    in_script(
        _SET,
        "if newest > tonumber(ARGV[2]) then return newest end",
        "if tostring(redis.call('GET', KEYS[2]) or '') > ARGV[2] then return newest end",
    ),
)
async def test_of_writers_at_once_the_newest_remains(redis: Redis) -> None:
    """Fifty writers in any order: the value and the guard are the newest one's."""
    tokens = random.Random(1).sample(range(1, 51), 50)
    answers = await asyncio.gather(
        *(fenced_set(redis, "crowd", token, token=token) for token in tokens), return_exceptions=True
    )
    refused = [answer for answer in answers if answer is not None]
    assert all(isinstance(error, StaleToken) and error.expected > error.actual for error in refused)
    assert await redis.mget("crowd", guard_key("crowd")) == [b"50", b"50"]


@kills("a read shows no token", in_script(_GET, "redis.call('SET', KEYS[2], ARGV[1])", ""))
async def test_a_read_that_shows_its_token_shuts_out_older_writes(redis: Redis) -> None:
    """The predecessor's late write can't come between the successor's read and its write."""
    await fenced_set(redis, "read", "first", token=1)
    assert await fenced_get(redis, "read", token=2) == b"first"
    with pytest.raises(StaleToken) as refused:
        await fenced_set(redis, "read", "late", token=1)
    assert (refused.value.expected, refused.value.actual) == (2, 1)
    await fenced_set(redis, "read", "second", token=2)


@kills("any token may read", in_script(_GET, "if newest > tonumber(ARGV[1]) then return {newest, false} end", ""))
async def test_an_older_token_may_not_read(redis: Redis) -> None:
    """What it computed from the answer would be refused anyway; a key that is not there is None, and fenced as well."""
    assert await fenced_get(redis, "nothing", token=5) is None
    with pytest.raises(StaleToken):
        await fenced_get(redis, "nothing", token=4)
    assert await redis.get(guard_key("nothing")) == b"5"


async def test_a_holder_forgotten_by_the_server_can_t_overwrite_its_successor(redis: Redis) -> None:
    """The lock is lost with all its data and granted again: the first holder's late write is refused."""
    first = await RedisLock(redis, "account").acquire()
    await redis.delete(*[key async for key in redis.scan_iter("distsys:lock:*")])
    second = await asyncio.create_task(RedisLock(redis, "account").acquire())
    assert first.token is not None
    assert second.token is not None
    await fenced_set(redis, "account", "second", token=second.token)
    with pytest.raises(StaleToken):
        await fenced_set(redis, "account", "first", token=first.token)
    assert await redis.get("account") == b"second"
    await first.release()
    await second.release()


@kills(
    "the guard expires with the value",
    in_script(_SET, "redis.call('SET', KEYS[2], ARGV[2])", "redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])"),
)
async def test_a_ttl_ends_the_value_and_not_its_guard(redis: Redis) -> None:
    """What has expired is still fenced; a later write without a ttl stays for good."""
    await fenced_set(redis, "session", "x", token=5, ttl=60)
    assert 0 < await redis.pttl("session") <= 60_000
    assert await redis.ttl(guard_key("session")) == -1
    await redis.delete("session")
    with pytest.raises(StaleToken):
        await fenced_set(redis, "session", "y", token=4)
    await fenced_set(redis, "session", "y", token=5)
    assert await redis.ttl("session") == -1


@pytest.mark.parametrize("ttl", [0, -1, 0.0, "5", float("nan"), float("inf")])
async def test_a_bad_ttl_writes_nothing(redis: Redis, ttl: Any) -> None:
    """Neither the value nor the guard is written."""
    with pytest.raises((ResponseError, TypeError, ValueError, OverflowError)):
        await fenced_set(redis, "ttl", "x", token=5, ttl=ttl)
    assert await redis.dbsize() == 0


async def test_a_write_whose_reply_was_lost_is_written_again(redis: Redis, redis_server: Server) -> None:
    """The client retries with the same token, which is accepted as the same holder's."""
    async with TcpProxy(redis_server.host, redis_server.port) as proxy:
        async with Redis(host="127.0.0.1", port=proxy.port) as client:
            await client.ping()
            proxy.cut_reply()
            await fenced_set(client, "cut", "once", token=3)
    assert await redis.get("cut") == b"once"


@pytest.mark.parametrize("options", [{"decode_responses": True}, {"protocol": 3}])
async def test_any_client_will_do(redis: Redis, redis_server: Server, options: dict[str, Any]) -> None:
    """Answers as text, RESP3."""
    async with Redis.from_url(redis_server.url, **options) as client:
        await fenced_set(client, "any", "x", token=2)
        with pytest.raises(StaleToken):
            await fenced_set(client, "any", "y", token=1)
        assert await fenced_get(client, "any", token=2) in ("x", b"x")
        assert await fenced_get(client, "none", token=2) is None


async def test_a_blocking_client_is_refused_before_it_writes(redis: Redis, redis_server: Server) -> None:
    """It would write, and only then fail to be awaited."""
    with BlockingRedis.from_url(redis_server.url) as client:
        with pytest.raises(TypeError, match="not an asyncio client"):
            await fenced_set(client, "blocking", "x", token=1)  # type: ignore[arg-type]
    assert await redis.dbsize() == 0


# ---- the guard's key


@kills("the guard in any slot", replaced(THIS_MODULE, "guard_key", lambda key: f"{key}:fence"))
@given(st.text(max_size=20) | st.text("{}ab", max_size=8))
def test_the_guard_shares_the_cluster_slot_of_its_key(key: str) -> None:
    """Whatever the braces; where no key could, it is an error that says so."""
    assume(key.encode("utf-8", "ignore").decode() == key)
    try:
        guard = guard_key(key)
    except ValueError as error:
        assert not key or "}" in key
        assert "no guard can be kept in its slot" in str(error)  # noqa: PT017
    else:
        assert key_slot(guard.encode()) == key_slot(key.encode())


@example(["a", "{a}"])
@kills(
    "two keys, one guard",
    replaced(THIS_MODULE, "guard_key", lambda key: f"{key}:fence" if "{" in key else f"{{{key}}}:fence"),
)
@given(st.lists(st.text("{}a:f=", min_size=1, max_size=6), min_size=2, max_size=2, unique=True))
def test_no_two_keys_share_a_guard(keys: list[str]) -> None:
    """`a` and `{a}` are two resources, whose tokens don't compare."""
    guards = []
    for key in keys:
        try:
            guards.append(guard_key(key))
        except ValueError:
            assume(False)
    assert len({*guards, *keys}) == 4


@pytest.mark.parametrize(
    ("key", "guard"),
    [
        ("balance", "distsys:fence={balance}"),
        ("{account}:balance", "distsys:fence:{account}:balance"),
        ("a{b", "distsys:fence={a{b}"),
        ("two words\n", "distsys:fence={two words\n}"),
        ("{a\nb}c", "distsys:fence:{a\nb}c"),
    ],
)
def test_the_guard_is_named_after_its_key(key: str, guard: str) -> None:
    """In braces if it has no hash tag of its own."""
    assert guard_key(key) == guard


@pytest.mark.parametrize("key", ["", "{}", "a}", "}{", "{}{a}"])
def test_a_key_that_no_guard_can_stand_beside_is_refused(key: str) -> None:
    """Redis hashes the whole of it, and no other key's tag can be equal to it."""
    with pytest.raises(ValueError, match="no guard can be kept in its slot"):
        guard_key(key)


async def test_a_key_of_bytes_is_refused(redis: Redis) -> None:
    """It would be the same key under another guard."""
    with pytest.raises(TypeError, match="is a bytes; give a str"):
        await fenced_set(redis, b"balance", 1, token=1)  # type: ignore[arg-type]


async def test_any_other_text_is_a_key(redis: Redis) -> None:
    """Unicode, spaces, ten kilobytes."""
    for key in ("ключ ✓", "two words", "{tag} and more", "x" * 10_000):
        await fenced_set(redis, key, "v", token=2)
        with pytest.raises(StaleToken):
            await fenced_set(redis, key, "w", token=1)


# ---- PostgreSQL: the guard table


@kills(
    "the guard keeps its first token",
    edited(fencing, "_ADMIT", "SET token = excluded.token", "SET token = guard.token"),
)
@kills("the guard admits every token", edited(fencing, "_ADMIT", " WHERE guard.token <= excluded.token", ""))
@kills(
    "the guard refuses an equal token", edited(fencing, "_ADMIT", "guard.token <= excluded", "guard.token < excluded")
)
async def test_the_guard_table_admits_newer_tokens_and_refuses_older_ones(conn: AsyncConnection[Any]) -> None:
    """Equal ones too; StaleToken carries both, and each resource has its own."""
    for token in (5, 5, 8):
        async with conn.transaction():
            await fence(conn, "report", token)
    with pytest.raises(StaleToken, match="report: token 7 is older than 8") as refused:
        async with conn.transaction():
            await conn.execute("UPDATE accounts SET balance = 1")
            await fence(conn, "report", 7)
    assert (refused.value.expected, refused.value.actual) == (8, 7)
    async with conn.transaction():
        await fence(conn, "other", 1)
    assert await rows(conn, "SELECT * FROM distsys_fence ORDER BY 1") == [("other", 1), ("report", 8)]
    assert await rows(conn, "SELECT DISTINCT balance FROM accounts") == [(0,)]


async def test_the_guard_needs_a_transaction(connect: Connect) -> None:
    """On a connection in autocommit its row would be free again before the write it guards."""
    conn = await connect()
    with pytest.raises(ValueError, match=r"async with conn\.transaction"):
        await fence(conn, "report", 5)
    assert await rows(conn, "SELECT * FROM distsys_fence") == []
    plain = await connect(autocommit=False)
    await fence(plain, "report", 5)
    await plain.commit()
    assert await rows(conn, "SELECT * FROM distsys_fence") == [("report", 5)]


@given(tokens=TOKENS)
@many
async def test_for_any_order_the_guard_admits_no_decreasing_token(
    conn: AsyncConnection[Any], tokens: list[int]
) -> None:
    """Each is admitted unless a larger one was."""
    resource, newest = f"order-{next(_numbers)}", 0
    for token in tokens:
        try:
            async with conn.transaction():
                await fence(conn, resource, token)
        except StaleToken as refused:
            assert (refused.expected, refused.actual) == (newest, token)  # noqa: PT017  one of two right outcomes
            assert token < newest
        else:
            assert token >= newest
            newest = token


@pytest.mark.parametrize("known", [True, False])
async def test_an_older_holder_waits_for_the_newer_ones_transaction_and_is_refused(
    connect: Connect, known: bool
) -> None:
    """They race for the guard's row, which is there already or not: the row stays locked until the first commits."""
    newer, older, admin = [await connect(autocommit=False) for _ in range(2)] + [await connect()]
    if known:
        await admin.execute("INSERT INTO distsys_fence VALUES ('race', 1)")
    await fence(newer, "race", 3)
    late = asyncio.create_task(fence(older, "race", 2))
    await blocked(admin)
    await newer.execute("UPDATE accounts SET balance = 3")
    await newer.commit()
    with pytest.raises(StaleToken) as refused:
        await late
    assert (refused.value.expected, refused.value.actual) == (3, 2)


@pytest.mark.parametrize("known", [True, False])
async def test_a_newer_holder_waits_for_the_older_ones_transaction_and_is_admitted(
    connect: Connect, known: bool
) -> None:
    """What the older one was admitted for commits first: the newer one writes over it, not under it."""
    older, newer, admin = [await connect(autocommit=False) for _ in range(2)] + [await connect()]
    if known:
        await admin.execute("INSERT INTO distsys_fence VALUES ('race', 1)")
    await fence(older, "race", 2)

    async def write() -> None:
        await fence(newer, "race", 3)
        await newer.execute("UPDATE accounts SET balance = 3")
        await newer.commit()

    task = asyncio.create_task(write())
    await blocked(admin)
    await older.execute("UPDATE accounts SET balance = 2")
    await older.commit()
    await task
    assert await rows(admin, "SELECT DISTINCT balance FROM accounts") == [(3,)]


async def test_a_token_whose_transaction_was_rolled_back_was_never_seen(connect: Connect) -> None:
    """An older holder that waited for it is admitted after all."""
    newer, older, admin = [await connect(autocommit=False) for _ in range(2)] + [await connect()]
    await fence(newer, "rollback", 3)
    task = asyncio.create_task(fence(older, "rollback", 2))
    await blocked(admin)
    await newer.rollback()
    await task
    await older.commit()
    assert await rows(admin, "SELECT token FROM distsys_fence") == [(2,)]


async def test_a_refusal_in_a_savepoint_leaves_the_transaction_usable(connect: Connect) -> None:
    """What came before it commits."""
    conn = await connect(autocommit=False)
    async with conn.transaction():
        await fence(conn, "savepoint", 5)
        with pytest.raises(StaleToken):
            async with conn.transaction():
                await fence(conn, "savepoint", 4)
        await conn.execute("UPDATE accounts SET balance = 1")
    assert await rows(conn, "SELECT DISTINCT balance FROM accounts") == [(1,)]


async def test_under_repeatable_read_a_race_is_a_serialization_failure(connect: Connect) -> None:
    """Postgres' own error passes: run the transaction again."""
    first, second, admin = [await connect(autocommit=False) for _ in range(2)] + [await connect()]
    for conn in (first, second):
        await conn.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    await second.execute("SELECT 1")
    await fence(first, "rr", 2)
    task = asyncio.create_task(fence(second, "rr", 3))
    await blocked(admin)
    await first.commit()
    with pytest.raises(psycopg.errors.SerializationFailure):
        await task


async def test_the_guard_answers_in_a_pipeline_too(connect: Connect) -> None:
    """Where a result comes only when it is asked for."""
    conn = await connect()
    async with conn.transaction():
        await fence(conn, "pipe", 5)
    with pytest.raises(StaleToken):
        async with conn.pipeline(), conn.transaction():
            await fence(conn, "pipe", 4)


# ---- PostgreSQL: the token in the row


@kills("an update leaves the token as it was", edited(fencing, "_UPDATE", ", {column} = {token}", ""))
@kills(
    "an update does not look at the token",
    edited(fencing, "_UPDATE", " AND {token} >= (SELECT token FROM newest)", ""),
)
async def test_an_update_writes_the_token_beside_the_values(conn: AsyncConnection[Any]) -> None:
    """A row that has none yet accepts any; an older one is refused and changes nothing."""
    assert await fenced_update(conn, "accounts", {"balance": 90}, where={"name": "a"}, token=34) == 1
    with pytest.raises(StaleToken, match=r"accounts {'name': 'a'}: token 33 is older than 34") as refused:
        await fenced_update(conn, "accounts", {"balance": 10}, where={"name": "a"}, token=33)
    assert (refused.value.expected, refused.value.actual) == (34, 33)
    assert await rows(conn, "SELECT * FROM accounts ORDER BY 1") == [("a", 90, 34), ("b", 0, None)]
    assert await fenced_update(conn, "accounts", {"balance": 80}, where={"name": "a"}, token=34) == 1
    assert await rows(conn, "SELECT * FROM accounts ORDER BY 1") == [("a", 80, 34), ("b", 0, None)]


@kills("the oldest of several rows decides", edited(fencing, "_UPDATE", "max(token)", "min(token)"))
@kills("an update is refused an equal token", edited(fencing, "_UPDATE", "{token} >= (SELECT", "{token} > (SELECT"))
async def test_several_rows_are_all_written_or_none(conn: AsyncConnection[Any]) -> None:
    """One row with a newer token holds back the others."""
    await fenced_update(conn, "accounts", {"balance": 1}, where={"name": "a"}, token=9)
    await fenced_update(conn, "accounts", {"balance": 0}, where={"name": "b"}, token=3)
    await conn.execute("ALTER TABLE accounts ADD bank text DEFAULT 'x'")
    with pytest.raises(StaleToken) as refused:
        await fenced_update(conn, "accounts", {"balance": 5}, where={"bank": "x"}, token=8)
    assert refused.value.expected == 9
    assert await rows(conn, "SELECT balance FROM accounts ORDER BY name") == [(1,), (0,)]
    assert await fenced_update(conn, "accounts", {"balance": 5}, where={"bank": "x"}, token=9) == 2
    assert await rows(conn, "SELECT DISTINCT balance, fence_token FROM accounts") == [(5, 9)]


async def test_a_missing_row_is_an_error_and_no_refusal(conn: AsyncConnection[Any]) -> None:
    """Nothing was written because there is nothing to write to."""
    with pytest.raises(LookupError, match=r"no row of accounts matches \{'name': 'z'\}"):
        await fenced_update(conn, "accounts", {"balance": 1}, where={"name": "z"}, token=1)


@pytest.mark.parametrize(("values", "where"), [({}, {"name": "a"}), ({"balance": 1}, {})])
async def test_an_update_needs_columns_and_a_condition(
    conn: AsyncConnection[Any], values: dict[str, Any], where: dict[str, Any]
) -> None:
    """A forgotten condition does not mean every row."""
    with pytest.raises(ValueError, match="needs columns to set and a condition"):
        await fenced_update(conn, "accounts", values, where=where, token=1)


@given(tokens=TOKENS)
@many
async def test_for_any_order_of_updates_accepted_tokens_never_decrease(
    conn: AsyncConnection[Any], tokens: list[int]
) -> None:
    """Each is accepted unless a larger one was; the row holds the last accepted one."""
    name, newest = f"order-{next(_numbers)}", 0
    await conn.execute("INSERT INTO accounts VALUES (%s, 0, NULL)", (name,))
    for token in tokens:
        try:
            await fenced_update(conn, "accounts", {"balance": token % 100}, where={"name": name}, token=token)
        except StaleToken as refused:
            assert (refused.expected, refused.actual) == (newest, token)  # noqa: PT017  one of two right outcomes
            assert token < newest
        else:
            assert token >= newest
            newest = token
        found = await rows(conn, f"SELECT balance, fence_token FROM accounts WHERE name = '{name}'")
        assert found == [(newest % 100, newest)]


@kills("the token is read without a lock on its row", edited(fencing, "_UPDATE", "FOR UPDATE", ""), first=2, second=1)
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
async def test_updates_that_race_for_a_row_are_decided_by_its_newest_version(
    connect: Connect, first: int, second: int
) -> None:
    """The second waits for the first's transaction, then sees its token: written if it is not older."""
    one, two, admin = await connect(autocommit=False), await connect(), await connect()
    await fenced_update(one, "accounts", {"balance": 1}, where={"name": "a"}, token=first)
    task = asyncio.create_task(fenced_update(two, "accounts", {"balance": 2}, where={"name": "a"}, token=second))
    await blocked(admin)
    await one.commit()
    if second >= first:
        assert await task == 1
    else:
        with pytest.raises(StaleToken) as refused:
            await task
        assert (refused.value.expected, refused.value.actual) == (first, second)
    assert await rows(admin, "SELECT balance, fence_token FROM accounts WHERE name = 'a'") == [
        (2, second) if second >= first else (1, first)
    ]


@pytest.mark.parametrize("change", ["DELETE FROM accounts", "UPDATE accounts SET name = name || '-moved'"])
async def test_a_row_that_is_gone_when_the_wait_ends_is_a_missing_row(connect: Connect, change: str) -> None:
    """Deleted, or no longer matching: nothing was written."""
    one, two, admin = await connect(autocommit=False), await connect(), await connect()
    await one.execute(change.encode())
    task = asyncio.create_task(fenced_update(two, "accounts", {"balance": 2}, where={"name": "a"}, token=1))
    await blocked(admin)
    await one.commit()
    with pytest.raises(LookupError):
        await task


@kills(
    "rows are found again by their place",
    edited(
        fencing,
        "_UPDATE",
        "WHERE {rows} AND {token}",
        "WHERE ctid IN (SELECT ctid FROM {table} WHERE {rows}) AND {token}",
    ),
)
async def test_a_partitioned_table_is_updated_where_the_condition_holds_and_nowhere_else(
    conn: AsyncConnection[Any],
) -> None:
    """Rows of two partitions may lie at the same physical place."""
    await conn.execute("CREATE TABLE parts (id int, v int, fence_token bigint) PARTITION BY LIST (id)")
    for i in (1, 2):
        await conn.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF parts FOR VALUES IN ({})").format(sql.Identifier(f"part{i}"), i)
        )
        await conn.execute("INSERT INTO parts VALUES (%s, 0, NULL)", (i,))
    assert await fenced_update(conn, "parts", {"v": 7}, where={"id": 1}, token=1) == 1
    assert await rows(conn, "SELECT * FROM parts ORDER BY id") == [(1, 7, 1), (2, 0, None)]


ODD = ['Weird "Name"', "drop table accounts; --", "select", "a'b", "100%", "{}", "ключ"]


@pytest.mark.parametrize("odd", ODD)
async def test_any_identifier_is_quoted(conn: AsyncConnection[Any], odd: str) -> None:
    """Names of tables, schemas and columns are names, whatever they hold."""
    schema, column = sql.Identifier(odd), sql.Identifier(odd)
    await conn.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
    table = sql.Identifier(odd, odd)
    await conn.execute(sql.SQL("CREATE TABLE {} ({} int, id int, token bigint)").format(table, column))
    await conn.execute(sql.SQL("INSERT INTO {} VALUES (0, 1, NULL)").format(table))
    changed = await fenced_update(conn, f"{odd}.{odd}", {odd: 1}, where={odd: 0, "id": 1}, token=3, column="token")
    assert changed == 1
    assert await rows(conn, "SELECT count(*) FROM accounts") == [(2,)]


INJECTION = "x'; DROP TABLE accounts; --"


@pytest.mark.parametrize(
    "wrong",
    [
        {"table": f'accounts"; {INJECTION}'},
        {"values": {f'balance" = 1; {INJECTION}': 1}},
        {"where": {f'name" = 1; {INJECTION}': 1}},
        {"where": {"name": f"a' OR 1=1; {INJECTION}"}},
        {"column": f'fence_token" = 9; {INJECTION}'},
    ],
)
async def test_what_would_be_an_injection_is_a_name_that_does_not_exist(
    conn: AsyncConnection[Any], wrong: dict[str, Any]
) -> None:
    """Or a value that no row has."""
    call = {"table": "accounts", "values": {"balance": 9}, "where": {"name": "a"}, "token": 1, **wrong}
    with pytest.raises((psycopg.ProgrammingError, LookupError)):
        await fenced_update(conn, call.pop("table"), call.pop("values"), **call)
    assert await rows(conn, "SELECT balance, fence_token FROM accounts") == [(0, None), (0, None)]


async def test_values_of_every_kind_are_written_as_they_are(conn: AsyncConnection[Any]) -> None:
    """Quotes, percent signs, backslashes, NULL, JSON, dates, lists."""
    import datetime

    from psycopg.types.json import Jsonb

    await conn.execute("CREATE TABLE kinds (id int, t text, j jsonb, d timestamptz, l int[], fence_token bigint)")
    await conn.execute("INSERT INTO kinds (id) VALUES (1)")
    now = datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC)
    values = {"t": "it's 100 % \\ {} %s", "j": Jsonb({"a": [1]}), "d": now, "l": [1, 2]}
    await fenced_update(conn, "kinds", values, where={"id": 1}, token=1)
    assert await rows(conn, "SELECT t, j, d, l FROM kinds") == [("it's 100 % \\ {} %s", {"a": [1]}, now, [1, 2])]
    await fenced_update(conn, "kinds", {"t": None}, where={"id": 1}, token=1)
    assert await rows(conn, "SELECT t FROM kinds") == [(None,)]


async def test_rows_may_be_anything_the_connection_likes(connect: Connect, pg: str) -> None:
    """A connection or pool whose rows are dicts is understood."""
    conn = await connect(row_factory=dict_row)
    assert await fenced_update(conn, "accounts", {"balance": 1}, where={"name": "a"}, token=5) == 1
    with pytest.raises(StaleToken):
        async with conn.transaction():
            await fence(conn, "dicts", 5)
            await fence(conn, "dicts", 4)
    async with AsyncConnectionPool(pg, min_size=1, kwargs={"row_factory": dict_row}, open=False) as pool:
        assert await postgres_tokens(pool)() == 1


# ---- tokens from a sequence


async def test_tokens_from_postgres_only_grow(connect: Connect, pg_pool: AsyncConnectionPool) -> None:
    """One after the other strictly; at once each is drawn by one only."""
    await connect()
    draw = postgres_tokens(pg_pool)
    assert [await draw(), await draw()] == [1, 2]
    assert sorted(await asyncio.gather(*(draw() for _ in range(10)))) == list(range(3, 13))


async def test_no_failover_of_redis_turns_back_tokens_from_postgres(
    redis: Redis, connect: Connect, pg_pool: AsyncConnectionPool
) -> None:
    """The lock's server forgets everything, its clock included: the next token is larger all the same."""
    await connect()
    tokens = []
    for _ in range(3):
        async with RedisLock(redis, "pg", tokens=postgres_tokens(pg_pool)) as lease:
            assert current_token() == lease.token
            tokens.append(lease.token)
        await redis.flushall()
    assert tokens == [1, 2, 3]


async def test_a_release_whose_reply_was_lost_is_no_loss_under_tokens_from_elsewhere(redis_server: Server) -> None:
    """The server knows the lease by its own token: no other grant came in between."""
    async with TcpProxy(redis_server.host, redis_server.port) as proxy:
        async with Redis(host="127.0.0.1", port=proxy.port) as client:
            async with RedisLock(client, "warm", tokens=lambda: asyncio.sleep(0, 1)):
                pass
            async with RedisLock(client, "cut", tokens=lambda: asyncio.sleep(0, 7)) as lease:
                assert lease.token == 7
                proxy.cut_reply()


async def test_the_schema_may_be_made_by_many_at_once(pg: str) -> None:
    """IF NOT EXISTS alone would fail for some; what is there already is kept."""
    async with AsyncExitStack() as exits:
        conns = [await exits.enter_async_context(await AsyncConnection.connect(pg)) for _ in range(6)]

        async def make(conn: AsyncConnection[Any]) -> None:
            await ensure_schema(conn)
            await conn.commit()

        await asyncio.gather(*map(make, conns))
        await fence(conns[0], "kept", 7)
        await conns[0].commit()
        await asyncio.gather(*map(make, conns))
        assert await rows(conns[0], "SELECT * FROM distsys_fence") == [("kept", 7)]


async def test_without_the_schema_the_error_names_what_is_missing(pg_pool: AsyncConnectionPool) -> None:
    """Postgres says it."""
    with pytest.raises(psycopg.errors.UndefinedTable, match="distsys_fence_token"):
        await postgres_tokens(pg_pool)()


# ---- the token of the lease around


@kills("the outermost token", replaced(THIS_MODULE, "current_token", outermost_token))
async def test_nested_code_finds_the_token_of_the_lease_around_it(redis: Redis) -> None:
    """The innermost, or by the lock's name; in child tasks too; not outside, and not another lock's."""
    async with RedisLock(redis, "outer") as outer, RedisLock(redis, "inner") as inner:
        assert (current_token(), current_token("outer"), current_token("inner")) == (
            inner.token,
            outer.token,
            inner.token,
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.to_thread(current_token))
        assert task.result() == inner.token
        with pytest.raises(LookupError, match="'other' is held here"):
            current_token("other")
    with pytest.raises(LookupError, match="write under a lock"):
        current_token()


@kills("the token of a released lease", replaced(THIS_MODULE, "current_token", token_without_check))
async def test_a_task_that_outlives_the_lease_gets_no_token(redis: Redis) -> None:
    """It inherited the lease, which has been released since: its writes are no longer guarded."""
    released = asyncio.Event()

    async def late() -> int:
        await released.wait()
        return current_token()

    async with RedisLock(redis, "outlived"):
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
    released.set()
    with pytest.raises(LockLost, match="was released"):
        await task


@kills("the token of a lost lease", replaced(THIS_MODULE, "current_token", token_without_check))
async def test_a_lost_lease_gives_no_token(redis: Redis) -> None:
    """The token of a lock around it is no substitute: tokens of two locks can't be compared."""
    async with RedisLock(redis, "around"):
        lease = await RedisLock(redis, "lost").acquire()
        lease.mark_lost("was lost")
        with pytest.raises(LockLost, match="was lost"):
            current_token()
        assert current_token("around") > 0
        await lease.release()
        assert current_token() == current_token("around")


# ---- bad input, advice


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (None, TypeError, "pass lease.token .Redlock leases carry none"),
        (True, TypeError, "is a bool"),
        ("7", TypeError, "is a str"),
        (7.0, TypeError, "is a float"),
        (0, ValueError, "positive"),
        (-1, ValueError, "token=-1"),
        (2**53, ValueError, r"below 2\^53"),
    ],
)
async def test_what_is_no_token_is_refused_before_anything_is_written(
    redis: Redis, conn: AsyncConnection[Any], token: Any, error: type[Exception], message: str
) -> None:
    """By every fence."""
    with pytest.raises(error, match=message):
        await fenced_get(redis, "key", token=token)
    with pytest.raises(error, match=message):
        await fenced_set(redis, "key", 1, token=token)
    with pytest.raises(error, match=message):
        await fenced_update(conn, "accounts", {"balance": 1}, where={"name": "a"}, token=token)
    with pytest.raises(error, match=message):
        async with conn.transaction():
            await fence(conn, "resource", token)
    assert await redis.dbsize() == 0
    assert await rows(conn, "SELECT balance FROM accounts WHERE name = 'a'") == [(0,)]


def test_the_largest_token_is_below_2_to_the_53() -> None:
    """The largest integer Lua compares exactly."""
    assert check_token(2**53 - 1) == 2**53 - 1


@given(st.floats(0.001, 1000))
def test_a_ttl_is_two_to_three_times_the_expected_operation(expected: float) -> None:
    """As data: the bounds, and whether a ttl lies between them."""
    advice = ttl_advice(expected)
    assert (advice.shortest, advice.longest) == (2 * expected, 3 * expected)
    assert 2.5 * expected in advice
    assert expected not in advice
    assert 4 * expected not in advice


@pytest.mark.parametrize("expected", [0, -1, float("nan")])
def test_an_operation_takes_more_than_no_time(expected: float) -> None:
    """The error says what to measure."""
    with pytest.raises(ValueError, match="measure its p99"):
        ttl_advice(expected)
