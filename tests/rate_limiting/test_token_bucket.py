"""TokenBucketLimiter: every promise of the rule, on a real server."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import NoPermissionError, RedisError

from distsys.errors import RateLimited
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server, Servers
from distsys.rate_limiting import fallback, token_bucket
from distsys.rate_limiting.buckets import SCRIPT, Buckets, _IdenticalRequests
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, Decision, Limit, Request, micro
from distsys.rate_limiting.fallback import OnFailure
from distsys.rate_limiting.token_bucket import TokenBucketLimiter, TokenLease
from tests.bugs import edited, in_script, kills, replaced
from tests.rate_limiting.model import Model, WithoutExpiry, capacities, rates, schedules

Redis = redis.asyncio.Redis
START = 1_700_000_000


class Clock:
    """A clock of whole microseconds that the test moves; it tells seconds, as a limiter expects."""

    def __init__(self) -> None:
        self.us = START * MICRO

    def __call__(self) -> float:
        return self.us / MICRO


def limiter(redis: Redis, capacity: float = 10, refill_rate: float = 1, **options: Any) -> TokenBucketLimiter:
    if "clock" in options:
        redis = WithoutExpiry(connection_pool=redis.connection_pool)
    return TokenBucketLimiter(redis, capacity=capacity, refill_rate=refill_rate, **options)


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await fact():
            await asyncio.sleep(0)


async def calls(redis: Redis) -> int:
    """Return how many scripts the server has run."""
    stats = await redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))


# ---- the promise


@kills("nothing is taken", in_script(SCRIPT, "if granted > 0 and cost ~= 0", "if granted > 0 and cost < 0"))
@kills(
    "nothing is refilled",
    in_script(SCRIPT, "used = used - floor(elapsed / den) * num - floor(part / den)", "used = used - 0"),
)
async def test_a_burst_up_to_the_capacity_then_the_rate(redis: Redis) -> None:
    """The limiter of the quick start grants a hundred at once, then ten a second."""
    clock = Clock()
    bucket = limiter(redis, 100, 10, clock=clock)
    assert [await bucket.is_allowed("user:42") for _ in range(102)] == [True] * 100 + [False] * 2
    clock.us += MICRO
    assert [await bucket.is_allowed("user:42") for _ in range(12)] == [True] * 10 + [False] * 2
    assert await bucket.is_allowed("user:43")


@settings(max_examples=150)
@given(capacity=capacities, rate=rates, schedule=schedules)
async def test_it_decides_as_the_textbook_does(
    redis_server: Server, capacity: float, rate: float, schedule: list[tuple[int, Fraction]]
) -> None:
    """Random limits, costs, times and clock steps, also backwards, get the answers of exact fractions."""
    clock, model = Clock(), Model(capacity, rate)
    async with Redis.from_url(redis_server.url) as client:
        await client.flushdb()
        one, other = limiter(client, capacity, rate, clock=clock), limiter(client, capacity, rate, clock=clock)
        for number, (step, share) in enumerate(schedule):
            clock.us += step
            cost = max(1, math.floor(share * Fraction(capacity) * MICRO))
            decision = await (one, other)[number % 2].try_acquire("k", cost / MICRO)
            assert decision.allowed == model.ask(clock.us, Fraction(cost, MICRO))
            left = model.capacity - model.used_at(clock.us)
            assert abs(decision.remaining - left) <= 1
            assert decision.remaining <= left + Fraction(1, MICRO)


@settings(max_examples=100)
@given(capacity=capacities, rate=rates, schedule=schedules)
async def test_no_span_of_time_admits_more_than_capacity_and_refill(
    redis_server: Server, capacity: float, rate: float, schedule: list[tuple[int, Fraction]]
) -> None:
    """admitted(T) <= capacity + refill_rate * T for every span between two requests."""
    clock, admitted = Clock(), []
    async with Redis.from_url(redis_server.url) as client:
        await client.flushdb()
        bucket = limiter(client, capacity, rate, clock=clock)
        for step, share in schedule:
            clock.us += abs(step)
            cost = max(1, math.floor(share * Fraction(capacity) * MICRO))
            if await bucket.is_allowed("k", cost / MICRO):
                admitted.append((clock.us, Fraction(cost, MICRO)))
    for first in range(len(admitted)):
        total = Fraction(0)
        for at, cost in admitted[first:]:
            total += cost
            assert total <= Fraction(capacity) + Fraction(rate) * Fraction(at - admitted[first][0], MICRO) * (
                1 + Fraction(1, 10**9)
            )


@settings(max_examples=100)
@given(capacity=capacities, rate=rates, share=st.sampled_from([Fraction(1, 7), Fraction(1, 2), Fraction(1)]))
async def test_retry_after_is_exact(redis_server: Server, capacity: float, rate: float, share: Fraction) -> None:
    """After so many seconds the same request passes; a microsecond before, it is refused."""
    clock = Clock()
    cost = max(1, math.floor(share * Fraction(capacity) * MICRO)) / MICRO
    async with Redis.from_url(redis_server.url) as client:
        await client.flushdb()
        bucket = limiter(client, capacity, rate, clock=clock)
        while decision := await bucket.try_acquire("k", cost):
            pass
        wait = round(decision.retry_after * MICRO)
        assert wait > 0
        clock.us += wait - 1
        early = await bucket.try_acquire("k", cost)
        assert not early
        clock.us += 1
        assert await bucket.try_acquire("k", cost)


@kills(
    "a refused request takes as well",
    in_script(
        SCRIPT,
        "if granted > 0 and cost ~= 0 then bucket[USED], bucket[CHANGED] = max(0, bucket[USED] + granted * cost)",
        "if cost ~= 0 then bucket[USED], bucket[CHANGED] = max(0, bucket[USED] + max(granted, 1) * cost)",
    ),
)
async def test_a_refused_request_takes_nothing(redis: Redis) -> None:
    """Many refused requests do not keep the bucket empty."""
    clock = Clock()
    bucket = limiter(redis, 2, 1, clock=clock)
    for _ in range(2):
        assert await bucket.is_allowed("k")
    for _ in range(10):
        clock.us += MICRO // 20
        assert not await bucket.is_allowed("k")
    clock.us += MICRO // 2
    assert await bucket.is_allowed("k")


async def test_slow_rates_refill_however_often_they_are_asked(redis: Redis) -> None:
    """At one token an hour, 400 requests in between lose no fraction of a microtoken."""
    clock = Clock()
    bucket = limiter(redis, 1, 1 / 3600, clock=clock)
    assert await bucket.is_allowed("k", 1)
    for _ in range(400):
        clock.us += 9 * MICRO - 1
        assert not await bucket.is_allowed("k")
    clock.us += 400
    assert await bucket.is_allowed("k")


@kills("a fraction of a microtoken gets lost", in_script(SCRIPT, "used, part % den end", "used, 0 end"))
async def test_a_fraction_of_a_microtoken_is_carried_over(redis: Redis) -> None:
    """A third of a microtoken refills per microsecond: four and two microseconds together make two."""
    clock = Clock()
    bucket = limiter(redis, 1, 1 / 3, clock=clock)
    assert await bucket.is_allowed("k")
    for step in (4, 2) * 5:
        clock.us += step
        assert await bucket.is_allowed("k", 0.000001)
        assert not await bucket.is_allowed("k", 0.000001)


async def test_a_million_tokens_at_once_are_exact(redis: Redis) -> None:
    """The capacity is the largest one allowed, a billion."""
    clock = Clock()
    bucket = limiter(redis, MAX_TOKENS, 1_000_000, clock=clock)
    assert await bucket.is_allowed("k", MAX_TOKENS)
    clock.us += MICRO - 1
    assert not await bucket.is_allowed("k", 1_000_000)
    assert await bucket.is_allowed("k", 999_999)
    clock.us += 1
    assert await bucket.is_allowed("k", 1)
    assert not await bucket.is_allowed("k", 0.000001)


@kills("a clock set back takes", in_script(SCRIPT, "local elapsed = max(0, now - at)", "local elapsed = now - at"))
@kills("a clock set back gives twice", in_script(SCRIPT, "bucket[AT] = max(now, at)", "bucket[AT] = now"))
async def test_a_clock_set_back_takes_nothing_and_gives_nothing_twice(redis: Redis) -> None:
    """The clock goes back a minute: what is left stays, and the minute is not refilled a second time."""
    clock = Clock()
    bucket = limiter(redis, 10, 1, clock=clock)
    for _ in range(6):
        assert await bucket.is_allowed("k")
    clock.us -= 60 * MICRO
    assert (await bucket.peek("k")).remaining == 4
    assert await bucket.is_allowed("k")
    clock.us += 60 * MICRO
    assert (await bucket.peek("k")).remaining == 3


@kills("the time is the client's", in_script(SCRIPT, "redis.call('TIME')", "{12345, 0}"))
async def test_the_time_is_the_servers(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client believes about the time does not matter."""
    before = await redis.time()
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 12345.0)
        bucket = limiter(redis, 1, 0.001)
        assert await bucket.is_allowed("k")
    stored = await redis.get(bucket._key("k"))
    _, at, _ = struct.unpack("<ddd", stored)
    assert before[0] * MICRO + before[1] <= at
    after = await redis.time()
    assert at <= after[0] * MICRO + after[1]


