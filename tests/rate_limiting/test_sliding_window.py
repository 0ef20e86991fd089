"""SlidingWindowLimiter: every promise of the rule, on a real server. Most of them by a clock that the test moves."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable
from fractions import Fraction
from typing import Any

import pytest
import redis as sync_redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import NoPermissionError, RedisError

from distsys._support.redis import Script
from distsys.errors import RateLimited
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server
from distsys.rate_limiting import sliding_window
from distsys.rate_limiting.decision import MICRO, Decision, Request
from distsys.rate_limiting.fallback import OnFailure
from distsys.rate_limiting.sliding_window import LOOK, SCRIPTS, Precision, SlidingWindowLimiter
from tests.bugs import Plant, in_script, kills, replaced

Redis = redis.asyncio.Redis
BOTH: list[Precision] = ["exact", "approximate"]
both = pytest.mark.parametrize("precision", BOTH)
WINDOW = 10 * MICRO  # in the tests with a clock of their own; the server's TTL counts real seconds beside it
EXACT, APPROXIMATE = SCRIPTS["exact"], SCRIPTS["approximate"]
_numbers = itertools.count()


class Clock:
    """A clock of server microseconds that the test moves."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * MICRO + 123_457

    def __call__(self) -> float:
        return self.now / MICRO


def limiter(redis: Any, clock: Clock | None = None, **options: Any) -> SlidingWindowLimiter:
    return SlidingWindowLimiter(redis, **({"limit": 3, "window": WINDOW / MICRO, "clock": clock} | options))


