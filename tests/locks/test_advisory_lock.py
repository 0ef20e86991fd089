"""AdvisoryLock against a real PostgreSQL, and behind a real pgbouncer."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed

from distsys.errors import Indeterminate, LockDeadlock, LockLost, LockNotAcquired, Rejected, SharedSession
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server, Servers, ServerUnavailable
from distsys.locks.advisory_keys import held_advisory_locks, lock_id, lock_key
from distsys.locks.advisory_lock import AdvisoryLock, ConnectionHold, advisory_locks

Connect = Callable[..., Awaitable[AsyncConnection[Any]]]
INT4, INT8 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
KEYS = st.one_of(INT8, st.tuples(INT4, INT4))
_NO_POOL = AsyncConnectionPool("", open=False)  # never connected: for tests that only build locks
IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS


@pytest.fixture
async def connect(pg: str) -> AsyncIterator[Connect]:
    """Opens connections to the test's database: in autocommit unless told otherwise."""
    async with AsyncExitStack() as exits:

        async def open_one(dsn: str = pg, *, autocommit: bool = True, **options: Any) -> AsyncConnection[Any]:
            conn = await AsyncConnection.connect(dsn, autocommit=autocommit, **options)
            exits.push_async_callback(conn.close)
            return conn

        yield open_one


@pytest.fixture
async def admin(connect: Connect) -> AsyncConnection[Any]:
    return await connect()


# ---- waiting for facts of the server, and faults of it


async def states(conn: AsyncConnection[Any]) -> list[tuple[int | None, bool]]:
    return [(row.pid, row.granted) for row in await held_advisory_locks(conn)]


async def until(conn: AsyncConnection[Any], *, held: int, waiting: int) -> None:
    """Wait until so many sessions hold advisory locks, and so many wait for them."""
    found: list[tuple[int | None, bool]] = []
    for _ in range(20_000):
        found = await states(conn)
        if (sum(granted for _, granted in found), sum(not granted for _, granted in found)) == (held, waiting):
            return
    raise AssertionError(f"expected {held} held and {waiting} waiting, found {found}")


async def until_true(condition: Callable[[], bool]) -> None:
    for _ in range(200_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not become true")


async def terminate(conn: AsyncConnection[Any], victim: AsyncConnection[Any]) -> None:
    await conn.execute("SELECT pg_terminate_backend(%s)", [victim.info.backend_pid])


async def value(conn: AsyncConnection[Any], query: str) -> Any:
    cursor = await conn.execute(query.encode())
    row = await cursor.fetchone()
    return row and row[0]


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def until_cancelled(fault: Awaitable[None]) -> None:
    """Stay idle while the fault happens: a body that awaits psycopg itself would learn of it there."""
    task = asyncio.ensure_future(fault)
    try:
        await for_ever()
    finally:
        await task


@asynccontextmanager
async def asking(
    lock: AdvisoryLock, *, who: AsyncConnection[Any], held: int = 1, waiting: int = 1
) -> AsyncIterator[Any]:
    """Run a task that waits for the lock; it begins once the server shows it waiting."""
    task = asyncio.create_task(lock.acquire())
    await until(who, held=held, waiting=waiting)
    yield task
    assert task.done()


def trace(conn: AsyncConnection[Any], file: Path) -> Callable[[], str]:
    """Record the messages to the server until the returned function is called; a line "F ... Query" is a round trip."""
    if sys.platform != "linux":
        pytest.skip("libpq's trace is available on Linux")
    stream = file.open("w")
    conn.pgconn.trace(stream.fileno())

    def end() -> str:
        conn.pgconn.untrace()
        stream.close()
        return file.read_text()

    return end


# ---- names and keys


@given(st.text(min_size=1))
def test_the_id_of_a_name_is_stable_and_fits_into_signed_64_bits(name: str) -> None:
    """The same name always gives the same id, one that Postgres can take."""
    assert lock_id(name) == lock_id(name) == lock_key(name)
    assert -(2**63) <= lock_id(name) < 2**63


def test_the_id_of_a_name_is_the_one_written_down_here() -> None:
    """It must never change: two versions of a program would no longer exclude each other."""
    assert lock_id("payment:order-123") == 929066786645069215
    assert lock_id("größe") == -3219050744914661377


NAMES = [
    "payment:order-123",
    "with spaces",
    "größe ✓ 錠",
    "{braces}",
    "100%",
    "o'neil; --",
    "line\nbreak",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
async def test_sql_computes_the_same_id(connect: Connect, name: str) -> None:
    """Triggers and psql can take part in the same locks: the documented expression gives the same id."""
    conn = await connect()
    sql = "SELECT ('x' || left(encode(sha256(convert_to(%s, 'UTF8')), 'hex'), 16))::bit(64)::bigint"
    assert await (await conn.execute(sql, [name])).fetchone() == (lock_id(name),)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_any_name_can_be_locked_and_is_shown_in_the_refusal(
    connect: Connect, pg_pool: AsyncConnectionPool, name: str, scope: Any
) -> None:
    """Spaces, unicode, braces, quotes, percent signs and 10 kB: the name excludes, and its message stays readable."""
    async with AdvisoryLock(pg_pool, name, scope=scope):
        with pytest.raises(LockNotAcquired) as refused:
            await AdvisoryLock(await connect(autocommit=scope == "session"), name, scope=scope, timeout=0).acquire()
    assert repr(name)[:50] in str(refused.value)
    assert len(str(refused.value)) < 300
    assert refused.value.name == name


@given(KEYS)
def test_ints_and_pairs_are_their_own_keys(key: int | tuple[int, int]) -> None:
    """No hashing where the caller has numbered the locks."""
    assert lock_key(key) == key


@pytest.mark.parametrize("name", [2**63, -(2**63) - 1, (2**31, 0), (0, -(2**31) - 1)])
def test_a_number_that_does_not_fit_is_refused_with_its_bounds(name: Any) -> None:
    """Postgres would refuse or cut it; the message names the value and the number of bits."""
    with pytest.raises(ValueError, match=r"does not fit into signed (32|64) bits") as refused:
        lock_key(name)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", [True, 1.5, None, b"bytes", (1,), (1, 2, 3), (1, True), ("a", 1), [1, 2]])
def test_a_value_that_is_no_name_is_refused(name: Any) -> None:
    """A bool is an int by accident only; a pair has exactly two ints."""
    with pytest.raises(TypeError, match="give a str, an int, or a tuple of two ints"):
        lock_key(name)


def test_an_empty_name_is_refused() -> None:
    """Every lock without a name would be the same lock."""
    with pytest.raises(ValueError, match="as in 'payment:order-123'"):
        lock_key("")


async def test_the_two_key_spaces_are_apart(connect: Connect) -> None:
    """(0, 1) has the bits of 1 and is another lock; a name and its id are one lock."""
    a, b = await connect(), await connect()
    async with AdvisoryLock(a, 1, scope="session"), AdvisoryLock(a, "x", scope="session"):
        assert await AdvisoryLock(b, (0, 1), scope="session").try_acquire()
        assert await AdvisoryLock(b, lock_id("x"), scope="session").try_acquire() is None


@pytest.mark.parametrize(
    "key", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), (0, 0), (-1, -1), (2**31 - 1, -(2**31)), (-(2**31), 7)]
)
async def test_every_key_is_locked_and_shown_as_it_was_given(connect: Connect, key: Any) -> None:
    """Negative ids and the ends of both ranges survive SQL and pg_locks."""
    conn = await connect()
    async with AdvisoryLock(conn, key, scope="session"):
        (state,) = await held_advisory_locks(conn)
        assert state.key == key
    assert await held_advisory_locks(conn) == []


# ---- what is refused at once


async def test_a_synchronous_connection_is_refused(pg: str) -> None:
    """It would block the event loop for as long as the lock is waited for."""
    with psycopg.connect(pg) as conn, pytest.raises(TypeError, match="pass a psycopg AsyncConnection") as refused:
        AdvisoryLock(conn, "x")  # type: ignore[arg-type]
    assert "psycopg.Connection" in str(refused.value)


