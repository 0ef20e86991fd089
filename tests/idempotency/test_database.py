"""idempotent_execute: claim, effect and answer are one transaction, whatever becomes of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from distsys import schema
from distsys.errors import BadKey, KeyInProgress, KeyReused
from distsys.idempotency import database
from distsys.idempotency.claims import Claims
from distsys.idempotency.database import PostgresStore, claim, delete_expired, idempotent_execute
from distsys.idempotency.keys import fingerprint_of
from distsys.schema import ensure_schema
from tests.bugs import edited, kills
from tests.idempotency.broken import committed

Connection = AsyncConnection[Any]
WRITTEN = """
SELECT pg_current_xact_id_if_assigned() IS NOT NULL, coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)
FROM pg_stat_xact_user_tables
"""
COMMIT = 5  # of the exchanges with the server: BEGIN, claim, effect, mark, COMMIT
HELD_UP = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture
async def ledger(pg_pool: AsyncConnectionPool) -> AsyncConnectionPool:
    """A pool of a database with our schema, and a table that counts effects."""
    await prepared(pg_pool)
    return pg_pool


@pytest.fixture
async def conn(pg: str, ledger: AsyncConnectionPool) -> AsyncIterator[Connection]:
    """A connection in a transaction, which the test commits."""
    async with await AsyncConnection.connect(pg) as conn:
        await conn.execute("SELECT 1")
        yield conn


async def prepared(pool: AsyncConnectionPool) -> None:
    await ensure_schema(pool)
    async with pool.connection() as conn:
        await conn.execute("CREATE TABLE IF NOT EXISTS ledger (number serial PRIMARY KEY, what text NOT NULL)")


async def charge(conn: Connection, what: str = "k") -> dict[str, Any]:
    cursor = await conn.cursor(row_factory=dict_row).execute(
        "INSERT INTO ledger (what) VALUES (%s) RETURNING number", (what,)
    )
    row = await cursor.fetchone()
    assert row
    return {"number": row["number"]}


async def effects(pool: AsyncConnectionPool, what: str = "k") -> int:
    return int((await select(pool, "SELECT count(*) FROM ledger WHERE what = %s", what))[0])


async def select(pool: AsyncConnectionPool, query: str, *parameters: Any) -> Any:
    async with pool.connection() as conn:
        return await (await conn.execute(query.encode(), parameters)).fetchone()


async def held_up(pool: AsyncConnectionPool, number: int = 1) -> None:
    """Wait until so many statements wait for locks."""
    for _ in range(3_000):
        if (await select(pool, HELD_UP))[0] >= number:
            return
    raise AssertionError(f"fewer than {number} wait for locks")


# ---- once


async def test_an_operation_is_carried_out_once_and_answered_alike(ledger: AsyncConnectionPool) -> None:
    """As in the quick start: by pool, endpoint and request."""
    answers = [
        await idempotent_execute(ledger, "k", "POST /charges", charge, request={"amount": 1}, scope="user 1")
        for _ in range(3)
    ]
    assert answers == [{"number": 1}] * 3
    assert await effects(ledger) == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("autocommit", [True, False])
async def test_within_a_callers_transaction_it_is_the_caller_who_commits(
    pg: str, ledger: AsyncConnectionPool, keep: bool, autocommit: bool
) -> None:
    """If the caller rolls back, the key is free again."""
    async with await AsyncConnection.connect(pg, autocommit=autocommit) as conn:
        async with conn.transaction(force_rollback=not keep):
            await idempotent_execute(conn, "k", "e", charge)
            assert conn.info.transaction_status == TransactionStatus.INTRANS
            assert await effects(ledger) == 0, "visible before the caller has committed"
        assert await effects(ledger) == keep
        await idempotent_execute(conn, "k", "e", charge)
    assert await effects(ledger) == 1


@pytest.mark.parametrize("autocommit", [True, False])
async def test_a_connection_without_a_transaction_gets_one(
    pg: str, ledger: AsyncConnectionPool, autocommit: bool
) -> None:
    async with await AsyncConnection.connect(pg, autocommit=autocommit) as conn:
        await idempotent_execute(conn, "k", "e", charge)
        assert conn.info.transaction_status == TransactionStatus.IDLE
        assert await effects(ledger) == 1


async def test_what_a_caller_wrote_before_survives_an_operation_that_fails(
    ledger: AsyncConnectionPool, conn: Connection
) -> None:
    """Only a savepoint is rolled back, even if the server refused a statement, and the transaction continues."""
    await charge(conn, "before")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await idempotent_execute(conn, "k", "e", lambda conn: conn.execute("SELECT 1/0"))
    await idempotent_execute(conn, "k", "e", charge)
    await conn.commit()
    assert (await effects(ledger, "before"), await effects(ledger)) == (1, 1)


async def test_a_callers_own_savepoint_takes_the_claim_with_it(ledger: AsyncConnectionPool, conn: Connection) -> None:
    async with conn.transaction():
        async with conn.transaction(force_rollback=True):
            await idempotent_execute(conn, "k", "e", charge)
        await idempotent_execute(conn, "k", "e", charge)
    await conn.commit()
    assert await effects(ledger) == 1


async def test_of_fifty_at_once_one_has_an_effect(pg: str, ledger: AsyncConnectionPool) -> None:
    """The others wait for the row, and replay."""
    async with AsyncConnectionPool(pg, min_size=20, max_size=20, open=False) as many:
        answers = await asyncio.gather(*(idempotent_execute(many, "k", "e", charge) for _ in range(50)))
    assert [answer["number"] for answer in answers] == [answers[0]["number"]] * 50
    assert await effects(ledger) == 1


@kills(
    "an attempt that waited takes the row, whatever it holds",
    edited(database, "_CLAIM", f"WHERE {database._FREE_TO_TAKE}\n  RETURNING", "RETURNING"),
    keep=True,
)
@pytest.mark.parametrize("keep", [True, False])
async def test_a_concurrent_attempt_waits_until_the_first_is_committed_or_rolled_back(
    ledger: AsyncConnectionPool, conn: Connection, keep: bool
) -> None:
    first = await idempotent_execute(conn, "k", "e", charge)
    second = asyncio.create_task(idempotent_execute(ledger, "k", "e", charge))
    await held_up(ledger)
    await (conn.commit() if keep else conn.rollback())
    assert (await second == first) is keep
    assert await effects(ledger) == 1


async def test_the_same_key_within_its_own_operation_is_no_deadlock(ledger: AsyncConnectionPool) -> None:
    async def nested(conn: Connection) -> Any:
        return await idempotent_execute(conn, "k", "e", charge)

    with pytest.raises(KeyInProgress, match="'k'"):
        await idempotent_execute(ledger, "k", "e", nested)
    assert await effects(ledger) == 0


@kills("a replay locks the row", edited(database, "_CLAIM", "WHERE NOT EXISTS (SELECT FROM known)", ""))
async def test_a_replay_writes_nothing(ledger: AsyncConnectionPool, conn: Connection) -> None:
    """It writes and locks no row, and so gets no transaction id."""
    first = await idempotent_execute(ledger, "k", "e", charge)
    assert await idempotent_execute(conn, "k", "e", charge) == first
    assert await (await conn.execute(WRITTEN)).fetchone() == (False, 0)
    await idempotent_execute(conn, "other", "e", charge)
    assert await (await conn.execute(WRITTEN)).fetchone() == (True, 3), "the measure itself"


@kills("any request is answered", edited(database, "answer_to", "check_same_request(found, fingerprint, key)", "pass"))
async def test_another_request_under_the_same_key_is_refused(ledger: AsyncConnectionPool) -> None:
    """The order of members does not matter."""
    first = await idempotent_execute(ledger, "k", "e", charge, request={"a": 1, "b": 2})
    assert await idempotent_execute(ledger, "k", "e", charge, request={"b": 2.0, "a": 1}) == first
    with pytest.raises(KeyReused, match="'k' belongs to another request"):
        await idempotent_execute(ledger, "k", "e", charge, request={"a": 1, "b": 3})
    assert await effects(ledger) == 1


@kills(
    "users share their keys",
    edited(database, "idempotent_execute", "    check_seconds(", "    scope = ''\n    check_seconds("),
    other={"scope": "user 2"},
)
@pytest.mark.parametrize("other", [{"scope": "user 2"}, {"endpoint": "f"}, {"key": "l"}])
async def test_scopes_endpoints_and_keys_are_apart(ledger: AsyncConnectionPool, other: dict[str, str]) -> None:
    """One user's answer is never given to another with an equal request."""
    names = {"key": "k", "endpoint": "e", "scope": "user 1"}
    first = await idempotent_execute(ledger, operation=charge, **names)
    assert await idempotent_execute(ledger, operation=charge, **(names | other)) != first
    assert await effects(ledger) == 2


