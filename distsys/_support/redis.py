"""What every rule on Redis needs: an asyncio client, keys that can't be forged, scripts that survive a restart."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
from collections.abc import Awaitable, Sequence
from typing import Any

import redis.asyncio
from redis import Redis, RedisCluster, exceptions
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
)

from distsys._support.cancellation import heard

UNAVAILABLE = (
    OSError,
    TimeoutError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a primary that became a replica
    exceptions.OutOfMemoryError,
    exceptions.ClusterError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
)


class Script:
    """A Lua script: one atomic step at the server. Sent by its digest, in full when the server does not know it."""

    def __init__(self, text: str) -> None:
        self.text, self.sha = text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Any, keys: Sequence[str], *args: Any) -> Any:
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            answer = await redis.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:  # restarted, or SCRIPT FLUSH: EVAL brings the script along and loads it
            answer = await redis.eval(self.text, len(keys), *keys, *args)
        except NoPermissionError as error:
            error.add_note("distsys decides in scripts: give the user  +evalsha +eval +@read +@write +time ~distsys:*")
            raise
        if task and task.cancelling() > before:  # as distsys.tasks.heard, without a coroutine around each command
            raise asyncio.CancelledError
        return answer


class Command:
    """A single command, sent as scripts are; `options` are what the client reads the reply by."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options

    def run(self, redis: Any, keys: Sequence[str], *args: Any) -> Awaitable[Any]:
        return heard(redis.execute_command(self.name, *keys, *args, **self.options))


class Timed:
    """Runs scripts on one Redis: TimeoutError after `timeout` seconds; None: as long as the client waits.

    The client of a cluster that lost a node first asks the others where the slots are now. Cancelled in this it would
    begin from the start with the next script, and never come to an end where that takes longer than `timeout`: so it
    goes on in the background for a second. By then it waits for a node that hangs, and the next one may ask another.
    """

    def __init__(self, client: Any, timeout: float | None) -> None:
        self.redis, self.timeout = async_client(client), timeout
        self._lost = self._cluster = isinstance(client, redis.asyncio.RedisCluster)
        self._finding: asyncio.Task[Any] | None = None

    def run(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Awaitable[Any]:
        if self.timeout is None:
            return script.run(self.redis, keys, *args)
        return (self._run_on_cluster if self._cluster else self._run_in_time)(script, keys, *args)

    async def _run_in_time(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Any:
        async with asyncio.timeout(self.timeout):
            return await script.run(self.redis, keys, *args)

    async def _run_on_cluster(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Any:
        """Cancelled, the client closes connections, or tries once more where Python 3.11 loses it: nobody waits."""

        async def find_and_run() -> Any:
            if self._lost:
                await self._find_slots()
            try:
                return await script.run(self.redis, keys, *args)
            except BaseException:
                self._lost = True
                raise

        task = asyncio.create_task(find_and_run())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs it
        try:
            if not (await asyncio.wait([task], timeout=self.timeout))[0]:
                raise TimeoutError
            return task.result()
        finally:
            task.cancel()

    async def _find_slots(self) -> None:
        """One look at a time."""
        loop = asyncio.get_running_loop()
        if self._finding is None or self._finding.done() or self._finding.get_loop() is not loop:
            self._finding = loop.create_task(asyncio.wait_for(self._look(), 1))
        await asyncio.shield(self._finding)

    async def _look(self) -> None:
        """The client itself looks again after an error, but not when a timeout of ours left a hung node: do it here."""
        await self.redis.initialize()
        await self.redis.nodes_manager.initialize()
        self._lost = False  # by the look itself: it may have outlasted the decision that began it


def async_client(redis: Any) -> Any:
    """The client itself, if it is an asyncio one."""
    if _blocks(redis.__class__) or not hasattr(redis, "evalsha"):
        raise TypeError(f"{redis!r} is not an asyncio client of Redis: pass redis.asyncio.Redis(...)")
    return redis


@functools.cache  # the look at these classes costs more than all other checks of a lock together
def _blocks(client: type) -> bool:
    return issubclass(client, (Redis, RedisCluster))


def unavailable(error: Exception) -> bool:
    """Whether Redis could not be asked. A wrong password or a missing right is a mistake, and no policy may hide it.

    The client of a cluster that can't say where the slots are names, as the cause, what the last node answered.
    """
    cause = error.__cause__
    if isinstance(error, RedisClusterException) and not isinstance(cause, RedisClusterException):
        return cause is None or (isinstance(cause, Exception) and unavailable(cause))
    return isinstance(error, UNAVAILABLE) and not isinstance(error, (AuthenticationError, AuthorizationError))


def options(client: Any) -> dict[str, Any]:
    """What the client connects with, as far as it tells: a cluster's does not."""
    pool = getattr(client, "connection_pool", None)
    return getattr(pool, "connection_kwargs", {})


def hash_tag(name: str) -> str:
    """The name as it stands inside `{...}` of a key: braces of its own would end the tag early."""
    return name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")


def milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)
