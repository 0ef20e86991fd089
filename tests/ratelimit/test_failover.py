"""A cluster whose client does not know its slots, or has nobody to ask, is answered for by the policy."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import redis.asyncio

from distsys.lab.servers import Server
from distsys.ratelimit.decision import OnFailure
from distsys.ratelimit.sliding_window import SlidingWindowLimiter
from distsys.ratelimit.token_bucket import TokenBucketLimiter

Redis, RedisCluster = redis.asyncio.Redis, redis.asyncio.RedisCluster
SLOW = {"capacity": 10, "refill_rate": 0.01}  # by the test's clock; the server's TTL counts a thousand real seconds


# ---- a cluster's client, and the failure policy


async def test_a_look_for_the_slots_that_outlasts_the_timeout_goes_on(
    redis_cluster: redis.asyncio.RedisCluster,
) -> None:
    """Each decision takes its timeout and no longer; the look is one, and the first decision after it is Redis's."""
    done, looks = asyncio.Event(), 0

    class Far(RedisCluster):
        async def initialize(self, *args, **options):
            nonlocal looks
            looks += 1
            await done.wait()
            return await super().initialize(*args, **options)

    node = redis_cluster.get_default_node()
    async with asyncio.timeout(30):
        client = Far(host=node.host, port=node.port)
        limiters = [
            TokenBucketLimiter(client, **SLOW, name="far", on_failure=OnFailure(policy="open", timeout=0.005)),
            SlidingWindowLimiter(client, limit=1, window=1, on_failure=OnFailure(policy="open", timeout=0.005)),
        ]
        for number, limiter in enumerate(limiters, 1):
            assert [(await limiter.peek("k")).source for _ in range(3)] == ["open"] * 3
            assert looks == number
        done.set()
        for limiter in limiters:
            while (await limiter.peek("k")).source != "redis":
                pass
        await client.aclose()


async def test_a_cluster_client_that_does_not_hear_its_cancellation_holds_nobody_up(
    redis_cluster: redis.asyncio.RedisCluster,
) -> None:
    """As on Python 3.11, whose wait_for can lose it; then redis-py tries again and again."""
    done = asyncio.Event()

    class Deaf(RedisCluster):
        async def evalsha(self, *args):
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()
            await done.wait()
            return await super().evalsha(*args)

    node = redis_cluster.get_default_node()
    async with asyncio.timeout(30), Deaf(host=node.host, port=node.port) as client:
        bucket = TokenBucketLimiter(client, **SLOW, name="deaf", on_failure=OnFailure(policy="closed"))
        assert (await bucket.try_acquire("k")).source == "closed"
        done.set()
        while (await bucket.try_acquire("k")).source != "redis":
            pass


@pytest.mark.parametrize(("policy", "passes"), [("open", True), ("closed", False)])
async def test_a_cluster_of_which_no_node_answers_is_answered_for_by_the_policy(
    own_redis: Server, policy: str, passes: bool
) -> None:
    """The client's error for it is not one of Redis's; its cause is."""
    await own_redis.kill()
    async with asyncio.timeout(30):
        client = RedisCluster(host=own_redis.host, port=own_redis.port)
        on_failure = OnFailure(policy=policy, timeout=5)
        for limiter in (
            TokenBucketLimiter(client, **SLOW, on_failure=on_failure),
            SlidingWindowLimiter(client, limit=1, window=1, on_failure=on_failure),
        ):
            decision = await limiter.try_acquire("k")
            assert (decision.source, decision.allowed) == (policy, passes)
        await client.aclose()


@pytest.mark.parametrize("mistake", ["a wrong password", "no cluster"])
async def test_a_mistake_in_the_set_up_of_a_cluster_is_hidden_by_no_policy(
    redis_cluster: redis.asyncio.RedisCluster, redis_server: Server, mistake: str
) -> None:
    node = redis_cluster.get_default_node()
    host, port = (node.host, node.port) if mistake == "a wrong password" else (redis_server.host, redis_server.port)
    options = {"username": "nobody", "password": "wrong"} if mistake == "a wrong password" else {}
    client = RedisCluster(host=host, port=port, **options)
    bucket = TokenBucketLimiter(client, **SLOW, on_failure=OnFailure(policy="open", timeout=5))
    with pytest.raises(redis.exceptions.RedisClusterException):
        await bucket.is_allowed("k")
    await client.aclose()