# ---- not done


@kills(
    "a 500 is kept",
    edited(database, "idempotent_execute", "if not 200 <= status_of(result) < 300:", "if False:"),
    status=500,
)
@pytest.mark.parametrize("status", [199, 300, 404, 409, 500])
async def test_an_answer_that_is_no_success_rolls_back_the_effect_and_frees_the_key(
    ledger: AsyncConnectionPool, status: int
) -> None:
    """A 500 is not replayed: the next attempt is carried out."""

    async def refused(conn: Connection) -> Response:
        await charge(conn)
        return Response(b"no", status)

    answer = await idempotent_execute(ledger, "k", "e", refused)
    assert (answer.status_code, answer.body, await effects(ledger)) == (status, b"no", 0)
    assert await idempotent_execute(ledger, "k", "e", charge, request="another")
    assert await effects(ledger) == 1


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, KeyboardInterrupt])
async def test_an_error_rolls_back_the_effect_and_frees_the_key(
    ledger: AsyncConnectionPool, error: type[BaseException]
) -> None:
    async def broken(conn: Connection) -> None:
        await charge(conn)
        raise error("mine")

    with pytest.raises(error, match="mine"):
        await idempotent_execute(ledger, "k", "e", broken)
    assert await effects(ledger) == 0
    await idempotent_execute(ledger, "k", "e", charge, request="another")
    assert await effects(ledger) == 1


