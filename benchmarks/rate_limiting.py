"""Rate limiting: ours beside the raw script and the peers. `python benchmarks/rate_limiting.py --quick --rounds 3`"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from common import Bench, Contender, repeat

FULL = 1_000_000  # capacity and tokens per second: every decision is a yes
TASKS = 50
RAW = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local rate, capacity, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local refill = (now - (tonumber(state[2]) or now)) * rate / 1000000
local tokens = math.min(capacity, (tonumber(state[1]) or capacity) + refill)
local granted = 0
if tokens >= cost then tokens = tokens - cost granted = 1 end
redis.call('HSET', KEYS[1], 'tokens', tokens, 'at', now)
redis.call('PEXPIRE', KEYS[1], math.ceil(capacity / rate * 1000) + 1000)
return {granted, math.floor(tokens)}
"""

Allow = Callable[[str], Awaitable[bool]]
Handle = Callable[[int], Awaitable[int]]  # one request of a client through an app; its status


# ---- limiters


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Any]:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as redis:
        yield redis


@asynccontextmanager
async def raw(url: str) -> AsyncIterator[Allow]:
    async with client(url) as redis:
        sha = await redis.script_load(RAW)

        async def allow(key: str) -> bool:
            return bool((await redis.evalsha(sha, 1, key, FULL, FULL, 1))[0])

        yield allow


@asynccontextmanager
async def token_bucket(url: str) -> AsyncIterator[Allow]:
    from distsys.rate_limiting.token_bucket import TokenBucketLimiter

    async with client(url) as redis:
        yield TokenBucketLimiter(redis, capacity=FULL, refill_rate=FULL).is_allowed


@asynccontextmanager
async def leased(url: str) -> AsyncIterator[Allow]:
    from distsys.rate_limiting.token_bucket import TokenBucketLimiter, TokenLease

    async with client(url) as redis:
        limiter = TokenBucketLimiter(redis, capacity=FULL, refill_rate=FULL, lease=TokenLease(tokens=64, seconds=0.05))
        yield limiter.is_allowed
        await limiter.aclose()


@asynccontextmanager
async def sliding_window(url: str, precision: str) -> AsyncIterator[Allow]:
    from distsys.rate_limiting.sliding_window import SlidingWindowLimiter

    async with client(url) as redis:
        yield SlidingWindowLimiter(redis, limit=FULL, window=1, precision=precision).is_allowed


@asynccontextmanager
async def limits(url: str) -> AsyncIterator[Allow]:
    from limits import parse
    from limits.aio import storage, strategies

    store = storage.RedisStorage(f"async+{url}", implementation="redispy")
    limiter, item = strategies.SlidingWindowCounterRateLimiter(store), parse(f"{FULL}/second")

    async def allow(key: str) -> bool:
        return await limiter.hit(item, key)

    yield allow


@asynccontextmanager
async def throttled(url: str) -> AsyncIterator[Allow]:
    from throttled.asyncio import Throttled, rate_limiter, store

    quota = rate_limiter.per_sec(FULL, burst=FULL)
    throttle = Throttled(using="token_bucket", quota=quota, store=store.RedisStore(server=url))

    async def allow(key: str) -> bool:
        return not (await throttle.limit(key)).limited

    yield allow


@asynccontextmanager
async def pyrate(url: str) -> AsyncIterator[Allow]:
    from pyrate_limiter import Limiter, Rate, RedisStateStore, StateBucket, TokenBucket

    async with client(url) as redis:
        bucket = StateBucket([Rate(FULL, 1000)], TokenBucket(), RedisStateStore(redis, "pyrate"))
        limiter = Limiter(bucket)

        async def allow(key: str) -> bool:
            return bool(await limiter.try_acquire_async(key, blocking=False))

        yield allow


# ---- apps


def through(app: Any) -> Handle:
    """A GET straight into the app: no socket hides what the limiter costs."""
    headers = [(b"host", b"bench")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": "/"}
    scope |= {"raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http", "headers": headers}
    scope |= {"server": ("bench", 80)}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def handle(client: int) -> int:
        status = 0

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)

        await app(scope | {"client": (f"10.0.0.{client}", 1)}, receive, send)
        return status

    return handle


