"""TieredLimiter: several quotas decided at once, on one server and across the slots of a cluster."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from distsys.lab.testbed.servers import Server
from distsys.rate_limiting.buckets import SCRIPT
from distsys.rate_limiting.decision import MICRO
from distsys.rate_limiting.distributed import EVERYBODY, TIERS, Quota, TieredLimiter
from distsys.rate_limiting.fallback import OnFailure
from tests.bugs import in_script, kills
from tests.rate_limiting.model import Model
from tests.rate_limiting.test_token_bucket import Clock, calls, until

Redis = redis.asyncio.Redis
# So slow that no token comes back, and no key expires by the server's clock, while a test runs on a loaded machine.
USER = Quota(per="user", capacity=3, refill_rate=0.01)
ORGANISATION = Quota(per="organisation", capacity=4, refill_rate=0.01)
ALL = Quota(per=EVERYBODY, capacity=100, refill_rate=0.1)
PRO = {"pro": (USER, ORGANISATION, ALL)}


def who(user: str = "42", organisation: str = "acme") -> dict[str, str]:
    return {"user": user, "organisation": organisation}


async def test_a_request_passes_when_every_quota_has_room(redis: Redis) -> None:
    """A user takes three, another one the organisation's fourth; the answer names the quota that refused."""
    limiter = TieredLimiter(redis, PRO)
    for left in (2, 1, 0):
        decision = await limiter.try_acquire("pro", who())
        assert decision
        assert decision.tightest.remaining == left
    refused = await limiter.try_acquire("pro", who())
    assert not refused
    assert refused.refused_by == ("user",)
    assert 0 < refused.retry_after <= 100
    assert await limiter.try_acquire("pro", who(user="43"))
    refused = await limiter.try_acquire("pro", who(user="43"))
    assert refused.refused_by == ("organisation",)
    assert refused.quotas["user"].allowed
    assert (await limiter.try_acquire("pro", who("43", "other"))).allowed


@kills(
    "the first quota decides alone",
    in_script(SCRIPT, "for n = 1, cost > 0 and #own or 0 do", "for n = 1, cost > 0 and 1 or 0 do"),
)
async def test_a_refused_request_takes_from_no_quota(redis: Redis) -> None:
    """The user has no tokens left: fifty more requests take nothing from the organisation and from everybody."""
    limiter = TieredLimiter(redis, PRO, clock=Clock())
    for _ in range(3):
        assert await limiter.try_acquire("pro", who())
    for _ in range(50):
        refused = await limiter.try_acquire("pro", who())
    assert refused.quotas["organisation"].remaining == 1
    assert refused.quotas[EVERYBODY].remaining == 97
    assert await limiter.try_acquire("pro", who("43"))
    for _ in range(5):
        refused = await limiter.try_acquire("pro", who("44"))
    assert refused.refused_by == ("organisation",)
    assert refused.quotas["user"].remaining == 3


async def test_a_decision_on_three_quotas_is_one_call(redis: Redis) -> None:
    """Ten requests at once take two calls."""
    limiter = TieredLimiter(redis, PRO)
    await limiter.try_acquire("pro", who())
    before = await calls(redis)
    await limiter.try_acquire("pro", who("43"))
    assert await calls(redis) - before == 1
    await asyncio.gather(*(limiter.try_acquire("pro", who(str(user), str(user))) for user in range(10)))
    assert await calls(redis) - before == 3


@settings(max_examples=100)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 100 * MICRO), st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 3)),
        max_size=40,
    ),
    together=st.integers(1, 8),
)
async def test_it_decides_as_three_textbook_buckets_would(
    redis_server: Server, requests: list[tuple[int, str, str, int]], together: int
) -> None:
    """Each request takes from all or from none, in the order of arrival, however many arrive at once."""
    clock, models = Clock(), dict[tuple[str, str], Model]()
    async with Redis.from_url(redis_server.url) as client:
        await client.flushdb()
        limiter = TieredLimiter(client, PRO, clock=clock)
        for first in range(0, len(requests), together):
            batch = requests[first : first + together]
            clock.us += batch[0][0]
            decisions = await asyncio.gather(*(limiter.try_acquire("pro", who(u, o), cost) for _, u, o, cost in batch))
            for (_, user, organisation, cost), decision in zip(batch, decisions, strict=True):
                subjects = {"user": user, "organisation": organisation, EVERYBODY: ""}
                own = [
                    models.setdefault((q.per, subjects[q.per]), Model(q.capacity, q.refill_rate)) for q in PRO["pro"]
                ]
                full = tuple(
                    q.name
                    for q, model in zip(PRO["pro"], own, strict=True)
                    if model.used_at(clock.us) + cost > q.capacity
                )
                assert decision.refused_by == full
                if not any(full):
                    assert all(model.ask(clock.us, Fraction(cost)) for model in own)