async def test_an_operation_that_hides_a_failed_statement_is_not_done(ledger: AsyncConnectionPool) -> None:
    async def hides(conn: Connection) -> str:
        await charge(conn)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1/0")
        return "fine"

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await idempotent_execute(ledger, "k", "e", hides)
    assert await effects(ledger) == 0


class Interrupted(AsyncConnection[Any]):
    """A connection that counts its exchanges with the server, and does something before or after one of them."""

    exchanges = 0
    strike: Callable[[int, str], None] = staticmethod(lambda number, side: None)

    async def wait(self, *args: Any, **more: Any) -> Any:
        Interrupted.exchanges += 1
        number = Interrupted.exchanges
        Interrupted.strike(number, "before")
        answer = await super().wait(*args, **more)
        Interrupted.strike(number, "after")
        await asyncio.sleep(0)  # where a cancellation after the exchange strikes
        return answer


@pytest.mark.parametrize("side", ["before", "after"])
async def test_cancelled_at_any_await_it_is_done_or_not_and_a_retry_does_it_once(
    pg: str, ledger: AsyncConnectionPool, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """BEGIN, claim, effect, mark, COMMIT, and the pool's own: at each exchange with the server, and after it."""
    finished = []
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False, connection_class=Interrupted) as pool:
        for step in range(1, 8):
            key = f"key-{step}"

            def strike(number: int, when: str, step: int = step) -> None:
                task = asyncio.current_task()
                if (number, when) == (step, side) and task is not None:
                    task.cancel()

            monkeypatch.setattr(Interrupted, "exchanges", 0)
            monkeypatch.setattr(Interrupted, "strike", staticmethod(strike))
            attempt = asyncio.create_task(idempotent_execute(pool, key, "e", partial(charge, what=key)))
            await asyncio.wait([attempt])
            finished.append(not attempt.cancelled())
            done = await effects(ledger, key)
            if (step, side) != (COMMIT, "before"):  # cancelled with COMMIT on its way, both may be
                assert done == (step >= COMMIT), "by COMMIT, and nothing else"
            await idempotent_execute(ledger, key, "e", partial(charge, what=key))
            assert await effects(ledger, key) == 1
    assert finished == [False] * 6 + [True]


@pytest.mark.parametrize("moment", ["before", "within", "after"])
async def test_a_session_that_is_ended_leaves_nothing_half_done(ledger: AsyncConnectionPool, moment: str) -> None:
    """pg_terminate_backend before the effect, while another statement runs, and before the mark."""

    async def broken(conn: Connection) -> None:
        end = f"SELECT pg_terminate_backend({conn.info.backend_pid})"
        if moment == "after":
            await charge(conn)
        if moment == "within":
            await conn.execute(end)
        else:
            await select(ledger, end)
        await charge(conn)

    with pytest.raises(psycopg.OperationalError):
        await idempotent_execute(ledger, "k", "e", broken)
    assert await effects(ledger) == 0
    await idempotent_execute(ledger, "k", "e", charge)
    assert await effects(ledger) == 1