def bare_app() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def ok(request: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/", ok)])


@asynccontextmanager
async def bare(url: str) -> AsyncIterator[Handle]:
    yield through(bare_app())


@asynccontextmanager
async def limited(url: str, slice_of: str = "") -> AsyncIterator[Handle]:
    from distsys.rate_limiting.http import RateLimitMiddleware, client_address
    from distsys.rate_limiting.token_bucket import TokenBucketLimiter, TokenLease

    lease = TokenLease(tokens=float(slice_of), seconds=0.05) if slice_of else None
    async with client(url) as redis:
        limiter = TokenBucketLimiter(redis, capacity=FULL, refill_rate=FULL, lease=lease)
        yield through(RateLimitMiddleware(bare_app(), limiter, key=client_address()))
        await limiter.aclose()


@asynccontextmanager
async def slowapi(url: str) -> AsyncIterator[Handle]:
    from slowapi import Limiter
    from slowapi.middleware import SlowAPIASGIMiddleware
    from slowapi.util import get_remote_address

    app = bare_app()
    limiter = Limiter(key_func=get_remote_address, storage_uri=url, default_limits=[f"{FULL}/second"])
    app.state.limiter = limiter
    app.add_middleware(SlowAPIASGIMiddleware)
    yield through(app)


@asynccontextmanager
async def fastapi_limiter(url: str) -> AsyncIterator[Handle]:
    from fastapi import Depends, FastAPI
    from fastapi_limiter.depends import RateLimiter
    from pyrate_limiter import Limiter, Rate, RedisBucket

    async with client(url) as redis:
        bucket = await RedisBucket.init([Rate(FULL, 1000)], redis, "fastapi-limiter")
        app = FastAPI()

        @app.get("/", dependencies=[Depends(RateLimiter(limiter=Limiter(bucket)))])
        async def ok() -> str:
            return "ok"

        yield through(app)


# ---- what is measured, in the child


async def alone(allow: Allow, start: float, seconds: float) -> dict[str, float]:
    """One after the other."""

    async def once() -> None:
        assert await allow("alone")

    return await repeat(once, seconds)


async def crowd(allow: Allow, start: float, seconds: float, keys: int) -> dict[str, float]:
    """Fifty tasks at once."""
    count, cpu, begin = 0, time.process_time(), time.perf_counter()

    async def ask(key: str) -> None:
        nonlocal count
        while time.perf_counter() < begin + seconds:
            assert await allow(key)
            count += 1
            if count % TASKS == 0:
                await asyncio.sleep(0)  # what never waits would let nobody else in

    await asyncio.gather(*(ask(f"{os.getpid()}:{number % keys}") for number in range(TASKS)))
    return {"count": count, "seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


async def handled(handle: Handle, start: float, seconds: float) -> dict[str, float]:
    """Requests, one after the other."""

    async def once() -> None:
        assert await handle(1) == 200

    return await repeat(once, seconds)


async def handled_together(handle: Handle, start: float, seconds: float) -> dict[str, float]:
    """Fifty at a time, each of another client."""

    async def allow(key: str) -> bool:
        return await handle(int(key.partition(":")[2])) == 200

    return await crowd(allow, start, seconds, TASKS)


async def main() -> None:
    async with Bench.open("rate_limiting") as bench:
        url = (await bench.servers.redis()).url
        floor = "EVALSHA of a token bucket"

        def contenders(ours: float, ahead: float | None) -> list[Contender]:
            return [
                Contender(floor, "raw", [url]),
                Contender("TokenBucketLimiter, ours", "token_bucket", [url], floor, ours),
                Contender("TokenBucketLimiter, ours, leased 64", "leased", [url], floor, ahead),
                Contender("SlidingWindowLimiter, ours, exact", "sliding_window", [url, "exact"], floor),
                Contender("SlidingWindowLimiter, ours, approximate", "sliding_window", [url, "approximate"], floor),
                Contender("limits, sliding window counter", "limits", [url], floor, needs="limits"),
                Contender("throttled-py, token bucket", "throttled", [url], floor, needs="throttled-py"),
                Contender("pyrate-limiter, token bucket", "pyrate", [url], floor, needs="pyrate-limiter"),
            ]

        note = """
Ours counts in whole microtokens, answers how much is left and when to come again, and sends what arrives together as
one call; the raw script and the peers send one call per decision. A lease decides locally, and may admit up to 64 more
per process."""
        await bench.speed("One decision after the other", "decisions", contenders(0.95, 25), do="alone", note=note)
        for keys, title, goal in ((TASKS, f"{TASKS} tasks, each its key", 4), (1, f"{TASKS} tasks, one hot key", 12)):
            await bench.speed(title, "decisions", contenders(goal, None), do="crowd", note=note, keys=keys)
        app, rival = "Starlette without a limiter", "SlowAPI with Redis"
        await bench.speed(
            "HTTP, one request after the other",
            "requests",
            [
                Contender(app, "bare", [url], needs="starlette"),
                Contender("middleware, ours, leased 256", "limited", [url, "256"], app, 0.5, needs="starlette"),
                Contender("middleware, ours", "limited", [url], app, needs="starlette"),
                Contender(rival, "slowapi", [url], app, needs="slowapi"),
                Contender("fastapi-limiter with Redis", "fastapi_limiter", [url], app, needs="fastapi-limiter"),
            ],
            do="handled",
            note="Straight into the app, without a socket. One at a time suits a blocking client, SlowAPI's.",
        )
        await bench.speed(
            f"HTTP, {TASKS} requests at a time",
            "requests",
            [
                Contender(rival, "slowapi", [url], needs="slowapi"),
                Contender("middleware, ours", "limited", [url], rival, 2, needs="starlette"),
                Contender("middleware, ours, leased 256", "limited", [url, "256"], rival, needs="starlette"),
                Contender("fastapi-limiter with Redis", "fastapi_limiter", [url], rival, needs="fastapi-limiter"),
            ],
            do="handled_together",
            note="SlowAPI's call to Redis blocks the event loop, so fifty at a time are one after the other.",
        )


if __name__ == "__main__":
    asyncio.run(main())
