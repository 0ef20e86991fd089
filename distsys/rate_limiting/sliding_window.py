"""Sliding window: at most `limit` in any `window` seconds, counted exactly or with two counters.

Promise  in every half-open span [t, t + window) at most `limit` are admitted per key, by all processes together; with
         precision="approximate" at most 2 * limit - 1, and it refuses only when more than limit - cost were admitted in
         the last 2 * window. A refused request takes nothing, and retry_after is exact. A key holds one member of a
         sorted set per admission in the window, whatever its cost, so `limit` at most; or two counters, 40 bytes.
Not      exact after a failover or an eviction, which forget admissions; fair between processes that wait in acquire();
         right while the server's clock leaps forward: admissions leave early. Set back, it gives nothing twice: what is
         in the window counts as admitted then, so the wait begins anew, once.
Units    limit and cost are whole numbers; times in seconds, float, counted in microseconds of the server.
Errors   RateLimited from acquire(); redis.RedisError and TimeoutError pass unless `on_failure` says what to answer.
Source   ClassDojo, "Better Rate Limiting With Redis Sorted Sets", 2015 (exact); Cloudflare, "How we built rate limiting
         capable of scaling to millions of domains", 2017 (approximate).
"""

from __future__ import annotations

import struct
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from distsys._support.arguments import check_positive, check_text
from distsys._support.redis import Script, Timed, async_client, hash_tag
from distsys.rate_limiting.buckets import Clock
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, Decision, Limit, Request, never_passes
from distsys.rate_limiting.fallback import Fallback, OnFailure
from distsys.rate_limiting.queues import Queues

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

Precision = Literal["exact", "approximate"]
SCRIPTS: dict[Precision, Script] = {
    "exact": Script(files(__package__).joinpath("sliding_window.lua").read_text()),
    "approximate": Script(files(__package__).joinpath("sliding_window_approximate.lua").read_text()),
}
KEYS = {"exact": "distsys:window:1", "approximate": "distsys:counters:1"}  # 1: the version of what the keys hold
SHORTEST = 0.001  # seconds; below, the way to the server takes longer than the window
TAKE, LOOK, GIVE_BACK = 1, 0, -1


class _LocalLimit(Limit):
    """What the failure policy `local` limits a process to: a bucket of `limit`, which a window refills once."""

    def __init__(self, limit: int, window: float) -> None:
        self.full, self.capacity, self.num, self.den = limit * MICRO, limit, limit, window


class SlidingWindowLimiter:
    """`if await SlidingWindowLimiter(redis, limit=100, window=60).is_allowed("user:42"): ...`

    limit       units admitted in any window; a request costs 1 unless it says otherwise
    window      seconds
    precision   "exact" stores each admission, "approximate" two counters, with the errors named above. Each has keys of
                its own, so a limiter that changes it begins empty
    name        keeps the keys of one limiter apart from another's; one with another limit or window but the same name
                goes on with what was admitted. Of two in use at once, the shorter window forgets for both
    on_failure  what to answer when Redis does not, see OnFailure; None: its error passes. `local` gives each process a
                token bucket of this size, refilled once per window: up to twice its fraction of `limit` in a window
    clock       seconds, instead of the server's own clock: for tests and simulations
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        *,
        limit: int,
        window: float,
        precision: Precision = "exact",
        name: str = "",
        on_failure: OnFailure | None = None,
        clock: Clock | None = None,
    ) -> None:
        if precision not in SCRIPTS:
            raise ValueError(f"precision={precision!r}: 'exact' or 'approximate'")
        if check_positive("window", window, MAX_TOKENS, "seconds") < SHORTEST:
            raise ValueError(f"window={window!r}: at least {SHORTEST} s")
        self.redis, self.limit, self.window = async_client(redis), _whole("limit", limit), window
        self.precision, self.name, self.clock = precision, name, clock
        self._script = SCRIPTS[precision]
        self._fallback, self._local = Fallback(name, on_failure), (_LocalLimit(limit, window),)
        self._prefix = f"{KEYS[precision]}:{hash_tag(name)}:"
        self._scripts = Timed(redis, self._fallback.timeout)
        self._queues = Queues(limit, f"room left ({limit} in {window:g} s)")

    async def is_allowed(self, key: str, cost: int = 1) -> bool:
        """Admits the request if the window has room for it, and says whether it had."""
        return (await self.try_acquire(key, cost)).allowed

    async def try_acquire(self, key: str, cost: int = 1) -> Decision:
        """The same; and how much room is left, and when to come again. Cancelled, it may have been admitted."""
        return await self._decide(key, self._cost(cost), TAKE)

    async def acquire(self, key: str, cost: int = 1, timeout: float | None = None) -> Decision:
        """Waits until it is admitted: in this process first come, first served; it asks only when there can be room.

        RateLimited as soon as `timeout` seconds can't be enough; None waits as long as it takes. Cancelled while a
        request is under way, it may have been admitted.
        """
        wanted = self._cost(cost)
        return await self._queues.wait(key, lambda: self._decide(key, wanted, TAKE), timeout, self.window)

    async def peek(self, key: str) -> Decision:
        """What is left, taking nothing; allowed says whether a request of cost 1 would pass."""
        return await self._decide(key, 1, LOOK)

    async def refund(self, key: str, cost: int = 1) -> None:
        """Gives back units that were admitted and not used: the oldest ones in the window.

        Which request they belonged to is not known. The oldest would leave first, so without them the window is never
        emptier than it should be, and the promise holds. Without the newest it could be, when others came between.
        """
        await self._ask(key, self._cost(cost), GIVE_BACK)

    async def reset(self, key: str) -> None:
        """Empties the window."""
        await self.redis.delete(self._key(key))

    # ---- one decision

    async def _decide(self, key: str, cost: int, mode: int) -> Decision:
        try:
            allowed, used, wait, reset = await self._ask(key, cost, mode)
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self._fallback.decide(error, Request((self._key(key),), self._local, cost * MICRO * mode))[0]
        self._fallback.worked()
        return Decision(allowed == 1, self.limit, max(0, self.limit - used), wait / MICRO, reset / MICRO)

    async def _ask(self, key: str, cost: int, mode: int) -> Any:
        now = "" if self.clock is None else round(self.clock() * MICRO)
        packed = struct.pack("<dddd", self.limit, round(self.window * MICRO), cost, mode)
        return await self._scripts.run(self._script, (self._key(key),), now, packed)

    # ---- input

    def _key(self, key: str) -> str:
        tag = hash_tag(check_text("key", key, "'user:42'"))
        return f"{self._prefix}{{{tag}}}"

    def _cost(self, cost: int) -> int:
        if _whole("cost", cost) > self.limit:
            raise never_passes(cost, f"limit={self.limit!r}")
        return cost


def _whole(name: str, value: int) -> int:
    check_positive(name, value, MAX_TOKENS, "whole units")
    if not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; units are counted whole: give an int")
    return value
