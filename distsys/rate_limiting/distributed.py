"""Distributed limits: what a tier may do, per user, per organisation and in all, decided at once.

Promise  a request passes when every quota of its tier has room, and then takes from each; a refused request takes from
         none, and the answer names the quotas that refused. If one server (or one slot of a cluster) has the keys, this
         is one atomic step. Across slots the limiter reserves in one after the other and gives back, see TieredLimiter.
Not      exact after a failover or an eviction; fair between tiers that share a quota.
Units    as for the token bucket: tokens, tokens per second, seconds.
Errors   ValueError for an unknown tier or a missing subject; redis.RedisError unless `on_failure` says what to answer.
Source   Turner 1986; RFC 3290, appendix A; two-phase reservation as in Bernstein, Hadzilacos, Goodman 1987, chapter 7.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from redis.asyncio import Redis, RedisCluster

from distsys._support.arguments import check_text
from distsys._support.cancellation import in_background
from distsys._support.redis import hash_tag
from distsys.rate_limiting.buckets import Buckets, Clock
from distsys.rate_limiting.decision import BucketReply, Decision, Limit, Request
from distsys.rate_limiting.fallback import Fallback, OnFailure

Subjects = Mapping[str, str]  # whose tokens, by the `per` of the quotas: {"user": "42"}
EVERYBODY = "everybody"  # a quota per this has one bucket for all


@dataclass(frozen=True, kw_only=True)
class Quota:
    """`capacity` tokens at once and `refill_rate` a second: `Quota(per="user", capacity=100, refill_rate=10)`.

    per   a word of yours for whose tokens these are, such as "user", or EVERYBODY
    name  tells two quotas with the same `per` apart; by default it is `per`
    """

    per: str
    capacity: float
    refill_rate: float
    name: str = ""
    limit: Limit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_text("name", self.name or self.per, "'user'"))
        object.__setattr__(self, "limit", Limit(self.capacity, self.refill_rate))


TIERS: Mapping[str, tuple[Quota, ...]] = {
    "anonymous": (Quota(per="address", capacity=20, refill_rate=1),),
    "free": (Quota(per="user", capacity=60, refill_rate=2),),
    "pro": (
        Quota(per="user", capacity=300, refill_rate=20),
        Quota(per="organisation", capacity=2_000, refill_rate=100),
    ),
    "enterprise": (Quota(per="organisation", capacity=20_000, refill_rate=1_000),),
}
"""An example to copy and change, not a recommendation: measure what users need and what your service can bear."""


class TieredDecision(NamedTuple):
    """Whether the request may pass; true when it may. `quotas` has each quota's own decision, by its name."""

    allowed: bool
    refused_by: tuple[str, ...]
    quotas: Mapping[str, Decision]

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def tightest(self) -> Decision:
        """Return the decision of the quota that refuses longest, or else has the smallest share left."""
        return max(self.quotas.values(), key=lambda one: one.tightness)

    @property
    def retry_after(self) -> float:
        """Return the seconds until every quota can let the same request pass; 0 when it passed."""
        return self.tightest.retry_after


