"""Bugs planted in Redlock, the fences and the lease, by name, and the test that each one kills."""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from psycopg import AsyncConnection
from redis.asyncio import Redis

from distsys._support import postgres
from distsys._support.redis import Script
from distsys.lab.testbed.servers import Server
from distsys.locks import fencing, redlock
from distsys.locks import lease as leases
from distsys.locks.lease import Lease, LeasedLock, held_leases
from distsys.locks.redlock import _FREE, _GRANT, EXTEND, Redlock, _Votes
from tests.locks import test_fencing as fences
from tests.locks import test_lease as told
from tests.locks import test_redlock as votes
from tests.locks.test_fencing import Connect, conn, connect
from tests.locks.test_redlock import all_well, nodes, servers_5, three

__all__ = ["conn", "connect", "nodes", "servers_5", "three"]  # fixtures, found by their names here
Test = Callable[..., Any]


async def dies(test: Test, *, within: float = 2, **fixtures: Any) -> bool:
    """Whether the test fails under the mutant. One that hangs has failed; what it leaves running is ended."""
    given = getattr(test, "keywords", {})
    wanted = {name: fixtures[name] for name in inspect.signature(test).parameters if name not in given}
    before = asyncio.all_tasks()
    try:
        async with asyncio.timeout(within):
            answer = test(**wanted)
            if inspect.isawaitable(answer):
                await answer
    except BaseException:  # noqa: BLE001  pytest's own Failed is no Exception
        return True
    finally:
        for _ in range(100):  # Python 3.11's wait_for can swallow a cancellation
            if not (left := asyncio.all_tasks() - before):
                break
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)
    return False


def name_of(test: Test) -> str:
    return str(getattr(test, "func", test).__name__)


def planted(name: str, *bug: Any, caught_by: Test) -> Any:
    return pytest.param(*bug, caught_by, id=name)


async def never(*_: Any, **__: Any) -> None:
    """In place of a call that the mutant leaves out."""


# ---- Redlock

OURS = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end"
HELD = "if holder then return holder == ARGV[1] and 1 or 0 end"
SET = "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"

SCRIPTS = [
    planted(
        "no owner check on release",
        *(_FREE, OURS, ""),
        caught_by=votes.test_a_minority_in_other_hands_does_not_matter,
    ),
    planted(
        "no owner check on extension",
        *(EXTEND, OURS, ""),
        caught_by=votes.test_extension_takes_a_majority,
    ),
    planted(
        "granted to whoever asks",
        *(_GRANT, HELD, ""),
        caught_by=votes.test_a_minority_of_grants_is_given_back_and_the_error_counts_them,
    ),
    planted(
        "a retry after a lost reply is refused",
        *(_GRANT, HELD, "if holder then return 0 end"),
        caught_by=partial(votes.test_a_lost_reply_is_not_a_lost_vote, cut=3),
    ),
    planted(
        "a retry gains time",
        *(_GRANT, HELD, "if holder and holder ~= ARGV[1] then return 0 end"),
        caught_by=votes.test_to_ask_again_is_the_same_grant,
    ),
    planted(
        "granted without a TTL",
        *(_GRANT, SET, "redis.call('SET', KEYS[1], ARGV[1])"),
        caught_by=votes.test_a_grant_stands_on_every_node_with_a_ttl_until_it_is_released,
    ),
    planted(
        "the ttl taken for seconds",
        *(_GRANT, SET, "redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])"),
        caught_by=votes.test_a_grant_stands_on_every_node_with_a_ttl_until_it_is_released,
    ),
    planted(
        "a grant is accepted after its release",
        *(_FREE, "if ARGV[2] == '1' then", "if false then"),
        caught_by=votes.test_a_grant_that_arrives_after_its_release_is_refused,
    ),
    planted(
        "every release leaves a mark",
        *(_FREE, "if ARGV[2] == '1' then", "if true then"),
        caught_by=votes.test_a_grant_that_arrives_after_its_release_is_refused,
    ),
    planted(
        "a slow extension shortens a longer one",
        *(EXTEND, "if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then", "if true then"),
        caught_by=votes.test_an_extension_never_shortens_what_a_node_has_promised,
    ),
]


@pytest.mark.parametrize(("script", "old", "new", "killer"), SCRIPTS)
async def test_a_bug_in_a_script_of_redlock_is_caught(
    servers_5: list[Server],
    nodes: list[Redis],
    three: list[Redis],
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    old: str,
    new: str,
    killer: Test,
) -> None:
    """Each mutant by the test that is named beside it."""
    assert old in script.text, "the script no longer has the line to break"
    broken = Script(script.text.replace(old, new))
    monkeypatch.setattr(script, "text", broken.text)
    monkeypatch.setattr(script, "sha", broken.sha)
    assert await dies(killer, servers_5=servers_5, nodes=nodes, three=three)
    await all_well(servers_5)


