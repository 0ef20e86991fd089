"""Bugs planted in RedisLock, by name, and the test that each one kills: this tests the tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import NoScriptError

from distsys._support.redis import Script
from distsys.lab.testbed.servers import Server
from distsys.locks import lease as lease_module
from distsys.locks import redis_lock
from distsys.locks.redis_lock import _ASK, _LEAVE, EXTEND, RedisLock
from tests.locks import test_redis_lock as promises
from tests.survival import survived

Test = Callable[[redis.asyncio.Redis], Awaitable[None]]

SCRIPTS: list[tuple[str, Script, str, str, Test]] = [
    (
        "no owner check on release",
        _LEAVE,
        "if holder == me then",
        "if holder then",
        promises.test_force_release_hands_the_lock_on_and_the_holder_learns_of_it,
    ),
    (
        "no owner check on renewal",
        EXTEND,
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end",
        "",
        promises.test_a_lock_that_somebody_else_holds_by_now_is_not_extended,
    ),
    (
        "granted without a TTL",
        _ASK,
        "redis.call('SET', lock, me, 'PX', ARGV[2])",
        "redis.call('SET', lock, me)",
        promises.test_explain_says_who_holds_the_lock_and_how_many_wait,
    ),
    (
        "the ttl taken for seconds",
        _ASK,
        "redis.call('SET', lock, me, 'PX', ARGV[2])",
        "redis.call('SET', lock, me, 'EX', ARGV[2])",
        promises.test_explain_says_who_holds_the_lock_and_how_many_wait,
    ),
    (
        "the token not drawn anew",
        _ASK,
        "token = tonumber(newest) + 1",
        "token = tonumber(newest)",
        promises.test_a_token_never_decreases_when_the_servers_clock_stepped_back,
    ),
    (
        "the token a bare counter",
        _ASK,
        "local token = now()",
        "local token = 1",
        promises.test_each_token_is_larger_than_every_earlier_one,
    ),
    (
        "the token not remembered",
        _ASK,
        "if newest and",
        "if false and",
        promises.test_a_token_never_decreases_when_the_servers_clock_stepped_back,
    ),
    (
        "granted to whoever asks",
        _ASK,
        "if holder == me then",
        "if true then",
        promises.test_only_one_of_many_holds_it,
    ),
    (
        "newcomers overtake the queue",
        _ASK,
        "holder = next_waiter() or me",
        "holder = me",
        promises.test_a_newcomer_does_not_overtake_when_a_lease_ran_out,
    ),
    (
        "the queue never cleaned",
        _LEAVE,
        "redis.call('LREM', queue, 1, me)",
        "",
        promises.test_a_cancelled_waiter_leaves_the_queue,
    ),
    (
        "last come, first served",
        _ASK,
        "redis.call('RPUSH', queue, me)",
        "redis.call('LPUSH', queue, me)",
        promises.test_waiters_are_served_first_come_first_served,
    ),
    (
        "the dead are served too",
        _LEAVE,
        "if alive_until and tonumber(alive_until) > now() then",
        "if true then",
        promises.test_a_dead_waiter_is_skipped,
    ),
    (
        "nobody is woken",
        _LEAVE,
        "if waiter then reserve(waiter) else redis.call('DEL', lock) end",
        "redis.call('DEL', lock)",
        promises.test_exactly_one_waiter_is_woken,
    ),
    (
        "an undone request is granted when it arrives",
        _ASK,
        "if gone then return {0, 0, ''} end",
        "",
        promises.test_a_request_that_arrives_after_its_cancellation_is_refused,
    ),
]


@pytest.mark.parametrize(("name", "script", "old", "new", "killer"), SCRIPTS, ids=[s[0] for s in SCRIPTS])
async def test_a_bug_in_a_script_is_caught(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    script: Script,
    old: str,
    new: str,
    killer: Test,
) -> None:
    """Each mutant by the test that is named beside it."""
    assert old in script.text, f"{name}: the script no longer has the line to break"
    broken = Script(script.text.replace(old, new))
    monkeypatch.setattr(script, "text", broken.text)
    monkeypatch.setattr(script, "sha", broken.sha)
    assert not await survived(killer, redis_server)


enter, leave = RedisLock.__aenter__, lease_module.Lease.leave


async def never(*_: Any) -> None:
    """In place of a call that the mutant leaves out."""


async def released_at_once(lock: RedisLock) -> lease_module.Lease:
    lease = await enter(lock)
    await lease.release()
    return lease


async def left_in_peace(lease: lease_module.Lease, _: BaseException | None) -> None:
    await leave(lease, None)


async def deaf(self: Script, redis: Any, keys: Any, *args: Any) -> Any:
    """A script that takes what the client answers, whatever was cancelled meanwhile."""
    try:
        return await redis.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
    except NoScriptError:
        return await redis.eval(self.text, len(keys), *keys, *args)


CODE: list[tuple[str, Any, str, Any, Test]] = [
    (
        "no renewal",
        lease_module.Lease,
        "_renew_now",
        never,
        promises.test_a_lease_is_renewed_while_the_body_runs,
    ),
    (
        "released before the body ran",
        RedisLock,
        "__aenter__",
        released_at_once,
        promises.test_only_one_of_many_holds_it,
    ),
    (
        "a loss is not told",
        lease_module.Lease,
        "lose",
        lambda *_: None,
        promises.test_a_lease_taken_away_ends_the_body_with_lock_lost,
    ),
    (
        "a lost lease masks the body's error",
        lease_module.Lease,
        "leave",
        left_in_peace,
        promises.test_the_bodys_own_error_is_never_masked,
    ),
    (
        "a lock acquired twice by one task waits for itself",
        RedisLock,
        "_refuse_reentry",
        lambda _: None,
        promises.test_acquiring_again_in_the_same_task_raises_instead_of_deadlocking,
    ),
    (
        "a swallowed cancellation is forgotten",
        redis_lock,
        "heard",
        lambda work: work,
        promises.test_a_cancellation_that_the_client_swallowed_still_counts,
    ),
    *(
        (
            f"a cancellation swallowed by {call} is forgotten",
            Script,
            "run",
            deaf,
            partial(promises.test_a_cancellation_that_the_client_swallowed_still_counts_for_a_lease, call=call),
        )
        for call in ("release", "extend")
    ),
]


@pytest.mark.parametrize(("name", "home", "attribute", "broken", "killer"), CODE, ids=[c[0] for c in CODE])
async def test_a_bug_in_the_code_is_caught(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    home: Any,
    attribute: str,
    broken: Any,
    killer: Test,
) -> None:
    """Each mutant by the test that is named beside it."""
    monkeypatch.setattr(home, attribute, broken)
    assert not await survived(killer, redis_server)
