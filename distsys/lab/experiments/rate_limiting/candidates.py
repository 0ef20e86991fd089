"""Candidates for the rate-limiting experiments: the usual limiters, each with the one mistake it is known for."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distsys.lab.run.worker import checkpoint
from distsys.rate_limiting.distributed import Quota, TieredLimiter
from distsys.rate_limiting.token_bucket import TokenBucketLimiter


@dataclass
class CounterInMemory:
    """A counter that is exact in one process; each further process has one of its own."""

    limit: int
    count: int = 0

    def allow(self, key: str) -> bool:
        """Count the request; return whether the count is within the limit."""
        self.count += 1
        return self.count <= self.limit


class SlowAPI:
    """An app with SlowAPI in front, called in this process as a server would call it; `url` is that of its storage."""

    def __init__(self, limit: int, url: str) -> None:
        import httpx
        from slowapi import Limiter
        from slowapi.middleware import SlowAPIASGIMiddleware
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route

        app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
        app.state.limiter = Limiter(
            key_func=lambda request: request.headers["key"], default_limits=[f"{limit}/day"], storage_uri=url
        )
        app.add_middleware(SlowAPIASGIMiddleware)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")

    async def allow(self, key: str) -> bool:
        """Send a request; return whether SlowAPI let it pass."""
        return (await self.http.get("/", headers={"key": key})).status_code != 429


@dataclass
class InRedis:
    """The base of the limiters below: at most `limit` in `window` seconds, by a clock that may be the client's."""

    redis: Any
    limit: int
    window: float
    clock: Callable[[], float] = time.time


class GetThenSet(InRedis):
    """A counter that is read, and written one higher a moment later."""

    async def allow(self, key: str) -> bool:
        """Return whether the count was below the limit, and then count the request."""
        count = int(await self.redis.get(key) or 0)
        await checkpoint("between-get-and-set")
        if count >= self.limit:
            return False
        await self.redis.set(key, count + 1, px=int(self.window * 1000))
        return True


class FixedWindow(InRedis):
    """A counter per window: right in each window, wrong across the boundary of two."""

    async def allow(self, key: str) -> bool:
        """Count the request in the present window; return whether the count is within the limit."""
        counter = f"{key}:{int(self.clock() / self.window)}"
        count = await self.redis.incr(counter)
        await self.redis.expire(counter, 60)
        return bool(count <= self.limit)


class RefusalsCount(InRedis):
    """A log with ZADD first and ZCARD after: a refused request fills the window like an admitted one."""

    async def allow(self, key: str) -> bool:
        """Log the request; return whether the log is within the limit."""
        now = self.clock()
        pipe = self.redis.pipeline(transaction=False)
        pipe.zremrangebyscore(key, "-inf", now - self.window)
        pipe.zadd(key, {uuid.uuid4().hex: now})
        pipe.zcard(key)
        pipe.expire(key, 60)
        return bool((await pipe.execute())[2] <= self.limit)


class Log(InRedis):
    """A log of admitted requests, in one script: right if its times are, and if no two members are alike."""

    SCRIPT = """redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1] - ARGV[2])
        if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
        redis.call('ZADD', KEYS[1], ARGV[1], ARGV[4])
        return redis.call('EXPIRE', KEYS[1], 60)"""

    def member(self, now: float) -> str:
        """Return the member that stands for a request."""
        return uuid.uuid4().hex

    async def allow(self, key: str) -> bool:
        """Log the request if the log has room; return whether it had."""
        now = self.clock()
        return bool(await self.redis.eval(self.SCRIPT, 1, key, now, self.window, self.limit, self.member(now)))


class LogByMillisecond(Log):
    """A log whose members are milliseconds: two requests in the same one count once."""

    def member(self, now: float) -> str:
        """Return the millisecond."""
        return str(int(now * 1000))


USER = Quota(per="user", capacity=5, refill_rate=0.01)
ORGANISATION = Quota(per="organisation", capacity=8, refill_rate=0.01)


class OneAfterTheOther:
    """Two limiters, the organisation's and then the user's: a request that the second refuses has used up the first."""

    def __init__(self, redis: Any) -> None:
        self.quotas = [TokenBucketLimiter(redis, capacity=q.capacity, refill_rate=q.refill_rate, name=q.per)
                       for q in (ORGANISATION, USER)]  # fmt: skip

    async def allow(self, key: str, user: str, organisation: str) -> bool:
        """Take from one quota after the other, as far as they grant."""
        for quota, who in zip(self.quotas, (organisation, user), strict=True):
            if not await quota.is_allowed(f"{key}:{who}"):
                return False
        return True


class AllAtOnce:
    """A TieredLimiter, which takes from both quotas in one step, or from none."""

    def __init__(self, redis: Any, name: str) -> None:
        self.limiter = TieredLimiter(redis, {"pro": (USER, ORGANISATION)}, name=name)

    async def allow(self, key: str, user: str, organisation: str) -> Any:
        """Take from both quotas or from none."""
        return await self.limiter.try_acquire("pro", {"user": user, "organisation": organisation})


class SlicesForEver:
    """A lease without an end: five tokens at a time from a bucket of ten, kept until they are used."""

    def __init__(self, redis: Any, clock: Callable[[], float]) -> None:
        self.bucket = TokenBucketLimiter(redis, capacity=10, refill_rate=10, clock=clock)
        self.left = 0

    async def allow(self, key: str) -> bool:
        """Use a token of the slice, or of a new one."""
        if self.left == 0 and await self.bucket.is_allowed(key, cost=5):
            self.left = 5
        passes = self.left > 0
        self.left -= passes
        return passes


class LimitReq:
    """A client of nginx, whose `limit_req` answers 429 beyond the limit: no Redis, no code in the service."""

    def __init__(self, nginx: str) -> None:
        self.host, _, self.port = nginx.removeprefix("http://").partition(":")

    async def allow(self, key: str) -> bool:
        """Send a request; return whether nginx let it pass."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        with contextlib.closing(writer):
            writer.write(f"GET /?key={key} HTTP/1.0\r\n\r\n".encode())
            return b" 429 " not in await reader.readline()
