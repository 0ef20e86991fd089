"""Bugs planted in SlidingWindowLimiter, by name, and the test that each one kills: this tests the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from distsys._support.redis import Script
from distsys.lab.testbed.servers import Server
from distsys.rate_limiting import sliding_window
from distsys.rate_limiting.sliding_window import SCRIPTS, Precision, SlidingWindowLimiter
from tests.rate_limiting import test_sliding_window as promises
from tests.survival import survived

Test = Callable[..., Awaitable[None]]

SCRIPT_MUTANTS: list[tuple[str, Precision, str, str, Test, tuple[Any, ...]]] = [
    (
        "the timestamp as the member",
        "exact",
        "redis.call('ZADD', key, now, struct.pack('>dI4', total + cost, cost))",
        "redis.call('ZADD', key, now, struct.pack('>dI4', now, cost))",
        promises.test_requests_of_one_microsecond_all_count,
        ("exact",),
    ),
    (
        "little-endian members, which one microsecond puts out of order",
        "exact",
        "'>dI4'",
        "'<dI4'",
        promises.test_requests_of_one_microsecond_all_count,
        ("exact",),
    ),
    (
        "refused requests are stored too",
        "exact",
        "if over > 0 then",
        "if over > 0 then redis.call('ZADD', key, now, struct.pack('>dI4', total + cost, cost))",
        promises.test_a_refused_request_takes_nothing,
        ("exact",),
    ),
    (
        "the window closed at both ends",
        "exact",
        "oldest <= now - window",
        "oldest < now - window",
        promises.test_the_window_is_half_open,
        (),
    ),
    (
        "a window of a microsecond less",
        "exact",
        "oldest <= now - window then\n  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)",
        "oldest <= now - window + 1 then\n  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window + 1)",
        promises.test_the_window_is_half_open,
        (),
    ),
    (
        "nothing is ever trimmed",
        "exact",
        "oldest <= now - window",
        "false",
        promises.test_there_are_never_more_members_than_the_limit,
        (),
    ),
    (
        "a cost of any size counts as one",
        "exact",
        "struct.pack('>dI4', total + cost, cost)",
        "struct.pack('>dI4', total + 1, 1)",
        promises.test_a_request_is_one_member_whatever_its_cost,
        (),
    ),
    (
        "retry_after of the oldest, whatever the cost",
        "exact",
        "member(holder(over))",
        "member(0)",
        promises.test_a_large_request_waits_until_enough_have_left,
        (),
    ),
    (
        "no time to live",
        "exact",
        "redis.call('PEXPIRE', key, math.ceil(window / 1000) + 1000)",
        "",
        promises.test_every_key_has_a_time_to_live,
        ("exact", 7),
    ),
    (
        "a time to live in whole milliseconds, rounded down",
        "exact",
        "math.ceil(window / 1000) + 1000",
        "math.floor(window / 1000)",
        promises.test_every_key_has_a_time_to_live,
        ("exact", 0.0015),
    ),
    (
        "the time to live of a shorter window stays",
        "exact",
        "redis.call('PEXPIRE', key, math.ceil((newest + window - now) / 1000) + 1000)  -- a window",
        "--",
        promises.test_a_longer_window_begins_with_what_was_admitted,
        ("exact",),
    ),
    (
        "a clock that was set back holds everybody up",
        "exact",
        "if newest and newest > now then",
        "if false then",
        promises.test_a_clock_that_was_set_back_only_begins_the_wait_anew,
        ("exact", -promises.WINDOW // 2),
    ),
    (
        "the count runs past what a double can hold",
        "exact",
        "if total + cost > 9007199254740991 then over = used end",
        "",
        promises.test_the_count_begins_anew_before_it_loses_precision,
        (),
    ),
    (
        "a refund loses the time to live",
        "exact",
        "if used > 0 then redis.call('PEXPIRE'",
        "if false then redis.call('PEXPIRE'",
        promises.test_a_refund_keeps_the_time_to_live,
        ("exact",),
    ),
    (
        "a refund gives back whole requests",
        "exact",
        "if upto > base then",
        "if false then",
        promises.test_a_refund_gives_back_at_once,
        ("exact",),
    ),
    (
        "two fixed windows without a weight",
        "approximate",
        "return ceil(previous * (window - elapsed) / window)",
        "return 0",
        promises.test_both_bounds_of_the_approximation_are_reached,
        (),
    ),
    (
        "the weight rounded down",
        "approximate",
        "return ceil(previous * (window - elapsed) / window)",
        "return floor(previous * (window - elapsed) / window)",
        promises.test_both_bounds_of_the_approximation_are_reached,
        (),
    ),
    (
        "another window begins empty",
        "approximate",
        "if length ~= window then",
        "if length ~= window then previous, current = 0, 0",
        promises.test_a_longer_window_begins_with_what_was_admitted,
        ("approximate",),
    ),
    (
        "the counters wait for the clock to catch up",
        "approximate",
        "if at > now then",
        "if false then",
        promises.test_a_clock_that_was_set_back_only_begins_the_wait_anew,
        ("approximate", -3600 * 1_000_000),
    ),
    (
        "the counters live for one window only",
        "approximate",
        "start + 2 * window - now or",
        "start + window - now or",
        promises.test_every_key_has_a_time_to_live,
        ("approximate", 7),
    ),
    (
        "a look is a request",
        "approximate",
        "elseif mode > 0 then",
        "else",
        promises.test_a_look_takes_nothing,
        ("approximate",),
    ),
]


@pytest.mark.parametrize(
    ("name", "precision", "old", "new", "killer", "arguments"), SCRIPT_MUTANTS, ids=[each[0] for each in SCRIPT_MUTANTS]
)
async def test_a_bug_in_a_script_is_caught(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: Precision,
    old: str,
    new: str,
    killer: Test,
    arguments: tuple[Any, ...],
) -> None:
    """Each mutant by the test that is named beside it, which the script as it is passes."""
    text = SCRIPTS[precision].text
    assert old in text, f"{name}: the script no longer has the line to break"
    assert await survived(killer, redis_server, *arguments)
    monkeypatch.setitem(SCRIPTS, precision, Script(text.replace(old, new)))
    assert not await survived(killer, redis_server, *arguments)


async def polls(limiter: SlidingWindowLimiter, key: str, cost: int = 1, timeout: float | None = None) -> Any:
    while not (decision := await limiter.try_acquire(key, cost)):
        await asyncio.sleep(min(1, decision.retry_after))
    return decision


CODE_MUTANTS: list[tuple[str, Any, str, Any, Test, tuple[Any, ...]]] = [
    (
        "acquire asks before there can be room",
        SlidingWindowLimiter,
        "acquire",
        polls,
        promises.test_acquire_sleeps_exactly_retry_after,
        ("exact",),
    ),
    (
        "braces of a key end its hash tag",
        sliding_window,
        "hash_tag",
        lambda name: name.replace("{", "").replace("}", ""),
        promises.test_any_text_is_a_key_and_no_two_share_a_window,
        ("exact",),
    ),
    (
        "both precisions write the same key",
        sliding_window,
        "KEYS",
        {"exact": "distsys:window:1", "approximate": "distsys:window:1"},
        promises.test_the_two_precisions_do_not_share_a_key,
        ("exact",),
    ),
    (
        "fractions of a unit are cut off",
        sliding_window,
        "_whole",
        lambda _, value: int(value),
        promises.test_a_wrong_cost_is_refused_by_every_call,
        (0.5, TypeError, "cost=0.5 is a float; units are counted whole"),
    ),
]


@pytest.mark.parametrize(
    ("name", "home", "attribute", "broken", "killer", "arguments"), CODE_MUTANTS, ids=[each[0] for each in CODE_MUTANTS]
)
async def test_a_bug_in_the_code_is_caught(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    home: Any,
    attribute: str,
    broken: Any,
    killer: Test,
    arguments: tuple[Any, ...],
) -> None:
    """Each mutant by the test that is named beside it."""
    if killer is promises.test_acquire_sleeps_exactly_retry_after:
        arguments = (*arguments, monkeypatch)
    assert await survived(killer, redis_server, *arguments)
    monkeypatch.setattr(home, attribute, broken)
    assert not await survived(killer, redis_server, *arguments)
