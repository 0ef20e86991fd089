"""Real servers, started once for the run; every test gets a database of its own and an empty Redis."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from hypothesis import settings
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis, RedisCluster

from distsys.lab.testbed.processes import Processes
from distsys.lab.testbed.servers import Server, Servers
from tests import bugs
from tests.clusters import start_cluster

settings.register_profile("distsys", deadline=None)  # a loaded machine is no bug
settings.load_profile("distsys")
_numbers = itertools.count()
ALONE = ("lab/testbed/test_processes.py", "lab/testbed/test_servers.py", "notebooks/test_browser.py")
"""These count processes and folders of the machine, or drive a browser: nothing runs beside them."""


@pytest.fixture(scope="session")
async def servers() -> AsyncIterator[Servers]:
    processes = await Processes.start()
    servers = Servers(processes)
    yield servers
    await servers.aclose()
    await processes.aclose()


@pytest.fixture(scope="session")
async def postgres(servers: Servers) -> Server:
    return await servers.postgres()


@pytest.fixture(scope="session")
async def redis_server(servers: Servers) -> Server:
    return await servers.redis()


@pytest.fixture(scope="session")
async def redis_cluster(servers: Servers) -> AsyncIterator[RedisCluster]:
    """A client of three masters, which keep what tests leave: each uses names of its own."""
    nodes = await start_cluster(servers)
    async with RedisCluster(host=nodes[0].host, port=nodes[0].port) as client:
        yield client


@pytest.fixture
async def pg(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a fresh, empty database."""
    name = f"test_{next(_numbers)}"
    async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as admin:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy")
        yield psycopg.conninfo.make_conninfo(postgres.url, dbname=name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def pg_pool(pg: str) -> AsyncIterator[AsyncConnectionPool]:
    async with AsyncConnectionPool(pg, min_size=1, max_size=8, open=False) as pool:
        yield pool


@pytest.fixture
async def redis(redis_server: Server) -> AsyncIterator[Redis]:
    """A client of an empty Redis."""
    async with Redis.from_url(redis_server.url) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def own_redis(servers: Servers) -> AsyncIterator[Server]:
    """A Redis of this test alone, to be killed, paused and restarted."""
    server = await servers.redis(f"own-{next(_numbers)}")
    yield server
    if server.process is not None and server.process.state != "exited":
        await server.kill()


# ---- bugs planted by @kills


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bugs.parametrize(metafunc)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = bugs.select(items)
    for item in items:
        if item.path.as_posix().endswith(ALONE):
            item.add_marker("alone")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    bug = bugs.bug_of(item)
    return (yield) if bug is None else (yield from bugs.run(item, bug))


@pytest.fixture
def planted_bug(request: pytest.FixtureRequest) -> bugs.Bug | None:
    """The bug under which this test has to die; `bugs.run` plants it around the test alone."""
    bug: bugs.Bug | None = request.param
    return bug