async def test_a_user_who_changes_tier_keeps_what_was_used(redis: Redis) -> None:
    """An upgrade gives the difference at once, a downgrade no free start."""
    tiers = {"free": [USER], "pro": [Quota(per="user", capacity=10, refill_rate=0.05)]}
    limiter = TieredLimiter(redis, tiers, clock=Clock())
    for _ in range(3):
        assert await limiter.try_acquire("free", {"user": "42"})
    assert (await limiter.try_acquire("pro", {"user": "42"}, 7)).allowed
    assert not await limiter.try_acquire("free", {"user": "42"})


async def test_two_tiers_of_one_user_at_once_wait_for_each_other(redis: Redis) -> None:
    """A bucket is in a call with one limit only, so each request is decided by its own limit."""
    tiers = {"free": [USER], "pro": [Quota(per="user", capacity=10, refill_rate=0.05)]}
    limiter = TieredLimiter(redis, tiers, clock=Clock())
    wanted = [("free", 3), ("free", 1), ("pro", 1), ("free", 1), ("pro", 6)]
    decisions = await asyncio.gather(*(limiter.try_acquire(tier, {"user": "42"}, cost) for tier, cost in wanted))
    assert [bool(one) for one in decisions] == [True, False, True, False, True]


async def test_a_refund_goes_to_every_quota(redis: Redis) -> None:
    limiter = TieredLimiter(redis, PRO, clock=Clock())
    assert await limiter.try_acquire("pro", who(), 3)
    await limiter.refund("pro", who(), 2)
    decision = await limiter.try_acquire("pro", who(), 2)
    assert decision
    assert decision.quotas["organisation"].remaining == 1


