"""Token bucket: bursts up to a capacity, then a steady rate.

Promise  in any T seconds at most `capacity + refill_rate * T` tokens are granted per key, by all processes together; a
         refused request takes nothing. A lease may add a bounded number of tokens, see TokenLease.
Not      exact after a failover or an eviction, which forget grants; fair between processes that wait in acquire();
         right while the server's clock leaps: after a leap forward it refills too early, after a leap back it refills
         nothing until the clock has caught up.
Units    tokens, counted in millionths; refill_rate in tokens per second; times in seconds, float.
Errors   RateLimited from acquire(); redis.RedisError and TimeoutError pass unless `on_failure` says what to answer.
Source   Turner 1986 (the leaky bucket as a meter); RFC 3290, appendix A.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from operator import itemgetter

from redis.asyncio import Redis, RedisCluster

from distsys._support.arguments import check_positive, check_text
from distsys._support.cancellation import in_background
from distsys._support.redis import hash_tag
from distsys.rate_limiting.buckets import Buckets, Clock
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, BucketReply, Decision, Limit, Request
from distsys.rate_limiting.fallback import Fallback, OnFailure
from distsys.rate_limiting.queues import FairQueues

CACHED_REQUESTS = 1_000  # kept by a limiter, so that they need not be checked and written anew
MAX_SLICES = 10_000  # leased at a time by one limiter; requests with further keys are decided by Redis
GRANTED: Callable[[BucketReply], bool] = itemgetter(0)


@dataclass(frozen=True, kw_only=True)
class TokenLease:
    """A slice of the quota, to decide from without asking: `tokens` at a time, given back after `seconds`.

    The price: tokens taken before a span of time may be used in it. In any T seconds there may be up to
    `min(processes * tokens, refill_rate * seconds)` more than the bucket alone would grant. Other processes may be
    refused while a slice lies unused. A process that dies takes its slices along.
    """

    tokens: float
    seconds: float

    def __post_init__(self) -> None:
        check_positive("tokens", self.tokens, MAX_TOKENS, "tokens")
        check_positive("seconds", self.seconds, 60, "seconds")


@dataclass
class _Slice:
    """The leased tokens of one key."""

    left: int  # microtokens that are not used yet
    used: int  # microtokens used in the bucket, the whole slice included
    clock: Clock
    until: float  # by that clock
    timer: asyncio.TimerHandle  # gives the rest back then


@dataclass(eq=False, repr=False)
class TokenBucketLimiter:
    """`if await TokenBucketLimiter(redis, capacity=100, refill_rate=10).is_allowed("user:42"): ...`

    capacity     tokens of a full bucket: the largest burst
    refill_rate  tokens per second
    name         keeps the keys of one limiter apart from another's; a limiter with other limits but the same name goes
                 on with what was used
    on_failure   what to answer when Redis does not, see OnFailure; None: its error passes
    lease        decides most requests without asking Redis, see TokenLease; aclose() gives back what is left
    clock        seconds, instead of the server's own clock: for tests and simulations
    """

    redis: Redis | RedisCluster
    _: KW_ONLY
    capacity: float
    refill_rate: float
    name: str = ""
    on_failure: OnFailure | None = None
    lease: TokenLease | None = None
    clock: Clock | None = None

    def __post_init__(self) -> None:
        self.limit = Limit(self.capacity, self.refill_rate)
        self._limits = (self.limit,)
        self._fallback = Fallback(self.name, self.on_failure)
        self._buckets = Buckets(self.redis, timeout=self._fallback.timeout, clock=self.clock)
        self._prefix = f"distsys:bucket:1:{hash_tag(self.name)}:{{"  # 1: the version of what the keys hold
        self._cached_request = lru_cache(CACHED_REQUESTS, typed=True)(self._request)  # the same clients come again
        self._slices: dict[str, _Slice] = {}
        self._leasing: set[str] = set()  # keys whose slice is on its way
        exhausted = f"tokens left ({self.capacity:g} at once and {self.refill_rate:g} a second)"
        self._queues = FairQueues(self.capacity, exhausted)

    async def is_allowed(self, key: str, cost: float = 1) -> bool:
        """Take `cost` tokens if they are there, and return whether they were.

        ValueError and TypeError name a key or cost that means nothing; redis.RedisError and TimeoutError pass unless
        `on_failure` has an answer. If cancelled while the request is under way, its tokens may be taken.
        """
        if self.lease is not None:
            return (await self.try_acquire(key, cost)).allowed
        try:
            request = self._cached_request(key, cost)
        except TypeError:  # the cache can't hash the key: say what is wrong with it
            request = self._request(key, cost)
        return await self._fallback.guard(self._buckets.ask(request), request, GRANTED, any)

    async def try_acquire(self, key: str, cost: float = 1) -> Decision:
        """Take `cost` tokens if they are there; the decision says how much is left and when to come again.

        Errors and cancellation are those of is_allowed().
        """
        wanted = self.limit.cost(cost)
        if self.lease is None:
            return await self._decide(self._ask_for(key, wanted))
        return self._from_slice(key, wanted) or await self._with_slice(key, wanted, self.lease)

    async def acquire(self, key: str, cost: float = 1, timeout: float | None = None) -> Decision:
        """Wait until the tokens are there, FIFO within this process; ask Redis only when they can be.

        RateLimited as soon as `timeout` seconds can't be enough; None waits as long as it takes. If cancelled while a
        request is under way, its tokens may be taken.
        """
        longest = self.limit.seconds(self.limit.cost(cost))
        return await self._queues.wait(key, lambda: self.try_acquire(key, cost), timeout, longest)

    async def peek(self, key: str) -> Decision:
        """Return what is left without taking any; `allowed` says whether one token would pass."""
        return await self._decide(self._ask_for(key, 0))

    async def refund(self, key: str, tokens: float = 1) -> None:
        """Give back tokens that were taken and not needed. A bucket never holds more than its capacity.

        No policy answers here: redis.RedisError and TimeoutError pass.
        """
        await self._buckets.ask(self._ask_for(key, -self.limit.cost(tokens)))

    async def reset(self, key: str) -> None:
        """Fill the bucket; redis.RedisError passes."""
        self._drop_slice(key)
        await self._buckets.redis.delete(self._key(key))

    async def aclose(self) -> None:
        """Give back what is left of leased slices. The Redis client is yours and stays open."""
        await asyncio.gather(*map(self._give_back, list(self._slices)))

    async def _decide(self, request: Request) -> Decision:
        return await self._fallback.guard(self._buckets.ask(request), request, request.decision, list.pop)

    # ---- leased slices

    def _from_slice(self, key: str, cost: int) -> Decision | None:
        own = self._slices.get(key)
        if own is None or own.left < cost or own.clock() >= own.until:
            return None
        own.left -= cost
        return self.limit.decision(own.used - own.left - cost, cost, cost, "lease")

    async def _with_slice(self, key: str, cost: int, lease: TokenLease) -> Decision:
        """Ask for the request and a slice together, or for the request alone while a slice is on its way."""
        await self._give_back(key)  # used up, or past its time
        taken = len(self._slices) + len(self._leasing)
        if key in self._slices or key in self._leasing or taken >= MAX_SLICES:
            return await self._decide(self._ask_for(key, cost))
        request = self._ask_for(key, cost, 1 + int(lease.tokens * MICRO) // cost)
        open_slice = partial(self._open_slice, key, request, lease.seconds)
        self._leasing.add(key)
        try:
            return await self._fallback.guard(self._buckets.ask(request), request, open_slice, list.pop)
        finally:
            self._leasing.discard(key)

    def _open_slice(self, key: str, request: Request, seconds: float, reply: BucketReply) -> Decision:
        """Keep what was granted beyond the first request, until it is used or `seconds` have passed."""
        granted, (used,), taken = reply
        if granted > 1:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(seconds, lambda: in_background(self._give_back(key), f"closing a slice of {key!r}"))
            left = (granted - 1) * request.cost
            used += taken + granted * request.cost
            self._slices[key] = _Slice(left, used, loop.time, loop.time() + seconds, timer)
        return request.decision(reply)

    async def _give_back(self, key: str) -> None:
        """Give back a slice at once and never again: a bucket that has been full meanwhile would grant it twice."""
        if left := self._drop_slice(key):
            request, what = self._ask_for(key, -left), f"limiter {self.name!r}: giving back a slice of {key!r}"
            await asyncio.wait([in_background(self._buckets.ask(request), what)])  # it comes back by the refill, too

    def _drop_slice(self, key: str) -> int:
        """Forget the slice and return the microtokens that it had left."""
        own = self._slices.pop(key, None)
        if own is None:
            return 0
        own.timer.cancel()
        return own.left

    # ---- input

    def _request(self, key: str, cost: float) -> Request:
        return self._ask_for(key, self.limit.cost(cost))

    def _ask_for(self, key: str, microtokens: int, times: int = 1) -> Request:
        return Request((self._key(key),), self._limits, microtokens, times)

    def _key(self, key: str) -> str:
        return self._prefix + hash_tag(check_text("key", key, "'user:42'")) + "}"
