"""Token bucket: bursts up to a capacity, then a steady rate.

Promise  in any T seconds at most `capacity + refill_rate * T` tokens are granted per key, by all processes together; a
         refused request takes nothing; what a lease may add to that is a number, see Lease.
Not      exact after a failover or an eviction, which forget grants; fair between processes that wait in acquire();
         right while the server's clock leaps: forward it refills too early, back it stands until caught up.
Units    tokens, counted in millionths; refill_rate in tokens per second; times in seconds, float.
Errors   RateLimited from acquire(); redis.RedisError and TimeoutError pass unless `on_failure` says what to answer.
Source   Turner 1986 (the leaky bucket as a meter); RFC 3290, appendix A.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from distsys.errors import RateLimited
from distsys.ratelimit.buckets import Buckets, Clock, Request
from distsys.ratelimit.decision import (
    MICRO,
    Decision,
    Fallback,
    Limit,
    OnFailure,
    Queues,
    check_key,
    logger,
    wait_in_turn,
)
from distsys.redis_scripts import hash_tag
from distsys.tasks import in_background

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

REQUESTS = 1_000  # kept by a limiter, so that they need not be checked and written anew
MAX_SLICES = 10_000  # leased at a time by one limiter; requests with further keys are decided by Redis


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A slice of the quota, to decide from without asking: `tokens` at a time, given back after `seconds`.

    The price: tokens taken before a span of time may be used in it. In any T seconds there may be up to
    `min(processes * tokens, refill_rate * seconds)` more than the bucket alone would grant; others may be refused while
    a slice lies unused; a process that dies takes its slices along.
    """

    tokens: float
    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens={self.tokens!r}: a slice holds more than 0 tokens")
        if not 0 < self.seconds <= 60:
            raise ValueError(f"seconds={self.seconds!r}: a slice is kept for more than 0 s and at most 60 s")


class _Slice:
    """Of one key. Until Redis has granted it, it is empty and has no timer."""

    left = used = 0  # microtokens here; microtokens used in the bucket, these included
    until = 0.0
    now: Clock
    timer: asyncio.TimerHandle | None = None


