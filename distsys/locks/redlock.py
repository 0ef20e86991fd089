"""Redlock: one lock held by a majority of independent Redis nodes, so that no single node must survive.

Promise  one holder per name while a majority of the nodes keeps its data and clocks run at about the same rate;
         a minority that is dead, hung or refusing delays a caller by at most `node_timeout`.
Not      a source of fencing tokens: a majority agrees on no order of the grants (a counter on each node would need
         consensus). Not safe when a node restarts empty inside a lease: keep such a node down for one TTL, or fsync
         every grant. Not safe when the clocks of a majority leap forward. Not fair: after a split vote, chance decides.
Units    seconds, float.
Errors   LockNotAcquired (granted, needed, errors) after `timeout`; LockLost when the lease ended under the body.
Source   redis.io "The Redlock algorithm"; Kleppmann 2016 "How to do distributed locking"; antirez 2016 "Is Redlock
         safe?".
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from distsys._support.arguments import check_text
from distsys._support.clock import Clock, elapsed
from distsys._support.redis import Script, async_client, hash_tag, milliseconds, options
from distsys.errors import LockNotAcquired
from distsys.locks.hold import EXAMPLE
from distsys.locks.lease import UNDO_SECONDS, Lease, LeasedLock, OnLost, local_deadline
from distsys.locks.redis_lock import EXTEND

if TYPE_CHECKING:
    from redis.asyncio import Redis

_Question = Callable[..., Coroutine[Any, Any, bool]]  # asked of one node

# KEYS[1] - the lock's key on one node      ARGV[1] - owner      ARGV[2] - ttl in ms
# Returns 1 if the node grants it, also to an owner that holds it already: asking again is safe; else 0.
_GRANT = Script("""
if redis.call('EXISTS', KEYS[1] .. ':tombstone:' .. ARGV[1]) == 1 then return 0 end
local holder = redis.call('GET', KEYS[1])
if holder then return holder == ARGV[1] and 1 or 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