async def test_ended_while_it_waits_for_another_it_has_claimed_nothing(
    ledger: AsyncConnectionPool, conn: Connection
) -> None:
    await idempotent_execute(conn, "k", "e", charge)
    waiting = asyncio.create_task(idempotent_execute(ledger, "k", "e", charge))
    await held_up(ledger)
    await select(
        ledger, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )  # fmt: skip
    with pytest.raises(psycopg.OperationalError):
        await waiting
    await conn.rollback()
    await idempotent_execute(ledger, "k", "e", charge)
    assert await effects(ledger) == 1


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
async def test_above_read_committed_an_attempt_that_waited_has_to_begin_anew(
    pg: str, ledger: AsyncConnectionPool, conn: Connection, level: IsolationLevel
) -> None:
    """Its snapshot is older than the answer; a new transaction returns it."""
    async with await AsyncConnection.connect(pg) as strict:
        await strict.set_isolation_level(level)
        first = await idempotent_execute(conn, "k", "e", charge)
        waiting = asyncio.create_task(idempotent_execute(strict, "k", "e", charge))
        await held_up(ledger)
        await conn.commit()
        with pytest.raises(psycopg.errors.SerializationFailure):
            await waiting
        assert await idempotent_execute(strict, "k", "e", charge) == first
    assert await effects(ledger) == 1


async def test_a_claim_that_waited_for_another_gets_the_larger_number(
    ledger: AsyncConnectionPool, conn: Connection
) -> None:
    """It does although it asked first: a claim draws its number when it holds the row."""
    await expired(ledger)
    await conn.execute("SELECT FROM distsys_idempotency FOR UPDATE")
    waiting = asyncio.create_task(PostgresStore(ledger, endpoint="e").claim("k", bytes(32), lease=60, ttl=60))
    await held_up(ledger)
    first = await claim(conn, "", "e", "k", bytes(32), lease=0.001, ttl=0.001)
    await conn.execute("SELECT pg_sleep(0.01)")  # by now it is expired
    await conn.commit()
    second = await waiting
    assert (first.state, second.state) == ("claimed", "claimed")
    assert second.owner > first.owner


@pytest.mark.parametrize("option", ["default_transaction_isolation=serializable", "lock_timeout=1"])
async def test_a_conflict_with_another_attempt_is_not_an_outage_of_the_store(
    pg: str, ledger: AsyncConnectionPool, conn: Connection, option: str
) -> None:
    """Otherwise on_failure="open" would carry it out concurrently."""
    ran: list[int] = []

    async def attempt() -> None:
        ran.append(1)

    await claim(conn, "", "", "k", fingerprint_of(None), ttl=60, lease=60)
    async with AsyncConnectionPool(pg, min_size=1, open=False, kwargs={"options": f"-c {option}"}) as strict:
        losing = asyncio.create_task(Claims(PostgresStore(strict), on_failure="open").run("k", attempt))
        if "isolation" in option:
            await held_up(ledger)
            await conn.commit()
        with pytest.raises((psycopg.errors.SerializationFailure, psycopg.errors.LockNotAvailable)):
            await losing
    assert ran == []


# ---- expiry


async def expired(pool: AsyncConnectionPool, key: str = "k") -> None:
    """Make a key that was done and has expired by the server's clock."""
    await idempotent_execute(pool, key, "e", partial(charge, what="earlier"), ttl=0.001)
    while not (await select(pool, "SELECT expires_at <= now() FROM distsys_idempotency WHERE key = %s", key))[0]:
        pass


@kills("an expired key is never free", edited(database, "_CLAIM", "mine.expires_at <= clock_timestamp() OR ", ""))
async def test_an_expired_key_is_claimed_again_by_any_request(ledger: AsyncConnectionPool) -> None:
    await expired(ledger)
    await idempotent_execute(ledger, "k", "e", charge, request="another")
    await idempotent_execute(ledger, "k", "e", charge, request="another")
    assert await effects(ledger) == 1


