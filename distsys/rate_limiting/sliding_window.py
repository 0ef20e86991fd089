"""Sliding window: at most `limit` in any `window` seconds, counted exactly or with two counters.

Promise  in every half-open span [t, t + window) at most `limit` are admitted per key, by all processes together; with
         precision="approximate" at most 2 * limit - 1, and it refuses only when more than limit - cost were admitted in
         the last 2 * window. A refused request takes nothing, and retry_after is exact. An exact key holds one member
         of a sorted set per admission in the window, whatever its cost; an approximate one two counters, 40 bytes.
Not      exact after a failover or an eviction, which forget admissions; fair between processes that wait in acquire();
         right while the server's clock leaps forward: admissions leave early. A clock that is set back gives nothing
         twice: what is in the window counts as admitted at that moment, so the wait begins anew, once.
Units    limit and cost are whole numbers; times in seconds, float, counted in microseconds of the server.
Errors   RateLimited from acquire(); redis.RedisError and TimeoutError pass unless `on_failure` says what to answer.
Source   ClassDojo, "Better Rate Limiting With Redis Sorted Sets", 2015 (exact); Cloudflare, "How we built rate limiting
         capable of scaling to millions of domains", 2017 (approximate).
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable
from dataclasses import KW_ONLY, dataclass
from importlib.resources import files
from typing import Literal

from redis.asyncio import Redis, RedisCluster

from distsys._support.arguments import check_positive, check_text
from distsys._support.redis import Script, Timed, hash_tag
from distsys.rate_limiting.buckets import Clock
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, Decision, Limit, Request, never_passes
from distsys.rate_limiting.fallback import Fallback, OnFailure
from distsys.rate_limiting.queues import FairQueues

Precision = Literal["exact", "approximate"]
SCRIPTS: dict[Precision, Script] = {
    "exact": Script(files(__package__).joinpath("sliding_window.lua").read_text()),
    "approximate": Script(files(__package__).joinpath("sliding_window_approximate.lua").read_text()),
}
KEY_PREFIXES = {"exact": "distsys:window:1", "approximate": "distsys:counters:1"}  # 1: version of what the keys hold
MIN_WINDOW_SECONDS = 0.001  # below, the way to the server takes longer than the window
TAKE, LOOK, GIVE_BACK = 1, 0, -1
Reply = tuple[int, int, int, int]
"""What the scripts return: 1 if it passes, units in the window, microseconds to wait, and until it is empty."""


class _LocalLimit(Limit):
    """The limit of one process under the failure policy `local`: a bucket of `limit`, which a window refills once."""

    def __init__(self, limit: int, window: float) -> None:
        self.full, self.capacity = limit * MICRO, limit
        self.num, self.den = limit, window


@dataclass(eq=False, repr=False)
class SlidingWindowLimiter:
    """`if await SlidingWindowLimiter(redis, limit=100, window=60).is_allowed("user:42"): ...`

    limit       units admitted in any window; a request costs 1 unless it says otherwise
    window      seconds
    precision   "exact" stores each admission, "approximate" two counters, with the errors named above. Each has keys of
                its own, so a limiter that changes it begins empty
    name        keeps the keys of one limiter apart from another's. A limiter with another limit or window but the same
                name goes on with what was admitted; if two are in use at once, the shorter window forgets for both
    on_failure  what to answer when Redis does not, see OnFailure; None: its error passes. `local` gives each process a
                token bucket of this size, refilled once per window: up to twice its fraction of `limit` in a window
    clock       seconds, instead of the server's own clock: for tests and simulations
    """

    redis: Redis | RedisCluster
    _: KW_ONLY
    limit: int
    window: float
    precision: Precision = "exact"
    name: str = ""
    on_failure: OnFailure | None = None
    clock: Clock | None = None

    def __post_init__(self) -> None:
        if self.precision not in SCRIPTS:
            raise ValueError(f"precision={self.precision!r}: 'exact' or 'approximate'")
        if check_positive("window", self.window, MAX_TOKENS, "seconds") < MIN_WINDOW_SECONDS:
            raise ValueError(f"window={self.window!r}: at least {MIN_WINDOW_SECONDS} s")
        self._fallback = Fallback(self.name, self.on_failure)
        self._local_limits = (_LocalLimit(_whole("limit", self.limit), self.window),)
        self._script = SCRIPTS[self.precision]
        self._prefix = f"{KEY_PREFIXES[self.precision]}:{hash_tag(self.name)}:{{"
        self._scripts = Timed(self.redis, self._fallback.timeout)
        self._queues = FairQueues(self.limit, f"room left ({self.limit} in {self.window:g} s)")

    async def is_allowed(self, key: str, cost: int = 1) -> bool:
        """Admit the request if the window has room for it, and return whether it had.

        ValueError and TypeError name a key or cost that means nothing; redis.RedisError and TimeoutError pass unless
        `on_failure` has an answer. If cancelled while it is under way, the request may have been admitted.
        """
        return (await self.try_acquire(key, cost)).allowed

    async def try_acquire(self, key: str, cost: int = 1) -> Decision:
        """Admit the request if there is room; the decision says how much is left and when to come again.

        Errors and cancellation are those of is_allowed().
        """
        return await self._decide(key, self._cost(cost), TAKE)

    async def acquire(self, key: str, cost: int = 1, timeout: float | None = None) -> Decision:
        """Wait until the request is admitted, FIFO within this process; ask Redis only when there can be room.

        RateLimited as soon as `timeout` seconds can't be enough; None waits as long as it takes. If cancelled while a
        request is under way, it may have been admitted.
        """
        wanted = self._cost(cost)
        return await self._queues.wait(key, lambda: self._decide(key, wanted, TAKE), timeout, self.window)

    async def peek(self, key: str) -> Decision:
        """Return what is left without taking any; `allowed` says whether a request of cost 1 would pass."""
        return await self._decide(key, 1, LOOK)

    async def refund(self, key: str, cost: int = 1) -> None:
        """Give back units that were admitted and not used: the oldest ones in the window.

        Which request they belonged to is not known. The oldest would leave first, so without them the window is never
        emptier than it should be, and the promise holds. Without the newest it could be, if others came between. No
        policy answers here: redis.RedisError and TimeoutError pass.
        """
        await self._ask(key, self._cost(cost), GIVE_BACK)

    async def reset(self, key: str) -> None:
        """Empty the window; redis.RedisError passes."""
        await self._scripts.redis.delete(self._key(key))

    # ---- one decision

    async def _decide(self, key: str, cost: int, mode: int) -> Decision:
        request = Request((self._key(key),), self._local_limits, cost * MICRO * mode)
        return await self._fallback.guard(self._ask(key, cost, mode), request, self._decision, list.pop)

    def _decision(self, reply: Reply) -> Decision:
        passes, used, wait, reset = reply
        return Decision(passes == 1, self.limit, max(0, self.limit - used), wait / MICRO, reset / MICRO)

    def _ask(self, key: str, cost: int, mode: int) -> Awaitable[Reply]:
        now = "" if self.clock is None else round(self.clock() * MICRO)
        packed = struct.pack("<dddd", self.limit, round(self.window * MICRO), cost, mode)
        return self._scripts.run(self._script, (self._key(key),), now, packed)

    # ---- input

    def _key(self, key: str) -> str:
        return self._prefix + hash_tag(check_text("key", key, "'user:42'")) + "}"

    def _cost(self, cost: int) -> int:
        if _whole("cost", cost) > self.limit:
            raise never_passes(cost, f"limit={self.limit!r}")
        return cost


def _whole(name: str, value: int) -> int:
    check_positive(name, value, MAX_TOKENS, "whole units")
    if not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; units are counted whole: give an int")
    return value