# ---- what it leaves on the server


@pytest.mark.parametrize(("capacity", "rate"), [(1, 1_000_000), (5, 100), (10, 1), (0.5, 0.01), (100, 3)])
@kills(
    "the bucket expires before it is full",
    in_script(SCRIPT, "* bucket[DEN] / 1000) + 1000", "* bucket[DEN] / 2000) + 1"),
    capacity=10,
    rate=1,
)
@kills("a bucket has no TTL", in_script(SCRIPT, ", 'PX', min(ms, 2 ^ 53))", ")"), capacity=10, rate=1)
async def test_every_key_has_a_ttl_of_at_least_the_time_to_fill(redis: Redis, capacity: float, rate: float) -> None:
    """A TTL of 0 ms would delete the bucket, so that a rate of more than twice the burst had no limit at all."""
    bucket = limiter(redis, capacity, rate)
    assert await bucket.is_allowed("k", capacity)
    (key,) = await redis.keys("*")
    assert await redis.pttl(key) > 1000 * (capacity / rate)
    assert await redis.pttl(key) <= 1000 * (capacity / rate) + 1001


async def test_a_full_bucket_leaves_no_key(redis: Redis) -> None:
    """After a refund of everything, or a reset, it is as if the bucket had never been used."""
    bucket = limiter(redis)
    await bucket.is_allowed("k", 3)
    await bucket.refund("k", 3)
    assert await redis.keys("*") == []
    await bucket.is_allowed("k", 3)
    await bucket.reset("k")
    assert await redis.keys("*") == []


