"""Redlock: one lock held by a majority of independent Redis nodes, so that no single node must survive.

Promise  one holder per name while a majority of the nodes keeps its data and clocks run at about the same rate;
         a minority that is dead, hung or refusing delays nobody by more than `node_timeout`.
Not      a source of fencing tokens: owners are random, and no order of grants exists that a majority has agreed on (a
         counter on each node would need consensus). Not safe when a node restarts empty inside a lease: keep such a
         node down for one TTL, or fsync every grant. Not fair: after a split vote, chance decides.
Units    seconds, float.
Errors   LockNotAcquired (granted, needed, errors) after `timeout`; LockLost when the lease ended under the body.
Source   redis.io "The Redlock algorithm"; Kleppmann 2016 "How to do distributed locking"; antirez 2016 "Is Redlock safe?".
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from redis.exceptions import NoScriptError

from distsys.clock import Clock, elapsed
from distsys.errors import LockNotAcquired
from distsys.locks.lease import (
    UNDO_WAIT,
    Holders,
    Lease,
    OnLost,
    async_client,
    check_name,
    check_timeout,
    check_ttl,
    hash_tag,
    in_background,
    local_deadline,
    milliseconds,
    refuse_reentry,
    sha1,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

# KEYS[1] - the lock's key on one node      ARGV[1] - owner    ARGV[2] - ttl in ms (free: unused)
# Each returns 1 for yes and 0 for no. To ask again is safe: the owner decides.
_GRANT = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_EXTEND = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_FREE = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end return redis.call('DEL', KEYS[1])"
_SHA = {script: sha1(script) for script in (_GRANT, _EXTEND, _FREE)}


class Redlock:
    """`async with Redlock([node1, node2, node3], "report:daily", ttl=10) as lease: ...`

    clients       at least 3 clients of independent nodes (no replicas of each other); an odd number is best
    node_timeout  how long one node may take, far below the ttl; default ttl/50, at least 0.05 s and at most 0.5 s
    timeout       how long to try: None for ever, 0 one round
    retry_delay   mean pause after a lost round, drawn at random so that rivals fall out of step
    renew, on_lost  as in RedisLock
    """

    def __init__(
        self,
        clients: Sequence[Redis],
        name: str,
        *,
        ttl: float,
        timeout: float | None = None,
        node_timeout: float | None = None,
        retry_delay: float = 0.05,
        renew: bool = True,
        on_lost: OnLost = "cancel",
        clock: Clock = elapsed,
        rng: random.Random | None = None,
    ) -> None:
        self.clients = tuple(async_client(client) for client in clients)
        if len(self.clients) < 3:
            raise ValueError(f"{len(self.clients)} client(s): a majority that survives a loss needs at least 3 nodes")
        if len({id(client) for client in self.clients}) < len(self.clients):
            raise ValueError("the same client stands twice in clients: its vote would count twice")
        self.name, self.ttl, self.timeout = check_name(name), check_ttl(ttl), check_timeout(timeout)
        self.node_timeout = min(0.5, max(0.05, ttl / 50)) if node_timeout is None else node_timeout
        if not 0 < self.node_timeout < ttl / 2:
            raise ValueError(f"node_timeout={self.node_timeout}: above 0 and far below ttl={ttl}, else a dead node eats the lease")
        self.quorum = len(self.clients) // 2 + 1
        self.retry_delay, self.renew, self.on_lost = retry_delay, renew, on_lost
        self.clock, self.rng = clock, rng or random.Random()
        self._key = f"distsys:redlock:{{{hash_tag(name)}}}"
        self._holders = Holders(name)

    async def __aenter__(self) -> Lease:
        return self._holders.add((await self._acquire(self.timeout)).guard())

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        await self._holders.take().leave(error)

    async def acquire(self, timeout: float | Literal["default"] | None = "default") -> Lease:
        """Tries for `timeout` seconds (None: for ever, 0: one round). End the lease with lease.release() or lock.release()."""
        return self._holders.add(await self._acquire(self.timeout if timeout == "default" else check_timeout(timeout)))

    async def try_acquire(self) -> Lease | None:
        """One round: the lease, or None."""
        try:
            return await self.acquire(0)
        except LockNotAcquired:
            return None

    async def release(self) -> bool:
        """Releases this task's lease. False: a majority no longer held it for us."""
        return await self._holders.take().release()

    async def _acquire(self, timeout: float | None) -> Lease:
        refuse_reentry(self._key, self.name)
        give_up = None if timeout is None else self.clock() + timeout
        while True:
            grant = _Grant(os.urandom(16).hex())
            asked_at = self.clock()
            try:
                votes = await self._vote(lambda client, grant=grant: self._grant(client, grant))  # type: ignore[misc]
            except BaseException:
                await asyncio.wait({self._take_back(grant)}, timeout=UNDO_WAIT)
                raise
            if votes.yes >= self.quorum and self.clock() < local_deadline(asked_at, self.ttl):
                return self._lease(grant, asked_at)
            # A minority, or too late to be of use: nothing of it may stand in the way of the others.
            await asyncio.wait({self._take_back(grant)}, timeout=self.node_timeout)
            pause = self.rng.uniform(0, 2 * self.retry_delay)
            if give_up is not None and self.clock() + pause >= give_up:
                raise LockNotAcquired(
                    f"{self.name!r}: {votes.yes} of {len(self.clients)} nodes granted it, {self.quorum} are needed"
                    + (f"; {votes.errors[0]!r}" if votes.errors else ""),
                    name=self.name,
                    granted=votes.yes,
                    needed=self.quorum,
                    errors=votes.errors,
                )
            await asyncio.sleep(pause)

    def _lease(self, grant: _Grant, asked_at: float) -> Lease:
        async def extend(lease: Lease, ttl: float) -> bool:
            votes = await self._vote(lambda client: self._run(client, _EXTEND, lease.owner, milliseconds(ttl)))
            if votes.yes < self.quorum <= votes.yes + len(votes.errors):
                raise votes.errors[0]  # silent nodes may still hold it: try again while the lease lasts
            return votes.yes >= self.quorum

        async def release(lease: Lease) -> bool:
            grant.over = True
            votes = await self._vote(lambda client: self._run(client, _FREE, lease.owner))
            return votes.yes >= self.quorum

        return Lease(
            self.name,
            key=self._key,
            owner=grant.owner,
            token=None,
            ttl=self.ttl,
            asked_at=asked_at,
            extend=extend,
            release=release,
            renew=self.renew,
            on_lost=self.on_lost,
            clock=self.clock,
        )

    async def _grant(self, client: Redis, grant: _Grant) -> bool:
        try:
            return await self._run(client, _GRANT, grant.owner, milliseconds(self.ttl))
        finally:
            if grant.over:  # came too late to count: it must not stand in the way until its TTL
                in_background(self._free(client, grant), f"release of a late grant of {self.name!r}")

    def _take_back(self, grant: _Grant) -> asyncio.Task[Any]:
        grant.over = True
        frees = (self._free(client, grant) for client in self.clients)
        return in_background(asyncio.gather(*frees, return_exceptions=True), f"taking back grants of {self.name!r}")

    async def _free(self, client: Redis, grant: _Grant) -> bool:
        async with asyncio.timeout(self.node_timeout):
            return await self._run(client, _FREE, grant.owner)

    async def _vote(self, ask: Callable[[Redis], Awaitable[bool]]) -> _Votes:
        """Asks all nodes at once. Decided by the first majority; stragglers go on until the node timeout."""
        loop = asyncio.get_running_loop()
        votes, decided = _Votes(), loop.create_future()
        tasks = [loop.create_task(ask(client)) for client in self.clients]  # type: ignore[arg-type]

        def count(task: asyncio.Task[bool]) -> None:
            error = TimeoutError(f"no answer in {self.node_timeout} s") if task.cancelled() else task.exception()
            if error is not None:
                votes.errors.append(error)
            elif task.result():
                votes.yes += 1
            else:
                votes.no += 1
            asked = votes.yes + votes.no + len(votes.errors)
            if asked == len(tasks):
                timer.cancel()
            lost = asked - votes.yes > len(tasks) - self.quorum
            if (votes.yes >= self.quorum or lost) and not decided.done():
                decided.set_result(None)

        def time_out() -> None:
            for task in tasks:
                task.cancel()

        timer = loop.call_later(self.node_timeout, time_out)
        for task in tasks:
            task.add_done_callback(count)
        await decided
        return votes

    async def _run(self, client: Redis, script: str, *args: Any) -> bool:
        try:
            return bool(await client.evalsha(_SHA[script], 1, self._key, *args))
        except NoScriptError:
            return bool(await client.eval(script, 1, self._key, *args))


class _Grant:
    """One round's owner; `over` once its grants no longer count."""

    def __init__(self, owner: str) -> None:
        self.owner, self.over = owner, False


class _Votes:
    def __init__(self) -> None:
        self.yes, self.no = 0, 0
        self.errors: list[BaseException] = []