async def calls(redis: Redis, command: str) -> int:
    return int((await redis.info("commandstats")).get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a fact by asking for it again and again."""
    async with asyncio.timeout(10):
        while not await fact():
            await asyncio.sleep(0)


def everywhere_in_script(script: Script, old: str, new: str) -> Plant:
    """Plant by editing a text that stands in the script several times."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        broken = Script(script.text.replace(old, new))
        patch.setattr(script, "text", broken.text)
        patch.setattr(script, "sha", broken.sha)

    return plant


async def polls(limiter: SlidingWindowLimiter, key: str, cost: int = 1, timeout: float | None = None) -> Any:
    """Stand in for acquire() with a broken one, which asks every second."""
    while not (decision := await limiter.try_acquire(key, cost)):
        await asyncio.sleep(min(1, decision.retry_after))
    return decision


def without_braces(name: str) -> str:
    """Stand in for hash_tag() with a broken one, under which two keys can meet."""
    return name.replace("{", "").replace("}", "")


def most_in_a_window(admitted: list[tuple[int, int]], window: int = WINDOW) -> int:
    """Return the units in the fullest span [t, t + window) that begins with one of these (microsecond, units)."""
    return max((sum(units for at, units in admitted if t <= at < t + window) for t, _ in admitted), default=0)


# ---- what is admitted


@both
async def test_the_quick_start_runs_as_written(redis: Redis, precision: Precision) -> None:
    """By the server's own clock it admits as many as the limit says, then refuses and says when to come again."""
    limiter = SlidingWindowLimiter(redis, limit=3, window=3600, precision=precision)
    assert [await limiter.is_allowed("user:42") for _ in range(4)] == [True, True, True, False]
    refused = await limiter.try_acquire("user:42")
    assert not refused
    assert refused[:3] == (False, 3, 0)
    assert 3590 < refused.retry_after <= 3600 if precision == "exact" else 3590 < refused.retry_after <= 7200
    assert refused.reset_after >= refused.retry_after
    assert refused.source == "redis"
    assert await limiter.is_allowed("user:43")


@both
@kills(
    "the timestamp as the member",
    in_script(
        EXACT,
        "redis.call('ZADD', key, now, struct.pack('>dI4', total + cost, cost))",
        "redis.call('ZADD', key, now, struct.pack('>dI4', now, cost))",
    ),
    precision="exact",
)
@kills(
    "little-endian members, which one microsecond puts out of order",
    everywhere_in_script(EXACT, "'>dI4'", "'<dI4'"),
    precision="exact",
)
async def test_requests_of_one_microsecond_all_count(redis: Redis, precision: Precision) -> None:
    """With the timestamp as the member, one of them would be stored and the rest admitted for nothing."""
    fixed = limiter(redis, Clock(), limit=5, precision=precision)
    assert sum([await fixed.is_allowed("k") for _ in range(20)]) == 5
    assert (await fixed.peek("k")).remaining == 0


@kills("the window closed at both ends", in_script(EXACT, "oldest <= now - window", "oldest < now - window"))
@kills(
    "a window of a microsecond less",
    in_script(
        EXACT,
        "oldest <= now - window then\n  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)",
        "oldest <= now - window + 1 then\n  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window + 1)",
    ),
)
async def test_the_window_is_half_open(redis: Redis) -> None:
    """What was admitted at t leaves at t + window exactly, not a microsecond sooner."""
    clock = Clock()
    one = limiter(redis, clock, limit=1)
    assert await one.is_allowed("k")
    clock.now += WINDOW - 1
    assert (await one.try_acquire("k")).retry_after == 1 / MICRO
    clock.now += 1
    assert await one.is_allowed("k")


@kills("retry_after of the oldest, whatever the cost", in_script(EXACT, "member(holder(over))", "member(0)"))
async def test_a_large_request_waits_until_enough_have_left(redis: Redis) -> None:
    """The sum of the costs that leave counts, not the number of requests."""
    clock = Clock()
    ten = limiter(redis, clock, limit=10)
    for cost in (1, 1, 5, 1, 2):
        assert await ten.is_allowed("k", cost)
        clock.now += 1000
    for cost, requests in ((1, 1), (2, 2), (3, 3), (7, 3), (8, 4), (9, 5), (10, 5)):
        refused = await ten.try_acquire("k", cost)
        assert round(refused.retry_after * MICRO) == WINDOW - (6 - requests) * 1000


async def test_no_burst_where_two_fixed_windows_meet(redis: Redis) -> None:
    """Full at the end of one minute, the limiter refuses in the next until the window has passed."""
    clock = Clock()
    minute = limiter(redis, clock, limit=100)
    assert sum([await minute.is_allowed("k") for _ in range(150)]) == 100
    clock.now += WINDOW // 2
    assert sum([await minute.is_allowed("k") for _ in range(150)]) == 0
    clock.now += WINDOW // 2
    assert sum([await minute.is_allowed("k") for _ in range(150)]) == 100


@both
@kills(
    "refused requests are stored too",
    in_script(
        EXACT,
        "if over > 0 then",
        "if over > 0 then redis.call('ZADD', key, now, struct.pack('>dI4', total + cost, cost))",
    ),
    precision="exact",
)
async def test_a_refused_request_takes_nothing(redis: Redis, precision: Precision) -> None:
    """It takes neither room nor memory: fifty refusals leave the key as it was."""
    clock = Clock()
    three = limiter(redis, clock, precision=precision)
    assert await three.is_allowed("k", 2)
    before = await redis.dump(three._key("k"))
    assert not any([await three.is_allowed("k", 2) for _ in range(50)])
    assert await redis.dump(three._key("k")) == before
    assert await three.is_allowed("k", 1)


@both
async def test_a_decision_is_one_round_trip_and_one_script(redis: Redis, precision: Precision) -> None:
    """This holds for admitted and refused requests; the exact window trims and adds at most once in each."""
    clock = Clock()
    three = limiter(redis, clock, precision=precision)
    await three.is_allowed("warm")
    await redis.config_resetstat()
    for _ in range(4):
        await three.is_allowed("k")
    clock.now += 2 * WINDOW
    assert await three.is_allowed("k")
    assert await calls(redis, "evalsha") == 5
    assert await calls(redis, "eval") == 0
    if precision == "exact":
        assert await calls(redis, "zadd") == 4
        assert await calls(redis, "zremrangebyscore") == 1


@kills(
    "a cost of any size counts as one",
    in_script(EXACT, "struct.pack('>dI4', total + cost, cost)", "struct.pack('>dI4', total + 1, 1)"),
)
async def test_a_request_is_one_member_whatever_its_cost(redis: Redis) -> None:
    """So memory grows with the number of requests, never with their costs."""
    big = limiter(redis, Clock(), limit=1_000_000_000)
    assert await big.is_allowed("k", 999_999_999)
    assert await big.is_allowed("k")
    assert not await big.is_allowed("k")
    assert await redis.zcard(big._key("k")) == 2


@kills("nothing is ever trimmed", in_script(EXACT, "oldest <= now - window", "false"))
async def test_there_are_never_more_members_than_the_limit(redis: Redis) -> None:
    """The next request, admitted or not, trims the members that have left the window."""
    clock = Clock()
    five = limiter(redis, clock, limit=5)
    admitted = 0
    for _ in range(60):
        clock.now += WINDOW // 7
        admitted += await five.is_allowed("k")
        assert await redis.zcard(five._key("k")) <= 5
    assert admitted > 30


@both
@kills(
    "both precisions write the same key",
    replaced(sliding_window, "KEY_PREFIXES", dict.fromkeys(BOTH, "distsys:window:1")),
    precision="exact",
)
async def test_the_two_precisions_do_not_share_a_key(redis: Redis, precision: Precision) -> None:
    """A limiter that changes its precision begins empty, and finds no key of the wrong type."""
    other: Precision = "approximate" if precision == "exact" else "exact"
    assert await limiter(redis, limit=1, precision=precision).is_allowed("k")
    assert await limiter(redis, limit=1, precision=other).is_allowed("k")
    assert not await limiter(redis, limit=1, precision=precision).is_allowed("k")


@both
async def test_many_at_once_on_connections_of_their_own_never_exceed_the_limit(
    redis_server: Server, redis: Redis, precision: Precision
) -> None:
    """Sixty requests of four clients race for a window of twenty."""
    clients = [Redis.from_url(redis_server.url) for _ in range(4)]
    windows = [limiter(each, limit=20, window=3600, precision=precision) for each in clients]
    answers = await asyncio.gather(*(windows[i % 4].is_allowed("k") for i in range(60)))
    await asyncio.gather(*(each.aclose() for each in clients))
    assert sum(answers) == 20


# ---- against a model, on schedules that nobody would think of

COSTS = st.integers(1, 4)
WAITS = st.one_of(
    st.sampled_from([0, 0, 1, WINDOW - 1, WINDOW, WINDOW + 1]),
    st.integers(1, WINDOW // 8),
    st.integers(1, WINDOW // 8),
    st.integers(0, 3 * WINDOW),
)
BACK = st.one_of(st.integers(-3, 0), st.integers(-5 * WINDOW, 0))
ANY_STEP = st.one_of(BACK, st.integers(0, 5 * WINDOW))


def schedules(step: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Mix requests, waits, waits of exactly what the last refusal said, clock steps and looks."""
    operation = st.one_of(
        st.tuples(st.just("take"), COSTS),
        st.tuples(st.just("take"), COSTS),
        st.tuples(st.just("wait"), WAITS),
        st.tuples(st.just("retry"), st.sampled_from([-1, 0])),
        st.tuples(st.just("step"), step),
        st.tuples(st.just("look"), st.just(1)),
    )
    return st.lists(operation, min_size=8, max_size=40)


class Log:
    """The exact window as its promise reads: one entry per unit, and brute force."""

    def __init__(self, limit: int) -> None:
        self.limit, self.units = limit, list[int]()

    def decide(self, now: int, cost: int, *, take: bool) -> Decision:
        self.units = [min(at, now) for at in self.units if min(at, now) + WINDOW > now]
        leaves = sorted(at + WINDOW - now for at in self.units)
        fits = len(leaves) + cost <= self.limit
        wait = 0 if fits else next(t for t in leaves if sum(each > t for each in leaves) + cost <= self.limit)
        if fits and take:
            self.units += [now] * cost
        left = max(0, self.limit - len(self.units))
        reset = max((at + WINDOW - now for at in self.units), default=0)
        return Decision(fits, self.limit, left, wait / MICRO, reset / MICRO)


class Counters:
    """The approximate window as its page describes it, in fractions."""

    def __init__(self, limit: int) -> None:
        self.limit, self.start, self.at, self.previous, self.current = limit, None, 0, 0, 0
        self.start: int | None

    def decide(self, now: int, cost: int, *, take: bool) -> tuple[bool, int]:
        """Return whether it passes, and how much is left."""
        if self.start is None:
            self.start = self.at = now
        if now < self.at:
            self.start, self.at = self.start - (self.at - now), now
        passed = (now - self.start) // WINDOW
        start, previous, current = self.start, self.previous, self.current
        if passed == 1:
            start, previous, current = start + WINDOW, current, 0
        elif passed > 1:
            start, previous, current = now, 0, 0
        counted = current + math.ceil(previous * (1 - Fraction(now - start, WINDOW)))
        fits = counted + cost <= self.limit
        if fits and take:
            self.start, self.at, self.previous, self.current = start, now, previous, current + cost
            counted += cost
        if self.previous == self.current == 0:
            self.start = None
        return fits, max(0, self.limit - counted)


class Run:
    """One schedule on one key, through two clients, with true time kept apart from the server's clock."""

    def __init__(self, clients: tuple[Redis, Redis], precision: Precision, limit: int) -> None:
        self.clock, self.truth, self.wait, self.cost = Clock(), 0, 0, 1
        self.redis, self.key = clients[0], f"k{next(_numbers)}"
        self.limiters = [limiter(each, self.clock, limit=limit, precision=precision) for each in clients]
        self.turns = itertools.cycle(self.limiters)
        self.admitted: list[tuple[int, int]] = []  # (true time, units)

    def pass_time(self, microseconds: int) -> None:
        self.clock.now += microseconds
        self.truth += microseconds

    async def play(self, schedule: list[tuple[str, int]], check: Callable[[int, bool, Decision], None]) -> None:
        for operation, number in schedule:
            if operation == "wait":
                self.pass_time(number)
            elif operation == "step":
                self.clock.now += number
            elif operation == "retry" and self.wait:
                self.pass_time(self.wait + number)
                await self.ask(self.cost, check, take=True)
            elif operation in ("take", "look"):
                await self.ask(min(number, self.limiters[0].limit), check, take=operation == "take")

    async def ask(self, cost: int, check: Callable[[int, bool, Decision], None], *, take: bool) -> None:
        one = next(self.turns)
        decision = await (one.try_acquire(self.key, cost) if take else one.peek(self.key))
        check(cost, take, decision)
        if decision and take:
            self.admitted.append((self.truth, cost))
        self.wait, self.cost = round(decision.retry_after * MICRO), cost
        if not decision:
            await self.try_the_wait(one, cost)

    async def try_the_wait(self, one: SlidingWindowLimiter, cost: int) -> None:
        """Check on a copy of the key: a microsecond before the wait ends it is refused, then it is admitted."""
        assert self.wait >= 1
        now, copy = self.clock.now, f"{self.key}-copy"
        await self.redis.copy(one._key(self.key), one._key(copy), replace=True)
        self.clock.now = now + self.wait - 1
        assert not await one._decide(copy, cost, LOOK)
        self.clock.now = now + self.wait
        assert await one._decide(copy, cost, LOOK)
        self.clock.now = now


async def play(server: Server, precision: Precision, limit: int, schedule: list[tuple[str, int]], model: Any) -> Run:
    async with Redis.from_url(server.url) as a, Redis.from_url(server.url) as b:
        run = Run((a, b), precision, limit)

        def check(cost: int, take: bool, decision: Decision) -> None:
            expected = model.decide(run.clock.now, cost, take=take)
            assert (decision if precision == "exact" else (decision.allowed, decision.remaining)) == expected
            assert decision.retry_after <= (1 if precision == "exact" else 2) * WINDOW / MICRO
            assert decision.reset_after >= decision.retry_after

        await run.play(schedule, check)
    return run


@settings(max_examples=150)
@given(st.integers(1, 6), schedules(ANY_STEP))
async def test_the_exact_window_decides_as_brute_force_does(
    redis_server: Server, limit: int, schedule: list[tuple[str, int]]
) -> None:
    """Two clients and a clock that jumps: every number of every decision is the model's, and retry_after is exact."""
    await play(redis_server, "exact", limit, schedule, Log(limit))


@settings(max_examples=150)
@given(st.integers(1, 6), schedules(BACK))
async def test_no_window_ever_admits_more_than_the_limit(
    redis_server: Server, limit: int, schedule: list[tuple[str, int]]
) -> None:
    """This holds in true time, however often the server's clock was set back."""
    run = await play(redis_server, "exact", limit, schedule, Log(limit))
    assert most_in_a_window(run.admitted) <= limit


@settings(max_examples=150)
@given(st.integers(1, 6), schedules(BACK))
async def test_the_approximate_window_admits_fewer_than_twice_the_limit(
    redis_server: Server, limit: int, schedule: list[tuple[str, int]]
) -> None:
    """The upper bound holds; each decision is that of the weighted counters, and each retry_after is exact."""
    run = await play(redis_server, "approximate", limit, schedule, Counters(limit))
    assert most_in_a_window(run.admitted) <= 2 * limit - 1


@settings(max_examples=150)
@given(st.integers(1, 6), schedules(st.just(0)))
async def test_the_approximate_window_refuses_only_when_two_windows_were_too_full(
    redis_server: Server, limit: int, schedule: list[tuple[str, int]]
) -> None:
    """The lower bound holds: it admits whatever an exact limiter of twice the window would admit."""
    async with Redis.from_url(redis_server.url) as a, Redis.from_url(redis_server.url) as b:
        run = Run((a, b), "approximate", limit)

        def check(cost: int, take: bool, decision: Decision) -> None:
            recent = sum(units for at, units in run.admitted if at > run.truth - 2 * WINDOW)
            assert decision or recent > limit - cost

        await run.play(schedule, check)


@kills(
    "two fixed windows without a weight",
    in_script(APPROXIMATE, "return ceil(previous * (window - elapsed) / window)", "return 0"),
)
@kills(
    "the weight rounded down",
    in_script(
        APPROXIMATE,
        "return ceil(previous * (window - elapsed) / window)",
        "return floor(previous * (window - elapsed) / window)",
    ),
)
async def test_both_bounds_of_the_approximation_are_reached(redis: Redis) -> None:
    """It admits 2 * limit - 1 in one window, and none although the last window was empty: both bounds are tight."""
    clock = Clock()
    over = limiter(redis, clock, limit=5, precision="approximate")
    assert await over.is_allowed("over")  # here the first fixed window begins
    clock.now += WINDOW - 1
    assert sum([await over.is_allowed("over") for _ in range(9)]) == 4
    await over.refund("over")  # the first: now nothing was admitted before this microsecond
    assert await over.is_allowed("over")
    clock.now += WINDOW - 1
    assert sum([await over.is_allowed("over") for _ in range(9)]) == 4  # with the 5 it makes 9 in WINDOW microseconds

    under = limiter(redis, clock, limit=5, precision="approximate")
    assert await under.is_allowed("under", 5)
    clock.now += WINDOW
    assert (await under.try_acquire("under")).retry_after == WINDOW / MICRO / 5
    clock.now += WINDOW // 5 - 1
    assert not await under.is_allowed("under")  # an exact one would have admitted 5 at the window's end


@both
@pytest.mark.parametrize("step", [-1, -WINDOW // 2, -3600 * MICRO])
@kills(
    "a clock that was set back holds everybody up",
    in_script(EXACT, "if newest and newest > now then", "if false then"),
    precision="exact",
    step=-WINDOW // 2,
)
@kills(
    "the counters wait for the clock to catch up",
    in_script(APPROXIMATE, "if at > now then", "if false then"),
    precision="approximate",
    step=-3600 * 1_000_000,
)
async def test_a_clock_that_was_set_back_only_begins_the_wait_anew(
    redis: Redis, precision: Precision, step: int
) -> None:
    """A client that only waits what refusals say gets through, however far the clock went back."""
    clock = Clock()
    three = limiter(redis, clock, precision=precision)
    assert await three.is_allowed("k", 3)
    clock.now += step
    refused = await three.try_acquire("k")
    assert round(refused.retry_after * MICRO) == (WINDOW if precision == "exact" else WINDOW + WINDOW // 3 + 1)
    clock.now += round(refused.retry_after * MICRO)
    assert await three.is_allowed("k")


# ---- refund, reset, peek


@settings(max_examples=100)
@given(
    limit=st.integers(1, 6),
    takes=st.lists(st.tuples(st.integers(0, WINDOW // 2), COSTS), min_size=1, max_size=8),
    which=st.integers(0, 7),
    later=st.lists(st.tuples(st.integers(0, WINDOW // 2), COSTS), max_size=8),
)
@pytest.mark.parametrize("precision", BOTH)
async def test_a_refund_never_makes_room_that_was_not_there(
    redis_server: Server,
    precision: Precision,
    limit: int,
    takes: list[tuple[int, int]],
    which: int,
    later: list[tuple[int, int]],
) -> None:
    """Whichever request is refunded, the promise holds for the others."""
    async with Redis.from_url(redis_server.url) as client:
        clock, key, admitted = Clock(), f"k{next(_numbers)}", list[tuple[int, int]]()
        one = limiter(client, clock, limit=limit, precision=precision)

        async def go(schedule: list[tuple[int, int]]) -> None:
            for wait, cost in schedule:
                clock.now += wait
                if await one.is_allowed(key, min(cost, limit)):
                    admitted.append((clock.now, min(cost, limit)))

        await go(takes)
        in_window = [each for each in admitted if each[0] > clock.now - WINDOW]
        if in_window:
            undone = in_window[which % len(in_window)]
            admitted.remove(undone)
            await one.refund(key, undone[1])
        await go(later)
        assert most_in_a_window(admitted) <= (limit if precision == "exact" else 2 * limit - 1)


@both
@kills(
    "a refund gives back whole requests", in_script(EXACT, "if upto > base then", "if false then"), precision="exact"
)
async def test_a_refund_gives_back_at_once(redis: Redis, precision: Precision) -> None:
    """A refund may be a part of a request, a whole one or several, but never more than was admitted."""
    clock = Clock()
    ten = limiter(redis, clock, limit=10, precision=precision)
    for cost in (4, 3, 3):
        assert await ten.is_allowed("k", cost)
        clock.now += 10
    for back, left in ((1, 1), (3, 4), (4, 8), (9, 10)):
        await ten.refund("k", back)
        assert (await ten.peek("k")).remaining == left
    assert await redis.exists(ten._key("k")) == 0
    assert await ten.is_allowed("k", 10)
    assert not await ten.is_allowed("k")


@both
@kills(
    "a refund loses the time to live",
    in_script(EXACT, "if used > 0 then redis.call('PEXPIRE'", "if false then redis.call('PEXPIRE'"),
    precision="exact",
)
async def test_a_refund_keeps_the_time_to_live(redis: Redis, precision: Precision) -> None:
    """The units that are left after a refund still expire."""
    three = limiter(redis, precision=precision)
    assert await three.is_allowed("k", 3)
    await three.refund("k", 1)
    assert 0 < await redis.pttl(three._key("k")) <= 2 * WINDOW // 1000 + 1000


@both
@kills("a look is a request", in_script(APPROXIMATE, "elseif mode > 0 then", "else"), precision="approximate")
async def test_a_look_takes_nothing(redis: Redis, precision: Precision) -> None:
    """It answers as a request of cost 1 would be answered."""
    clock = Clock()
    one = limiter(redis, clock, limit=1, precision=precision)
    assert await one.peek("k") == Decision(True, 1, 1, 0.0, 0.0)
    assert await redis.exists(one._key("k")) == 0
    assert await one.is_allowed("k")
    refused = await one.try_acquire("k")
    assert await one.peek("k") == refused


@both
async def test_reset_empties_the_window(redis: Redis, precision: Precision) -> None:
    """Other keys keep their windows."""
    one = limiter(redis, limit=1, precision=precision)
    assert await one.is_allowed("a")
    assert await one.is_allowed("b")
    await one.reset("a")
    assert await one.is_allowed("a")
    assert not await one.is_allowed("b")


# ---- what the server keeps


@both
@pytest.mark.parametrize("window", [0.001, 0.0015, 7, 86_400, 31_536_000])
@kills(
    "no time to live",
    in_script(EXACT, "redis.call('PEXPIRE', key, math.ceil(window / 1000) + 1000)", ""),
    precision="exact",
    window=7,
)
@kills(
    "a time to live in whole milliseconds, rounded down",
    in_script(EXACT, "math.ceil(window / 1000) + 1000", "math.floor(window / 1000)"),
    precision="exact",
    window=0.0015,
)
@kills(
    "the counters live for one window only",
    in_script(APPROXIMATE, "start + 2 * window - now or", "start + window - now or"),
    precision="approximate",
    window=7,
)
async def test_every_key_has_a_time_to_live(redis: Redis, precision: Precision, window: float) -> None:
    """The TTL is never 0, never shorter than the key is needed, and never missing."""
    one = SlidingWindowLimiter(redis, limit=1, window=window, precision=precision, clock=Clock())
    assert await one.is_allowed("k")
    fixed_windows = 1 if precision == "exact" else 2
    needed = math.ceil(fixed_windows * window * 1000)
    assert needed < await redis.pttl(one._key("k")) <= needed + 1000


@both
@kills(
    "the time to live of a shorter window stays",
    in_script(EXACT, "redis.call('PEXPIRE', key, math.ceil((newest + window - now) / 1000) + 1000)  -- a window", "--"),
    precision="exact",
)
@kills(
    "another window begins empty",
    in_script(APPROXIMATE, "if length ~= window then", "if length ~= window then previous, current = 0, 0"),
    precision="approximate",
)
async def test_a_longer_window_begins_with_what_was_admitted(redis: Redis, precision: Precision) -> None:
    """A deployment that changes the window gives no fresh start, and the TTL follows."""
    clock = Clock()
    short = limiter(redis, clock, precision=precision)
    long = limiter(redis, clock, precision=precision, window=3600)
    assert await short.is_allowed("k", 3)
    clock.now += WINDOW // 2
    refused = await long.try_acquire("k")
    assert not refused
    assert refused.retry_after > 60
    assert await redis.pttl(long._key("k")) > 3_000_000


@both
async def test_a_shorter_window_and_a_smaller_limit_hold_at_once(redis: Redis, precision: Precision) -> None:
    """The admissions under the larger limit have to leave first, and no command fails."""
    clock = Clock()
    before = limiter(redis, clock, limit=10, window=3600, precision=precision)
    after = limiter(redis, clock, limit=2, precision=precision)
    for _ in range(10):
        assert await before.is_allowed("k")
    refused = await after.try_acquire("k", 2)
    assert (refused.allowed, refused.remaining) == (False, 0)
    clock.now += round(refused.retry_after * MICRO) - 1
    assert not await after.is_allowed("k", 2)
    clock.now += 1
    assert await after.is_allowed("k", 2)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([2, 5]), st.sampled_from([1, 3, 10]), WAITS, COSTS), max_size=30))
@pytest.mark.parametrize("precision", BOTH)
async def test_limiters_of_any_numbers_on_one_key_always_come_to_an_end(
    redis_server: Server, precision: Precision, requests: list[tuple[int, int, int, int]]
) -> None:
    """While a deployment changes limit and window, waiting as long as the refusal says is always enough."""
    async with Redis.from_url(redis_server.url) as client:
        clock, key = Clock(), f"k{next(_numbers)}"
        for limit, window, wait, cost in requests:
            clock.now += wait
            one = limiter(client, clock, limit=limit, window=window, precision=precision)
            decision = await one.try_acquire(key, min(cost, limit))
            if not decision:
                assert 0 < decision.retry_after <= 2 * window
                clock.now += round(decision.retry_after * MICRO)
                assert await one.is_allowed(key, min(cost, limit))


@kills(
    "the count runs past what a double can hold",
    in_script(EXACT, "if total + cost > 9007199254740991 then over = used end", ""),
)
async def test_the_count_begins_anew_before_it_loses_precision(redis: Redis) -> None:
    """Near 2^53 it refuses until the window is empty, instead of counting wrong."""
    clock = Clock()
    three = limiter(redis, clock)
    assert await three.is_allowed("k")
    [(member, score)] = await redis.zrange(three._key("k"), 0, -1, withscores=True)
    await redis.zadd(three._key("k"), {b"\x43\x3f\xff\xff\xff\xff\xff\xff" + member[8:]: score})  # 2^53 - 1
    await redis.zrem(three._key("k"), member)
    refused = await three.try_acquire("k")
    assert refused[:4] == (False, 3, 2, WINDOW / MICRO)
    clock.now += WINDOW
    assert [await three.is_allowed("k") for _ in range(4)] == [True, True, True, False]


# ---- waiting


@both
@kills("acquire asks before there can be room", replaced(SlidingWindowLimiter, "acquire", polls), precision="exact")
async def test_acquire_sleeps_exactly_retry_after(
    redis: Redis, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request, one sleep, one request: it does not poll."""
    clock, slept, sleep = Clock(), list[float](), asyncio.sleep
    one = limiter(redis, clock, limit=1, precision=precision)
    assert await one.is_allowed("k")
    expected = (await one.peek("k")).retry_after

    async def pass_time(seconds: float) -> None:
        slept.append(seconds)
        clock.now += round(seconds * MICRO)
        await sleep(0)

    monkeypatch.setattr("distsys.rate_limiting.queues.asyncio.sleep", pass_time)
    assert await one.acquire("k", timeout=60)
    assert slept == [expected]


@both
async def test_waiters_of_one_process_are_admitted_in_order(redis: Redis, precision: Precision) -> None:
    """By the server's own clock, waiters are FIFO, also when one of them asks for more."""
    one = SlidingWindowLimiter(redis, limit=2, window=0.02, precision=precision)
    order: list[int] = []

    async def enter(number: int) -> None:
        await one.acquire("k", 2 if number % 3 == 0 else 1)
        order.append(number)

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for number in range(9):
            tasks.create_task(enter(number))
    assert order == list(range(9))


@both
async def test_acquire_gives_up_as_soon_as_the_timeout_cannot_be_enough(redis: Redis, precision: Precision) -> None:
    """It raises at once, not at the end of the timeout; the error says when to come again, and is a 429."""
    one = limiter(redis, limit=1, window=3600, precision=precision)
    assert await one.acquire("k", timeout=0)
    with pytest.raises(RateLimited, match=r"'k' has no room left \(1 in 3600 s\)") as refused:
        await one.acquire("k", timeout=60)
    assert refused.value.retry_after > 3000
    assert refused.value.problem()["status"] == 429


def is_queued(limiter: SlidingWindowLimiter) -> bool:
    """Return whether a caller is waiting or asking for the key "k"."""
    lock = limiter._queues._locks.get("k")
    return lock is not None and lock.locked()


async def test_a_waiter_in_the_queue_gives_up_at_its_timeout(redis: Redis) -> None:
    """It has not asked, so it has taken nothing; the next waiter gets its turn."""
    one = limiter(redis, limit=1, window=3600)
    assert await one.is_allowed("k")
    head = asyncio.create_task(one.acquire("k"))

    async def queued() -> bool:
        return is_queued(one)

    await until(queued)
    with pytest.raises(RateLimited):
        await one.acquire("k", timeout=0.01)
    head.cancel()
    with pytest.raises(asyncio.CancelledError):
        await head
    assert not is_queued(one)


@pytest.mark.parametrize("steps", range(16))
async def test_a_cancelled_waiter_leaves_no_queue_behind(redis: Redis, steps: int) -> None:
    """Cancelled after so many turns of the event loop, it has taken at most its own cost."""
    one = limiter(redis, limit=2, window=3600)
    task = asyncio.create_task(one.acquire("k"))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert not is_queued(one)
    assert await one.acquire("k", timeout=0)
    assert (await one.peek("k")).remaining in (0, 1)


# ---- failures


@both
async def test_scripts_that_the_server_forgot_are_brought_along(redis: Redis, precision: Precision) -> None:
    """SCRIPT FLUSH between any two calls changes nothing."""
    two = limiter(redis, limit=2, precision=precision)
    answers = []
    for _ in range(3):
        await redis.script_flush()
        answers.append(await two.is_allowed("k"))
    assert answers == [True, True, False]


@both
async def test_a_user_without_the_right_to_run_scripts_is_told_what_it_needs(
    redis: Redis, redis_server: Server, precision: Precision
) -> None:
    """A missing right is a mistake, not an outage: no failure policy hides it."""
    await redis.acl_setuser("weak", enabled=True, passwords=["+pw"], keys=["*"], categories=["-@all"])
    async with Redis(host=redis_server.host, port=redis_server.port, username="weak", password="pw") as weak:
        one = limiter(weak, precision=precision, on_failure=OnFailure(policy="open", timeout=5))
        with pytest.raises(NoPermissionError) as refused:
            await one.is_allowed("k")
    assert "+evalsha +eval" in refused.value.__notes__[0]
    await redis.acl_deluser("weak")


@both
async def test_the_rights_that_the_error_names_are_enough(
    redis: Redis, redis_server: Server, precision: Precision
) -> None:
    """A user with exactly the rights of the error's note can do everything."""
    await redis.execute_command(
        "ACL", "SETUSER", "enough", "on", ">pw", "+evalsha", "+eval", "+@read", "+@write", "+time", "~distsys:*"
    )
    async with Redis(host=redis_server.host, port=redis_server.port, username="enough", password="pw") as enough:
        one = limiter(enough, limit=1, precision=precision)
        assert [await one.is_allowed("k") for _ in range(2)] == [True, False]
        await one.refund("k")
        await one.reset("k")
    await redis.acl_deluser("enough")


@pytest.mark.parametrize("fault", ["killed", "hung"])
async def test_each_policy_answers_for_a_server_that_does_not(
    own_redis: Server, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Without Redis open admits, closed refuses, local counts here; without a policy the error passes."""
    async with Redis(host=own_redis.host, port=own_redis.port, retry=None, socket_timeout=0.2) as client:
        policies = {
            policy: limiter(client, limit=2, window=3600, on_failure=OnFailure(policy=policy, timeout=0.05))
            for policy in ("open", "closed", "local")
        }
        bare = limiter(client, limit=2, window=3600)
        for one in policies.values():
            await until(lambda one=one: _decides(one))
        caplog.clear()  # a connection that took longer than the timeout to open has been answered for, too
        await (own_redis.kill() if fault == "killed" else own_redis.pause())
        with caplog.at_level(logging.WARNING, "distsys.rate_limiting"):
            answers = {name: [await one.try_acquire("k") for _ in range(3)] for name, one in policies.items()}
        with pytest.raises((RedisError, TimeoutError, OSError)):
            await bare.is_allowed("k")
        await (own_redis.restart() if fault == "killed" else own_redis.resume())
        await until(lambda: _decides(policies["closed"]))
    assert [each.allowed for each in answers["open"]] == [True, True, True]
    assert [each.allowed for each in answers["closed"]] == [False, False, False]
    assert [each.allowed for each in answers["local"]] == [True, True, False]
    assert 1700 < answers["local"][2].retry_after <= 1800  # half a window for one of two
    assert {name: {each.source for each in given} for name, given in answers.items()} == {n: {n} for n in policies}
    assert sum("while Redis does not decide" in record.message for record in caplog.records) == 3


async def _decides(one: SlidingWindowLimiter) -> bool:
    return (await one.try_acquire("again")).source == "redis"


async def test_the_failure_policies_bear_any_numbers(redis: Redis) -> None:
    """One a month or a billion in a millisecond: the local limiter takes over without an error."""
    for limit, window in ((1, 2_592_000.0), (1_000_000_000, 0.001)):
        one = limiter(redis, limit=limit, window=window, on_failure=OnFailure(policy="local", timeout=5))
        assert await one.is_allowed("k")
        assert one._fallback.decide(OSError(), Request(("k",), one._local_limits, MICRO))[0].allowed


@both
async def test_a_lost_reply_may_count_twice_and_never_less(redis_server: Server, precision: Precision) -> None:
    """The client sends the request again; the one whose answer was lost stays counted."""
    async with TcpProxy("127.0.0.1", redis_server.port) as proxy:
        async with Redis(host="127.0.0.1", port=proxy.port) as client:
            await client.flushdb()
            three = limiter(client, window=3600, precision=precision)
            await three.is_allowed("warm")
            proxy.cut_reply()
            assert await three.is_allowed("k")
            assert (await three.peek("k")).remaining == 1


async def test_a_restarted_server_begins_empty(own_redis: Server) -> None:
    """Redis forgets the admissions with everything else, as the reference says."""
    async with Redis(host=own_redis.host, port=own_redis.port) as client:
        one = limiter(client, limit=1, window=3600)
        assert await one.is_allowed("k")
        await own_redis.restart()
        assert await one.is_allowed("k")


# ---- keys and input

AWKWARD = ["two words", "ключ ✓", "{braces}", "}{", "a:b", "a:{b", "%7B", "line\nbreak", "\0", "x" * 10_000]


@both
@kills("braces of a key end its hash tag", replaced(sliding_window, "hash_tag", without_braces), precision="exact")
async def test_any_text_is_a_key_and_no_two_share_a_window(redis: Redis, precision: Precision) -> None:
    """Braces, newlines, colons and ten kilobytes may stand in the key and in the name."""
    windows = [limiter(redis, limit=1, name=name, precision=precision) for name in ["", *AWKWARD]]
    for one in windows:
        for key in AWKWARD:
            assert await one.is_allowed(key)
            assert not await one.is_allowed(key)


@given(st.text(max_size=8), st.text(min_size=1, max_size=8), st.text(max_size=8), st.text(min_size=1, max_size=8))
def test_two_pairs_of_name_and_key_never_share_a_redis_key(name: str, key: str, name2: str, key2: str) -> None:
    """In a cluster the key alone decides the slot."""
    first, second = limiter(Redis(), name=name)._key(key), limiter(Redis(), name=name2)._key(key2)
    assert (first == second) == ((name, key) == (name2, key2))
    slot = key_slot(first.encode("utf-8", "surrogatepass"))
    assert slot == key_slot(limiter(Redis(), name=name2)._key(key).encode("utf-8", "surrogatepass"))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"limit": 0}, ValueError, "limit=0: give whole units above 0"),
    ({"limit": -1}, ValueError, "limit=-1"),
    ({"limit": 2.5}, TypeError, "limit=2.5 is a float; units are counted whole"),
    ({"limit": math.nan}, ValueError, "limit=nan"),
    ({"limit": True}, TypeError, "limit=True is a bool"),
    ({"limit": "5"}, TypeError, "limit='5' is a str"),
    ({"limit": 10**12}, ValueError, "at most 1,000,000,000"),
    ({"window": 0}, ValueError, "window=0: give seconds above 0"),
    ({"window": -1.0}, ValueError, "window=-1.0"),
    ({"window": math.nan}, ValueError, "window=nan"),
    ({"window": math.inf}, ValueError, "window=inf"),
    ({"window": True}, TypeError, "window=True is a bool"),
    ({"window": "60"}, TypeError, "window='60' is a str"),
    ({"window": 1e-7}, ValueError, r"window=1e-07: at least 0\.001 s"),
    ({"precision": "roughly"}, ValueError, "precision='roughly': 'exact' or 'approximate'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(each[0]) for each in WRONG])
def test_a_wrong_option_is_named_with_its_bound(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """The constructor raises, before any request."""
    with pytest.raises(error, match=message):
        limiter(Redis(), **wrong)


def test_a_blocking_client_is_refused() -> None:
    """It would block the event loop."""
    with pytest.raises(TypeError, match="not an asyncio client"):
        limiter(sync_redis.Redis())


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        (4, ValueError, "cost=4 could never pass limit=3"),
        (0, ValueError, "cost=0: give whole units above 0"),
        (-1, ValueError, "cost=-1"),
        (0.5, TypeError, "cost=0.5 is a float; units are counted whole"),
        (math.nan, ValueError, "cost=nan"),
        (True, TypeError, "cost=True is a bool"),
        ("1", TypeError, "cost='1' is a str"),
        (None, TypeError, "cost=None is a NoneType"),
    ],
)
@kills("fractions of a unit are cut off", replaced(sliding_window, "_whole", lambda _, value: int(value)), cost=0.5)
async def test_a_wrong_cost_is_refused_by_every_call(
    redis: Redis, cost: Any, error: type[Exception], message: str
) -> None:
    """The message names the cost and the remedy; no failure policy answers for it."""
    three = limiter(redis, on_failure=OnFailure(policy="open", timeout=5))
    for call in (three.is_allowed, three.try_acquire, three.acquire, three.refund):
        with pytest.raises(error, match=message):
            await call("k", cost)
    assert await redis.dbsize() == 0


@pytest.mark.parametrize(("key", "error"), [("", ValueError), (42, TypeError), (None, TypeError), (b"k", TypeError)])
async def test_a_wrong_key_is_refused_by_every_call(redis: Redis, key: Any, error: type[Exception]) -> None:
    """An empty key would be one window for everybody."""
    three = limiter(redis, on_failure=OnFailure(policy="open", timeout=5))
    for call in (three.is_allowed, three.try_acquire, three.acquire, three.refund, three.peek, three.reset):
        with pytest.raises(error, match="key="):
            await call(key)


async def test_a_wrong_timeout_is_refused(redis: Redis) -> None:
    """It raises before anything is asked."""
    with pytest.raises(ValueError, match="timeout=-1"):
        await limiter(redis).acquire("k", timeout=-1)


def test_the_scripts_call_no_random_and_no_clock_of_the_client() -> None:
    """Members are counts, and the time is the server's."""
    for script in SCRIPTS.values():
        assert "random" not in script.text
        assert "redis.call('TIME')" in script.text


# ---- cluster


@both
async def test_a_cluster_keeps_a_window_for_each_key(
    redis_cluster: redis.asyncio.RedisCluster, precision: Precision
) -> None:
    """On three masters, each decision is one script in one slot."""
    window = limiter(redis_cluster, Clock(), name=f"cluster-{precision}", precision=precision)
    users = [f"user:{number}" for number in range(12)]
    for expected in (True, True, True, False):
        assert [await window.is_allowed(user) for user in users] == [expected] * 12
    for user in users:
        await window.reset(user)
    assert await window.is_allowed(users[0])
    await window.reset(users[0])