async def test_other_limits_go_on_with_what_was_used(redis: Redis) -> None:
    """A larger bucket gives the difference, a smaller one is in debt; neither gives a free start."""
    clock = Clock()
    for _ in range(8):
        assert await limiter(redis, 10, 1, clock=clock).is_allowed("k")
    assert (await limiter(redis, 20, 5, clock=clock).peek("k")).remaining == 12
    small = limiter(redis, 5, 2, clock=clock)
    assert not await small.is_allowed("k")
    assert (await small.peek("k")).retry_after == 2.0
    clock.us += 2 * MICRO
    assert await small.is_allowed("k")


@pytest.mark.parametrize(
    "key", ["a b", "ключ", "{user}", "}{", "a:b", "line\nbreak", "%7B", "\x00", "x" * 10_240, "distsys:bucket:1::{k}"]
)
async def test_any_text_is_a_key_of_its_own(redis: Redis, key: str) -> None:
    """No two of these texts share a bucket."""
    bucket = limiter(redis, 1)
    assert await bucket.is_allowed(key)
    assert not await bucket.is_allowed(key)
    assert await bucket.is_allowed(key + "}")
    assert await limiter(redis, 1, name="other").is_allowed(key)
    assert len(await redis.keys("distsys:bucket:1:*")) == 3


@kills("keys keep their braces", replaced(token_bucket, "hash_tag", lambda name: name))
async def test_no_key_reaches_into_another_limiter(redis: Redis) -> None:
    """A user who may choose the key can't forge another limiter's name with braces and colons."""
    assert await limiter(redis, 1, name="a").is_allowed("b}:{c")
    assert await limiter(redis, 1, name="a:{b}").is_allowed("c")