# KEYS and ARGV[1] as above      ARGV[2] - "1" when a grant may still be on its way: it is refused when it arrives
# Returns 1 if the lock was ours on this node, else 0.
_RELEASE = Script("""
if ARGV[2] == '1' then redis.call('SET', KEYS[1] .. ':tombstone:' .. ARGV[1], 1, 'PX', 60000) end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")


class Redlock(LeasedLock):
    """`async with Redlock([node1, node2, node3], "report:daily", ttl=10) as lease: ...`

    clients       at least 3 clients of independent nodes (no replicas of each other); an odd number is best
    node_timeout  seconds that one node may take, far below the ttl; default ttl/50, at least 0.05 s and at most 0.5 s
    timeout       seconds to try: None tries for ever, 0 is one round
    retry_delay   mean seconds of the pause after a failed round, drawn at random so that rivals fall out of step
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
        if len({_address(client) for client in self.clients}) < len(self.clients):
            raise ValueError("clients names the same node twice: its vote would count twice")
        key = f"distsys:redlock:{{{hash_tag(check_text('name', name, EXAMPLE))}}}"
        super().__init__(name, key, ttl=ttl, timeout=timeout, renew=renew, on_lost=on_lost, clock=clock)
        self.node_timeout = min(0.5, max(0.05, ttl / 50)) if node_timeout is None else node_timeout
        if not 0 < self.node_timeout < ttl / 2:
            bounds = f"above 0 and far below ttl={ttl}, or a dead node uses up the lease"
            raise ValueError(f"node_timeout={self.node_timeout}: {bounds}")
        if not retry_delay >= 0:
            raise ValueError(f"retry_delay={retry_delay}: a pause is not negative")
        self.quorum = len(self.clients) // 2 + 1
        self.retry_delay, self.rng = retry_delay, rng or random.Random()

    async def _acquire(self, timeout: float | None, *, body: bool) -> Lease:
        self._refuse_reentry()
        give_up = None if timeout is None else self.clock() + timeout
        while True:
            owner, asked_at = os.urandom(16).hex(), self.clock()
            grants = self._ask_all(self._run, _GRANT, owner, milliseconds(self.ttl))
            try:
                await grants.decided
            except BaseException:
                await self._release_all(owner, grants)
                raise
            too_late = self.clock() >= local_deadline(asked_at, self.ttl)
            if grants.yes >= self.quorum and not too_late:
                return self._add_hold(self._lease(owner, grants, asked_at, body=body))
            await self._release_all(owner, grants)
            pause = self.rng.uniform(0, 2 * self.retry_delay)
            if give_up is not None and self.clock() + pause >= give_up:
                message = (
                    f"{self.name!r}: {grants.yes} of {len(self.clients)} nodes granted it, {self.quorum} are needed"
                )
                message += f", and too late for ttl={self.ttl:g}" if too_late else ""
                message += f"; {grants.errors[0]!r}" if grants.errors else ""
                facts = {"granted": grants.yes, "needed": self.quorum, "errors": grants.errors}
                raise LockNotAcquired(message, name=self.name, **facts)
            await asyncio.sleep(pause)

    async def _release_all(self, owner: str, grants: _Votes) -> None:
        """Release every grant of a failed round. Slow nodes are left to the background.

        A node that can't be reached keeps what it granted until its TTL; its error is among the votes.
        """
        released = self._ask_all(self._release_on, owner, grants, timeout=self.node_timeout + UNDO_SECONDS)
        await asyncio.wait(released.tasks, timeout=self.node_timeout)

    async def _release_on(self, node: int, owner: str, grants: _Votes) -> bool:
        await grants.answered(node)  # or the grant might come after its release
        granted = grants.answers[node]
        if granted is False:
            return False
        return await self._run(node, _RELEASE, owner, "" if granted is True else "1")

    def _lease(self, owner: str, grants: _Votes, asked_at: float, *, body: bool) -> Lease:
        def extend(_: Lease, ttl: float) -> Coroutine[Any, Any, bool]:
            return self._majority_confirms(self._run, EXTEND, owner, milliseconds(ttl))

        def release(_: Lease) -> Coroutine[Any, Any, bool]:
            return self._majority_confirms(self._release_on, owner, grants)

        return Lease(self, owner=owner, token=None, asked_at=asked_at, extend=extend, release=release, body=body)

    async def _majority_confirms(self, ask: _Question, *args: Any) -> bool:
        """Ask all nodes whether the lock was ours. Raise a silent node's error if the silent ones could decide it."""
        votes = self._ask_all(ask, *args)
        await votes.decided
        if votes.yes < self.quorum and votes.no <= len(self.clients) - self.quorum:
            raise votes.errors[0]
        return votes.yes >= self.quorum

    def _ask_all(self, ask: _Question, *args: Any, timeout: float | None = None) -> _Votes:
        asked = (ask(node, *args) for node in range(len(self.clients)))
        return _Votes(asked, quorum=self.quorum, timeout=timeout or self.node_timeout)

    async def _run(self, node: int, script: Script, *args: Any) -> bool:
        return bool(await script.run(self.clients[node], [self._key], *args))


class _Votes:
    """Answers of all nodes, asked at once. `decided` is done with a majority of yes, or when there can be none."""

    def __init__(self, asked: Iterable[Coroutine[Any, Any, bool]], *, quorum: int, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self.decided: asyncio.Future[None] = loop.create_future()
        self._quorum, self._timeout = quorum, timeout
        self.tasks = [loop.create_task(question) for question in asked]
        self.answers: list[bool | BaseException | None] = [None] * len(self.tasks)
        self._timer = loop.call_later(timeout, self._time_out)
        for task in self.tasks:
            task.add_done_callback(self._count)

    @property
    def yes(self) -> int:
        return self.answers.count(True)

    @property
    def no(self) -> int:
        return self.answers.count(False)

    @property
    def errors(self) -> list[BaseException]:
        return [answer for answer in self.answers if isinstance(answer, BaseException)]

    async def answered(self, node: int) -> None:
        """Wait for one node's answer, at most until the node timeout."""
        if self.answers[node] is None:
            await asyncio.wait({self.tasks[node]}, timeout=self._timeout)

    def _count(self, task: asyncio.Task[bool]) -> None:
        if not task.cancelled():
            self.answers[self.tasks.index(task)] = task.exception() or task.result()
        if None not in self.answers:
            self._timer.cancel()
        self._decide()

    def _time_out(self) -> None:
        for node, task in enumerate(self.tasks):
            if self.answers[node] is None:
                self.answers[node] = TimeoutError(f"no answer in {self._timeout} s")
                task.cancel()
        self._decide()

    def _decide(self) -> None:
        possible = self.yes + self.answers.count(None)
        if (self.yes >= self._quorum or possible < self._quorum) and not self.decided.done():
            self.decided.set_result(None)


def _address(client: Redis) -> object:
    """Return where a client's node is, as far as the client tells."""
    address = tuple(map(options(client).get, ("path", "host", "port")))
    return address if any(address) else id(client)
