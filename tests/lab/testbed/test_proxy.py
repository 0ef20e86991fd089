"""The proxy's faults, against a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server


@pytest.fixture
async def link(redis_server: Server) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(redis_server.host, redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def through(link: TcpProxy, redis: Redis, redis_server: Server) -> AsyncIterator[Redis]:
    """A client of the empty Redis by way of the proxy, connected, which tries everything once."""
    async with Redis.from_url(link.through(redis_server.url), retry=Retry(NoBackoff(), 0)) as client:
        await client.ping()
        yield client


async def silence(call: Awaitable[object]) -> None:
    """The call gets no answer: neither a result nor an error."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.2)


async def soon(ask: Callable[[], Awaitable[object]], answer: object) -> None:
    for _ in range(500):
        if await ask() == answer:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{await ask()!r} never became {answer!r}")


async def test_it_forwards_large_values_both_ways_unchanged(redis: Redis, through: Redis) -> None:
    """Values far beyond one chunk arrive whole and in order."""
    value = bytes(range(256)) * 20_000
    await through.set("k", value)
    assert await redis.get("k") == value == await through.get("k")


def test_a_url_through_it_keeps_all_but_the_address() -> None:
    """User, password, database and options of a URL survive."""
    proxy = TcpProxy("elsewhere", 5432)
    proxy.port = 7
    assert proxy.through("postgresql://u:p%40@elsewhere:5432/db?a=b") == "postgresql://u:p%40@127.0.0.1:7/db?a=b"
    assert proxy.through("redis://elsewhere/0") == "redis://127.0.0.1:7/0"


async def test_a_delay_is_added_to_each_way(link: TcpProxy, through: Redis) -> None:
    """A round trip takes at least twice the delay, and a pipeline's commands share it."""
    link.delay(0.05)
    started = time.monotonic()
    async with through.pipeline(transaction=False) as pipe:
        for _ in range(100):
            pipe.incr("n")
        await pipe.execute()
    assert 0.1 <= time.monotonic() - started < 100 * 0.1


async def test_a_partition_loses_requests_and_new_connections_stay_silent(
    link: TcpProxy, through: Redis, redis: Redis
) -> None:
    """Nothing sent during a partition ever arrives, also not after it has healed."""
    link.drop()
    await silence(through.set("k", "lost"))
    await silence(through.set("k", "lost"))  # by a new connection
    link.heal()
    assert await through.get("k") is None
    assert await redis.get("k") is None


async def test_after_a_partition_connections_that_lost_nothing_go_on(link: TcpProxy, through: Redis) -> None:
    """Only a connection with a gap in its bytes is reset."""
    before = await through.client_id()
    link.drop()
    link.heal()
    assert await through.client_id() == before


async def test_a_cut_reply_belongs_to_a_request_that_was_carried_out(
    link: TcpProxy, through: Redis, redis: Redis
) -> None:
    """The client sees a reset, the server has counted; the next request is served."""
    for _ in range(20):
        await redis.delete("n")
        await through.ping()
        link.cut_reply()
        with pytest.raises(RedisConnectionError):
            await through.incr("n")
        assert await redis.get("n") == b"1"
        assert await through.incr("n") == 2


async def test_the_nth_reply_is_cut_and_no_other(link: TcpProxy, through: Redis) -> None:
    """Counting starts when the cut is ordered."""
    link.cut_reply(3)
    assert [await through.incr("n"), await through.incr("n")] == [1, 2]
    with pytest.raises(RedisConnectionError):
        await through.incr("n")
    assert await through.incr("n") == 4


async def test_a_reset_ends_all_connections_and_new_ones_are_served(
    link: TcpProxy, through: Redis, redis: Redis
) -> None:
    """Both ends see it at once, also while they wait for an answer."""

    async def blocked() -> int:
        return (await redis.info("clients"))["blocked_clients"]

    waiting = asyncio.create_task(through.blpop(["empty"], timeout=4))
    await soon(blocked, 1)
    link.reset_all()
    with pytest.raises(RedisConnectionError):
        await waiting
    await soon(blocked, 0)
    assert await through.ping()


async def test_a_refused_server_is_a_reset_for_the_client() -> None:
    """With nothing behind it, the proxy ends the connection instead of leaving the client waiting."""
    async with TcpProxy("127.0.0.1", 1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()


@pytest.mark.parametrize(("fault", "value"), [("delay", -1), ("cut_reply", 0)])
def test_a_fault_out_of_range_is_refused_by_name(fault: str, value: int) -> None:
    """The error names the value and its bound."""
    with pytest.raises(ValueError, match=str(value)):
        getattr(TcpProxy("127.0.0.1", 1), fault)(value)