@pytest.mark.parametrize("source", [None, "postgresql://", object()])
def test_a_source_that_is_no_connection_is_refused(source: Any) -> None:
    """The message shows what was passed."""
    with pytest.raises(TypeError, match="AsyncConnectionPool") as refused:
        AdvisoryLock(source, "x")
    assert repr(source) in str(refused.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scope": "row"}, ValueError, "scope='row'"),
        ({"proxy": "transaction"}, ValueError, "proxy='transaction'"),
        ({"timeout": -1}, ValueError, "timeout=-1"),
        ({"timeout": float("nan")}, ValueError, "timeout=nan"),
        ({"timeout": float("inf")}, ValueError, "24 days; None waits for ever"),
        ({"timeout": 2**31 / 1000 + 1}, ValueError, "24 days"),
        ({"timeout": "5"}, TypeError, "timeout='5'"),
        ({"timeout": True}, TypeError, "timeout=True"),
    ],
)
async def test_a_wrong_option_is_refused_with_its_value(
    pg_pool: AsyncConnectionPool, options: Any, error: type[Exception], words: str
) -> None:
    """At construction, before anything is sent."""
    with pytest.raises(error, match=words):
        AdvisoryLock(pg_pool, "x", **options)


async def test_acquire_checks_its_timeout_too(connect: Connect) -> None:
    """The timeout of a call is held to the same bounds as the lock's own."""
    with pytest.raises(ValueError, match="timeout=-1"):
        await AdvisoryLock(await connect(), "x", scope="session").acquire(timeout=-1)


# ---- transaction scope on the caller's connection


async def test_a_transaction_lock_lasts_until_the_transaction_ends_and_outlasts_its_block(connect: Connect) -> None:
    """Leaving the block frees nothing: what was written under the lock is not visible yet. Commit does."""
    a, b = await connect(autocommit=False), await connect(autocommit=False)
    async with AdvisoryLock(a, "x") as hold:
        assert hold.connection is a
        assert a.info.transaction_status == INTRANS
    assert await AdvisoryLock(b, "x").try_acquire() is None
    await a.commit()
    assert await AdvisoryLock(b, "x").try_acquire()


async def test_a_rollback_ends_a_transaction_lock_too(connect: Connect, admin: AsyncConnection[Any]) -> None:
    """Whichever way the transaction ends, nothing is left."""
    conn = await connect()
    with pytest.raises(ZeroDivisionError):
        async with conn.transaction():
            await AdvisoryLock(conn, "x").acquire()
            assert len(await states(admin)) == 1
            raise ZeroDivisionError
    assert await states(admin) == []


async def test_in_autocommit_outside_a_transaction_it_is_refused(connect: Connect) -> None:
    """The lock would end before the next statement. The message names both remedies."""
    conn = await connect()
    with pytest.raises(RuntimeError, match=r"conn\.transaction\(\).*scope='session'"):
        async with AdvisoryLock(conn, "x"):
            pytest.fail("it would hold nothing")
    async with conn.transaction():
        assert await AdvisoryLock(conn, "x").acquire()


async def test_asking_again_inside_the_same_transaction_is_free(connect: Connect) -> None:
    """Nested code may take the lock without knowing whether its caller has."""
    conn = await connect(autocommit=False)
    lock = AdvisoryLock(conn, "x")
    await lock.acquire()
    await lock.acquire()
    async with AdvisoryLock(conn, "x", timeout=0):
        await conn.commit()
    assert await states(conn) == []


async def test_a_transaction_lock_cannot_be_released_by_hand(connect: Connect) -> None:
    """Postgres has no such call; the message says what ends it."""
    conn = await connect(autocommit=False)
    hold = await AdvisoryLock(conn, "x").acquire()
    with pytest.raises(RuntimeError, match="commit or roll back, or use scope='session'"):
        await hold.release()


async def test_the_transaction_begins_as_the_connection_was_set_up(connect: Connect) -> None:
    """The lock may be the first statement: isolation level and read-only mode are still the connection's."""
    conn = await connect(autocommit=False)
    await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    await conn.set_read_only(True)
    async with AdvisoryLock(conn, "x", timeout=5):
        assert await value(conn, "SHOW transaction_isolation") == "serializable"
        assert await value(conn, "SHOW transaction_read_only") == "on"


async def test_row_and_cursor_factories_of_the_caller_do_not_matter(connect: Connect) -> None:
    """Rows may be dicts and parameters bound by the client."""
    conn = await connect(row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.AsyncClientCursor)
    for timeout in (None, 0, 5):
        async with conn.transaction():
            assert await AdvisoryLock(conn, "x", timeout=timeout).acquire()
        async with AdvisoryLock(conn, "x", scope="session", timeout=timeout):
            assert [state.key for state in await held_advisory_locks(conn)] == [lock_id("x")]


async def test_in_repeatable_read_the_snapshot_is_older_than_the_lock(connect: Connect) -> None:
    """The trap the docstring names: the lock is ours, and we still do not see what its last holder committed."""
    a, b = await connect(autocommit=False), await connect(autocommit=False)
    await a.execute("CREATE TABLE t (n int)")
    await a.commit()
    await b.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
    await AdvisoryLock(a, "x").acquire()
    async with asking(AdvisoryLock(b, "x"), who=await connect()) as task:
        await a.execute("INSERT INTO t VALUES (1)")
        await a.commit()
        await task
    assert await value(b, "SELECT count(*) FROM t") == 0


# ---- transaction scope: timeout, deadlock, cancellation


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_a_timeout_leaves_the_transaction_as_it_was(connect: Connect, timeout: float) -> None:
    """Earlier work stays, the transaction goes on, and lock_timeout is what the caller had set."""
    a, b = await connect(autocommit=False), await connect(autocommit=False)
    await AdvisoryLock(a, "x").acquire()
    await b.execute("CREATE TEMP TABLE t AS SELECT 1 AS n")
    await b.execute("SET LOCAL lock_timeout = '7s'")
    with pytest.raises(
        LockNotAcquired, match=r"advisory lock 'x' was not obtained in .* s.*held_advisory_locks"
    ) as refused:
        await AdvisoryLock(b, "x").acquire(timeout)
    assert isinstance(refused.value, Rejected)
    assert refused.value.facts.keys() == {"name", "waited"}
    assert refused.value.waited >= timeout
    assert await value(b, "SHOW lock_timeout") == "7s"
    assert await value(b, "SELECT n FROM t") == 1
    await a.commit()
    await AdvisoryLock(b, "x").acquire(timeout)
    assert await value(b, "SHOW lock_timeout") == "7s"
    await b.commit()
    assert await value(b, "SHOW lock_timeout") == "0"
    assert await value(b, "SELECT n FROM t") == 1


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_neither_a_grant_nor_a_refusal_leaves_a_savepoint_behind(connect: Connect, timeout: float) -> None:
    """The transaction is not nested any deeper than before."""
    conn = await connect()
    async with AdvisoryLock(await connect(), "taken", scope="session"):
        for name in ("free", "taken"):
            with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
                async with conn.transaction():
                    with suppress(LockNotAcquired):
                        await AdvisoryLock(conn, name, timeout=timeout).acquire()
                    await conn.execute("RELEASE distsys_lock")


async def test_a_timeout_of_a_session_setting_is_restored_as_well(connect: Connect) -> None:
    """SET lock_timeout of the session is as it was, within the transaction and after it."""
    conn = await connect()
    await conn.execute("SET lock_timeout = '1234ms'")
    async with conn.transaction():
        await AdvisoryLock(conn, "x", timeout=60).acquire()
        assert await value(conn, "SHOW lock_timeout") == "1234ms"
    assert await value(conn, "SHOW lock_timeout") == "1234ms"


@pytest.mark.parametrize("setting", ["lock_timeout", "statement_timeout"])
@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_wait_that_the_servers_own_settings_end_is_not_acquired(
    connect: Connect, setting: str, scope: Any
) -> None:
    """With timeout=None a role's lock_timeout or statement_timeout still ends the wait: certainly without the lock."""
    holder, conn = await connect(), await connect(autocommit=scope == "session")
    await conn.execute(f"SET {setting} = '20ms'".encode())
    async with AdvisoryLock(holder, "x", scope="session"):
        with pytest.raises(LockNotAcquired, match=f"due to {setting.replace('_', ' ')}"):
            await AdvisoryLock(conn, "x", scope=scope).acquire()
        assert await value(conn, "SELECT 1") == 1


