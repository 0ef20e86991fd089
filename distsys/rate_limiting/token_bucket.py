"""Token bucket: bursts up to a capacity, then a steady rate.

Promise  in any T seconds at most `capacity + refill_rate * T` tokens are granted per key, by all processes together; a
         refused request takes nothing; what a lease may add to that is a number, see TokenLease.
Not      exact after a failover or an eviction, which forget grants; fair between processes that wait in acquire();
         right while the server's clock leaps: forward it refills too early, back it stands until caught up.
Units    tokens, counted in millionths; refill_rate in tokens per second; times in seconds, float.
Errors   RateLimited from acquire(); redis.RedisError and TimeoutError pass unless `on_failure` says what to answer.
Source   Turner 1986 (the leaky bucket as a meter); RFC 3290, appendix A.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from distsys._support.arguments import check_positive, check_text
from distsys._support.cancellation import in_background
from distsys._support.redis import hash_tag
from distsys.rate_limiting.buckets import Buckets, Clock
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, BucketReply, Decision, Limit, Request
from distsys.rate_limiting.fallback import Fallback, OnFailure
from distsys.rate_limiting.queues import Queues

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

REQUESTS = 1_000  # kept by a limiter, so that they need not be checked and written anew
MAX_SLICES = 10_000  # leased at a time by one limiter; requests with further keys are decided by Redis


@dataclass(frozen=True, kw_only=True)
class TokenLease:
    """A slice of the quota, to decide from without asking: `tokens` at a time, given back after `seconds`.

    The price: tokens taken before a span of time may be used in it. In any T seconds there may be up to
    `min(processes * tokens, refill_rate * seconds)` more than the bucket alone would grant; others may be refused while
    a slice lies unused; a process that dies takes its slices along.
    """

    tokens: float
    seconds: float

    def __post_init__(self) -> None:
        check_positive("tokens", self.tokens, MAX_TOKENS, "tokens")
        check_positive("seconds", self.seconds, 60, "seconds")


@dataclass
class _Slice:
    """Of one key."""

    left: int  # microtokens here
    used: int  # in the bucket, these included
    now: Clock
    until: float
    timer: asyncio.TimerHandle  # gives it back then


class TokenBucketLimiter:
    """`if await TokenBucketLimiter(redis, capacity=100, refill_rate=10).is_allowed("user:42"): ...`

    capacity     tokens of a full bucket: the largest burst
    refill_rate  tokens per second
    name         keeps the keys of one limiter apart from another's; one with other limits but the same name goes on
                 with what was used
    on_failure   what to answer when Redis does not, see OnFailure; None: its error passes
    lease        decides most requests without asking Redis, see TokenLease; aclose() gives back what is left
    clock        seconds, instead of the server's own clock: for tests and simulations
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        *,
        capacity: float,
        refill_rate: float,
        name: str = "",
        on_failure: OnFailure | None = None,
        lease: TokenLease | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.limit, self.name, self.lease = Limit(capacity, refill_rate), name, lease
        self._limits, self._fallback = (self.limit,), Fallback(name, on_failure)
        self._buckets = Buckets(redis, timeout=self._fallback.timeout, clock=clock)
        self._prefix = f"distsys:bucket:1:{hash_tag(name)}:"  # 1: the version of what the keys hold
        self._request = lru_cache(REQUESTS, typed=True)(self._new_request)  # the same clients come again
        self._slices: dict[str, _Slice] = {}
        self._leasing: set[str] = set()  # keys whose slice is on its way
        self._queues = Queues(capacity, f"tokens left ({capacity:g} at once and {refill_rate:g} a second)")

    async def is_allowed(self, key: str, cost: float = 1) -> bool:
        """Takes `cost` tokens if they are there, and says whether they were."""
        if self.lease is not None:
            return (await self.try_acquire(key, cost)).allowed
        try:
            request = self._request(key, cost)
        except TypeError:  # what can't be hashed is no key: say so
            request = self._new_request(key, cost)
        try:  # as Fallback.guard, without what nobody asks for here: it is the most used of all
            (used,), taken = await self._buckets.ask(request)
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self._fallback.decide(error, request)[0].allowed
        self._fallback.worked()
        return used + taken + request.cost <= self.limit.full

    async def try_acquire(self, key: str, cost: float = 1) -> Decision:
        """The same; and how much is left, and when to come again."""
        if self.lease is None:
            return await self._decide(self._new_request(key, cost))
        wanted = self.limit.cost(cost)
        decision = self._from_slice(key, wanted)
        return decision if decision is not None else await self._with_slice(key, wanted, self.lease)

    async def acquire(self, key: str, cost: float = 1, timeout: float | None = None) -> Decision:
        """Waits until the tokens are there: in this process first come, first served; it asks only when they can be.

        RateLimited as soon as `timeout` seconds can't be enough; None waits as long as it takes. Cancelled while a
        request is under way, its tokens may be taken.
        """
        longest = self.limit.seconds(self.limit.cost(cost))
        return await self._queues.wait(key, lambda: self.try_acquire(key, cost), timeout, longest)

    async def peek(self, key: str) -> Decision:
        """What is left, taking nothing; allowed says whether one token would pass."""
        return await self._decide(self._ask_for(key, 0))

    async def refund(self, key: str, tokens: float = 1) -> None:
        """Gives back tokens that were taken and not needed. A bucket never holds more than its capacity."""
        await self._buckets.ask(self._ask_for(key, -self.limit.cost(tokens)))

    async def reset(self, key: str) -> None:
        """Fills the bucket."""
        self._drop(key)
        await self._buckets.redis.delete(self._key(key))

    async def aclose(self) -> None:
        """Gives back what is left of leased slices. The client is yours, and stays open."""
        await asyncio.gather(*map(self._give_back, list(self._slices)))

    async def _decide(self, request: Request) -> Decision:
        try:
            (used,), taken = await self._buckets.ask(request)
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self._fallback.decide(error, request)[0]
        self._fallback.worked()
        return self.limit.decision(used + taken, request.cost, request.cost or MICRO)

    # ---- leased slices

    def _from_slice(self, key: str, cost: int) -> Decision | None:
        own = self._slices.get(key)
        if own is None or own.left < cost or own.now() >= own.until:
            return None
        own.left -= cost  # granted before: what limit.decision would say, without asking whether
        limit, used = self.limit, own.used - own.left
        return Decision(True, limit.capacity, max(0, (limit.full - used) // MICRO), 0.0, limit.seconds(used), "lease")

    async def _with_slice(self, key: str, cost: int, lease: TokenLease) -> Decision:
        """Asks for the request and a slice together; for the request alone while a slice is on its way."""
        await self._give_back(key)  # used up, or past its time
        taken = len(self._slices) + len(self._leasing)
        if key in self._slices or key in self._leasing or taken >= MAX_SLICES:
            return await self._decide(self._ask_for(key, cost))
        request = self._ask_for(key, cost, 1 + int(lease.tokens * MICRO) // cost)
        self._leasing.add(key)
        try:
            (decision,) = await self._fallback.guard(self._lease(key, request, lease.seconds), request)
        finally:
            self._leasing.discard(key)
        return decision

    async def _lease(self, key: str, request: Request, seconds: float) -> BucketReply:
        (used,), taken = await self._buckets.ask(request)
        used += taken
        granted = min(request.times, (self.limit.full - used) // request.cost)
        if granted > 1:
            loop, left = asyncio.get_running_loop(), (granted - 1) * request.cost
            timer = loop.call_later(seconds, lambda: in_background(self._give_back(key), f"closing a slice of {key!r}"))
            self._slices[key] = _Slice(left, used + request.cost + left, loop.time, loop.time() + seconds, timer)
        return (used,), 0

    async def _give_back(self, key: str) -> None:
        """Soon, or not at all: a bucket that has been full meanwhile would grant them twice."""
        if left := self._drop(key):
            request, what = self._ask_for(key, -left), f"limiter {self.name!r}: giving back a slice of {key!r}"
            await asyncio.wait([in_background(self._buckets.ask(request), what)])  # it comes back by the refill, too

    def _drop(self, key: str) -> int:
        own = self._slices.pop(key, None)
        if own is None:
            return 0
        own.timer.cancel()
        return own.left

    # ---- input

    def _new_request(self, key: str, cost: float) -> Request:
        return self._ask_for(key, self.limit.cost(cost))

    def _ask_for(self, key: str, microtokens: int, times: int = 1) -> Request:
        return Request((self._key(key),), self._limits, microtokens, times)

    def _key(self, key: str) -> str:
        tag = hash_tag(check_text("key", key, "'user:42'"))
        return f"{self._prefix}{{{tag}}}"