init = Redlock.__init__


def one_vote_is_enough(lock: Redlock, *args: Any, **options: Any) -> None:
    init(lock, *args, **options)
    lock.quorum = 1


async def silence_is_a_no(lock: Redlock, *question: Any) -> bool:
    answers = lock._ask(*question)
    await answers.decided
    return answers.yes >= lock.quorum


def when_all_have_answered(answers: _Votes) -> None:
    if None not in answers.answers and not answers.decided.done():
        answers.decided.set_result(None)


CODE = [
    planted(
        "one vote is enough",
        *(Redlock, "__init__", one_vote_is_enough),
        caught_by=votes.test_a_minority_of_grants_is_given_back_and_the_error_counts_them,
    ),
    planted(
        "the time it took does not count",
        *(redlock, "local_deadline", lambda *_: float("inf")),
        caught_by=partial(votes.test_a_grant_with_too_little_validity_left_is_none, took=20.0, granted=False),
    ),
    planted(
        "a lost round keeps its grants",
        *(Redlock, "_take_back", never),
        caught_by=votes.test_a_minority_of_grants_is_given_back_and_the_error_counts_them,
    ),
    planted(
        "a cancelled acquire keeps its grants",
        *(Redlock, "_take_back", never),
        caught_by=partial(votes.test_an_acquire_cancelled_at_any_await_leaves_no_grant_behind, turns=6),
    ),
    planted(
        "silence is a no",
        *(Redlock, "_ours", silence_is_a_no),
        caught_by=votes.test_silent_nodes_are_an_error_of_the_extension_and_no_loss,
    ),
    planted(
        "all nodes are waited for",
        *(_Votes, "_decide", when_all_have_answered),
        caught_by=partial(votes.test_a_failing_minority_changes_nothing, fault="hung", count=3),
    ),
    planted(
        "no node timeout",
        *(_Votes, "_time_out", lambda _: None),
        caught_by=partial(votes.test_a_failing_majority_is_an_error_that_names_the_cause, fault="hung"),
    ),
    planted(
        "a straggler is released before it is granted",
        *(_Votes, "answered", never),
        caught_by=votes.test_a_straggler_is_released_with_the_rest,
    ),
    planted(
        "a token nobody agreed on",
        *(redlock, "Lease", lambda *args, **options: Lease(*args, **{**options, "token": 1})),
        caught_by=votes.test_it_hands_out_no_fencing_token,
    ),
    planted(
        "a lock acquired twice by one task waits for itself",
        *(Redlock, "_refuse_reentry", lambda _: None),
        caught_by=votes.test_acquiring_again_in_the_same_task_raises_instead_of_deadlocking,
    ),
]


@pytest.mark.parametrize(("home", "attribute", "broken", "killer"), CODE)
async def test_a_bug_in_the_code_of_redlock_is_caught(
    servers_5: list[Server],
    nodes: list[Redis],
    three: list[Redis],
    monkeypatch: pytest.MonkeyPatch,
    home: Any,
    attribute: str,
    broken: Any,
    killer: Test,
) -> None:
    """Each mutant by the test that is named beside it."""
    monkeypatch.setattr(home, attribute, broken)
    assert await dies(killer, servers_5=servers_5, nodes=nodes, three=three)
    await all_well(servers_5)


# ---- fences in Redis

NEWER = "if newest > tonumber(ARGV[2]) then return newest end"
GUARD = "redis.call('SET', KEYS[2], ARGV[2])"