async def test_a_wait_is_one_round_trip(connect: Connect, tmp_path: Path) -> None:
    """With or without a timeout, one message goes out and one answer comes back; a hundred locks are no more."""
    conn = await connect()
    async with conn.transaction():
        for locks in (
            AdvisoryLock(conn, "x"),
            AdvisoryLock(conn, "y", timeout=60),
            advisory_locks(conn, *range(100), timeout=60),
        ):
            traced = trace(conn, tmp_path / "trace")
            await locks.acquire()
            assert traced().count("\tF\t") == 1


async def test_a_deadlock_is_an_error_of_its_own_and_leaves_the_transaction_usable(connect: Connect) -> None:
    """Postgres ends one of the two; its earlier lock stays, and the other gets what it waited for after that."""
    a, b = await connect(autocommit=False), await connect(autocommit=False)
    for conn in (a, b):
        await conn.execute("SET deadlock_timeout = '20ms'")
    await AdvisoryLock(a, "x").acquire()
    await AdvisoryLock(b, "y").acquire()
    tasks = {
        asyncio.create_task(AdvisoryLock(a, "y").acquire()): a,
        asyncio.create_task(AdvisoryLock(b, "x").acquire()): b,
    }
    (ended,), (waiting,) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(LockDeadlock, match=r"take locks in one order, as advisory_locks\(\) does") as deadlock:
        await ended
    assert isinstance(deadlock.value, Rejected)
    assert await value(tasks[ended], "SELECT 1") == 1
    assert len(await states(tasks[ended])) == 3
    await tasks[ended].commit()
    assert await waiting


async def test_a_cancelled_wait_leaves_the_transaction_usable_and_nothing_held(connect: Connect) -> None:
    """asyncio.timeout around an acquire is safe: what the transaction did before is still there."""
    a, b = await connect(autocommit=False), await connect(autocommit=False)
    await AdvisoryLock(a, "x").acquire()
    await b.execute("CREATE TEMP TABLE t AS SELECT 1 AS n")
    async with asking(AdvisoryLock(b, "x", timeout=60), who=await connect()) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(await states(b)) == 1
    assert await value(b, "SELECT n FROM t") == 1
    assert await value(b, "SHOW lock_timeout") == "0"


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_cancelled_before_the_connection_was_free_it_ends_at_once(connect: Connect, scope: Any) -> None:
    """Another task's statement is under way on the connection: nothing was sent yet, so there is nothing to undo."""
    conn = await connect(autocommit=False)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("SELECT 1/0")
    async with conn.lock:
        task = asyncio.create_task(AdvisoryLock(conn, "x", scope=scope).acquire())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert task.cancelled()


async def test_a_transaction_that_has_failed_already_says_so(connect: Connect) -> None:
    """psycopg's own errors pass through unchanged."""
    conn = await connect(autocommit=False)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("SELECT 1/0")
    for timeout in (None, 0, 5):
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await AdvisoryLock(conn, "x", timeout=timeout).acquire()


# ---- transaction scope with a pool


async def test_with_a_pool_the_block_is_the_transaction(
    pg_pool: AsyncConnectionPool, admin: AsyncConnection[Any]
) -> None:
    """What the body writes on hold.connection is committed as the lock is freed, and rolled back when it fails."""
    await admin.execute("CREATE TABLE t (n int)")
    async with AdvisoryLock(pg_pool, "x") as hold:
        await hold.connection.execute("INSERT INTO t VALUES (1)")
        assert len(await states(admin)) == 1
        assert await value(admin, "SELECT count(*) FROM t") == 0
    assert await states(admin) == []
    with pytest.raises(ZeroDivisionError):
        async with AdvisoryLock(pg_pool, "x") as hold:
            await hold.connection.execute("INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
    async with AdvisoryLock(pg_pool, "x") as hold:
        await hold.connection.execute("INSERT INTO t VALUES (3)")
        raise psycopg.Rollback
    assert await (await admin.execute("SELECT n FROM t")).fetchall() == [(1,)]


async def test_with_a_pool_a_transaction_lock_needs_a_block(pg_pool: AsyncConnectionPool) -> None:
    """Without one, nothing says whether to commit or to roll back."""
    for call in (AdvisoryLock(pg_pool, "x").acquire, AdvisoryLock(pg_pool, "x").try_acquire):
        with pytest.raises(RuntimeError, match="use `async with`"):
            await call()


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_refused_lock_gives_the_pool_its_connection_back(connect: Connect, pg: str, scope: Any) -> None:
    """A pool of one connection is enough for refusal after refusal, and then for a grant."""
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False) as pool:
        async with AdvisoryLock(await connect(), "x", scope="session"):
            for timeout in (0, 0.01, 0, 0.01):
                with pytest.raises(LockNotAcquired, match="'x' was not obtained"):
                    async with AdvisoryLock(pool, "x", scope=scope, timeout=timeout):
                        pytest.fail("another connection holds it")
        async with AdvisoryLock(pool, "x", scope=scope, timeout=5) as hold:
            assert hold.connection.info.transaction_status == (INTRANS if scope == "transaction" else IDLE)


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_pool_with_no_connection_free_is_not_acquired(pg: str, scope: Any) -> None:
    """The timeout covers the wait for a connection too; the message says that the pool is the reason."""
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False) as pool, pool.connection():
        with pytest.raises(LockNotAcquired, match=r"the pool has no connection free.*raise its max_size"):
            async with AdvisoryLock(pool, "x", scope=scope, timeout=0.02):
                pytest.fail("there is no connection to hold it")


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_closed_pool_says_so(pg: str, scope: Any) -> None:
    """The pool's own error passes through."""
    pool = AsyncConnectionPool(pg, min_size=1, open=False)
    await pool.open()
    await pool.close()
    with pytest.raises(PoolClosed):
        await AdvisoryLock(pool, "x", scope=scope).__aenter__()


# ---- session scope


async def test_a_session_lock_is_free_at_the_end_of_its_block(connect: Connect) -> None:
    """One holder at a time; the next try after the block succeeds. Autocommit or not, no transaction is begun."""
    a, b = await connect(autocommit=False), await connect()
    async with AdvisoryLock(a, "x", scope="session"):
        assert a.info.transaction_status == IDLE
        assert await AdvisoryLock(b, "x", scope="session").try_acquire() is None
    hold = await AdvisoryLock(b, "x", scope="session").try_acquire()
    assert hold
    await hold.release()
    await hold.release()
    assert await states(a) == []


async def test_a_session_lock_and_its_unlock_are_one_round_trip_each(connect: Connect, tmp_path: Path) -> None:
    """No BEGIN, no pid look-up, no SET: with a timeout or without, parsed anew or prepared."""
    conn, round_trips = await connect(autocommit=False), []
    for timeout in (None, 60, 60, None, 0, 0, 0):
        traced = trace(conn, tmp_path / "trace")
        async with AdvisoryLock(conn, "x", scope="session", timeout=timeout):
            pass
        round_trips.append(traced().count("\tSync"))
    assert round_trips == [2, 4, 2, 2, 2, 3, 2]  # each of the three statements is prepared when it comes again


async def test_many_names_are_few_prepared_statements(connect: Connect) -> None:
    """Names, timeouts and pids are parameters: a connection that locks a million invoices keeps what it kept."""
    conn = await connect()
    for number in range(10):
        for name in (f"invoice:{number}", (number, 7)):
            for timeout in (None, 0, 60 + number):
                async with AdvisoryLock(conn, name, scope="session", timeout=timeout):
                    pass
    (found,) = await (await conn.execute("SELECT count(*) FROM pg_prepared_statements")).fetchone() or (None,)
    assert found == 6  # lock, try, unlock, for each of the two key spaces


@pytest.mark.parametrize("forget", ["DISCARD ALL", "DEALLOCATE ALL"])
async def test_a_session_that_forgot_its_prepared_statements_is_survived(connect: Connect, forget: str) -> None:
    """Pools clean what comes back to them; the server's answer says so, and the statement is sent in full again."""
    conn, other = await connect(), await connect()
    for _ in range(4):
        for _ in range(3):
            async with AdvisoryLock(conn, "x", scope="session"):
                assert await AdvisoryLock(other, "x", scope="session").try_acquire() is None
        hold = await AdvisoryLock(conn, "x", scope="session").acquire()
        await conn.execute(forget.encode())
        if forget == "DISCARD ALL":  # which unlocks, too
            with pytest.raises(LockLost):
                await hold.release()
            conn = await connect()
        else:
            await hold.release()
        assert await states(other) == []