async def test_a_key_that_expires_while_retries_are_in_flight_is_claimed_by_one(
    ledger: AsyncConnectionPool, conn: Connection
) -> None:
    """The first retry holds the old row; the others wait for it, although it has expired."""
    await expired(ledger)
    first = await idempotent_execute(conn, "k", "e", charge)
    others = [asyncio.create_task(idempotent_execute(ledger, "k", "e", charge)) for _ in range(3)]
    await held_up(ledger, 3)
    await delete_expired(ledger)
    await conn.commit()
    assert await asyncio.gather(*others) == [first] * 3
    assert await effects(ledger) == 1


@kills(
    "an answer that took long expires from its beginning",
    edited(
        database,
        "_KEEP",
        "greatest(expires_at, clock_timestamp() + make_interval(secs => %s * 0.99))",
        "greatest(expires_at, to_timestamp(%s * 0))",
    ),
)
async def test_an_operation_longer_than_its_ttl_is_kept_from_its_end(
    ledger: AsyncConnectionPool, conn: Connection
) -> None:
    async def slow(conn: Connection) -> Any:
        await conn.execute("SELECT pg_sleep(0.2)")
        return await charge(conn)

    first = await idempotent_execute(conn, "k", "e", slow, ttl=0.005)
    left = await (await conn.execute("SELECT expires_at > now() + interval '0.2' FROM distsys_idempotency")).fetchone()
    assert (left, first) == ((True,), {"number": 1})


@kills(
    "an answer moves its row",
    edited(database, "_KEEP", "greatest(expires_at, ", "greatest(expires_at + interval '1 s', "),
)
async def test_an_answer_is_written_where_its_row_is(ledger: AsyncConnectionPool, conn: Connection) -> None:
    """The update touches no index (HOT)."""
    await idempotent_execute(conn, "k", "e", charge)
    counts = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'distsys_idempotency'"
    assert await (await conn.execute(counts)).fetchone() == (1, 1)


async def test_cleanup_deletes_what_has_expired_in_batches(ledger: AsyncConnectionPool) -> None:
    for number in range(5):
        await expired(ledger, f"old-{number}")
    await idempotent_execute(ledger, "new", "e", charge)
    assert [await delete_expired(ledger, batch=2) for _ in range(4)] == [2, 2, 1, 0]
    assert await select(ledger, "SELECT key FROM distsys_idempotency") == ("new",)


@kills("cleanup waits for writers", edited(database, "delete_batch", " SKIP LOCKED", ""))
async def test_cleanup_waits_for_no_writer_and_no_writer_for_it(ledger: AsyncConnectionPool, conn: Connection) -> None:
    """One writer holds an expired key, which stays; another claims a key that was just deleted."""
    await expired(ledger, "held")
    await expired(ledger, "free")
    await idempotent_execute(conn, "held", "e", charge)
    assert await delete_expired(ledger) == 1
    await idempotent_execute(ledger, "free", "e", charge)
    await conn.commit()
    assert await effects(ledger) == 2


@kills(
    "cleanup reads the whole table",
    edited(database, "delete_expired", "expires_at <= now()", "expires_at <= clock_timestamp()"),
)
async def test_cleanup_reads_what_it_deletes_and_no_more(ledger: AsyncConnectionPool, conn: Connection) -> None:
    """By the index, which clock_timestamp() could not use."""
    await expired(ledger)
    await conn.execute(
        "INSERT INTO distsys_idempotency (scope, endpoint, key, fingerprint, answer, expires_at) SELECT '', "
        "'e', 'key-' || n, sha256(''), '', now() + interval '1 day' FROM generate_series(1, 5000) AS n"
    )
    await conn.commit()
    await conn.execute("ANALYZE distsys_idempotency")
    await conn.commit()
    assert await delete_expired(conn) == 1
    read = "SELECT seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'distsys_idempotency'"
    assert await (await conn.execute(read)).fetchone() == (0,)


async def test_writers_go_on_under_cleanup(ledger: AsyncConnectionPool) -> None:
    """Keys expire, are claimed again and are deleted all at once: each attempt is answered, and done once."""
    ended = asyncio.Event()

    async def clean() -> None:
        while not ended.is_set():
            await delete_expired(ledger, batch=3)

    async def write(number: int) -> None:
        for turn in range(20):
            what = f"{number}-{turn}"
            await idempotent_execute(
                ledger, f"key-{turn % 3}", "e", partial(charge, what=what), scope=str(number), ttl=0.001
            )

    cleaning = asyncio.create_task(clean())
    await asyncio.gather(*map(write, range(4)))
    ended.set()
    await cleaning
    async with ledger.connection() as conn:
        found = await (await conn.execute("SELECT what, count(*) FROM ledger GROUP BY what")).fetchall()
    assert {number for _, number in found} == {1}