LUA = [
    planted(
        "an equal token is refused",
        *("_SET", NEWER, NEWER.replace(">", ">=")),
        caught_by=fences.test_an_equal_token_is_the_same_holder_writing_again,
    ),
    planted(
        "nothing is refused",
        *("_SET", NEWER, ""),
        caught_by=fences.test_an_older_token_is_refused_and_nothing_is_written,
    ),
    planted(
        "written, and then refused",
        *("_SET", NEWER, "redis.call('SET', KEYS[1], ARGV[1])" + NEWER),
        caught_by=fences.test_an_older_token_is_refused_and_nothing_is_written,
    ),
    planted(
        "tokens compared as text",
        *("_SET", NEWER, "if tostring(redis.call('GET', KEYS[2]) or '') > ARGV[2] then return newest end"),
        caught_by=fences.test_of_writers_at_once_the_newest_remains,
    ),
    planted(
        "the token is not remembered",
        *("_SET", GUARD, ""),
        caught_by=fences.test_an_older_token_is_refused_and_nothing_is_written,
    ),
    planted(
        "the guard expires with the value",
        *("_SET", GUARD, "redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])"),
        caught_by=fences.test_a_ttl_ends_the_value_and_not_its_guard,
    ),
    planted(
        "a read shows no token",
        *("_GET", "redis.call('SET', KEYS[2], ARGV[1])", ""),
        caught_by=fences.test_a_read_that_shows_its_token_shuts_out_older_writes,
    ),
    planted(
        "anybody may read",
        *("_GET", "if newest > tonumber(ARGV[1]) then return {newest, false} end", ""),
        caught_by=fences.test_an_older_token_may_not_read,
    ),
]


@pytest.mark.parametrize(("script", "old", "new", "killer"), LUA)
async def test_a_bug_in_a_fence_of_redis_is_caught(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, script: str, old: str, new: str, killer: Test
) -> None:
    """Each mutant by the test that is named beside it."""
    assert old in getattr(fencing, script), "the script no longer has the line to break"
    monkeypatch.setattr(fencing, script, getattr(fencing, script).replace(old, new))
    assert await dies(killer, redis=redis)


# ---- fences in PostgreSQL

race = fences.test_updates_that_race_for_a_row_are_decided_by_its_newest_version
SQL = [
    planted(
        "the guard refuses an equal token",
        *(r"guard\.token <= excluded", "guard.token < excluded"),
        caught_by=fences.test_the_guard_table_admits_newer_tokens_and_refuses_older_ones,
    ),
    planted(
        "the guard admits everybody",
        *(r"WHERE guard\.token <= excluded\.token", ""),
        caught_by=fences.test_the_guard_table_admits_newer_tokens_and_refuses_older_ones,
    ),
    planted(
        "the guard keeps its first token",
        *("SET token = excluded.token", "SET token = guard.token"),
        caught_by=fences.test_the_guard_table_admits_newer_tokens_and_refuses_older_ones,
    ),
    planted(
        "an update is refused an equal token",
        *(r"(\d+) >= \(SELECT token", r"\1 > (SELECT token"),
        caught_by=fences.test_several_rows_are_all_written_or_none,
    ),
    planted(
        "an update does not look at the token",
        *(r"AND \d+ >= \(SELECT token FROM newest\)", ""),
        caught_by=fences.test_an_update_writes_the_token_beside_the_values,
    ),
    planted(
        "an update leaves the token as it was",
        *(r', "fence_token" = \d+', ""),
        caught_by=fences.test_an_update_writes_the_token_beside_the_values,
    ),
    planted(
        "the oldest of several rows decides",
        *(r"max\(token\)", "min(token)"),
        caught_by=fences.test_several_rows_are_all_written_or_none,
    ),
    planted(
        "the token is read without a lock on its row",
        *("FOR UPDATE", ""),
        caught_by=partial(race, first=2, second=1),
    ),
    planted(
        "rows are found again by their place",
        *(r'(SELECT)( "fence_token" AS.*)WHERE .*? AND (\d+ >=)', r"\1 ctid,\2WHERE ctid IN (TABLE place) AND \3"),
        caught_by=fences.test_a_partitioned_table_is_updated_where_the_condition_holds_and_nowhere_else,
    ),
]


@pytest.mark.parametrize(("old", "new", "killer"), SQL)
async def test_a_bug_in_a_fence_of_postgres_is_caught(
    connect: Connect,
    conn: AsyncConnection[Any],
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    killer: Test,
) -> None:
    """Each mutant by the test that is named beside it."""
    rows, touched = postgres.rows, []

    async def broken(conn: AsyncConnection[Any], query: Any, params: Any = None) -> list[Any]:
        text = query if isinstance(query, str) else query.as_string(conn)
        text, count = re.subn(old, new, text, count=1, flags=re.DOTALL)
        text = text.replace("(TABLE place)", "(SELECT ctid FROM target)")
        touched.append(count)
        return await rows(conn, text, params)

    monkeypatch.setattr(postgres, "rows", broken)
    assert await dies(killer, connect=connect, conn=conn)
    assert any(touched), "the statement no longer has the part to break"


# ---- keys and the token of the lease around


def innermost_or_not(name: str | None = None) -> int:
    for lease in held_leases.get():
        if lease.token is not None and name in (None, lease.name):
            return lease.token
    raise LookupError("no lease with a fencing token is held here; write under a lock")


