"""Redis lock: one holder at a time, waiters in order, a fencing token with every lease.

Promise  one holder per name while the server keeps its data; waiters are served first come, first served; each lease
         carries a token larger than every earlier one; the holder is told before the server can grant the next lease.
Not      safe against a stale write by itself: a holder paused past its lease still writes (fence the write); safe
         across a failover, which may forget the newest grant (fence, min_replicas, or Redlock) and orders tokens only
         as far as both servers' clocks agree; safe when the server's clock leaps forward, which ends leases early (let
         NTP slew it); re-entrant.
Units    seconds, float; tokens are integers, microseconds of the server's clock made strictly increasing.
Errors   LockNotAcquired after `timeout`; LockLost when the lease ended under the body; redis.RedisError passes.
Source   redis.io "Distributed Locks with Redis"; Gray & Cheriton 1989 (leases); Kulkarni 2014 (hybrid clocks).
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distsys._support.arguments import check_text
from distsys._support.cancellation import heard, in_background
from distsys._support.clock import Clock, elapsed
from distsys._support.redis import Script, async_client, hash_tag, milliseconds, options
from distsys.errors import LockNotAcquired
from distsys.locks.hold import EXAMPLE
from distsys.locks.lease import UNDO_WAIT, Lease, LeasedLock, OnLost, local_deadline

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

SLICE = 1.0  # longest single BLPOP: it must end before the client's socket timeout, and is a waiter's sign of life
PATIENCE_MS = 3_000  # a waiter silent for longer counts as dead and is skipped: three slices
CLAIM_MS = 1_000  # how long a lock handed to a waiter waits for it to take it up

# KEYS[1] - lock: its owner, with the lease as TTL. The other keys are named after it and so share its hash tag and its
# cluster slot. They are not listed, because not all can be: some are named after a waiter whom only the script finds.
#   :fence         the newest token, kept a week      :queue         waiting owners, oldest first
#   :seen          owner -> alive until (server's microseconds)
#   :wake:<owner>  what a waiter blocks on            :gone:<owner>  gave up; its request may still be on the way
# ARGV[1] - the owner who asks
_SHARED = """
local lock, me = KEYS[1], ARGV[1]
local fence, queue, seen = lock .. ':fence', lock .. ':queue', lock .. ':seen'
local function now()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
local function next_waiter()
  local waiter = redis.call('LPOP', queue)
  while waiter do
    local alive_until = redis.call('HGET', seen, waiter)
    redis.call('HDEL', seen, waiter)
    if alive_until and tonumber(alive_until) > now() then return waiter end
    waiter = redis.call('LPOP', queue)
  end
end
local function reserve(waiter)
  redis.call('SET', lock, waiter, 'PX', CLAIM_MS)
  redis.call('RPUSH', lock .. ':wake:' .. waiter, 1)
  redis.call('PEXPIRE', lock .. ':wake:' .. waiter, CLAIM_MS)
end
""".replace("CLAIM_MS", str(CLAIM_MS))

# ARGV[2] - ttl in ms    ARGV[3] - there when the asker does not want to queue
# Returns the token when granted (alone, for a table costs the server as much as three commands), else {0, ms until the
# present lease ends, holder}. To ask again is always safe: the owner decides, so a client that retries after a lost
# reply is still the one that was granted.
_ASK = Script(
    _SHARED
    + """
local known = redis.call('MGET', lock, fence, lock .. ':gone:' .. me)
local holder, newest, gone = known[1], known[2], known[3]
if gone then return {0, 0, ''} end
if not holder then
  holder = next_waiter() or me
  if holder ~= me then reserve(holder) end
end
if holder == me then
  local token = now()
  if newest and tonumber(newest) >= token then token = tonumber(newest) + 1 end
  redis.call('SET', lock, me, 'PX', ARGV[2])
  redis.call('SET', fence, token, 'PX', 604800000)
  return token
end
if not ARGV[3] then
  if redis.call('HSET', seen, me, now() + PATIENCE_MS * 1000) == 1 then
    redis.call('RPUSH', queue, me)
  end
  redis.call('PEXPIRE', queue, 60000)
  redis.call('PEXPIRE', seen, 60000)
end
return {0, redis.call('PTTL', lock), holder}
""".replace("PATIENCE_MS", str(PATIENCE_MS))
)

# ARGV[2] - the lease's token    ARGV[3] - "1" when the reply to an ask was never seen: that ask may still be on its way
# Returns 1: was ours, handed on or removed. 2: not there any more, but nobody was granted it after us. 0: lost.
_LEAVE = Script(
    _SHARED
    + """
if ARGV[3] == '1' then redis.call('SET', lock .. ':gone:' .. me, 1, 'PX', 60000) end
local holder = redis.call('GET', lock)
if holder == me then
  local waiter = next_waiter()
  if waiter then reserve(waiter) else redis.call('DEL', lock) end
  return 1