# ---- operations and answers


@dataclass
class Receipt:
    amount: Decimal
    at: datetime


class Model(BaseModel):
    amount: Decimal
    lines: list[int]


class Bound:
    async def with_connection(self, conn: Connection) -> Any:
        return await charge(conn)

    def without(self) -> str:
        return "sync"


async def none() -> None:
    return None


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
OPERATIONS: dict[str, tuple[Callable[..., Any], Any]] = {
    "async, with the connection": (charge, {"number": 1}),
    "async, without": (none, None),
    "sync, without": (lambda: [1, "two"], [1, "two"]),
    "sync, with": (lambda conn: type(conn).__name__, "AsyncConnection"),
    "partial": (partial(charge, what="k"), {"number": 1}),
    "partial, all bound": (partial(lambda amount: amount, 7), 7),
    "bound method": (Bound().with_connection, {"number": 1}),
    "bound method, without": (Bound().without, "sync"),
    "keyword only": (lambda *, amount=7: amount, 7),
    "a dataclass": (lambda: Receipt(Decimal("1.10"), NOON), {"amount": "1.10", "at": "2026-01-02T12:00:00+00:00"}),
    "a model": (lambda: Model(amount=Decimal("1.10"), lines=[1]), {"amount": "1.10", "lines": [1]}),
    "nested": (
        lambda: {"of": [Receipt(Decimal(1), NOON)]},
        {"of": [{"amount": "1", "at": "2026-01-02T12:00:00+00:00"}]},
    ),
    "keys that are numbers": (lambda: {1: "a"}, {"1": "a"}),
    "letters": (lambda: "ünï\0\U0001f600", "ünï\0\U0001f600"),
    "huge": (lambda: "x" * 3_000_000, "x" * 3_000_000),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_answer_is_the_same_the_first_time_and_later(ledger: AsyncConnectionPool, name: str) -> None:
    """It is read back from JSON both times, whatever kind of function the operation is."""
    operation, expected = OPERATIONS[name]
    assert [await idempotent_execute(ledger, "k", "e", operation) for _ in range(2)] == [expected] * 2


async def test_a_response_is_replayed_with_status_headers_and_body(ledger: AsyncConnectionPool) -> None:
    """It is marked as replayed, and carries no cookie."""

    async def created(conn: Connection) -> Response:
        response = JSONResponse(await charge(conn), 201, {"location": "/charges/1"})
        response.set_cookie("session", "secret")
        return response

    first = await idempotent_execute(ledger, "k", "e", created)
    again = await idempotent_execute(ledger, "k", "e", created)
    assert (again.status_code, again.body, again.headers["location"]) == (201, first.body, "/charges/1")
    assert ("set-cookie" in first.headers, "set-cookie" in again.headers) == (True, False)
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")


@kills(
    "the effect commits before the mark",
    edited(
        database, "idempotent_execute", "answer = kept", "await committed(conn); answer = kept", committed=committed
    ),
    answer=b"bytes",
)
@pytest.mark.parametrize(
    ("answer", "text"),
    [(b"bytes", "is a bytes: return plain"), ({1, 2}, "is a set"), (StreamingResponse([]), "stream")],
)
async def test_an_answer_that_cannot_be_kept_is_an_error_and_nothing_is_done(
    ledger: AsyncConnectionPool, answer: Any, text: str
) -> None:
    async def operation(conn: Connection) -> Any:
        await charge(conn)
        return answer

    with pytest.raises(TypeError, match=text):
        await idempotent_execute(ledger, "k", "e", operation)
    assert await effects(ledger) == 0


async def test_a_connection_in_pipeline_mode_and_with_rows_of_its_own(ledger: AsyncConnectionPool, pg: str) -> None:
    """Rows as dicts and statements in a pipeline do not disturb the claim."""

    async def zero(conn: Connection) -> Any:
        return await (await conn.execute("SELECT 1/0")).fetchall()

    async with await AsyncConnection.connect(pg, row_factory=dict_row) as conn, conn.pipeline():
        first = await idempotent_execute(conn, "k", "e", charge)
        assert await idempotent_execute(conn, "k", "e", charge) == first
        with pytest.raises(psycopg.errors.DivisionByZero):
            await idempotent_execute(conn, "l", "e", zero)
        assert await idempotent_execute(conn, "l", "e", charge) != first
    assert await effects(ledger) == 2


# ---- the schema, and mistakes


async def test_many_make_the_schema_at_once(pg_pool: AsyncConnectionPool) -> None:
    await asyncio.gather(*(ensure_schema(pg_pool) for _ in range(20)))
    await prepared(pg_pool)
    await idempotent_execute(pg_pool, "k", "e", charge)


@kills("each start makes the schema anew", edited(schema, "ensure_schema", "if missing:", "if True:"))
async def test_an_instance_that_starts_waits_for_no_writer(ledger: AsyncConnectionPool, conn: Connection) -> None:
    """No writer waits for it either: if the tables exist, nothing is locked."""
    await idempotent_execute(conn, "k", "e", charge)
    async with ledger.connection() as other:
        await other.execute("SET lock_timeout = 1")
        await ensure_schema(other)
    await conn.commit()


async def test_without_the_schema_the_error_names_the_remedy(pg_pool: AsyncConnectionPool) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable) as failed:
        await idempotent_execute(pg_pool, "k", "e", charge)
    assert re.search(r"ensure_schema\(db\)` creates the tables", "".join(failed.value.__notes__))


