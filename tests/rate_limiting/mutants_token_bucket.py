"""Bugs planted in the token bucket, each with the test that has to die of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import redis.asyncio

from distsys._support.redis import Script
from distsys.lab.testbed.servers import Server
from distsys.rate_limiting import buckets, decision, fallback, token_bucket
from tests.rate_limiting import test_distributed as tiers
from tests.rate_limiting import test_token_bucket as promises
from tests.survival import survived

Test = Callable[[redis.asyncio.Redis], Awaitable[None]]

SCRIPTS: list[tuple[str, str, str, Test]] = [
    (
        "a refused request takes as well",
        "if granted > 0 and cost ~= 0 then bucket[USED], bucket[CHANGED] = max(0, bucket[USED] + granted * cost)",
        "if cost ~= 0 then bucket[USED], bucket[CHANGED] = max(0, bucket[USED] + max(granted, 1) * cost)",
        promises.test_a_refused_request_takes_nothing,
    ),
    (
        "nothing is taken",
        "if granted > 0 and cost ~= 0",
        "if granted > 0 and cost < 0",
        promises.test_a_burst_up_to_the_capacity_then_the_rate,
    ),
    (
        "nothing is refilled",
        "used = used - floor(elapsed / den) * num - floor(part / den)",
        "used = used - 0",
        promises.test_a_burst_up_to_the_capacity_then_the_rate,
    ),
    (
        "a fraction of a microtoken gets lost",
        "used, part % den end",
        "used, 0 end",
        promises.test_a_fraction_of_a_microtoken_is_carried_over,
    ),
    (
        "a clock set back takes",
        "local elapsed = max(0, now - at)",
        "local elapsed = now - at",
        promises.test_a_clock_set_back_takes_nothing_and_gives_nothing_twice,
    ),
    (
        "a clock set back gives twice",
        "bucket[AT] = max(now, at)",
        "bucket[AT] = now",
        promises.test_a_clock_set_back_takes_nothing_and_gives_nothing_twice,
    ),
    (
        "the bucket expires before it is full",
        "* bucket[DEN] / 1000) + 1000",
        "* bucket[DEN] / 2000) + 1",
        partial(promises.test_every_key_has_a_ttl_of_at_least_the_time_to_fill, capacity=10, rate=1),
    ),
    (
        "a bucket has no TTL",
        ", 'PX', min(ms, 2 ^ 53))",
        ")",
        partial(promises.test_every_key_has_a_ttl_of_at_least_the_time_to_fill, capacity=10, rate=1),
    ),
    (
        "the first quota decides alone",
        "for n = 1, cost > 0 and #own or 0 do",
        "for n = 1, cost > 0 and 1 or 0 do",
        tiers.test_a_refused_request_takes_from_no_quota,
    ),
    (
        "the time is the client's",
        "redis.call('TIME')",
        "{12345, 0}",
        lambda redis: promises.test_the_time_is_the_servers(redis, pytest.MonkeyPatch()),
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "killer"), SCRIPTS, ids=[s[0] for s in SCRIPTS])
async def test_a_bug_in_the_script_is_caught(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str, killer: Test
) -> None:
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    text = buckets.SCRIPT.text
    assert text.count(old) == 1, f"{name}: the script no longer has the line to break"
    assert await survived(killer, redis_server)
    monkeypatch.setattr(buckets, "SCRIPT", Script(text.replace(old, new)))
    assert not await survived(killer, redis_server)


def all_alike(run: Any, granted: int, used: list[int]) -> None:
    for future in run.futures:
        future.set_result((used, 0))


async def always_a_slice(limiter: Any, key: str, cost: int, lease: token_bucket.Lease) -> Any:
    request = limiter._ask_for(key, cost, 1 + int(lease.tokens * decision.MICRO) // cost)
    return request.decisions(*await limiter._lease(key, request, lease.seconds))[0]


def kept(limiter: Any, key: str) -> int:
    own = limiter._slices.get(key)
    return own.left if own else 0


add = buckets._Batch.add

CODE: list[tuple[str, Any, str, Any, Test]] = [
    (
        "all of a batch get the first one's answer",
        buckets._Run,
        "answer",
        all_alike,
        promises.test_requests_that_arrive_together_go_out_together,
    ),
    (
        "requests of different cost are counted as one kind",
        decision.Request,
        "__ne__",
        lambda one, other: one.keys != other.keys,
        promises.test_together_each_key_and_cost_counts_for_itself,
    ),
    (
        "requests are not batched",
        buckets.Buckets,
        "ask",
        buckets.Buckets._ask_alone,
        promises.test_requests_that_arrive_together_go_out_together,
    ),
    (
        "every request leases a slice",
        token_bucket.TokenBucketLimiter,
        "_with_slice",
        always_a_slice,
        promises.test_many_at_once_take_one_slice,
    ),
    (
        "a slice is given back and kept",
        token_bucket.TokenBucketLimiter,
        "_drop",
        kept,
        promises.test_what_is_left_is_given_back_on_close,
    ),
    (
        "a policy hides a missing right",
        fallback,
        "unavailable",
        lambda error: True,
        lambda redis: promises.test_a_user_without_scripting_rights_is_told_which(
            redis, fallback.OnFailure(policy="open", timeout=5)
        ),
    ),
    (
        "a cost above the capacity is refused for ever",
        decision.Limit,
        "cost",
        lambda limit, cost: decision.micro("cost", cost),
        lambda redis: promises.test_requests_that_mean_nothing_are_refused(
            redis, "k", 11, ValueError, "could never pass"
        ),
    ),
    (
        "keys keep their braces",
        token_bucket,
        "hash_tag",
        lambda name: name,
        promises.test_no_key_reaches_into_another_limiter,
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
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    assert await survived(killer, redis_server)
    monkeypatch.setattr(home, attribute, broken)
    assert not await survived(killer, redis_server)