@dataclass(eq=False, repr=False)
class TieredLimiter:
    """`decision = await limiter.try_acquire("pro", {"user": "42", "organisation": "acme"})`

    tiers       for each tier its quotas; TIERS is an example
    name        keeps the keys of one limiter apart from another's
    one_slot    in a cluster: keep all keys in one slot, so that each decision is one atomic step, on one server.
                Otherwise each subject has its slot, and quotas in different slots are reserved one after the other. No
                quota is ever exceeded then either. What was reserved for a request that another slot refuses is given
                back at once; meanwhile it may have refused somebody, and if the process dies in between it stays taken
                until the refill
    on_failure, clock   as for TokenBucketLimiter

    A user who changes tier keeps what was used, because the key names the quota and the subject, not the tier.
    """

    redis: Redis | RedisCluster
    tiers: Mapping[str, Sequence[Quota]] = field(default_factory=lambda: TIERS)
    _: KW_ONLY
    name: str = ""
    one_slot: bool = False
    on_failure: OnFailure | None = None
    clock: Clock | None = None

    def __post_init__(self) -> None:
        self.tiers = {tier: tuple(quotas) for tier, quotas in self.tiers.items()}
        for tier, quotas in self.tiers.items():
            if not quotas:
                raise ValueError(f"tier {tier!r} has no quota: give it one, or don't ask for requests without a limit")
            if len({quota.name for quota in quotas}) < len(quotas):
                raise ValueError(f"tier {tier!r} has two quotas of one name: give each a name=")
        self._fallback = Fallback(self.name, self.on_failure)
        self._buckets = Buckets(self.redis, timeout=self._fallback.timeout, clock=self.clock)

    async def try_acquire(self, tier: str, subjects: Subjects | None = None, cost: float = 1) -> TieredDecision:
        """Take `cost` tokens from every quota of the tier, or from none. `subjects` says whose: {"user": "42"}.

        ValueError for an unknown tier, a missing subject, or a cost that could never pass; redis.RedisError and
        TimeoutError pass unless `on_failure` has an answer. If cancelled, tokens of one slot may stay taken.
        """
        request = self._request(tier, subjects or {}, cost)

        def combine(decisions: list[Decision]) -> TieredDecision:
            quotas = {quota.name: one for quota, one in zip(self.tiers[tier], decisions, strict=True)}
            refused = tuple(name for name, one in quotas.items() if not one)
            return TieredDecision(not refused, refused, quotas)

        asked = self._take(request)
        return await self._fallback.guard(asked, request, lambda reply: combine(request.decisions(reply)), combine)

    async def refund(self, tier: str, subjects: Subjects | None = None, cost: float = 1) -> None:
        """Give back what a request took and then did not use; the errors are those of try_acquire(), without policy."""
        await self._give_back(self._by_slot(self._request(tier, subjects or {}, cost)))

    # ---- one slot after the other

    async def _take(self, request: Request) -> BucketReply:
        used, reserved, passes = dict[str, int](), list[Request](), True
        try:
            for part in self._by_slot(request):
                granted, before, taken = await self._buckets.ask(part if passes else part._replace(cost=0))
                used |= {key: one + taken for key, one in zip(part.keys, before, strict=True)}
                passes = passes and granted > 0
                if passes:
                    reserved.append(part)
        except BaseException:
            in_background(self._give_back(reserved), f"giving back {reserved!r} after an error")
            raise
        if not passes and reserved:
            await asyncio.wait([in_background(self._give_back(reserved), f"giving back {reserved!r}")])
        return passes, [used[key] for key in request.keys], 0

    async def _give_back(self, requests: Iterable[Request]) -> None:
        """Give back what each request took; after an error the rest comes back by the refill."""
        for request in requests:
            await self._buckets.ask(request._replace(cost=-request.cost))

    def _by_slot(self, request: Request) -> list[Request]:
        slots: defaultdict[int, dict[str, Limit]] = defaultdict(dict)
        for key, limit in zip(request.keys, request.limits, strict=True):
            slots[self._buckets.slot(key)][key] = limit
        return [Request(tuple(part), tuple(part.values()), request.cost) for part in slots.values()]

    # ---- input

    def _request(self, tier: str, subjects: Subjects, cost: float) -> Request:
        if tier not in self.tiers:
            raise ValueError(f"tier={tier!r} is unknown; there are {', '.join(map(repr, self.tiers))}")
        quotas = self.tiers[tier]
        keys = tuple(self._key(tier, quota, subjects) for quota in quotas)
        (microtokens,) = {quota.limit.cost(cost) for quota in quotas}  # ValueError if one of them can never grant it
        return Request(keys, tuple(quota.limit for quota in quotas), microtokens)

    def _key(self, tier: str, quota: Quota, subjects: Subjects) -> str:
        if quota.per != EVERYBODY and quota.per not in subjects:
            raise ValueError(f"tier {tier!r} limits per {quota.per!r}: say whose tokens, as in {{{quota.per!r}: '42'}}")
        subject = "" if quota.per == EVERYBODY else hash_tag(check_text(quota.per, subjects[quota.per], "'42'"))
        kind, name = (hash_tag(word).replace(":", "%3A") for word in (quota.name, self.name))
        if self.one_slot:
            return f"distsys:quota:1:{{:{name}}}:{kind}:{{{subject}}}"  # a hash tag must not be empty
        return f"distsys:quota:1:{name}:{kind}:{{{subject or kind}}}"