@pytest.mark.parametrize(
    ("mistake", "error", "text"),
    [
        ({"db": "postgresql://"}, TypeError, "db='postgresql://' is a str: pass a psycopg AsyncConnection or"),
        ({"key": ""}, BadKey, "missing or empty: send one per intent"),
        ({"key": "two words"}, BadKey, "'two words' is malformed"),
        ({"key": "k" * 256}, BadKey, "has 256 characters: send at most 255"),
        ({"endpoint": 7}, TypeError, "endpoint=7 is a int; give a str"),
        ({"scope": None}, TypeError, "scope=None is a NoneType; give a str"),
        ({"scope": 42}, TypeError, "scope=42 is a int; give a str"),
        ({"scope": "a\0b"}, ValueError, r"scope='a\\x00b': give at most 700 bytes, without NUL"),
        ({"endpoint": "\ud800"}, ValueError, r"endpoint='\\ud800' holds a lone surrogate"),
        ({"endpoint": "e" * 701}, ValueError, r"endpoint='e{40}'\.\.\.: give at most 700 bytes"),
        ({"ttl": 0}, ValueError, "ttl=0: give seconds from 0.001 to a year"),
        ({"ttl": "1"}, TypeError, "ttl='1' is a str; give seconds as a number"),
        ({"request": {1: 2}}, TypeError, r"has the key 1, a int: member names must be str"),
    ],
)
async def test_a_mistake_is_named_with_its_remedy(
    ledger: AsyncConnectionPool, mistake: dict[str, Any], error: type[Exception], text: str
) -> None:
    right = {"db": ledger, "key": "k", "endpoint": "e", "operation": charge}
    with pytest.raises(error, match=text):
        await idempotent_execute(**(right | mistake))
    assert await effects(ledger) == 0


@pytest.mark.parametrize(
    ("batch", "error", "remedy"),
    [(0, ValueError, "1 or more"), (-1, ValueError, "1 or more")]
    + [(odd, TypeError, "rows as a whole number") for odd in ("all", True)],
)
async def test_a_batch_of_no_rows_is_refused(
    ledger: AsyncConnectionPool, batch: Any, error: type[Exception], remedy: str
) -> None:
    with pytest.raises(error, match=f"batch={batch!r}.*{remedy}"):
        await delete_expired(ledger, batch=batch)


async def test_the_longest_names_fit_the_index(ledger: AsyncConnectionPool) -> None:
    """Their letters are such that compression does not shorten them."""
    letters = "".join(chr(33 + (number * number * 7919 + number * 31) % 89) for number in range(3_000))
    await idempotent_execute(
        ledger, letters[:255].replace(",", "-").replace('"', "-"), letters[300:1000], charge, scope=letters[1000:1700]
    )
    assert await effects(ledger) == 1