async def test_waiters_are_served_in_order_of_arrival(connect: Connect) -> None:
    """The server's own queue: five sessions that came one after the other get the lock one after the other."""
    admin, order = await connect(), []
    holder = await AdvisoryLock(await connect(), "x", scope="session").acquire()

    async def waiter(number: int, conn: AsyncConnection[Any]) -> None:
        async with AdvisoryLock(conn, "x", scope="session"):
            order.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(waiter(number, await connect()))
            await until(admin, held=1, waiting=number + 1)
        await holder.release()
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_shared_holders_share_and_an_exclusive_one_does_not(connect: Connect, scope: Any) -> None:
    """Readers together, or one writer."""
    a, b, c = [await connect(autocommit=scope == "session") for _ in range(3)]
    async with AdvisoryLock(a, "x", scope=scope, shared=True), AdvisoryLock(b, "x", scope=scope, shared=True):
        assert await AdvisoryLock(c, "x", scope=scope).try_acquire() is None
        modes = {(state.mode, state.granted) for state in await held_advisory_locks(c)}
        assert modes == {("shared", True)}
    for conn in (a, b, c):
        await conn.commit()
    async with AdvisoryLock(c, "x", scope=scope):
        assert await AdvisoryLock(a, "x", scope=scope, shared=True).try_acquire() is None


async def test_a_timeout_leaves_the_session_idle_and_its_settings_alone(connect: Connect) -> None:
    """lock_timeout is the session's own again at once; no transaction is left open; the next acquire works."""
    conn = await connect(autocommit=False)
    lock = AdvisoryLock(conn, "x", scope="session", timeout=0.02)
    async with AdvisoryLock(await connect(), "x", scope="session"):
        with pytest.raises(LockNotAcquired, match="'x' was not obtained") as refused:
            await lock.acquire()
        assert refused.value.waited >= 0.02
        assert conn.info.transaction_status == IDLE
        assert await lock.try_acquire() is None
        with pytest.raises(LockNotAcquired):
            await lock.acquire(timeout=0.001)
        assert await value(conn, "SHOW lock_timeout") == "0"
        await conn.commit()
    async with lock:
        assert await value(conn, "SHOW lock_timeout") == "0"


async def test_a_session_lock_is_refused_inside_a_transaction(connect: Connect) -> None:
    """It would be unlocked before the work is visible. The message names both remedies."""
    conn = await connect(autocommit=False)
    await conn.execute("SELECT 1")
    with pytest.raises(RuntimeError, match="in a transaction; commit, or use scope='transaction'"):
        await AdvisoryLock(conn, "x", scope="session").acquire()
    await conn.commit()
    assert await AdvisoryLock(conn, "x", scope="session").acquire()


@pytest.mark.parametrize("timeout", [None, 0, 1])
@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_pipeline_is_refused(connect: Connect, scope: Any, timeout: float | None) -> None:
    """A pipeline does not wait for the answer, and only the answer says whether the lock was granted."""
    conn = await connect()
    async with conn.pipeline(), conn.transaction():
        with pytest.raises(RuntimeError, match=r"acquire before `conn\.pipeline\(\)`"):
            await AdvisoryLock(conn, "x", scope=scope, timeout=timeout).acquire()