class TokenBucketLimiter:
    """`if await TokenBucketLimiter(redis, capacity=100, refill_rate=10).is_allowed("user:42"): ...`

    capacity     tokens of a full bucket: the largest burst
    refill_rate  tokens per second
    name         keeps the keys of one limiter apart from another's; one with other limits but the same name goes on
                 with what was used
    on_failure   what to answer when Redis does not, see OnFailure; None: its error passes
    lease        decides most requests without asking Redis, see Lease; aclose() gives back what is left
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
        lease: Lease | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.limit, self.name, self.lease = Limit(capacity, refill_rate), name, lease
        self._limits, self._fallback = (self.limit,), Fallback(name, on_failure)
        self._buckets = Buckets(redis, timeout=self._fallback.timeout, clock=clock)
        self._prefix = f"distsys:bucket:1:{hash_tag(name)}:"  # 1: the version of what the keys hold
        self._request = lru_cache(REQUESTS, typed=True)(self._new_request)  # the same clients come again
        self._slices: dict[str, _Slice] = {}
        self._queues = Queues()

    async def is_allowed(self, key: str, cost: float = 1) -> bool:
        """Takes `cost` tokens if they are there, and says whether they were."""
        if self.lease is not None:
            return (await self.try_acquire(key, cost)).allowed
        try:
            request = self._request(key, cost)
        except TypeError:  # what can't be hashed is no key: say so
            request = self._new_request(key, cost)
        try:  # as _decide, without what nobody asks for here: it is the most used of all
            granted, _, _ = await self._buckets.ask(request)
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self._fallback.decide(error, request.keys, request.limits, request.cost)[0].allowed
        if self._fallback.failing:
            self._fallback.worked()
        return granted > 0

    async def try_acquire(self, key: str, cost: float = 1) -> Decision:
        """The same; and how much is left, and when to come again."""
        wanted = self.limit.cost(cost)
        if self.lease is None:
            return await self._decide(key, wanted)
        decision = self._from_slice(key, wanted)
        return decision if decision is not None else await self._with_slice(key, wanted)

    async def acquire(self, key: str, cost: float = 1, timeout: float | None = None) -> Decision:
        """Waits until the tokens are there: in this process first come, first served; it asks only when they can be.

        RateLimited as soon as `timeout` seconds can't be enough; None waits as long as it takes. Cancelled while a
        request is under way, its tokens may be taken.
        """
        wanted = self.limit.cost(cost)

        def refusal(wait: float | None) -> RateLimited:
            return self._refusal(key, self.limit.seconds(wanted) if wait is None else wait)

        return await wait_in_turn(self._queues, key, lambda: self.try_acquire(key, cost), timeout, refusal)

    async def peek(self, key: str) -> Decision:
        """What is left, taking nothing; allowed says whether one token would pass."""
        return await self._decide(key, 0)

    async def refund(self, key: str, tokens: float = 1) -> None:
        """Gives back tokens that were taken and not needed. A bucket never holds more than its capacity."""
        await self._buckets.ask(Request((self._key(key),), self._limits, -self.limit.cost(tokens)))

    async def reset(self, key: str) -> None:
        """Fills the bucket."""
        self._drop(key)
        await self._buckets.redis.delete(self._key(key))

    async def aclose(self) -> None:
        """Gives back what is left of leased slices. The client is yours, and stays open."""
        await asyncio.gather(*(self._give_back(key) for key in list(self._slices)))

    # ---- one decision

    async def _decide(self, key: str, cost: int, times: int = 1, keep: _Slice | None = None) -> Decision:
        try:
            granted, (used,), before = await self._buckets.ask(Request((self._key(key),), self._limits, cost, times))
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self._fallback.decide(error, (key,), self._limits, cost or MICRO)[0]
        if self._fallback.failing:
            self._fallback.worked()
        used += before
        if granted and keep is not None:
            self._fill(key, keep, (granted - 1) * cost, used + granted * cost)
        if cost == 0:
            return self.limit.decision(used + MICRO <= self.limit.full, used, MICRO)
        return self.limit.decision(granted > 0, used + cost if granted else used, cost)

    # ---- leased slices

    def _from_slice(self, key: str, cost: int) -> Decision | None:
        own = self._slices.get(key)
        if own is None or own.left < cost or own.now() >= own.until:
            return None
        own.left -= cost
        return self.limit.decision(True, own.used - own.left, cost, "lease")

    async def _with_slice(self, key: str, cost: int) -> Decision:
        """Asks for the request and a slice together; for the request alone while a slice is on its way."""
        assert self.lease is not None
        own = self._slices.get(key)
        if own is not None and own.timer is not None:  # used up, or past its time
            await self._give_back(key)
        if key in self._slices or len(self._slices) >= MAX_SLICES:
            return await self._decide(key, cost)
        own = self._slices[key] = _Slice()
        try:
            return await self._decide(key, cost, 1 + int(self.lease.tokens * MICRO) // cost, own)
        finally:
            if own.timer is None and self._slices.get(key) is own:
                del self._slices[key]

    def _fill(self, key: str, own: _Slice, left: int, used: int) -> None:
        assert self.lease is not None
        loop = asyncio.get_running_loop()
        own.left, own.used, own.now, own.until = left, used, loop.time, loop.time() + self.lease.seconds
        own.timer = loop.call_later(self.lease.seconds, self._expire, key)

    def _expire(self, key: str) -> None:
        in_background(self._give_back(key), f"giving back a slice of {key!r}")

    async def _give_back(self, key: str) -> None:
        """Soon, or not at all: a bucket that has been full meanwhile would grant them twice."""
        left = self._drop(key)
        if left:
            try:
                await self._buckets.ask(Request((self._key(key),), self._limits, -left))
            except Exception as error:  # noqa: BLE001  logged; what is not given back comes back by the refill
                logger.warning("limiter %r: a slice of %r was not given back: %r", self.name, key, error)

    def _drop(self, key: str) -> int:
        own = self._slices.get(key)
        if own is None or own.timer is None:
            return 0
        own.timer.cancel()
        del self._slices[key]
        return own.left

    # ---- input

    def _new_request(self, key: str, cost: float) -> Request:
        return Request((self._key(key),), self._limits, self.limit.cost(cost))

    def _key(self, key: str) -> str:
        return f"{self._prefix}{{{hash_tag(check_key(key))}}}"

    def _refusal(self, key: str, retry_after: float) -> RateLimited:
        limit = f"{self.limit.capacity:g} at once and {self.limit.refill_rate:g} a second"
        message = f"{key!r} has no tokens left ({limit}); the next try can pass in {retry_after:.3g} s"
        return RateLimited(message, key=key, limit=self.limit.capacity, retry_after=retry_after)