def lost_or_not(name: str | None = None) -> int:
    for lease in reversed(held_leases.get()):
        if lease.token is not None and name in (None, lease.name):
            return lease.token
    raise LookupError("no lease with a fencing token is held here; write under a lock")


PYTHON = [
    planted(
        "the guard in any slot",
        *("guard_key", lambda key: f"{key}:fence"),
        caught_by=fences.test_the_guard_shares_the_cluster_slot_of_its_key,
    ),
    planted(
        "two keys, one guard",
        *("guard_key", lambda key: f"{key}:fence" if "{" in key else f"{{{key}}}:fence"),
        caught_by=fences.test_no_two_keys_share_a_guard,
    ),
    planted(
        "the outermost token",
        *("current_token", innermost_or_not),
        caught_by=fences.test_nested_code_finds_the_token_of_the_lease_around_it,
    ),
    planted(
        "the token of a released lease",
        *("current_token", lost_or_not),
        caught_by=fences.test_a_task_that_outlives_the_lease_gets_no_token,
    ),
    planted(
        "the token of a lost lease",
        *("current_token", lost_or_not),
        caught_by=fences.test_a_lost_lease_gives_no_token,
    ),
]


@pytest.mark.parametrize(("function", "broken", "killer"), PYTHON)
async def test_a_bug_in_a_function_of_fencing_is_caught(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, function: str, broken: Any, killer: Test
) -> None:
    """Each mutant by the test that is named beside it."""
    monkeypatch.setattr(fences, function, broken)
    assert await dies(killer, redis=redis)


# ---- the lease


def shortened(lease: Lease, asked_at: float, ttl: float) -> None:
    lease.ttl, lease._deadline = ttl, leases.local_deadline(asked_at, ttl)


def kept(lock: LeasedLock, lease: Lease) -> Lease:
    lock._held.append(lease)
    return lease


LEASE = [
    planted(
        "no allowance for drift",
        *(leases, "local_deadline", lambda asked_at, ttl: asked_at + ttl),
        caught_by=told.test_a_lease_knows_from_the_clock_alone_that_it_is_over,
    ),
    planted(
        "the last answer decides the deadline",
        *(Lease, "_granted", shortened),
        caught_by=told.test_extensions_that_overtake_each_other_keep_the_longer_one,
    ),
    planted(
        "a released lease is remembered for ever",
        *(LeasedLock, "_keep", kept),
        caught_by=told.test_a_task_whose_leases_are_released_elsewhere_does_not_collect_them,
    ),
    planted(
        "the body is told when it can't hear",
        *(leases, "try_cancel", lambda body: body.cancel()),
        caught_by=partial(told.test_a_body_that_only_waits_for_quick_work_is_stopped, turns=1, work_turns=1),
    ),
]
if sys.version_info >= (3, 12):
    LEASE.pop()  # there wait_for swallows nothing


@pytest.mark.parametrize(("home", "attribute", "broken", "killer"), LEASE)
async def test_a_bug_in_the_lease_is_caught(
    monkeypatch: pytest.MonkeyPatch, home: Any, attribute: str, broken: Any, killer: Test
) -> None:
    """Each mutant by the test that is named beside it."""
    monkeypatch.setattr(home, attribute, broken)
    assert await dies(killer)


# ---- controls


@pytest.mark.parametrize("killer", sorted({param.values[-1] for param in LEASE}, key=str), ids=name_of)
async def test_without_a_bug_the_tests_of_the_lease_live(killer: Test) -> None:
    """Or their deaths would prove nothing."""
    assert not await dies(killer, within=20)


@pytest.mark.parametrize(
    "killer",
    sorted({param.values[-1] for group in (SCRIPTS, CODE) for param in group}, key=str),
    ids=name_of,
)
async def test_without_a_bug_the_tests_of_redlock_live(
    servers_5: list[Server],
    nodes: list[Redis],
    three: list[Redis],
    killer: Test,
) -> None:
    """The same."""
    assert not await dies(killer, within=20, servers_5=servers_5, nodes=nodes, three=three)
    await all_well(servers_5)


@pytest.mark.parametrize(
    "killer",
    sorted({param.values[-1] for group in (LUA, SQL, PYTHON) for param in group}, key=str),
    ids=name_of,
)
async def test_without_a_bug_the_tests_of_fencing_live(
    redis: Redis,
    connect: Connect,
    conn: AsyncConnection[Any],
    killer: Test,
) -> None:
    """The same."""
    assert not await dies(killer, within=20, redis=redis, connect=connect, conn=conn)