def test_the_tiers_to_start_from_are_sound() -> None:
    """Each tier names its quotas once and gives more than the tier before."""
    limiter = TieredLimiter(Redis(), TIERS)
    assert list(limiter.tiers) == ["anonymous", "free", "pro", "enterprise"]
    rates = [max(quota.refill_rate for quota in quotas) for quotas in limiter.tiers.values()]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gold", {}), "tier='gold' is unknown; there are 'pro'"),
        (
            ("pro", {"user": "42"}),
            "tier 'pro' limits per 'organisation': say whose tokens, as in {'organisation': '42'}",
        ),
        (("pro", {}), "limits per 'user'"),
        (("pro", who(user="")), "'' is empty"),
        (("pro", who(), 4), "cost=4 could never pass capacity=3"),
        (("pro", who(), 0), "cost=0"),
    ],
)
async def test_requests_that_mean_nothing_are_refused(redis: Redis, arguments: tuple[Any, ...], message: str) -> None:
    """The message says what to give instead; nothing is taken."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011  matched below, unescaped
        await TieredLimiter(redis, PRO).try_acquire(*arguments)
    assert message in str(refused.value)
    assert await redis.keys("*") == []


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({"pro": []}, "tier 'pro' has no quota"),
        ({"pro": [USER, Quota(per="user", capacity=1, refill_rate=1)]}, "two quotas of one name"),
    ],
)
def test_tiers_that_mean_nothing_are_refused(tiers: dict[str, list[Quota]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TieredLimiter(Redis(), tiers)


def test_a_quota_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        Quota(per="user", capacity=0, refill_rate=1)
    with pytest.raises(ValueError, match="'' is empty"):
        Quota(per="", capacity=1, refill_rate=1)


# ---- without Redis


async def test_without_redis_every_quota_is_kept_locally_or_none_taken(own_redis: Server) -> None:
    """The local policy is all or nothing as well, to its fraction of each quota."""
    async with Redis.from_url(own_redis.url) as client:
        limiter = TieredLimiter(client, PRO, name="dead", on_failure=OnFailure(policy="local", fraction=0.5, timeout=5))
        await own_redis.kill()
        first = await limiter.try_acquire("pro", who())
        assert first
        assert {one.source for one in first.quotas.values()} == {"local"}
        assert (await limiter.try_acquire("pro", who())).refused_by == ("user",)
        assert await limiter.try_acquire("pro", who("43"))
        assert (await limiter.try_acquire("pro", who("44"))).refused_by == ("organisation",)
        assert (await limiter.try_acquire("pro", who("44", "other"))).allowed


@pytest.mark.parametrize(("policy", "passes"), [("open", True), ("closed", False)])
async def test_without_redis_open_and_closed_speak_for_all_quotas(own_redis: Server, policy: Any, passes: bool) -> None:
    async with Redis.from_url(own_redis.url) as client:
        limiter = TieredLimiter(client, PRO, on_failure=OnFailure(policy=policy, timeout=5))
        await own_redis.kill()
        decision = await limiter.try_acquire("pro", who())
        assert decision.allowed == passes
        assert decision.refused_by == (() if passes else ("user", "organisation", EVERYBODY))


# ---- cluster


async def test_across_slots_a_refused_request_gives_back_what_it_reserved(
    redis_cluster: redis.asyncio.RedisCluster,
) -> None:
    """User, organisation and everybody lie in different slots; a refusal by a later one releases the earlier ones."""
    name = "across"
    limiter = TieredLimiter(redis_cluster, PRO, name=name, clock=Clock())
    slots = {redis_cluster.keyslot(limiter._key("pro", quota, who())) for quota in PRO["pro"]}
    assert len(slots) == 3
    for _ in range(3):
        assert await limiter.try_acquire("pro", who())
    assert (await limiter.try_acquire("pro", who("43"))).allowed
    for _ in range(5):
        refused = await limiter.try_acquire("pro", who("44"))
        assert refused.refused_by == ("organisation",)
        assert refused.quotas["user"].remaining == 3
        assert refused.quotas[EVERYBODY].remaining == 96
    assert (await limiter.try_acquire("pro", who("44", "other"), 3)).allowed


async def test_across_slots_a_crowd_never_exceeds_a_quota(redis_cluster: redis.asyncio.RedisCluster) -> None:
    """Eighty requests of four users at once exceed no quota, and afterwards no token is missing."""
    limiter = TieredLimiter(redis_cluster, PRO, name="crowd", clock=Clock())
    users = [str(number % 4) for number in range(80)]
    decisions = await asyncio.gather(*(limiter.try_acquire("pro", who(user)) for user in users))
    assert sum(one.allowed for one in decisions) <= 4
    for user in set(users):
        assert sum(one.allowed for one, u in zip(decisions, users, strict=True) if u == user) <= 3
    passed = sum(one.allowed for one in decisions)
    after = await limiter.try_acquire("pro", who("new", "new"))
    assert after.quotas[EVERYBODY].remaining == 99 - passed


@pytest.mark.parametrize("name", ["", "api", "{api}"])
def test_one_slot_is_one_slot_whatever_the_name(name: str) -> None:
    """Redis ignores an empty hash tag, so a limiter without a name needs a tag, too."""
    limiter = TieredLimiter(Redis(), PRO, name=name, one_slot=True)
    keys = [limiter._key("pro", quota, who(user)) for quota in PRO["pro"] for user in "ab"]
    assert len({key_slot(key.encode()) for key in keys}) == 1


async def test_one_slot_keeps_a_decision_in_one_step(redis_cluster: redis.asyncio.RedisCluster) -> None:
    """All keys of the limiter share a slot."""
    limiter = TieredLimiter(redis_cluster, PRO, name="one", one_slot=True, clock=Clock())
    keys = {limiter._key("pro", quota, who(u)) for quota in PRO["pro"] for u in "ab"}
    assert len(keys) == 4
    assert len({redis_cluster.keyslot(key) for key in keys}) == 1
    decisions = await asyncio.gather(*(limiter.try_acquire("pro", who(str(n % 4))) for n in range(20)))
    assert sum(one.allowed for one in decisions) == 4


async def test_cancelled_between_two_slots_it_gives_back_the_first(redis_cluster: redis.asyncio.RedisCluster) -> None:
    """The user's master has granted, the organisation's is silent: cancelled, the request returns the user's tokens."""
    limiter = TieredLimiter(redis_cluster, PRO, name="cancelled")
    user, organisation, _ = (limiter._key("pro", quota, who()) for quota in PRO["pro"])
    await limiter.try_acquire("pro", who("other", "other"))  # the script is known to all
    silent = redis_cluster.get_node_from_key(organisation)
    await silent.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    task = asyncio.create_task(limiter.try_acquire("pro", who()))

    async def taken() -> bool:
        return bool(await redis_cluster.exists(user))

    async def given_back() -> bool:
        return not await taken()

    await until(taken)
    task.cancel()
    await silent.execute_command("CLIENT", "UNPAUSE")
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(given_back)
