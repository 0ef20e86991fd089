"""Limiters with a mistake, each beside the scene that has to find it, and right ones in several styles."""

from __future__ import annotations

import time
import uuid
from typing import Any

from distsys.rate_limiting.sliding_window import SlidingWindowLimiter
from distsys.rate_limiting.token_bucket import TokenBucketLimiter

AT_ONCE, BOUNDARY, FIRST, STEADY, CLIENTS, PAUSE, IMPATIENT, CLOCKS, HELD_BACK, KILLED, FROZEN, BROKEN, LEFT_BEHIND = (
    range(13)
)
WINDOW = """
local t = redis.call('TIME') local now = t[1] * 1000000 + t[2]
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1] * 1000000)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now, ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1] * 1000)
return 1
"""
SERVERS_TIME = "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2]"
BUCKET = """
local t = redis.call('TIME') local now = t[1] + t[2] / 1000000
local known = redis.call('HMGET', KEYS[1], 'left', 'at')
local left = tonumber(known[1] or ARGV[1])
left = math.min(tonumber(ARGV[1]), left + (now - tonumber(known[2] or now)) * ARGV[2])
local granted = 0
if left >= 1 then granted, left = 1, left - 1 end
redis.call('HSET', KEYS[1], 'left', tostring(left), 'at', tostring(now))
redis.call('PEXPIRE', KEYS[1], 10000)
return granted
"""


class Window:
    """Right: one script, by the server's clock."""

    script = WINDOW

    def __init__(self, redis: Any, limit: int, window: float) -> None:
        self.redis, self.limit, self.window = redis, limit, window

    def member(self) -> str:
        return uuid.uuid4().hex

    async def allow(self, key: str) -> bool:
        return bool(await self.redis.eval(self.script, 1, key, self.window, self.limit, self.member()))


class Bucket:
    """Right: a token bucket in one script."""

    script = BUCKET

    def __init__(self, redis: Any, capacity: int, refill_rate: float) -> None:
        self.redis, self.capacity, self.rate = redis, capacity, refill_rate

    async def is_allowed(self, key: str) -> bool:
        return bool(await self.redis.eval(self.script, 1, key, self.capacity, self.rate))


class WatchedWindow(Window):
    """Right: WATCH, look, MULTI, take; by the server's clock."""

    async def allow(self, key: str) -> bool:
        from redis.exceptions import WatchError

        while True:
            async with self.redis.pipeline() as pipe:
                try:
                    await pipe.watch(key)
                    seconds, micros = await pipe.time()
                    now = seconds + micros / 1e6
                    if await pipe.zcount(key, f"({now - self.window}", "+inf") >= self.limit:
                        return False
                    pipe.multi()
                    pipe.zremrangebyscore(key, "-inf", now - self.window)
                    pipe.zadd(key, {self.member(): now})
                    pipe.pexpire(key, int(self.window * 1000))
                    await pipe.execute()
                except WatchError:
                    continue
                return True


class InMemory(Window):
    async def allow(self, key: str) -> bool:
        await self.redis.ping()
        now = time.monotonic()
        self.mine = [at for at in getattr(self, "mine", []) if at > now - self.window]
        if len(self.mine) >= self.limit:
            return False
        self.mine.append(now)
        return True


class OneTooMany(Window):
    script = WINDOW.replace(">= tonumber", "> tonumber")


class HalfAWindow(Window):
    script = WINDOW.replace("ARGV[1] * 1000000)", "ARGV[1] * 500000)")


class CountsRefusals(Window):
    script = WINDOW.replace(
        "if redis.call('ZCARD'", "redis.call('ZADD', KEYS[1], now, 'asked' .. ARGV[3])\nif redis.call('ZCARD'"
    )


class TimeIsTheMember(Window):
    """Two requests of one millisecond leave one mark."""

    script = WINDOW.replace("ARGV[3])", "math.floor(now / 50000))")


class NoTtl(Window):
    script = WINDOW.replace("redis.call('PEXPIRE', KEYS[1], ARGV[1] * 1000)", "")


class LooksThenTakes(Window):
    async def allow(self, key: str) -> bool:
        seconds, micros = await self.redis.time()
        now = seconds + micros / 1e6
        if await self.redis.zcount(key, f"({now - self.window}", "+inf") >= self.limit:
            return False
        await self.redis.zadd(key, {self.member(): now})
        await self.redis.pexpire(key, int(self.window * 1000))
        return True


class GetThenSet(Bucket):
    """A counter that is read, and written back."""

    async def is_allowed(self, key: str) -> bool:
        seconds, micros = await self.redis.time()
        now = seconds + micros / 1e6
        left, at = map(float, ((await self.redis.get(key)) or f"{self.capacity} {now}".encode()).split())
        left = min(self.capacity, left + (now - at) * self.rate)
        if left < 1:
            return False
        await self.redis.set(key, f"{left - 1} {now}", px=10_000)
        return True


class IncrThenExpire(Window):
    """A fixed window whose TTL is a second command."""

    async def allow(self, key: str) -> bool:
        n = await self.redis.incr(key)
        if n == 1:
            await self.redis.pexpire(key, int(self.window * 1000))
        return bool(n <= self.limit)


class FixedWindow(Window):
    """A counter for each second of the clock."""

    async def allow(self, key: str) -> bool:
        seconds, _ = await self.redis.time()
        name = f"{key}:{seconds // int(self.window)}"
        async with self.redis.pipeline() as pipe:
            pipe.incr(name)
            pipe.pexpire(name, 2000)
            n, _ = await pipe.execute()
        return bool(n <= self.limit)


class ClientClock(Window):
    async def allow(self, key: str) -> bool:
        script = WINDOW.replace(
            "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2]", "local now = tonumber(ARGV[4])"
        )
        me = self.member()
        return bool(await self.redis.eval(script, 1, key, self.window, self.limit, me, int(time.time() * 1e6)))


class NoCap(Bucket):
    """An idle bucket grows without end."""

    script = BUCKET.replace("math.min(tonumber(ARGV[1]), ", "(").replace(
        "PEXPIRE', KEYS[1], 10000", "PEXPIRE', KEYS[1], 100000"
    )


class RefillsTwice(Bucket):
    script = BUCKET.replace("* ARGV[2])", "* ARGV[2] * 2)")


class TakesWhenRefused(Bucket):
    script = BUCKET.replace(
        "if left >= 1 then granted, left = 1, left - 1 end", "if left >= 1 then granted = 1 end left = left - 1"
    )


def slide(redis: Any, limit: int, window: float) -> SlidingWindowLimiter:
    return SlidingWindowLimiter(redis, limit=limit, window=window)


def bucket(redis: Any, capacity: float, refill_rate: float) -> TokenBucketLimiter:
    return TokenBucketLimiter(redis, capacity=capacity, refill_rate=refill_rate)


RIGHT = (Window, Bucket, WatchedWindow, slide, bucket)
WRONG = {
    InMemory: AT_ONCE,
    OneTooMany: AT_ONCE,
    HalfAWindow: IMPATIENT,
    CountsRefusals: AT_ONCE,
    TimeIsTheMember: AT_ONCE,
    NoTtl: LEFT_BEHIND,
    LooksThenTakes: AT_ONCE,
    GetThenSet: AT_ONCE,
    IncrThenExpire: KILLED,
    FixedWindow: BOUNDARY,
    ClientClock: AT_ONCE,
    NoCap: AT_ONCE,
    RefillsTwice: BOUNDARY,
    TakesWhenRefused: IMPATIENT,
}
"""By mistake: the scene that has to show it."""
