"""A cluster of three masters with a replica each loses a master: every limiter goes on through the same client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis.asyncio

from distsys.lab.testbed.servers import Server, Servers
from distsys.rate_limiting.decision import Decision
from distsys.rate_limiting.distributed import EVERYBODY, Quota, TieredLimiter
from distsys.rate_limiting.fallback import OnFailure
from distsys.rate_limiting.sliding_window import SlidingWindowLimiter
from distsys.rate_limiting.token_bucket import TokenBucketLimiter
from tests.clusters import start_cluster
from tests.rate_limiting.test_token_bucket import MICRO, Clock

Redis, RedisCluster = redis.asyncio.Redis, redis.asyncio.RedisCluster
USER = "user:42"
_numbers = itertools.count()
SLOW = {"capacity": 10, "refill_rate": 0.01}  # by the test's clock; the server's TTL counts a thousand real seconds
PRO = {"pro": [Quota(per="user", **SLOW), Quota(per=EVERYBODY, capacity=100, refill_rate=0.01)]}


@pytest.fixture
async def nodes(servers: Servers) -> AsyncIterator[list[Server]]:
    """Three masters, then the replica of each."""
    nodes = await start_cluster(servers, replicas=1, name=f"failover{next(_numbers)}-")
    yield nodes
    for node in nodes:
        await node.kill()


async def test_a_failover_in_a_cluster_grants_what_was_used_in_the_lag_again(nodes: list[Server]) -> None:
    """Six grants are replicated and four are not: those four pass once more, and what other masters hold stays."""
    clock, closed = Clock(), OnFailure(policy="closed", timeout=5)
    async with RedisCluster(host=nodes[0].host, port=nodes[0].port) as client:
        bucket = TokenBucketLimiter(client, **SLOW, clock=clock, on_failure=closed)
        window = SlidingWindowLimiter(client, limit=10, window=1000, clock=clock, on_failure=closed)
        tiers = TieredLimiter(client, PRO, clock=clock, on_failure=closed)

        async def of_tier() -> Decision:
            return (await tiers.try_acquire("pro", {"user": USER})).quotas["user"]

        limiters = [lambda: bucket.try_acquire(USER), lambda: window.try_acquire(USER), of_tier]

        async def granted(times: int) -> list[int]:
            return [sum([(await ask()).allowed for _ in range(times)]) for ask in limiters]

        lost, other = (client.get_node_from_key(key).port for key in (USER, EVERYBODY))
        assert lost != other
        (master,) = (node for node in nodes if node.port == lost)
        replica = nodes[nodes.index(master) + 3]
        async with Redis.from_url(master.url) as link:
            assert await granted(6) == [6, 6, 6]
            await link.set(USER, "after them, in the same stream")
            assert await link.wait(1, 10_000) == 1
            await replica.pause()
            assert await link.client_kill_filter(_type="replica") == 1  # what is sent now never arrives
            assert await granted(5) == [4, 4, 4]
        await master.kill()
        await replica.resume()
        again = 0

        async def promoted() -> bool:
            nonlocal again
            decision = await bucket.try_acquire(USER)  # goes on meanwhile, by the policy at first
            again += decision.allowed
            return decision.source == "redis" and await is_master(replica) and all([await agrees(n) for n in alive])

        alive = [node for node in nodes if node is not master]
        await until(promoted)
        bucket_again, *others_again = await granted(12)
        assert [again + bucket_again, *others_again] == [4, 4, 4]
        assert (await tiers.try_acquire("pro", {"user": "other"})).quotas[EVERYBODY].remaining == 100 - 10 - 4 - 1
        clock.us += 300 * MICRO
        assert await granted(12) == [3, 0, 3]
        clock.us += 700 * MICRO
        assert await granted(12) == [7, 10, 7]


async def test_a_master_that_hangs_is_given_up_for_its_replica(nodes: list[Server]) -> None:
    """Its connections stay open and silent; decisions end by the timeout, and the client still finds the replica."""
    async with RedisCluster(host=nodes[0].host, port=nodes[0].port) as client:
        bucket = TokenBucketLimiter(client, **SLOW, on_failure=OnFailure(policy="closed", timeout=0.2))

        async def decided() -> bool:
            return (await bucket.peek(USER)).source == "redis"

        await until(decided)
        (master,) = (node for node in nodes if node.port == client.get_node_from_key(USER).port)
        await master.pause()
        assert not await decided()
        await until(decided)
        assert await is_master(nodes[nodes.index(master) + 3])


async def is_master(node: Server) -> bool:
    async with Redis.from_url(node.url) as client:
        return (await client.role())[0] == b"master"


async def agrees(node: Server) -> bool:
    """Return whether the node counts every slot as served."""
    async with Redis.from_url(node.url) as client:
        return (await client.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a fact. A failover takes seconds, because the other masters wait 2 s until they vote."""
    async with asyncio.timeout(60):
        while not await fact():
            await asyncio.sleep(0.02)


# ---- a cluster's client, and the failure policy


async def test_a_refresh_of_the_slots_that_outlasts_the_timeout_goes_on(
    redis_cluster: redis.asyncio.RedisCluster,
) -> None:
    """Each decision takes its timeout and no longer; one refresh serves them all, and then Redis decides."""
    done, refreshes = asyncio.Event(), 0

    class Far(RedisCluster):
        async def initialize(self, *args, **options):
            nonlocal refreshes
            refreshes += 1
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
            assert refreshes == number
        done.set()
        for limiter in limiters:
            while (await limiter.peek("k")).source != "redis":
                pass
        await client.aclose()


async def test_a_cluster_client_that_swallows_its_cancellation_blocks_nobody(
    redis_cluster: redis.asyncio.RedisCluster,
) -> None:
    """On Python 3.11 wait_for can swallow a cancellation; then redis-py tries again and again."""
    done = asyncio.Event()

    class Deaf(RedisCluster):
        async def execute_command(self, *args, **options):
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()
            await done.wait()
            return await super().execute_command(*args, **options)

    node = redis_cluster.get_default_node()
    async with asyncio.timeout(30), Deaf(host=node.host, port=node.port) as client:
        bucket = TokenBucketLimiter(client, **SLOW, name="deaf", on_failure=OnFailure(policy="closed"))
        assert (await bucket.try_acquire("k")).source == "closed"
        done.set()
        while (await bucket.try_acquire("k")).source != "redis":
            pass


@pytest.mark.parametrize(("policy", "passes"), [("open", True), ("closed", False)])
async def test_the_policy_answers_for_a_cluster_of_which_no_node_does(
    own_redis: Server, policy: str, passes: bool
) -> None:
    """The client raises an error of its own, whose cause is the connection error of Redis."""
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
