"""Bugs planted in idempotent_execute, steps, dedup and consumers, and the test that each one kills."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Awaitable, Callable
from types import FunctionType
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis

from distsys import schema
from distsys.idempotency import consumers, database, dedup, steps
from distsys.lab.testbed.servers import Server
from tests.idempotency import test_claims, test_consumers, test_database, test_dedup, test_steps
from tests.idempotency.test_consumers import Kafka, brokers
from tests.idempotency.test_database import ledger
from tests.survival import survived

__all__ = ["brokers", "ledger"]
EMPTY = b"TRUNCATE distsys_idempotency, distsys_processed, distsys_failures, ledger RESTART IDENTITY CASCADE"
Test = Callable[..., Awaitable[None]]

# name, home and attribute, text, another text, the test that dies, its parameters
MUTANTS: list[tuple[str, Any, str, str, str, Test, dict[str, Any]]] = [
    (
        "an expired key is never free",
        database,
        "_CLAIM",
        "mine.expires_at <= clock_timestamp() OR ",
        "",
        test_database.test_an_expired_key_is_claimed_again_by_any_request,
        {},
    ),
    (
        "who waited takes the row, whatever it holds",
        database,
        "_CLAIM",
        f"WHERE {database._FREE_TO_TAKE}\n  RETURNING",
        "RETURNING",
        test_database.test_who_comes_meanwhile_waits_until_it_is_committed_or_rolled_back,
        {"keep": True},
    ),
    (
        "a replay locks the row",
        database,
        "_CLAIM",
        "WHERE NOT EXISTS (SELECT FROM known)",
        "",
        test_database.test_a_replay_writes_nothing,
        {},
    ),
    (
        "a 500 is kept",
        database,
        "idempotent_execute",
        "if not 200 <= status_of(result) < 300:",
        "if False:",
        test_database.test_an_answer_that_is_no_success_rolls_back_the_effect_and_frees_the_key,
        {"status": 500},
    ),
    (
        "an answer that took long expires from its beginning",
        database,
        "_KEEP",
        "greatest(expires_at, clock_timestamp() + make_interval(secs => %s * 0.99))",
        "greatest(expires_at, to_timestamp(%s * 0))",
        test_database.test_an_operation_longer_than_its_ttl_is_kept_from_its_end,
        {},
    ),
    (
        "an answer moves its row",
        database,
        "_KEEP",
        "greatest(expires_at, ",
        "greatest(expires_at + interval '1 s', ",
        test_database.test_an_answer_is_written_where_its_row_is,
        {},
    ),
    (
        "any request is answered",
        database,
        "answer_to",
        "check_same(found, fingerprint, key)",
        "pass",
        test_database.test_another_request_under_the_same_key_is_refused,
        {},
    ),
    (
        "users share their keys",
        database,
        "idempotent_execute",
        "name, fingerprint, _ = parse_key(key)",
        "scope = ''; name, fingerprint, _ = parse_key(key)",
        test_database.test_scopes_endpoints_and_keys_are_apart,
        {"other": {"scope": "user 2"}},
    ),
    (
        "the effect commits before the mark",
        database,
        "idempotent_execute",
        "answer = kept(result)",
        "await committed(conn)\n            answer = kept(result)",
        test_database.test_an_answer_that_cannot_be_kept_is_an_error_and_nothing_is_done,
        {"answer": b"bytes", "text": "bytes"},
    ),
    (
        "cleanup waits for writers",
        database,
        "delete_batch",
        " SKIP LOCKED",
        "",
        test_database.test_cleanup_waits_for_no_writer_and_no_writer_for_it,
        {},
    ),
    (
        "cleanup reads the whole table",
        database,
        "delete_expired",
        "expires_at <= now()",
        "expires_at <= clock_timestamp()",
        test_database.test_cleanup_reads_what_it_deletes_and_no_more,
        {},
    ),
    (
        "each start makes the schema anew",
        schema,
        "ensure_schema",
        "if missing:",
        "if True:",
        test_database.test_an_instance_that_starts_waits_for_no_writer,
        {},
    ),
    (
        "a claim whose COMMIT is not heard of is nobody's",
        database.PostgresStore,
        "claim",
        "conn, conn.transaction():",
        "conn:",
        test_claims.test_whichever_reply_of_postgresql_is_lost_there_is_one_effect,
        {"autocommit": True},
    ),
    (
        "a claim whose COMMIT failed is kept",
        database.PostgresStore,
        "claim",
        "await asyncio.wait([asking])",
        "await asking",
        test_claims.test_whichever_reply_of_postgresql_is_lost_there_is_one_effect,
        {"autocommit": False},
    ),
    (
        "an owner that was overtaken keeps its step",
        steps,
        "_KEEP",
        "(scope, endpoint, key, fence) = (%s, %s, %s, %s) AND leased_until > 'epoch'",
        "(scope, endpoint, key) = (%s, %s, %s) AND %s > 0",
        test_steps.test_an_owner_that_was_overtaken_can_keep_nothing,
        {},
    ),
    (
        "the steps of an expired key are replayed",
        steps,
        "_FORGET",
        "DELETE FROM distsys_steps WHERE",
        "SELECT 1 FROM distsys_steps WHERE NOT",
        test_steps.test_a_key_that_has_expired_starts_anew,
        {},
    ),
    (
        "what always fails is tried first",
        steps,
        "_ORPHANS",
        "ORDER BY fence",
        "ORDER BY expires_at",
        test_steps.test_what_always_fails_keeps_the_completer_from_no_other,
        {},
    ),
    (
        "a name that comes twice is answered with the first result",
        steps.Steps,
        "step",
        "self._ended.add(name)",
        "pass",
        test_steps.test_a_name_that_comes_twice_in_an_attempt_is_a_mistake,
        {},
    ),
    (
        "Redis is told before the commit",
        dedup.Dedup,
        "handle",
        "                if fresh:\n",
        "                await self._remember(identity)\n                if fresh:\n",
        test_dedup.test_redis_is_told_after_the_commit_and_never_before,
        {},
    ),
    (
        "a shutdown is a failure",
        dedup.Dedup,
        "handle",
        "except Exception as error:",
        "except BaseException as error:",
        test_dedup.test_a_cancelled_handler_is_neither_done_nor_counted,
        {},
    ),
    (
        "poison comes again for ever",
        dedup,
        "_COUNT",
        "mine.attempts + 1 >= %(most)s",
        "mine.attempts + 1 >= %(most)s + 1000",
        test_dedup.test_a_message_that_fails_comes_again_until_it_is_parked,
        {},
    ),
    (
        "a success is not forgiven",
        dedup.Dedup,
        "handle",
        "await rows(conn, _FORGIVE, identity)",
        "pass",
        test_dedup.test_one_that_succeeds_in_the_end_is_forgiven,
        {},
    ),
    (
        "groups share what Redis knows",
        dedup,
        "_key",
        "json_of(identity)",
        "json_of(identity[1:])",
        test_dedup.test_groups_and_sources_process_a_message_each_for_itself,
        {},
    ),
    (
        "what failed is acknowledged",
        consumers,
        "consume_stream",
        "fields)).ack:",
        "fields)):",
        test_consumers.test_what_failed_comes_again_and_in_the_end_is_parked,
        {},
    ),
    (
        "what was under way is skipped",
        consumers,
        "consume_kafka",
        "consumer.seek(place, record.offset)",
        "pass",
        test_consumers.test_a_cancelled_handler_commits_nothing_and_its_record_comes_again,
        {},
    ),
]


@pytest.mark.parametrize(
    ("name", "home", "attribute", "old", "new", "killer", "parameters"), MUTANTS, ids=[each[0] for each in MUTANTS]
)
async def test_a_planted_bug_is_caught(
    redis_server: Server,
    pg: str,
    postgres: Server,
    ledger: AsyncConnectionPool,
    brokers: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    home: Any,
    attribute: str,
    old: str,
    new: str,
    killer: Test,
    parameters: dict[str, Any],
) -> None:
    """Each mutant by the test that is named beside it, which the rule as it is passes."""
    given = {"pg": pg, "postgres": postgres, "pg_pool": ledger, "ledger": ledger, **parameters}
    given["dedup"] = dedup.Dedup("g", ledger, retention=3_600, max_attempts=3)

    async def test(redis: Redis) -> None:
        wanted = inspect.signature(killer).parameters
        async with await AsyncConnection.connect(pg) as conn:
            await conn.execute("SELECT 1")
            values = given | {"redis": redis, "conn": conn, "kafka": Kafka(brokers)}
            await killer(**{key: value for key, value in values.items() if key in wanted})

    assert await survived(test, redis_server), "without the bug"
    async with ledger.connection() as other:
        await other.execute(EMPTY)
    before = getattr(home, attribute)
    function = getattr(before, "__wrapped__", before)
    text = function if isinstance(function, str) else textwrap.dedent(inspect.getsource(function))
    assert old in text, f"{name}: the text to break is no longer there"
    if isinstance(function, FunctionType):
        monkeypatch.setitem(function.__globals__, "committed", committed)
        monkeypatch.setattr(function, "__code__", code_of(function, text.replace(old, new)))
    else:
        monkeypatch.setattr(home, attribute, text.replace(old, new))
    assert not await survived(test, redis_server)


async def committed(conn: AsyncConnection[Any]) -> None:
    """A commit that psycopg does not see."""
    for command in (b"COMMIT", b"BEGIN", b"SAVEPOINT one"):
        await conn.execute(command)


def code_of(function: FunctionType, text: str) -> Any:
    """What that source compiles to, for whoever holds the function already."""
    names = dict(function.__globals__)
    exec(text, names)
    made = names[function.__name__]
    return getattr(made, "__wrapped__", made).__code__