NAMED = st.tuples(st.text(), st.text(min_size=1))


@given(one=NAMED, other=NAMED)
def test_names_and_keys_of_tenants_never_meet(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two limiters and two keys share a bucket only when both are the same, whatever colons and braces they hold."""
    client = Redis()
    keys = [limiter(client, name=name)._key(key) for name, key in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


# ---- one call for many


def all_alike(group: _IdenticalRequests, granted: int, used: list[int]) -> None:
    """Stand in for resolve() with a broken one, which answers everybody as the first."""
    for future in group.futures:
        future.set_result((1, used, 0))


@kills("all of a batch get the first one's answer", replaced(_IdenticalRequests, "resolve", all_alike))
@kills("requests are not batched", replaced(Buckets, "ask", Buckets._ask_alone))
async def test_requests_that_arrive_together_go_out_together(redis: Redis) -> None:
    """The first goes alone, the other ninety-nine in one script call; each gets the answer it would have got alone."""
    bucket = limiter(redis, 60, 0.001)
    before = await calls(redis)
    decisions = await asyncio.gather(*(bucket.try_acquire("k") for _ in range(100)))
    assert await calls(redis) - before <= 3  # 2, and EVAL where the script is not known yet
    assert [one.allowed for one in decisions] == [True] * 60 + [False] * 40
    assert [one.remaining for one in decisions] == [*range(59, -1, -1), *[0] * 40]


@kills(
    "requests of different cost are counted as one kind",
    replaced(Request, "__ne__", lambda one, other: one.keys != other.keys),
)
async def test_together_each_key_and_cost_counts_for_itself(redis: Redis) -> None:
    """They are decided in the order of arrival: small requests after a large one that no longer fits still pass."""
    bucket = limiter(redis, 10, 0.001)
    wanted = [("a", 1), ("a", 8), ("b", 10), ("a", 2), ("a", 1), ("b", 1), ("a", 1), ("c", 3)]
    decisions = await asyncio.gather(*(bucket.try_acquire(key, cost) for key, cost in wanted))
    assert [bool(one) for one in decisions] == [True, True, True, False, True, False, False, True]


@settings(max_examples=60)
@given(wanted=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=40))
async def test_together_is_as_one_by_one(redis_server: Server, wanted: list[tuple[str, int]]) -> None:
    """Any mixture of keys and costs gets the decisions that it would get one by one."""
    clock = Clock()
    async with Redis.from_url(redis_server.url) as client:
        await client.flushdb()
        one, two = limiter(client, clock=clock, name="one"), limiter(client, clock=clock, name="two")
        together = await asyncio.gather(*(one.try_acquire(*each) for each in wanted))
        assert together == [await two.try_acquire(*each) for each in wanted]


async def test_a_lone_request_is_one_call_and_no_task(redis: Redis) -> None:
    """Nothing waits when nothing is under way."""
    bucket = limiter(redis)
    await bucket.is_allowed("k")
    before = await calls(redis)
    tasks = asyncio.all_tasks()
    for _ in range(5):
        assert await bucket.is_allowed("k")
        assert asyncio.all_tasks() <= tasks
    assert await calls(redis) - before == 5


async def test_cancelling_one_caller_cancels_nobody_else(redis: Redis) -> None:
    """Nor does the caller whose call is under way. A request that was cancelled while waiting took nothing."""
    bucket = limiter(redis, 10, 0.001)
    tasks = [asyncio.create_task(bucket.is_allowed("k")) for _ in range(8)]
    await asyncio.sleep(0)
    for gone in (tasks[0], tasks[3], tasks[5]):
        gone.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in done] == [n in (0, 3, 5) for n in range(8)]
    assert (await bucket.peek("k")).remaining in (4, 5)  # the first may have been granted


async def test_a_failure_reaches_each_caller_and_the_next_call_is_fresh(redis: Redis) -> None:
    """The batch fails as a whole; the next call works again."""
    bucket = limiter(redis)
    await redis.set(bucket._key("k"), "not a bucket")
    done = await asyncio.gather(*(bucket.is_allowed("k") for _ in range(5)), return_exceptions=True)
    assert all(isinstance(one, RedisError) for one in done)
    await redis.delete(bucket._key("k"))
    assert await bucket.is_allowed("k")


def test_a_second_event_loop_starts_afresh(redis_server: Server) -> None:
    """A call that was under way in a loop that has ended blocks no later request."""
    client = Redis.from_url(redis_server.url)
    bucket = limiter(client, 100, 1, name="loops")

    async def abandon() -> None:
        tasks = [asyncio.create_task(bucket.is_allowed("k")) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await client.connection_pool.disconnect(inuse_connections=True)

    async def ask() -> bool:
        try:
            return await bucket.is_allowed("k")
        finally:
            await client.aclose()

    asyncio.run(abandon())
    assert asyncio.run(ask())


async def test_scripts_that_the_server_forgot_are_brought_along(redis: Redis) -> None:
    bucket = limiter(redis)
    for _ in range(3):
        assert await bucket.is_allowed("k")
        await redis.script_flush()


# ---- waiting


async def test_acquire_waits_exactly_as_long_as_it_must(redis: Redis) -> None:
    """It sleeps until the tokens can be there, and asks again then: two calls, no polling."""
    bucket = limiter(redis, 1, 20)
    assert await bucket.is_allowed("k")
    before = await calls(redis)
    assert await bucket.acquire("k", timeout=10)
    assert await calls(redis) - before == 2


async def test_waiters_are_served_in_order(redis: Redis) -> None:
    """Waiters of one process are FIFO."""
    bucket, order = limiter(redis, 1, 50), []

    async def wait(number: int) -> None:
        await bucket.acquire("k", timeout=10)
        order.append(number)

    await asyncio.gather(*(wait(number) for number in range(8)))
    assert order == list(range(8))
    assert not bucket._queues._locks


async def test_a_timeout_that_cannot_be_enough_is_told_at_once(redis: Redis) -> None:
    """RateLimited carries what the caller needs next, and nothing was taken."""
    bucket = limiter(redis, 1, 0.01)
    assert await bucket.is_allowed("k")
    for timeout in (0, 5):
        with pytest.raises(RateLimited, match=r"'k' has no tokens left \(1 at once and 0\.01 a second\)") as refused:
            await bucket.acquire("k", timeout=timeout)
        assert 90 < refused.value.retry_after <= 100
        assert refused.value.problem()["status"] == 429


async def test_a_waiter_behind_others_gives_up_in_time(redis: Redis) -> None:
    """If its turn does not come, it gets RateLimited, and the waiter before it goes on."""
    bucket = limiter(redis, 1, 5)
    assert await bucket.is_allowed("k")
    first = asyncio.create_task(bucket.acquire("k"))
    await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await bucket.acquire("k", timeout=0.01)
    assert await first


async def test_a_cancelled_waiter_leaves_the_queue(redis: Redis) -> None:
    bucket = limiter(redis, 1, 20)
    assert await bucket.is_allowed("k")
    waiters = [asyncio.create_task(bucket.acquire("k", timeout=10)) for _ in range(3)]
    await asyncio.sleep(0)
    waiters[1].cancel()
    done = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(one) for one in done] == [Decision, asyncio.CancelledError, Decision]


# ---- leases


async def test_a_lease_decides_without_asking(redis: Redis) -> None:
    """Thirty-three requests take one call, and each decision says whether Redis or the lease made it."""
    bucket = limiter(redis, 100, 0.001, lease=TokenLease(tokens=32, seconds=60))
    await redis.script_flush()
    before = await calls(redis)
    decisions = [await bucket.try_acquire("k") for _ in range(33)]
    assert await calls(redis) - before == 2  # NOSCRIPT, and the one
    assert [one.source for one in decisions] == ["redis", *["lease"] * 32]
    assert [one.remaining for one in decisions] == list(range(99, 66, -1))


async def test_a_lease_never_grants_more_than_there_is(redis: Redis) -> None:
    """The last slice is what is left: all slices together are the bucket's capacity."""
    bucket = limiter(redis, 40, 0.001, lease=TokenLease(tokens=32, seconds=60))
    assert sum([await bucket.is_allowed("k") for _ in range(60)]) == 40


@kills("a slice is given back and kept", edited(TokenBucketLimiter, "_drop_slice", ".pop(key, None)", ".get(key)"))
async def test_what_is_left_is_given_back_on_close(redis: Redis) -> None:
    """A second close gives nothing back."""
    bucket = limiter(redis, 100, 0.001, lease=TokenLease(tokens=32, seconds=60))
    for _ in range(3):
        assert await bucket.is_allowed("k")
    assert (await bucket.peek("k")).remaining == 67
    await bucket.aclose()
    await bucket.aclose()
    assert (await bucket.peek("k")).remaining == 97


async def test_a_slice_goes_back_when_its_time_is_over(redis: Redis) -> None:
    bucket = limiter(redis, 100, 0.001, lease=TokenLease(tokens=32, seconds=0.02))
    assert await bucket.is_allowed("k")

    async def back() -> bool:
        return (await bucket.peek("k")).remaining == 99

    await until(back)
    assert not bucket._slices


@kills(
    "every request leases a slice",
    edited(TokenBucketLimiter, "_with_slice", "key in self._slices or key in self._leasing or", ""),
)
async def test_many_at_once_take_one_slice(redis: Redis) -> None:
    """While a slice is on its way, the other requests ask for themselves: a process never holds two slices."""
    bucket = limiter(redis, 1000, 0.001, lease=TokenLease(tokens=32, seconds=60))
    assert all(await asyncio.gather(*(bucket.is_allowed("k") for _ in range(50))))
    assert (await bucket.peek("k")).remaining == 1000 - 50 - 32


@pytest.mark.parametrize("processes", [1, 4])
async def test_the_overshoot_of_leases_stays_below_its_bound(redis: Redis, processes: int) -> None:
    """The worst case: slices are taken, the bucket refills, and then everything is used at once."""
    clock, tokens, capacity = Clock(), 8, 40
    leased = [
        limiter(redis, capacity, 10, lease=TokenLease(tokens=tokens, seconds=60), clock=clock) for _ in range(processes)
    ]
    for bucket in leased:
        assert await bucket.is_allowed("k")
    clock.us += 60 * MICRO
    admitted = 0
    for bucket in leased:
        while await bucket.is_allowed("k"):
            admitted += 1
    bound = min(processes * tokens, 10 * 60)
    assert capacity < admitted <= capacity + bound
    for bucket in leased:
        await bucket.aclose()


async def test_a_cancelled_or_failed_lease_leaves_no_placeholder(redis: Redis) -> None:
    """The next request takes a slice again."""
    bucket = limiter(redis, 100, 1, lease=TokenLease(tokens=8, seconds=60))
    task = asyncio.create_task(bucket.is_allowed("k"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await redis.set(bucket._key("bad"), "not a bucket")
    with pytest.raises(RedisError):
        await bucket.is_allowed("bad")
    assert not bucket._slices
    assert not bucket._leasing
    await bucket.is_allowed("k")
    assert bucket._slices


async def test_a_slice_that_can_not_be_given_back_is_logged(
    own_redis: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokens come back by the refill; closing does not fail."""
    async with Redis.from_url(own_redis.url) as client:
        bucket = limiter(client, lease=TokenLease(tokens=8, seconds=60), name="slice")
        assert await bucket.is_allowed("k")
        await own_redis.kill()
        await bucket.aclose()
    assert "limiter 'slice': giving back a slice of 'k' failed" in caplog.text


# ---- without Redis


POLICIES: list[tuple[Any, list[bool]]] = [
    ("open", [True] * 4),
    ("closed", [False] * 4),
    ("local", [True, True, False, False]),
]


@pytest.mark.parametrize(("policy", "answers"), POLICIES)
async def test_a_dead_redis_is_answered_for_by_the_policy(
    own_redis: Server, caplog: pytest.LogCaptureFixture, policy: Any, answers: list[bool]
) -> None:
    """The decision says which policy applied; the log reports the change, not every request."""
    async with Redis.from_url(own_redis.url) as client:
        bucket = limiter(client, 4, 0.001, name="dead", on_failure=OnFailure(policy=policy, fraction=0.5, timeout=5))
        assert (await bucket.try_acquire("k")).source == "redis"
        await own_redis.kill()
        decisions = [await bucket.try_acquire("k") for _ in range(4)]
        assert [one.allowed for one in decisions] == answers
        assert {one.source for one in decisions} == {policy}
        assert all(one.retry_after > 0 for one in decisions if not one)
        await own_redis.restart()
        assert (await bucket.try_acquire("k")).source == "redis"
    assert caplog.text.count("Redis does not decide") == 1
    assert caplog.text.count("Redis decides again") == 1


@pytest.mark.parametrize("policy", ["open", "closed", "local"])
async def test_a_hung_redis_blocks_nobody(own_redis: Server, policy: Any) -> None:
    """While Redis is stopped, the policy makes every decision, whether one request waits or many."""
    async with Redis.from_url(own_redis.url) as client:
        bucket = limiter(client, 100, 1, on_failure=OnFailure(policy=policy))

        async def decides() -> bool:
            return (await bucket.try_acquire("k")).source == "redis"

        await until(decides)
        await own_redis.pause()
        alone = await bucket.try_acquire("k")
        crowd = await asyncio.gather(*(bucket.try_acquire("k") for _ in range(20)))
        assert {one.source for one in (alone, *crowd)} == {policy}
        await own_redis.resume()
        await until(decides)


async def test_the_loop_runs_on_while_redis_hangs(own_redis: Server) -> None:
    """Other tasks run while a decision is waiting for Redis."""
    async with Redis.from_url(own_redis.url) as client:
        bucket = limiter(client, on_failure=OnFailure(policy="open", timeout=0.2))
        assert await bucket.is_allowed("k")
        await own_redis.pause()
        turns, decision = 0, asyncio.create_task(bucket.try_acquire("k"))
        while not decision.done():
            await asyncio.sleep(0)
            turns += 1
        assert decision.result().source == "open"
        assert turns > 100
        await own_redis.resume()


async def test_without_a_policy_the_error_passes(own_redis: Server) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await own_redis.kill()
        with pytest.raises(redis.exceptions.ConnectionError):
            await limiter(client).is_allowed("k")


@pytest.mark.parametrize("on_failure", [None, OnFailure(policy="open", timeout=5)])
@kills(
    "a policy hides a missing right",
    replaced(fallback, "unavailable", lambda error: True),
    on_failure=OnFailure(policy="open", timeout=5),
)
async def test_a_user_without_scripting_rights_is_told_which(redis: Redis, on_failure: OnFailure | None) -> None:
    """A missing right is a mistake of the set-up, not a failure of Redis: no policy hides it."""
    await redis.acl_setuser("reader", enabled=True, nopass=True, keys="*", commands=["+@read", "+ping", "-@scripting"])
    host = redis.connection_pool.connection_kwargs
    async with Redis(host=host["host"], port=host["port"], username="reader", password="any") as client:
        with pytest.raises(NoPermissionError) as refused:
            await limiter(client, on_failure=on_failure).is_allowed("k")
    assert "+evalsha" in "".join(refused.value.__notes__)
    await redis.acl_deluser("reader")


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity=0: give tokens above 0, at most 1,000,000,000"),
        ({"capacity": -1}, ValueError, "capacity=-1"),
        ({"capacity": math.nan}, ValueError, "capacity=nan"),
        ({"capacity": math.inf}, ValueError, "capacity=inf"),
        ({"capacity": 2e9}, ValueError, "at most 1,000,000,000"),
        ({"capacity": "10"}, TypeError, "capacity='10' is a str; give tokens as a number"),
        ({"capacity": True}, TypeError, "capacity=True is a bool"),
        ({"refill_rate": 0}, ValueError, "refill_rate=0: give tokens per second above 0"),
        ({"refill_rate": 1e-9}, ValueError, "less than one in eleven days"),
        ({"refill_rate": math.nan}, ValueError, "refill_rate=nan"),
        ({"refill_rate": None}, TypeError, "refill_rate=None"),
        ({"name": 42}, TypeError, "name=42 is a int; give a str"),
    ],
)
def test_limits_that_mean_nothing_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The constructor raises, and the message names the value and its bounds."""
    with pytest.raises(error) as refused:
        TokenBucketLimiter(Redis(), **{"capacity": 10, "refill_rate": 1, **options})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("key", "cost", "error", "message"),
    [
        ("k", 0, ValueError, "cost=0: give tokens above 0"),
        ("k", -1, ValueError, "cost=-1"),
        ("k", math.nan, ValueError, "cost=nan"),
        ("k", "1", TypeError, "cost='1' is a str"),
        ("k", True, TypeError, "cost=True is a bool"),
        ("k", 11, ValueError, "cost=11 could never pass capacity=10: raise it, or split the request"),
        ("", 1, ValueError, "key='' is empty"),
        (42, 1, TypeError, "key=42 is a int; give a str: 'user:42'"),
        (b"k", 1, TypeError, "key=b'k' is a bytes"),
        (["k"], 1, TypeError, "key=['k'] is a list"),
    ],
)
@kills(
    "a cost above the capacity is refused for ever",
    replaced(Limit, "cost", lambda limit, cost: micro("cost", cost)),
    key="k",
    cost=11,
)
async def test_requests_that_mean_nothing_are_refused(
    redis: Redis, key: Any, cost: Any, error: type[Exception], message: str
) -> None:
    """Every method raises, and nothing is taken."""
    bucket = limiter(redis)
    for ask in (bucket.is_allowed, bucket.try_acquire, bucket.acquire, bucket.refund):
        with pytest.raises(error) as refused:
            await ask(key, cost)
        assert message in str(refused.value)
    assert await redis.keys("*") == []


def test_a_blocking_client_is_refused() -> None:
    """It would block the event loop in every decision."""
    with pytest.raises(TypeError, match=r"pass redis\.asyncio\.Redis"):
        limiter(redis.Redis())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnFailure(policy="ignore"), "policy='ignore': 'open', 'closed' or 'local'"),  # type: ignore[arg-type]
        (lambda: OnFailure(policy="open", timeout=0), "timeout=0"),
        (lambda: OnFailure(policy="local", fraction=0), "fraction=0"),
        (lambda: OnFailure(policy="local", fraction=1.5), "fraction=1.5"),
        (lambda: TokenLease(tokens=0, seconds=1), "tokens=0"),
        (lambda: TokenLease(tokens=1, seconds=0), "seconds=0"),
        (lambda: TokenLease(tokens=1, seconds=3600), "at most 60"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make()


# ---- cluster


async def test_a_cluster_decides_in_every_slot(redis_cluster: redis.asyncio.RedisCluster) -> None:
    """On three masters, requests that arrive together are one call per slot, and each key has its own bucket."""
    bucket = limiter(redis_cluster, 2, 0.001, name="cluster")
    keys = [f"user:{number}" for number in range(30)]
    nodes = {redis_cluster.get_node_from_key(bucket._key(key)).name for key in keys}
    assert len(nodes) == 3
    for expected in (True, True, False):
        assert await asyncio.gather(*(bucket.is_allowed(key) for key in keys)) == [expected] * 30
    await asyncio.gather(*(bucket.reset(key) for key in keys))


async def test_a_failover_grants_at_most_the_capacity_again(servers: Servers, own_redis: Server) -> None:
    """Four grants are not replicated when the replica is promoted: those four, and no more, pass once again."""
    async with TcpProxy(own_redis.host, own_redis.port) as link:
        replica = await servers.redis("failover", replica_of=replace(own_redis, port=link.port))
        async with Redis.from_url(own_redis.url) as before, Redis.from_url(replica.url) as after:
            first = limiter(before, 10, 0.001)
            for _ in range(6):
                assert await first.is_allowed("k")
            await before.wait(1, 10_000)
            link.drop()
            for expected in (True, True, True, True, False):
                assert await first.is_allowed("k") == expected
            await servers.promote(replica)
            second = limiter(after, 10, 0.001)
            assert sum([await second.is_allowed("k") for _ in range(10)]) == 4
            link.heal()
    await replica.kill()
