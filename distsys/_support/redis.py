"""Shared by the rules on Redis: an asyncio client, keys that can't collide, scripts that survive a restart."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
from collections.abc import Awaitable, Sequence
from typing import Any

import redis.asyncio
from redis import Redis, RedisCluster, exceptions

from distsys._support.cancellation import reraise_swallowed_cancel

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
DENIED = exceptions.AuthenticationError, exceptions.AuthorizationError


class Script:
    """A Lua script: one atomic step on the server. It is sent by its digest, and in full if the server lacks it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Any, keys: Sequence[str], *args: Any) -> Any:
        """Run the script and return its reply; the client's errors pass."""
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            answer = await redis.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except exceptions.NoScriptError:  # after a restart or SCRIPT FLUSH: EVAL sends the script and loads it
            answer = await redis.eval(self.text, len(keys), *keys, *args)
        except exceptions.NoPermissionError as error:
            error.add_note("distsys runs Lua scripts: give the user  +evalsha +eval +@read +@write +time ~distsys:*")
            raise
        if task and task.cancelling() > before:  # as reraise_swallowed_cancel, without a coroutine around each command
            raise asyncio.CancelledError
        return answer


class Command:
    """A single command, with the interface of Script; `options` tell the client how to parse the reply."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.options = options

    def run(self, redis: Any, keys: Sequence[str], *args: Any) -> Awaitable[Any]:
        """Run the command and return its reply; the client's errors pass."""
        return reraise_swallowed_cancel(redis.execute_command(self.name, *keys, *args, **self.options))


class Timed:
    """Runner of scripts on one Redis: TimeoutError after `timeout` seconds; None: as long as the client waits.

    The client of a cluster that lost a node first refreshes the topology. If the timeout cancelled the refresh, the
    next script would begin it anew, and a refresh that takes longer than `timeout` would never finish. Therefore it
    continues in the background for at most a second. After a second it must be waiting for a node that hangs, and the
    next refresh may ask another node.
    """

    def __init__(self, client: Any, timeout: float | None) -> None:
        self.redis = async_client(client)
        self.timeout = timeout
        self._is_cluster = isinstance(client, redis.asyncio.RedisCluster)
        self._topology_is_stale = self._is_cluster
        self._refresh: asyncio.Task[Any] | None = None

    def run(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Awaitable[Any]:
        """Run the script and return its reply, within the timeout."""
        if self.timeout is None:
            return script.run(self.redis, keys, *args)
        return (self._run_on_cluster if self._is_cluster else self._run_in_time)(script, keys, *args)

    async def _run_in_time(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Any:
        async with asyncio.timeout(self.timeout):
            return await script.run(self.redis, keys, *args)

    async def _run_on_cluster(self, script: Script | Command, keys: Sequence[str], *args: Any) -> Any:
        """Run the script in a task: a cancelled client closes connections or retries, and the caller must not wait."""

        async def refresh_and_run() -> Any:
            if self._topology_is_stale:
                await self._refresh_topology()
            try:
                return await script.run(self.redis, keys, *args)
            except BaseException:
                self._topology_is_stale = True
                raise

        task = asyncio.create_task(refresh_and_run())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs it
        try:
            if not (await asyncio.wait([task], timeout=self.timeout))[0]:
                raise TimeoutError
            return task.result()
        finally:
            task.cancel()

    async def _refresh_topology(self) -> None:
        """Refresh the topology. At most one refresh runs."""
        loop = asyncio.get_running_loop()
        if self._refresh is None or self._refresh.done() or self._refresh.get_loop() is not loop:
            self._refresh = loop.create_task(asyncio.wait_for(self._reload_slots(), 1))
        await asyncio.shield(self._refresh)

    async def _reload_slots(self) -> None:
        """Ask the nodes where the slots are. The client does so after an error, but not after a timeout of ours."""
        await self.redis.initialize()
        await self.redis.nodes_manager.initialize()
        self._topology_is_stale = False  # here, because the refresh may outlast the script that began it


def async_client(redis: Any) -> Any:
    """Return the client, if it is an asyncio one; else TypeError."""
    if _blocks(redis.__class__) or not hasattr(redis, "evalsha"):
        raise TypeError(f"{redis!r} is not an asyncio client of Redis: pass redis.asyncio.Redis(...)")
    return redis


@functools.cache  # issubclass on these classes costs more than all other checks of a lock together
def _blocks(client: type) -> bool:
    return issubclass(client, (Redis, RedisCluster))


def unavailable(error: Exception) -> bool:
    """Return whether the error means that Redis could not be reached. Missing rights do not.

    A cluster's client that can't find the slots raises an error whose cause is what the last node answered.
    """
    cause = error.__cause__
    if isinstance(error, exceptions.RedisClusterException) and not isinstance(cause, exceptions.RedisClusterException):
        return cause is None or (isinstance(cause, Exception) and unavailable(cause))
    return isinstance(error, UNAVAILABLE) and not isinstance(error, DENIED)


def options(client: Any) -> dict[str, Any]:
    """Return the client's connection options; {} for a cluster's client, which does not have them in one place."""
    pool = getattr(client, "connection_pool", None)
    return getattr(pool, "connection_kwargs", {})


def hash_tag(name: str) -> str:
    """Return the name as it stands inside `{...}` of a key. It is escaped: a brace in it would end the tag early."""
    return name.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")


def milliseconds(seconds: float) -> int:
    """Return the milliseconds, rounded up."""
    return math.ceil(seconds * 1000)