async def test_a_deadlock_of_session_locks_is_reported_as_one(connect: Connect) -> None:
    """Session locks take part in Postgres's deadlock detection; the victim keeps what it held before."""
    a, b = await connect(), await connect()
    for conn in (a, b):
        await conn.execute("SET deadlock_timeout = '20ms'")
    async with AdvisoryLock(a, "x", scope="session"), AdvisoryLock(b, "y", scope="session"):
        waits = [AdvisoryLock(a, "y", scope="session").acquire(), AdvisoryLock(b, "x", scope="session").acquire()]
        done, pending = await asyncio.wait(map(asyncio.create_task, waits), return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(LockDeadlock):
            await done.pop()
        assert len(await states(await connect())) == 3
        pending.copy().pop().cancel()
        await asyncio.wait(pending)


# ---- session scope: the work is visible before the lock is free


@pytest.mark.parametrize("with_pool", [False, True])
async def test_the_next_holder_sees_what_the_body_did(
    connect: Connect, pg_pool: AsyncConnectionPool, with_pool: bool
) -> None:
    """A transaction which the body left open is committed before the unlock, not after it."""
    admin, next_one = await connect(), await connect()
    await admin.execute("CREATE TABLE t (n int)")
    async with AdvisoryLock(pg_pool if with_pool else await connect(autocommit=False), "x", scope="session") as hold:
        await hold.connection.execute("INSERT INTO t VALUES (1)")
        task = asyncio.create_task(AdvisoryLock(next_one, "x", scope="session").acquire())
        await until(admin, held=1, waiting=1)
    await task
    assert await value(next_one, "SELECT count(*) FROM t") == 1


async def test_the_work_of_a_failed_body_is_gone_before_the_next_holder_comes(connect: Connect) -> None:
    """Its open transaction is rolled back, also one that a failed statement has aborted."""
    conn, admin = await connect(autocommit=False), await connect()
    await admin.execute("CREATE TABLE t (n int)")
    for statement in ("SELECT 1", "SELECT 1/0"):
        with pytest.raises((KeyError, psycopg.errors.DivisionByZero)):
            async with AdvisoryLock(conn, "x", scope="session"):
                await conn.execute("INSERT INTO t VALUES (1)")
                await conn.execute(statement.encode())
                raise KeyError
        assert conn.info.transaction_status == IDLE
        assert await value(admin, "SELECT count(*) FROM t") == 0
        assert await states(admin) == []


async def test_release_by_hand_rolls_back_what_was_not_committed(
    connect: Connect, pg_pool: AsyncConnectionPool
) -> None:
    """`finally: release()` must not commit half of a failed piece of work."""
    admin = await connect()
    await admin.execute("CREATE TABLE t (n int)")
    lock = AdvisoryLock(pg_pool, "x", scope="session")
    hold = await lock.acquire()
    await hold.connection.execute("INSERT INTO t VALUES (1)")
    await hold.connection.commit()
    await hold.connection.execute("INSERT INTO t VALUES (2)")
    await lock.release()
    assert await (await admin.execute("SELECT n FROM t")).fetchall() == [(1,)]
    assert await states(admin) == []


async def test_a_commit_that_fails_is_the_error_of_the_block_and_the_lock_is_free(connect: Connect) -> None:
    """A deferred constraint speaks at commit: its error comes out, the connection stays good."""
    conn = await connect(autocommit=False)
    await conn.execute("CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    await conn.commit()
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with AdvisoryLock(conn, "x", scope="session"):
            await conn.execute("INSERT INTO t VALUES (1), (1)")
    assert await states(conn) == []


async def test_an_operational_error_of_a_living_connection_is_not_taken_for_its_death(connect: Connect) -> None:
    """A serialization failure at commit is the caller's to retry, and not a lost lock."""
    conn = await connect(autocommit=False)
    await conn.execute(
        """
        CREATE TABLE t (n int);
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN RAISE EXCEPTION 'try again' USING ERRCODE = 'serialization_failure'; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION fail()
        """
    )
    await conn.commit()
    with pytest.raises(psycopg.errors.SerializationFailure):
        async with AdvisoryLock(conn, "x", scope="session"):
            await conn.execute("INSERT INTO t VALUES (1)")
    assert await states(conn) == []


async def test_release_inside_the_callers_transaction_block_never_unlocks_early(connect: Connect) -> None:
    """psycopg refuses to end that transaction, so the connection is closed: work and lock end together."""
    conn, admin = await connect(), await connect()
    await admin.execute("CREATE TABLE t (n int)")
    hold = await AdvisoryLock(conn, "x", scope="session").acquire()
    with pytest.raises((psycopg.ProgrammingError, LockLost)):
        async with conn.transaction():
            await conn.execute("INSERT INTO t VALUES (1)")
            await hold.release()
    assert conn.closed
    await until(admin, held=0, waiting=0)
    assert await value(admin, "SELECT count(*) FROM t") == 0


# ---- holds: one per task, one per connection


async def test_tasks_share_one_object_with_a_pool(pg_pool: AsyncConnectionPool) -> None:
    """Each acquisition has its own connection, and they exclude each other."""
    lock, inside, connections = AdvisoryLock(pg_pool, "x", scope="session"), 0, set()

    async def work() -> None:
        nonlocal inside
        for _ in range(5):
            async with lock as hold:
                inside += 1
                assert inside == 1
                connections.add(hold.connection.info.backend_pid)
                await hold.connection.execute("SELECT 1")
                inside -= 1

    await asyncio.gather(*(work() for _ in range(4)))
    assert len(connections) > 1


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_acquiring_again_in_the_same_task_raises_instead_of_deadlocking(
    pg_pool: AsyncConnectionPool, scope: Any
) -> None:
    """With a pool the second wait would be for our own first hold, for ever."""
    lock = AdvisoryLock(pg_pool, "x", scope=scope)
    async with lock:
        with pytest.raises(RuntimeError, match="already holds advisory lock 'x': it is not re-entrant"):
            async with lock:
                pytest.fail("it must not be entered twice")
    async with lock:
        pass


async def test_a_second_hold_on_one_connection_is_refused_for_any_task(connect: Connect) -> None:
    """Postgres would grant it to the same session at once: two tasks would both believe to be alone."""
    conn, other = await connect(), await connect()
    async with AdvisoryLock(conn, "x", scope="session"):
        for name in ("x", lock_id("x")):
            with pytest.raises(
                RuntimeError, match="held or awaited on this connection already: use another, or a pool"
            ):
                await asyncio.create_task(AdvisoryLock(conn, name, scope="session", timeout=0).acquire())
        async with AdvisoryLock(conn, "y", scope="session"):
            assert len(await states(conn)) == 2
    async with AdvisoryLock(other, "x", scope="session"):
        for _ in range(2):
            assert await AdvisoryLock(conn, "x", scope="session").try_acquire() is None
    async with AdvisoryLock(conn, "x", scope="session"):
        pass


async def test_releasing_what_is_not_held_says_so(connect: Connect) -> None:
    """A release without an acquire is a mistake of the caller."""
    with pytest.raises(RuntimeError, match="this task does not hold advisory lock 'x': acquire it first"):
        await AdvisoryLock(await connect(), "x", scope="session").release()


async def test_a_block_may_release_its_hold_early_and_take_another(connect: Connect) -> None:
    """Its end has nothing left to do; each end finds its own hold."""
    conn, admin = await connect(), await connect()
    lock = AdvisoryLock(conn, "x", scope="session")
    async with lock as hold:
        assert await hold.release()
        assert await states(admin) == []
        async with lock:
            assert len(await states(admin)) == 1
    assert await states(admin) == []


async def test_a_lost_hold_that_its_block_releases_is_lost_at_the_end_too(connect: Connect) -> None:
    """A body that ignores the loss once is told again, and no cancellation is left over in the task."""
    conn, admin = await connect(), await connect()
    with pytest.raises(LockLost, match="its connection died") as lost:
        async with AdvisoryLock(conn, "x", scope="session") as hold:
            try:
                await until_cancelled(terminate(admin, conn))
            finally:
                with pytest.raises(LockLost):
                    await hold.release()
    assert not hasattr(lost.value, "__notes__")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_another_task_may_close_the_only_hold(connect: Connect) -> None:
    """Fixtures and exit stacks are often closed by another task than the one that entered them."""
    conn = await connect()
    lock = AdvisoryLock(conn, "x", scope="session")
    await asyncio.create_task(lock.__aenter__())
    await lock.__aexit__(None, None, None)
    await asyncio.create_task(lock.acquire())
    await lock.release()
    assert await states(conn) == []


async def test_a_held_connection_is_not_in_the_pool_and_comes_back_unlocked(
    pg: str, admin: AsyncConnection[Any]
) -> None:
    """The pool never hands out a session that holds the lock."""
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False) as pool:
        await pool.wait()
        async with AdvisoryLock(pool, "x", scope="session") as hold:
            pid = hold.connection.info.backend_pid
            assert pool.get_stats()["pool_available"] == 0
        assert pool.get_stats()["pool_available"] == 1
        assert await states(admin) == []
        async with pool.connection() as conn:
            assert conn.info.backend_pid == pid


# ---- loss


async def test_a_dead_connection_cancels_the_body_and_raises_lock_lost(connect: Connect) -> None:
    """An idle body learns it by the watch, not by its next query."""
    conn, admin = await connect(), await connect()
    hold = None
    with pytest.raises(
        LockLost, match="advisory lock 'x' was lost, and another holder may have it by now: its connection died"
    ) as lost:
        async with AdvisoryLock(conn, "x", scope="session") as hold:
            assert not hold.lost
            await until_cancelled(terminate(admin, conn))
    assert hold
    assert hold.lost
    assert lost.value.name == "x"
    assert isinstance(lost.value, Indeterminate)
    assert isinstance(lost.value.__cause__, psycopg.OperationalError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await AdvisoryLock(admin, "x", scope="session").try_acquire()


@pytest.mark.parametrize("work_turns", range(4))
async def test_a_dead_connection_stops_a_body_that_is_busy_elsewhere(connect: Connect, work_turns: int) -> None:
    """wait_for of Python 3.11, by which redis-py sends, swallows a cancellation that comes as its work is done."""
    conn, admin = await connect(), await connect()
    late = 0

    async def work() -> None:
        for _ in range(work_turns):
            await asyncio.sleep(0)

    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session") as hold:
            dying = asyncio.create_task(terminate(admin, conn))
            while late < 1000:
                await asyncio.wait_for(work(), 10)
                late += hold.lost
                await asyncio.sleep(0) if work_turns == 0 and sys.version_info >= (3, 12) else None
    await dying
    assert late < 100


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_dead_connection_of_a_pool_is_replaced(
    pg_pool: AsyncConnectionPool, connect: Connect, scope: Any
) -> None:
    """In both scopes the body is cancelled; the pool gets nothing back, and makes a new connection."""
    admin = await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(pg_pool, "x", scope=scope) as hold:
            await until_cancelled(terminate(admin, hold.connection))
    async with AdvisoryLock(pg_pool, "x", scope=scope, timeout=30) as hold:
        assert await value(hold.connection, "SELECT 1") == 1


async def test_a_dead_connection_cancels_a_body_in_the_callers_transaction(connect: Connect) -> None:
    """Postgres undoes the transaction; what the body does elsewhere is stopped by the cancellation."""
    conn, admin = await connect(autocommit=False), await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x"):
            await until_cancelled(terminate(admin, conn))


async def test_a_lost_hold_from_acquire_is_flagged_and_release_raises(connect: Connect) -> None:
    """Without a block there is no body to cancel: hold.lost turns true by itself."""
    conn, admin = await connect(), await connect()
    lock = AdvisoryLock(conn, "x", scope="session")
    hold = await lock.acquire()
    await terminate(admin, conn)
    await until_true(lambda: hold.lost)
    with pytest.raises(LockLost):
        await lock.release()


async def test_the_bodys_own_error_is_never_masked_by_the_loss(connect: Connect) -> None:
    """The loss beside it becomes a note."""
    conn, admin = await connect(), await connect()
    with pytest.raises(KeyError) as failed:
        async with AdvisoryLock(conn, "x", scope="session") as hold:
            try:
                await until_cancelled(terminate(admin, conn))
            finally:
                raise KeyError("the body's own")
    assert hold.lost
    assert any("was lost" in note for note in failed.value.__notes__)


async def test_an_error_that_the_body_met_on_the_dead_connection_is_its_own(connect: Connect) -> None:
    """A statement was under way: psycopg tells the body, the note tells about the lock."""
    conn, admin = await connect(), await connect()
    with pytest.raises(psycopg.OperationalError) as failed:
        async with AdvisoryLock(conn, "x", scope="session"):
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert any("was lost" in note for note in failed.value.__notes__)
    assert await states(admin) == []


async def test_a_body_that_swallows_the_cancellation_still_ends_with_lock_lost(connect: Connect) -> None:
    """Silence is not possible."""
    conn, admin = await connect(), await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"):
            with suppress(asyncio.CancelledError):
                await until_cancelled(terminate(admin, conn))


async def test_a_death_that_is_noticed_only_at_the_end_is_lock_lost(connect: Connect) -> None:
    """The unlock finds out: no await of the body gave the watch a chance."""
    conn, admin = await connect(), await connect()
    os_pid = conn.info.backend_pid
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"):
            with psycopg.connect(admin.info.dsn, autocommit=True) as sync:
                sync.execute("SELECT pg_terminate_backend(%s, 5000)", [os_pid])


async def test_a_cancellation_from_outside_wins_over_the_loss(connect: Connect) -> None:
    """The task ends cancelled, even when the lock was lost in the same moment."""
    conn, admin = await connect(), await connect()

    async def work() -> None:
        async with AdvisoryLock(conn, "x", scope="session"):
            try:
                await until_cancelled(terminate(admin, conn))
            except asyncio.CancelledError:
                task.cancel()
                raise

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_two_locks_on_one_connection_are_lost_together_and_once(connect: Connect) -> None:
    """The outer block raises LockLost; no cancellation is left over for the code after it."""
    conn, admin = await connect(), await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"), AdvisoryLock(conn, "y", scope="session"):
            await until_cancelled(terminate(admin, conn))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_unlocked_by_the_body_is_lost_and_its_connection_never_pooled(
    connect: Connect, pg_pool: AsyncConnectionPool
) -> None:
    """pg_advisory_unlock's answer is checked: false means that another holder may have been inside."""
    with pytest.raises(LockLost, match="did not hold it any more"):
        async with AdvisoryLock(pg_pool, "x", scope="session") as hold:
            await hold.connection.execute("SELECT pg_advisory_unlock_all()")
    assert hold.connection.closed
    with pytest.raises(KeyError) as failed:
        async with AdvisoryLock(pg_pool, "x", scope="session") as hold:
            await hold.connection.execute("SELECT pg_advisory_unlock_all()")
            raise KeyError
    assert any("did not hold it any more" in note for note in failed.value.__notes__)


async def test_a_connection_which_the_body_closed_is_lost(connect: Connect) -> None:
    """close() ends the session and with it the lock."""
    conn = await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"):
            await conn.close()


async def test_a_killed_server_cancels_the_body(servers: Servers) -> None:
    """SIGKILL to the whole server, while the body is idle."""
    victim = await servers.postgres("victim")
    if victim.process is None:
        pytest.skip("the server is not ours to kill")
    conn = await AsyncConnection.connect(victim.url, autocommit=True)
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"):
            await until_cancelled(victim.kill())


async def test_a_reset_connection_cancels_the_body(connect: Connect, pg: str, postgres: Server) -> None:
    """The network's own word, with none from Postgres."""
    async with TcpProxy(postgres.host, postgres.port) as link:
        conn = await connect(psycopg.conninfo.make_conninfo(pg, host="127.0.0.1", port=link.port))
        with pytest.raises(LockLost):
            async with AdvisoryLock(conn, "x", scope="session"):
                link.reset_all()
                await for_ever()


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_grant_whose_answer_never_came_is_not_held(
    connect: Connect, pg: str, postgres: Server, scope: Any
) -> None:
    """psycopg's error passes through; the server ends the session it can't reach, and the lock with it."""
    admin = await connect()
    async with TcpProxy(postgres.host, postgres.port) as link:
        conn = await connect(psycopg.conninfo.make_conninfo(pg, host="127.0.0.1", port=link.port))
        await conn.set_autocommit(scope == "session")
        await conn.execute("SELECT 1")
        link.cut_reply()
        with pytest.raises(psycopg.OperationalError):
            await AdvisoryLock(conn, "x", scope=scope).acquire()
        await until(admin, held=0, waiting=0)


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_lock_that_cannot_be_watched_is_not_taken(
    pg_pool: AsyncConnectionPool, admin: AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch, scope: Any
) -> None:
    """The process is out of file descriptors: the error comes out, and the pool gets an unlocked connection back."""

    def exhausted(fd: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    lock = AdvisoryLock(pg_pool, "x", scope=scope)
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", exhausted)
        with pytest.raises(OSError, match="Too many open files"):
            await lock.__aenter__()
    assert await states(admin) == []
    async with lock:
        assert len(await states(admin)) == 1


# ---- the watch does not disturb


async def test_notifications_reach_their_handler_while_the_lock_is_held(connect: Connect) -> None:
    """The watch reads the socket of an idle connection, and hands on what it reads."""
    conn, admin = await connect(), await connect()
    heard: asyncio.Queue[str] = asyncio.Queue()
    await conn.execute("LISTEN news")
    conn.add_notify_handler(lambda notify: heard.put_nowait(notify.payload))
    async with AdvisoryLock(conn, "x", scope="session"):
        await admin.execute("NOTIFY news, 'hello'")
        assert await heard.get() == "hello"


async def test_notifications_read_by_the_watch_are_not_lost_to_notifies(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """notifies() begun after the watch has read them still yields them."""
    reads = spy(monkeypatch)
    conn, admin = await connect(), await connect()
    await conn.execute("LISTEN news")
    async with AdvisoryLock(conn, "x", scope="session"):
        reads.clear()
        await admin.execute("NOTIFY news, 'hello'")
        await until_true(lambda: bool(reads))
        assert [notify.payload async for notify in conn.notifies(timeout=30, stop_after=1)] == ["hello"]


async def test_unread_data_of_a_slow_copy_does_not_spin_the_event_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket stays readable for as long as the body does not read; the watch looks away, and sees a death later."""
    reads = spy(monkeypatch)
    conn, admin = await connect(), await connect()
    with pytest.raises(LockLost):
        async with AdvisoryLock(conn, "x", scope="session"):
            async with conn.cursor().copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT") as copy:
                await copy.read()
                reads.clear()
                for _ in range(2_000):
                    await asyncio.sleep(0)
                assert len(reads) < 20
                async for _ in copy:
                    pass
            await until_cancelled(terminate(admin, conn))


async def test_a_hold_leaves_no_descriptor_and_no_callback_behind(connect: Connect) -> None:
    """Granted, refused, cancelled, lost: as many files are open as before, and nothing fires after the end."""
    conn, other, admin = await connect(), await connect(), await connect()
    loop, process = asyncio.get_running_loop(), psutil.Process()
    late: list[dict[str, Any]] = []
    lock = AdvisoryLock(conn, "x", scope="session")
    before = process.num_fds()
    loop.set_exception_handler(lambda _, context: late.append(context))
    try:
        async with lock:
            pass  # over before the watch begins to look
        await asyncio.sleep(0)
        async with lock:
            await conn.execute("SELECT 1")
        async with AdvisoryLock(other, "x", scope="session"):
            assert await lock.try_acquire() is None
            async with asking(lock, who=admin) as task:
                task.cancel()
                await asyncio.wait([task])
        assert process.num_fds() == before
        with pytest.raises(LockLost):
            async with lock:
                await until_cancelled(terminate(admin, conn))
        assert process.num_fds() == before - 1  # libpq has closed its own
    finally:
        loop.set_exception_handler(None)
    assert late == []


async def test_a_busy_connection_works_as_ever_under_the_watch(connect: Connect) -> None:
    """Queries, errors, transactions and a pipeline inside the block."""
    conn = await connect()
    async with AdvisoryLock(conn, "x", scope="session"):
        for n in range(200):
            assert await value(conn, f"SELECT {n}") == n
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1/0")
        async with conn.transaction(), conn.pipeline():
            cursors = [await conn.execute("SELECT %s::int", [n]) for n in range(50)]
        assert [await cursor.fetchone() for cursor in cursors] == [(n,) for n in range(50)]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[ConnectionHold]:
    """Counts how often the watch is woken."""
    reads: list[ConnectionHold] = []
    real = ConnectionHold._on_readable
    monkeypatch.setattr(ConnectionHold, "_on_readable", lambda hold: (reads.append(hold), real(hold)))
    return reads


# ---- cancellation, and grants that race it


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("with_pool", [False, True])
async def test_a_cancelled_wait_for_a_session_lock_holds_nothing(
    connect: Connect, pg_pool: AsyncConnectionPool, with_pool: bool, timeout: float | None
) -> None:
    """The server's queue is left; the connection is good for the next acquire."""
    admin, conn = await connect(), await connect()
    lock = AdvisoryLock(pg_pool if with_pool else conn, "x", scope="session", timeout=timeout)
    holder = await AdvisoryLock(await connect(), "x", scope="session").acquire()
    async with asking(lock, who=admin) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(admin, held=1, waiting=0)
    await holder.release()
    async with lock:
        assert len(await states(admin)) == 1


async def test_a_cancelled_release_still_frees_the_lock(connect: Connect, pg_pool: AsyncConnectionPool) -> None:
    """Cancelled once in the body and again during the unlock, at each of its awaits: nothing stays held."""
    admin = await connect()
    for awaits in range(12):
        entered = asyncio.Event()

        async def work(entered: asyncio.Event = entered) -> None:
            async with AdvisoryLock(pg_pool, "x", scope="session"):
                entered.set()
                await for_ever()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        for _ in range(awaits):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(admin, held=0, waiting=0)


@pytest.fixture
def backends(postgres: Server) -> None:
    """The tests that stop a single backend need its process."""
    if sys.platform != "linux" or postgres.process is None:
        pytest.skip("needs Linux's /proc and a server that this run has started")


def pending(pid: int, sig: int) -> bool:
    """Whether the signal waits for the stopped process to go on."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> sig - 1 & 1)


async def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await until_true(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())


async def race(lock: AdvisoryLock, conn: AsyncConnection[Any], admin: AsyncConnection[Any], by: str) -> None:
    """The lock is granted to a backend that is stopped, which on waking finds its timeout or its cancellation first."""
    pid = conn.info.backend_pid
    await conn.execute("SET deadlock_timeout = '1h'")  # it shares its signal with lock_timeout
    await conn.commit()
    holder = await AdvisoryLock(await AsyncConnection.connect(conn.info.dsn), lock.name, scope="session").acquire()
    for timeout in (0.1, 1, 10):  # on a busy machine a short one is over before the backend is stopped
        task = asyncio.create_task(lock.acquire(timeout if by == "timeout" else None))
        await until(admin, held=1, waiting=1)
        await stopped(pid)
        if len(await states(admin)) == 2:
            break
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(LockNotAcquired):
            await task
    await holder.release()
    await holder.connection.close()
    await until(admin, held=1, waiting=0)
    if by == "cancel":
        task.cancel()
    await until_true(lambda: pending(pid, signal.SIGALRM if by == "timeout" else signal.SIGINT))
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(LockNotAcquired if by == "timeout" else asyncio.CancelledError):
        await task


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize(("name", "shared"), [("x", False), ("x", True), ((-1, -2), False)])
@pytest.mark.parametrize("by", ["timeout", "cancel"])
async def test_a_grant_that_races_the_end_of_the_wait_is_given_back(
    connect: Connect, name: Any, shared: bool, by: str
) -> None:
    """Postgres reports the error and keeps the session lock: without a look at pg_locks it would stay for ever."""
    admin, conn = await connect(), await connect()
    lock = AdvisoryLock(conn, name, scope="session", shared=shared)
    await race(lock, conn, admin, by)
    assert await states(admin) == []
    async with lock:
        assert len(await states(admin)) == 1
    assert await states(admin) == []


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("by", ["timeout", "cancel"])
async def test_a_transaction_lock_whose_grant_raced_goes_back_with_the_savepoint(connect: Connect, by: str) -> None:
    """Here Postgres itself gives it back, and the transaction is usable."""
    admin, conn = await connect(), await connect(autocommit=False)
    await race(AdvisoryLock(conn, "x"), conn, admin, by)
    assert await states(admin) == []
    assert await value(conn, "SELECT 1") == 1


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_a_cancellation_that_comes_too_late_to_stop_the_grant(connect: Connect, scope: Any) -> None:
    """The server had not even read the request. A session lock is given back, a transaction keeps its own."""
    admin, conn = await connect(), await connect(autocommit=scope == "session")
    if scope == "transaction":
        await conn.execute("SELECT 1")
    pid = conn.info.backend_pid
    await stopped(pid)
    task = asyncio.create_task(AdvisoryLock(conn, "x", scope=scope).acquire())
    await until_true(lambda: conn.info.transaction_status == TransactionStatus.ACTIVE)
    task.cancel()
    await until_true(lambda: pending(pid, signal.SIGINT))
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await states(admin)) == (1 if scope == "transaction" else 0)
    await conn.commit()
    assert await states(admin) == []


@pytest.mark.parametrize("scope", ["transaction", "session"])
async def test_an_acquire_cancelled_twice_at_any_await_holds_nothing(
    connect: Connect, pg_pool: AsyncConnectionPool, scope: Any
) -> None:
    """A cancellation can hit the undoing too: then the connection is closed, which ends the lock."""
    admin = await connect()
    for free in (True, False):
        for awaits in range(10):
            holder = None if free else await AdvisoryLock(await connect(), "x", scope="session").acquire()
            task = asyncio.create_task(AdvisoryLock(pg_pool, "x", scope=scope, timeout=60).__aenter__())
            if not free:
                await until(admin, held=1, waiting=1)
            for _ in range(awaits):
                await asyncio.sleep(0)
            task.cancel()
            for _ in range(awaits):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                hold = await task
                await hold.lock.__aexit__(None, None, None)
            if holder:
                await holder.release()
            await until(admin, held=0, waiting=0)
    async with AdvisoryLock(pg_pool, "x", scope=scope, timeout=30):
        pass


async def test_a_connection_that_dies_while_waiting_passes_its_error_through(connect: Connect) -> None:
    """The lock was not obtained; psycopg's error says why; the key is free on the next connection."""
    admin, conn = await connect(), await connect()
    holding = AdvisoryLock(await connect(), "x", scope="session")
    async with holding, asking(AdvisoryLock(conn, "x", scope="session"), who=admin) as task:
        await terminate(admin, conn)
        with pytest.raises(psycopg.OperationalError):
            await task
    for scope in ("session", "transaction"):
        with pytest.raises(psycopg.OperationalError, match=r"connection is (closed|lost)"):
            await AdvisoryLock(conn, "x", scope=scope).acquire()  # type: ignore[arg-type]


class DyingCursor(psycopg.AsyncCursor[Any]):
    """Its session is ended just before it can roll back to a savepoint."""

    async def execute(self, query: Any, *args: Any, **options: Any) -> Any:
        if query.startswith(b"ROLLBACK TO"):
            await asyncio.to_thread(end_session, self.connection)
        return await super().execute(query, *args, **options)


def end_session(conn: AsyncConnection[Any]) -> None:
    with psycopg.connect(conn.info.dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])


async def test_a_transaction_that_dies_after_a_refused_wait_does_not_hide_the_refusal(connect: Connect) -> None:
    """The lock was not obtained, that stays the error; a note on its cause says what became of the transaction."""
    conn = await connect(autocommit=False, cursor_factory=DyingCursor)
    async with AdvisoryLock(await connect(), "x", scope="session"):
        with pytest.raises(LockNotAcquired) as refused:
            await AdvisoryLock(conn, "x", timeout=0.02).acquire()
    assert refused.value.__cause__
    assert "the transaction stays aborted" in refused.value.__cause__.__notes__[0]


async def test_a_connection_that_cannot_say_whether_the_lock_was_granted_is_closed(connect: Connect) -> None:
    """Here a table of the caller's hides pg_locks. Closing ends the session, and with it whatever it may hold."""
    conn = await connect()
    await conn.execute("CREATE TEMP TABLE pg_locks (); SET search_path = pg_temp, pg_catalog")
    async with AdvisoryLock(await connect(), "x", scope="session"):
        with pytest.raises(LockNotAcquired) as refused:
            await AdvisoryLock(conn, "x", scope="session", timeout=0.02).acquire()
    assert refused.value.__cause__
    assert "it could not say whether" in refused.value.__cause__.__notes__[0]
    assert conn.closed


# ---- several locks at once


@given(st.lists(st.one_of(KEYS, st.text(min_size=1)), min_size=1))
def test_several_locks_are_taken_in_one_order_whatever_the_order_of_their_names(names: list[Any]) -> None:
    """Sorted by (space, id), duplicates once: any permutation gives the same sequence, so no two can deadlock."""
    locks = advisory_locks(_NO_POOL, *names)
    assert locks.keys == advisory_locks(_NO_POOL, *reversed(names)).keys
    ids = [key for key in locks.keys if isinstance(key, int)]
    pairs = [key for key in locks.keys if isinstance(key, tuple)]
    assert locks.keys == (*sorted(ids), *sorted(pairs))
    assert set(locks.keys) == {lock_key(name) for name in names}


async def test_several_locks_are_held_until_the_transaction_ends(connect: Connect) -> None:
    """Names, ids and pairs together."""
    conn = await connect()
    async with conn.transaction(), advisory_locks(conn, "b", "a", 7, (1, 2), "a"):
        assert {state.key for state in await held_advisory_locks(conn)} == {lock_id("a"), lock_id("b"), 7, (1, 2)}
    assert await states(conn) == []


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_several_locks_are_all_or_none(connect: Connect, timeout: float) -> None:
    """Another connection holds the last one: none of the others stays held, and the transaction is usable."""
    conn = await connect(autocommit=False)
    async with AdvisoryLock(await connect(), 9, scope="session"):
        with pytest.raises(LockNotAcquired, match=r"\(7, 8, 9\) was not obtained"):
            await advisory_locks(conn, 7, 8, 9, timeout=timeout).acquire()
        assert len(await states(conn)) == 1
        assert await value(conn, "SHOW lock_timeout") == "0"
    assert await advisory_locks(conn, 7, 8, 9, timeout=timeout).acquire()


async def test_opposite_orders_do_not_deadlock(pg_pool: AsyncConnectionPool) -> None:
    """Transfers from a to b and from b to a, at the same time, again and again."""

    async def transfer(*accounts: str) -> None:
        for _ in range(10):
            async with advisory_locks(pg_pool, *accounts) as hold:
                await hold.connection.execute("SELECT 1")

    await asyncio.gather(*(transfer("a", "b") for _ in range(3)), *(transfer("b", "a") for _ in range(3)))


async def test_the_timeout_of_several_locks_bounds_the_whole_wait(connect: Connect, tmp_path: Path) -> None:
    """Each lock is waited for only as long as the ones before it have left."""
    conn, admin = await connect(), await connect()
    await conn.execute("BEGIN")
    hold = await AdvisoryLock(await connect(), 1, scope="session").acquire()
    traced = trace(conn, tmp_path / "trace")
    async with asking(advisory_locks(conn, 2, 1, timeout=59.999), who=admin) as task:
        for _ in range(20_000):
            if await value(admin, "SELECT clock_timestamp() - max(waitstart) > '50ms' FROM pg_locks"):
                break
        await hold.release()
        await task
    first, second = re.findall(r"DataRow.*'(\d+)ms'", traced())
    assert int(first) <= 59_999
    assert int(second) <= int(first) - 50


def test_no_names_are_refused() -> None:
    """A list that turned out empty would protect nothing."""
    with pytest.raises(ValueError, match="advisory_locks\\(\\) without names"):
        advisory_locks(_NO_POOL)


# ---- holders and waiters


async def test_held_advisory_locks_shows_holders_and_waiters(connect: Connect) -> None:
    """Key, name, mode, pid, application, and by whom a waiter is blocked and since when."""
    a, b = await connect(application_name="billing"), await connect(application_name="reports")
    admin = await connect()
    exclusive, shared = AdvisoryLock(a, "x", scope="session"), AdvisoryLock(a, (1, -2), scope="session", shared=True)
    async with exclusive, shared, asking(AdvisoryLock(b, "x", scope="session"), who=admin, held=2) as task:
        x, waiter, pair = await held_advisory_locks(admin, names=["x", "unused"])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (x.key, x.name, x.mode, x.granted) == (lock_id("x"), "x", "exclusive", True)
    assert (x.pid, x.application_name, x.blocked_by, x.waiting_since) == (a.info.backend_pid, "billing", [], None)
    assert (waiter.key, waiter.name, waiter.granted) == (lock_id("x"), "x", False)
    assert (waiter.application_name, waiter.blocked_by) == ("reports", [a.info.backend_pid])
    assert waiter.waiting_since is not None
    assert (pair.key, pair.name, pair.mode) == ((1, -2), None, "shared")


@pytest.mark.parametrize("autocommit", [True, False])
async def test_looking_leaves_the_connection_as_it_was(connect: Connect, autocommit: bool) -> None:
    """No transaction is begun and left open, none is ended."""
    conn = await connect(autocommit=autocommit)
    await held_advisory_locks(conn)
    assert conn.info.transaction_status == IDLE
    async with conn.transaction():
        await held_advisory_locks(conn)
        assert conn.info.transaction_status == INTRANS


async def test_locks_of_another_database_are_not_shown(connect: Connect, postgres: Server) -> None:
    """Advisory locks are per database: the same name elsewhere is another lock."""
    elsewhere = await connect(postgres.url)
    async with AdvisoryLock(elsewhere, "x", scope="session"):
        assert await states(await connect()) == []


# ---- behind a pooling proxy


@pytest.fixture
async def behind(servers: Servers, postgres: Server, pg: str) -> Callable[[str], Awaitable[str]]:
    """The DSN of the test's database through pgbouncer in the given mode."""

    async def dsn(pool_mode: str) -> str:
        try:
            bouncer = await servers.pgbouncer(postgres, pool_mode=pool_mode)
        except ServerUnavailable as error:
            pytest.skip(str(error))
        return psycopg.conninfo.make_conninfo(bouncer.url, dbname=psycopg.conninfo.conninfo_to_dict(pg)["dbname"])

    return dsn


@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
@pytest.mark.parametrize("timeout", [None, 0, 1])
async def test_behind_a_proxy_session_scope_is_refused_and_nothing_leaks(
    connect: Connect, behind: Callable[[str], Awaitable[str]], pool_mode: str, timeout: float | None
) -> None:
    """A transaction-pooling proxy would hand the locked session to others. The lock is not even taken."""
    conn, admin = await connect(await behind(pool_mode)), await connect()
    for _ in range(2):
        with pytest.raises(SharedSession, match=r"session' is refused.*A proxy in between.*Use scope='transaction'"):
            await AdvisoryLock(conn, "x", scope="session", timeout=timeout).acquire()
        assert await states(admin) == []


async def test_behind_a_transaction_pooling_proxy_transaction_scope_holds(
    connect: Connect, behind: Callable[[str], Awaitable[str]]
) -> None:
    """Lock, timeout and release all happen inside one transaction, which the proxy keeps on one server session."""
    dsn = await behind("transaction")
    a, b = await connect(dsn), await connect(dsn)
    for timeout in (None, 0, 0.05):
        async with a.transaction(), AdvisoryLock(a, "x", timeout=timeout), b.transaction():
            with pytest.raises(LockNotAcquired):
                await AdvisoryLock(b, "x", timeout=timeout or 0).acquire()
            assert await value(b, "SHOW lock_timeout") == "0"
        async with b.transaction():
            assert await AdvisoryLock(b, "x", timeout=timeout).acquire()


async def test_behind_a_session_pooling_proxy_session_scope_works_when_told(
    connect: Connect, behind: Callable[[str], Awaitable[str]]
) -> None:
    """proxy="session": lock, exclusion, cancellation and unlock, all through pgbouncer."""
    dsn = await behind("session")
    a, b, admin = await connect(dsn), await connect(dsn), await connect()
    held, wanted = [AdvisoryLock(conn, "x", scope="session", proxy="session") for conn in (a, b)]
    async with held, asking(wanted, who=admin) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await states(admin) == []


async def test_a_proxy_that_was_said_to_pool_sessions_and_does_not_is_found_out(
    connect: Connect, behind: Callable[[str], Awaitable[str]]
) -> None:
    """The unlock meets another server session, which holds the lock for another client: LockLost; that lock stays."""
    dsn, admin = await behind("transaction"), await connect()
    a, b, c = [await connect(dsn) for _ in range(3)]
    async with AsyncExitStack() as exits:
        with pytest.raises(LockLost, match="or was another one"):
            async with AdvisoryLock(a, 1, scope="session", shared=True, proxy="session"):
                await exits.enter_async_context(b.transaction())  # takes the server session that holds our lock
                await b.execute("SELECT 1")
                await c.execute("SELECT pg_advisory_lock_shared(1)")
                assert len(await states(admin)) == 2
        assert len(await states(admin)) == 2
