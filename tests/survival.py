"""Whether a test lives under a planted bug: what the mutants of the rules on Redis share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio

from distsys.lab.testbed.servers import Server


async def survived(test: Callable[..., Awaitable[None]], server: Server, *arguments: Any) -> bool:
    """Whether the test passes under the mutant. One that hangs does not; what it leaves running is ended."""
    before = asyncio.all_tasks()
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.flushall()
        try:
            async with asyncio.timeout(8):
                await test(client, *arguments)
        except BaseException:  # noqa: BLE001  pytest's own Failed is no Exception
            return False
        finally:
            for _ in range(100):  # Python 3.11's wait_for can swallow a cancellation
                left = asyncio.all_tasks() - before
                if not left:
                    break
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=0.1)
    return True


def lives(test: Callable[[], object]) -> bool:
    """The same for a test that needs no server."""
    try:
        test()
    except BaseException:  # noqa: BLE001
        return False
    return True
