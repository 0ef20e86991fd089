"""Limiters written by somebody who did not know the scenes: right ones, and wrong ones with one mistake each."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from redis.exceptions import WatchError

NOW = "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2]\n"


# --- right ----------------------------------------------------------------------------------------------------------------


class SlidingLog:
    LUA = (
        NOW
        + """
    local window, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - window))
    if redis.call('ZSCORE', KEYS[1], ARGV[3]) then return 1 end
    if redis.call('ZCARD', KEYS[1]) >= limit then return 0 end
    redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[3])
    redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1)
    return 1"""
    )

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    def name(self, key):
        return f"rate:{key}"

    def member(self):
        return uuid.uuid4().hex

    async def allow(self, key: str) -> bool:
        micros = int(self.window * 1_000_000)
        return await self.redis.eval(self.LUA, 1, self.name(key), micros, self.limit, self.member()) == 1


class TokenBucket:
    LUA = (
        NOW
        + """
    local capacity, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
    local row = redis.call('HMGET', KEYS[1], 'tokens', 'at')
    local tokens, at = tonumber(row[1]) or capacity, tonumber(row[2]) or now
    tokens = math.min(capacity, tokens + math.max(0, now - at) * rate / 1000000)
    local granted = 0
    if tokens >= 1 then tokens = tokens - 1 granted = 1 end
    redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.0f', now))
    redis.call('PEXPIRE', KEYS[1], math.ceil(capacity / rate * 1000) + 1000)
    return granted"""
    )

    def __init__(self, redis, capacity, refill_rate):
        self.redis, self.capacity, self.refill_rate = redis, capacity, refill_rate
        self.script = redis.register_script(self.LUA)

    async def try_acquire(self, key: str) -> bool:
        return bool(await self.script(keys=[f"bucket:{key}"], args=[self.capacity, self.refill_rate]))


class Gcra:
    """The theoretical arrival time of the next request, one number a key."""

    LUA = (
        NOW
        + """
    local step, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2])
    local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now)
    if tat - now > tolerance then return 0 end
    local ms = math.ceil((tat + step - now) / 1000)
    redis.call('SET', KEYS[1], string.format('%.0f', tat + step), 'PX', string.format('%.0f', ms))
    return 1"""
    )

    def __init__(self, redis, capacity, refill_rate):
        self.redis = redis
        self.step = 1_000_000 / refill_rate
        self.tolerance = self.step * (capacity - 1)

    async def is_allowed(self, key: str) -> bool:
        return await self.redis.eval(self.LUA, 1, f"gcra:{key}", self.step, self.tolerance) == 1


@dataclass
class BlockingListLimiter:
    redis: Any
    limit: int
    window: float

    LUA = (
        NOW
        + """
    local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
    local oldest = redis.call('LINDEX', KEYS[1], limit - 1)
    if oldest and now - tonumber(oldest) < window then return 0 end
    redis.call('LPUSH', KEYS[1], string.format('%.0f', now))
    redis.call('LTRIM', KEYS[1], 0, limit - 1)
    redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1)
    return 1"""
    )

    def is_allowed(self, key):
        return self.redis.eval(self.LUA, 1, "hits:" + key, self.limit, round(self.window * 1e6)) == 1


class WatchedLog:
    """Without Lua: the time is read under WATCH, so an EXEC that works saw every earlier request."""

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def allow(self, key):
        name = f"watched:{key}"
        async with self.redis.pipeline(transaction=True) as pipe:
            while True:
                try:
                    await pipe.watch(name)
                    seconds, micros = await pipe.time()
                    now = seconds * 1_000_000 + micros
                    start = now - int(self.window * 1_000_000)
                    if await pipe.zcount(name, f"({start}", "+inf") >= self.limit:
                        return False
                    pipe.multi()
                    pipe.zremrangebyscore(name, "-inf", start)
                    pipe.zadd(name, {uuid.uuid4().hex: now})
                    pipe.pexpire(name, int(self.window * 1000) + 1000)
                    await pipe.execute()
                    return True
                except WatchError:
                    continue


def ring_limiter(redis, limit, window):
    """The last `limit` admissions in a ring: the slot that comes next holds the oldest of them."""
    script = redis.register_script(
        NOW
        + """
        local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
        local n = tonumber(redis.call('HGET', KEYS[1], 'n') or '0')
        local slot = tostring(n % limit)
        local before = redis.call('HGET', KEYS[1], slot)
        if before and now - tonumber(before) < window then return 0 end
        redis.call('HSET', KEYS[1], slot, string.format('%.0f', now), 'n', (n + 1) % limit)
        redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1)
        return 1"""
    )

    class Ring:
        async def allow(self, key):
            return bool(await script(keys=[f"ring:{key}"], args=[limit, int(window * 1_000_000)]))

    return Ring()


# --- wrong ----------------------------------------------------------------------------------------------------------------


class WindowCounter:
    LUA = """
    local n = redis.call('INCR', KEYS[1])
    if n == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
    if n > tonumber(ARGV[1]) then return 0 end
    return 1"""

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def allow(self, key):
        return bool(await self.redis.eval(self.LUA, 1, f"count:{key}", self.limit, int(self.window * 1000)))


class IncrExpire:
    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def is_allowed(self, key):
        name = f"limit:{key}"
        count = await self.redis.incr(name)
        if count == 1:
            await self.redis.pexpire(name, int(self.window * 1000))
        return count <= self.limit


class PipelinedLog:
    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def allow(self, key):
        seconds, micros = await self.redis.time()
        now, name = seconds + micros / 1e6, f"log:{key}"
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(name, 0, now - self.window)
            pipe.zadd(name, {uuid.uuid4().hex: now})
            pipe.zcard(name)
            pipe.pexpire(name, int(self.window * 1000) + 1)
            _, _, count, _ = await pipe.execute()
        return count <= self.limit


class RollingCounter:
    LUA = """
    local n = tonumber(redis.call('GET', KEYS[1]) or '0')
    if n >= tonumber(ARGV[1]) then return 0 end
    redis.call('INCR', KEYS[1])
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return 1"""

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    def allow(self, key):
        return self.redis.eval(self.LUA, 1, f"rolling:{key}", self.limit, int(self.window * 1000)) == 1


class CardThenAdd:
    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def allow(self, key):
        seconds, micros = await self.redis.time()
        now, name = seconds + micros / 1e6, f"requests:{key}"
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(name, 0, now - self.window)
            pipe.zcard(name)
            _, count = await pipe.execute()
        if count >= self.limit:
            return False
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zadd(name, {uuid.uuid4().hex: now})
            pipe.pexpire(name, int(self.window * 1000) + 1)
            await pipe.execute()
        return True


class ClockedLog:
    LUA = SlidingLog.LUA.replace(NOW, "local now = tonumber(ARGV[4])\n")

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    def is_allowed(self, key):
        now, micros = int(time.time() * 1_000_000), int(self.window * 1_000_000)
        return self.redis.eval(self.LUA, 1, f"clocked:{key}", micros, self.limit, uuid.uuid4().hex, now) == 1


class ShortLivedLog(SlidingLog):
    LUA = SlidingLog.LUA.replace("math.ceil(window / 1000) + 1", "math.ceil(window / 1000000)")


class MillisecondLog:
    LUA = """
    local t = redis.call('TIME')
    local now, window = t[1] * 1000 + math.floor(t[2] / 1000), tonumber(ARGV[1])
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - window)
    if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
    redis.call('ZADD', KEYS[1], now, now)
    redis.call('PEXPIRE', KEYS[1], window + 1)
    return 1"""

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    def allow(self, key):
        return bool(self.redis.eval(self.LUA, 1, "ms:" + key, int(self.window * 1000), self.limit))


class HashedKeys(SlidingLog):
    def name(self, key):
        return f"rate:{hash(key) & 0xFFFFFFFF:08x}"


class RuleLimiter(SlidingLog):
    def name(self, key):
        return f"rate:{self.limit}/{self.window}"


class WholeTokens(TokenBucket):
    LUA = TokenBucket.LUA.replace(
        "tokens + math.max(0, now - at) * rate / 1000000)",
        "tokens + math.floor(math.max(0, now - at) * rate / 1000000))",
    )


class ThriftyBucket(TokenBucket):
    LUA = TokenBucket.LUA.replace("math.ceil(capacity / rate * 1000) + 1000", "math.ceil(1000 / rate)")


class SavingBucket(TokenBucket):
    LUA = TokenBucket.LUA.replace("math.min(capacity, tokens + ", "(tokens + ")


class SecondsLog(SlidingLog):
    LUA = SlidingLog.LUA.replace(NOW, "local now = redis.call('TIME')[1] * 1000000\n")


class PersistentBucket(TokenBucket):
    LUA = "\n".join(line for line in TokenBucket.LUA.splitlines() if "PEXPIRE" not in line)


class WeightedWindows:
    LUA = (
        NOW
        + """
    local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
    local index = math.floor(now / window)
    local current = tonumber(redis.call('HGET', KEYS[1], string.format('%.0f', index)) or '0')
    local previous = tonumber(redis.call('HGET', KEYS[1], string.format('%.0f', index - 1)) or '0')
    local share = 1 - (now - index * window) / window
    if math.floor(previous * share) + current >= limit then return 0 end
    redis.call('HINCRBY', KEYS[1], string.format('%.0f', index), 1)
    redis.call('HDEL', KEYS[1], string.format('%.0f', index - 2), string.format('%.0f', index - 3))
    redis.call('PEXPIRE', KEYS[1], math.ceil(2 * window / 1000))
    return 1"""
    )

    def __init__(self, redis, limit, window):
        self.redis, self.limit, self.window = redis, limit, window

    async def allow(self, key):
        return await self.redis.eval(self.LUA, 1, f"weighted:{key}", self.limit, int(self.window * 1e6)) == 1


WRONG = {
    WindowCounter: (
        "a burst on both sides of a second after the first request",
        "a fixed window: the end of one and the start of the next let up to twice the limit through in one window's length",
    ),
    IncrExpire: (
        "a burst on both sides of a second after the first request",
        "INCR and PEXPIRE are two commands: after a crash between them the counter never expires and the key is refused for ever (a fixed window besides)",
    ),
    PipelinedLog: (
        "an impatient client is refused again and again",
        "refused requests are counted too, so a client that goes on asking is never let in again",
    ),
    RollingCounter: (
        "a burst on both sides of a second after the first request",
        "each admitted request renews the TTL of the counter, so steady traffic below the limit is refused after limit requests",
    ),
    CardThenAdd: (
        "a command is held back until another request is admitted",
        "ZCARD and ZADD are two round trips: concurrent requests all see room and exceed the limit",
    ),
    ClockedLog: (
        "three workers ask at once, and come again later",
        "the time is each client's wall clock: a client whose clock is ahead throws the others' entries away (or one behind is refused)",
    ),
    ShortLivedLog: (
        "three workers ask at once, and come again later",
        "PEXPIRE gets seconds, so the log is gone after 1 ms and far more than the limit is let through",
    ),
    MillisecondLog: (
        "three workers ask at once, and come again later",
        "the member is the millisecond, so requests in the same millisecond count as one and the limit is exceeded",
    ),
    HashedKeys: (
        "three workers ask at once, and come again later",
        "Python's hash() of a str is salted per process, so each process has its own limit",
    ),
    RuleLimiter: ("two clients", "the log is named after the rule, not the key, so all keys share one limit"),
    WholeTokens: (
        "an impatient client is refused again and again",
        "the refill is rounded down while the time moves on, so a client that asks often never gets a token again",
    ),
    ThriftyBucket: (
        "a burst on both sides of a second",
        "the bucket expires after the time of one token (100 ms), and comes back full",
    ),
    SavingBucket: (
        "a burst on both sides of a second after the first request",
        "the refill is not capped at the capacity: after a pause a burst of more than the capacity is let through",
    ),
    SecondsLog: (
        "a burst on both sides of a second",
        "the time is in whole seconds, so a burst at the end of one second and one at the start of the next both pass",
    ),
    PersistentBucket: (
        "what is left behind",
        "buckets have no TTL, so the keys of clients that never come back stay for ever",
    ),
    WeightedWindows: (
        "a burst on both sides of a second",
        "the weighted previous window assumes an even spread: a burst late in it and new requests exceed the limit within one window",
    ),
}
RIGHT = [SlidingLog, TokenBucket, Gcra, BlockingListLimiter, WatchedLog, ring_limiter]