end
if redis.call('HDEL', seen, me) == 1 then redis.call('LREM', queue, 1, me) end
return redis.call('GET', fence) == ARGV[2] and 2 or 0
"""
)

# ARGV[2] - ttl in ms
EXTEND = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
""")

# Returns {owner, ms left, newest token, waiters, now}
_EXPLAIN = Script("""
local t = redis.call('TIME')
return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1]), redis.call('GET', KEYS[1] .. ':fence'),
  redis.call('LLEN', KEYS[1] .. ':queue'), t[1] * 1000000 + t[2]}
""")

_HOST = socket.gethostname().replace("|", "_")
_waiting_slots: WeakKeyDictionary[Any, tuple[asyncio.AbstractEventLoop, asyncio.Semaphore]] = WeakKeyDictionary()


@dataclass
class _Attempt:
    """One acquisition on its way."""

    owner: str
    token: int = 0
    stamp: int = 0  # the token this server drew, which is the lease's unless `tokens` drew another
    asked_at: float = 0.0
    left: float = 0.0  # seconds of the present lease
    holder: str = ""


@dataclass(frozen=True, kw_only=True)
class LockState:
    """What the server says of a lock right now. `owner` is None when it is free."""

    name: str
    owner: str | None
    host: str | None
    pid: int | None
    token: int | None  # of the present or the latest lease
    held_for: float  # seconds
    remaining: float  # seconds until the lease ends unless it is renewed
    waiting: int


