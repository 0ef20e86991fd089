"""Bugs planted in Redlock and in the fences, by name, and the test that each one kills: this tests the tests."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from distsys.lab.servers import Server
from distsys.locks import fencing, redlock
from distsys.locks.lease import Lease
from distsys.locks.redlock import _EXTEND, _FREE, _GRANT, Redlock, _Votes
from tests.locks import test_fencing as fences
from tests.locks import test_redlock as votes
from tests.locks.test_fencing import Connect, conn, connect
from tests.locks.test_redlock import all_well, nodes, servers_5, three

__all__ = ["conn", "connect", "nodes", "servers_5", "three"]  # fixtures
Test = Callable[..., Any]
OURS = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end"
GRANT = "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"


@pytest.fixture
async def dies(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[Test], Any]]:
    """Runs a test with its fixtures under the mutant; one that hangs has died too. What it leaves running is ended."""

    async def run(test: Test) -> bool:
        wanted = [name for name in inspect.signature(test).parameters if name not in getattr(test, "keywords", {})]
        call = partial(test, **{name: found[name] for name in wanted})
        before = asyncio.all_tasks()
        try:
            async with asyncio.timeout(5):
                await call() if inspect.iscoroutinefunction(test) else call()
        except BaseException:  # noqa: BLE001  pytest's own Failed is no Exception
            return True
        finally:
            for _ in range(100):  # Python 3.11's wait_for can swallow a cancellation
                if not (left := asyncio.all_tasks() - before):
                    break
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=0.1)
        return False

    found: dict[str, Any] = {"monkeypatch": pytest.MonkeyPatch()}
    yield run
    found["monkeypatch"].undo()