class RedisLock(LeasedLock):
    """`async with RedisLock(redis, "payment:order-123") as lease: ...`

    ttl           seconds a lease lasts without renewal; 2-3 times the expected operation, at most a day
    timeout       how long to wait: None for ever, 0 one try; then LockNotAcquired
    renew         extends the lease every ttl/3 while the body runs
    on_lost       "cancel" ends the body of `async with` and raises LockLost; "flag" only sets lease.lost. A lease from
                  acquire() has no body: look at lease.lost, or call lease.check() before what can't be undone
    min_replicas  replicas that must confirm the grant, or it is given back: narrows a failover's window only,
                  and not for renewals: a replica may hold the shorter TTL
    tokens        draws the fencing token elsewhere (fencing.postgres_tokens), checked against the lease afterwards
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        name: str,
        *,
        ttl: float = 30.0,
        timeout: float | None = None,
        renew: bool = True,
        on_lost: OnLost = "cancel",
        min_replicas: int = 0,
        tokens: Callable[[], Awaitable[int]] | None = None,
        clock: Clock = elapsed,
    ) -> None:
        if min_replicas < 0:
            raise ValueError(f"min_replicas={min_replicas}: 0 asks for no confirmation")
        key = f"distsys:lock:{{{hash_tag(check_text('name', name, EXAMPLE))}}}"
        super().__init__(name, key, ttl=ttl, timeout=timeout, renew=renew, on_lost=on_lost, clock=clock)
        self.redis, self.min_replicas, self.tokens = async_client(redis), min_replicas, tokens

    async def explain(self) -> LockState:
        """Who holds the lock, from where, for how long, and how many wait."""
        owner, left, token, waiting, now = await self._run(_EXPLAIN)
        owner = _text(owner)
        host, pid = owner.split("|")[:2] if owner.count("|") == 2 else (None, None)  # else not one of ours wrote it
        return LockState(
            name=self.name,
            owner=owner or None,
            host=host,
            pid=int(pid) if pid else None,
            token=int(token) if token else None,
            held_for=max(0.0, (now - int(token)) / 1e6) if owner and token else 0.0,
            remaining=max(0.0, left / 1000),
            waiting=waiting,
        )

    async def force_release(self) -> str | None:
        """Takes the lock from whoever holds it and hands it on; the owner it was taken from, None if it was free.

        The holder learns of it at its next renewal and may still write until then: only a fence stops that.
        """
        owner = (await self.explain()).owner
        return owner if owner and await self._run(_LEAVE, owner, "", "") == 1 else None

    # ---- acquire: ask; if it is taken, queue, sleep until woken, ask again

    async def _acquire(self, timeout: float | None, *, body: bool) -> Lease:
        self._refuse_reentry()
        attempt = _Attempt(f"{_HOST}|{os.getpid()}|{os.urandom(12).hex()}")
        try:
            if timeout:
                async with asyncio.timeout(timeout):
                    await self._obtain(attempt, wait=True)
            else:
                await self._obtain(attempt, wait=timeout is None)
        except BaseException as error:
            # Cancelled, timed out, disconnected: whether the last request was granted is unknown, so it is taken back.
            undo = in_background(self._run(_LEAVE, attempt.owner, "", "1"), f"undoing an acquire of {self.name!r}")
            await asyncio.wait({undo}, timeout=UNDO_WAIT)
            if timeout and isinstance(error, TimeoutError):
                raise self._refused(attempt, timeout) from None
            raise
        if not attempt.token:
            raise self._refused(attempt, 0.0)
        lease = Lease(
            self,
            owner=attempt.owner,
            token=attempt.token,
            asked_at=attempt.asked_at,
            extend=lambda lease, ttl: self._run(EXTEND, lease.owner, milliseconds(ttl)),
            release=lambda lease: self._leave(lease, attempt.stamp),
            body=body,
        )
        return self._keep(lease)

    async def _obtain(self, attempt: _Attempt, *, wait: bool) -> None:
        """Fills in the attempt's token; without `wait` it may come back without one."""
        slots = self._slots()
        queued = wait and not slots.locked()
        if await self._granted(attempt, queue=queued):
            return
        if not wait and attempt.holder == attempt.owner:
            raise self._refused(attempt, 0.0)  # granted too late to be of use, and given back
        if not wait:
            return
        async with slots:
            granted = False
            while not granted:
                # Until the lock is handed to us, the present lease ends, or it is time for a sign of life.
                longest = min(SLICE, self.ttl / 3, (options(self.redis).get("socket_timeout") or math.inf) / 2)
                block = max(0.01, min(longest, attempt.left + 0.001)) if queued else 0.0
                granted, queued = await self._granted(attempt, queue=True, block=block), True

    async def _granted(self, attempt: _Attempt, *, queue: bool, block: float = 0.0) -> bool:
        attempt.asked_at = self.clock()  # from here the lease counts, though what is blocked is granted later
        answer = await self._ask(attempt.owner, queue, block)
        token, left_ms, holder = answer if isinstance(answer, list) else (answer, 0, attempt.owner)
        attempt.stamp, attempt.left, attempt.holder = token, left_ms / 1000, _text(holder)
        if token and self.tokens is not None:
            # Drawn after the grant it may come too late. If the lease still stands now, every later holder draws later.
            drawn = await self.tokens()
            token = drawn if await self._run(EXTEND, attempt.owner, milliseconds(self.ttl)) == 1 else 0
        if token and self.clock() < local_deadline(attempt.asked_at, self.ttl):
            attempt.token = token
        return attempt.token > 0

    async def _ask(self, owner: str, queue: bool, block: float = 0.0) -> Any:
        """Asks at once; or lets the server wait for our wake-up and ask then, without a turn through the client."""
        args = (owner, milliseconds(self.ttl), *(() if queue else ("once",)))
        if not block and not self.min_replicas:
            return await self._run(_ASK, *args)
        async with self.redis.pipeline(transaction=False) as pipe:
            if block:
                pipe.blpop([f"{self._key}:wake:{owner}"], timeout=block)
            pipe.eval(_ASK.text, 1, self._key, *args)
            if self.min_replicas:  # WAIT speaks for the writes of its own connection
                pipe.execute_command("WAIT", self.min_replicas, milliseconds(self.ttl / 10))
            replies = await heard(pipe.execute())
        answer, confirmed = replies[-2:] if self.min_replicas else (replies[-1], 0)
        if not isinstance(answer, list) and confirmed < self.min_replicas:
            raise LockNotAcquired(
                f"{self.name!r}: {confirmed} of min_replicas={self.min_replicas} replicas confirmed the grant",
                name=self.name,
                confirmed=confirmed,
            )
        return answer

    def _slots(self) -> asyncio.Semaphore:
        """At most half of the pool's connections wait at the server, so that a holder finds one to release with."""
        pool, loop = getattr(self.redis, "connection_pool", self.redis), asyncio.get_running_loop()
        known = _waiting_slots.get(pool)
        if known is None or known[0] is not loop:
            size = getattr(pool, "max_connections", 100)
            if size < 2 or getattr(self.redis, "single_connection_client", False):
                raise ValueError(
                    "a client with one connection can't wait: a waiter occupies one, a holder needs another"
                )
            known = _waiting_slots[pool] = loop, asyncio.Semaphore(size // 2)
        return known[1]

    def _refused(self, attempt: _Attempt, waited: float) -> LockNotAcquired:
        by = f"; {attempt.holder} holds it" if attempt.holder else ""
        message = f"{self.name!r} was not obtained in {waited:g} s{by}"
        return LockNotAcquired(message, name=self.name, waited=waited, holder=attempt.holder)

    # ---- what is said to the server

    async def _leave(self, lease: Lease, stamp: int) -> bool:
        answer = await self._run(_LEAVE, lease.owner, stamp)
        # 2 inside the lease's own time: the client retried a release whose reply was lost. Nobody came between.
        return answer == 1 or (answer == 2 and lease.covered)

    def _run(self, script: Script, *args: Any) -> Awaitable[Any]:
        return script.run(self.redis, [self._key], *args)


def _text(reply: bytes | str | None) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply or ""
