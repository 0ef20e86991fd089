"""Redis lock: one holder at a time, waiters in order, a fencing token with every lease.

Promise  one holder per name while the server keeps its data; waiters are served first come, first served; each lease
         carries a token larger than every earlier one; the holder is told before the server can grant the next lease.
Not      safe against a stale write by itself: a holder paused past its lease still writes (fence the write). Not safe
         across a failover: it may forget the newest grant (use a fence or Redlock), and it orders tokens only as far as
         both servers' clocks agree. Not safe when the server's clock leaps forward, which ends leases early (let NTP
         slew it). Not re-entrant.
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
from distsys._support.cancellation import in_background, reraise_swallowed_cancel
from distsys._support.clock import Clock, elapsed
from distsys._support.redis import Script, async_client, hash_tag, milliseconds, options
from distsys.errors import LockNotAcquired
from distsys.locks.hold import EXAMPLE
from distsys.locks.lease import UNDO_SECONDS, Lease, LeasedLock, OnLost, local_deadline

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

MAX_BLOCK_SECONDS = 1.0  # longest BLPOP: below the client's socket timeout, and also the waiter's heartbeat
WAITER_TIMEOUT_MS = 3_000  # a waiter without a heartbeat for three blocks counts as dead and is skipped
RESERVATION_MS = 1_000  # a lock that was handed to a waiter stays reserved for it so long

# KEYS[1] - lock: its owner, with the lease as TTL. The other keys are named after it and so share its hash tag and its
# cluster slot. They can't all be listed in KEYS, because only the script finds the next waiter, whose name some carry.
#   :fence         the newest token, kept a week    :queue              waiting owners, oldest first
#   :heartbeats    waiter -> alive until (server's microseconds)
#   :wake:<owner>  what a waiter blocks on          :tombstone:<owner>  gave up; its request may still be on the way
# ARGV[1] - the owner that asks
_PRELUDE = """
local lock, me = KEYS[1], ARGV[1]
local fence, queue, heartbeats = lock .. ':fence', lock .. ':queue', lock .. ':heartbeats'
local function now()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
local function next_waiter()
  local waiter = redis.call('LPOP', queue)
  while waiter do
    local alive_until = redis.call('HGET', heartbeats, waiter)
    redis.call('HDEL', heartbeats, waiter)
    if alive_until and tonumber(alive_until) > now() then return waiter end
    waiter = redis.call('LPOP', queue)
  end
end
local function reserve(waiter)
  redis.call('SET', lock, waiter, 'PX', RESERVATION_MS)
  redis.call('RPUSH', lock .. ':wake:' .. waiter, 1)
  redis.call('PEXPIRE', lock .. ':wake:' .. waiter, RESERVATION_MS)
end
""".replace("RESERVATION_MS", str(RESERVATION_MS))

# ARGV[2] - ttl in ms    ARGV[3] - present when the owner does not want to queue
# Returns the token when granted (alone, for a table costs the server as much as three commands), else {0, ms until the
# present lease ends, holder}. Asking again is always safe: an owner that holds the lock already is granted it again, so
# a client may retry after a lost reply.
_ACQUIRE_OR_ENQUEUE = Script(
    _PRELUDE
    + """
local known = redis.call('MGET', lock, fence, lock .. ':tombstone:' .. me)
local holder, newest, tombstone = known[1], known[2], known[3]
if tombstone then return {0, 0, ''} end
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
  if redis.call('HSET', heartbeats, me, now() + WAITER_TIMEOUT_MS * 1000) == 1 then
    redis.call('RPUSH', queue, me)
  end
  redis.call('PEXPIRE', queue, 60000)
  redis.call('PEXPIRE', heartbeats, 60000)
end
return {0, redis.call('PTTL', lock), holder}
""".replace("WAITER_TIMEOUT_MS", str(WAITER_TIMEOUT_MS))
)

# ARGV[2] - the lease's token, while its time has not run out: the client may have retried a release whose reply was
#           lost, and that is a success if no newer token was granted; else ""
# ARGV[3] - "1" when the reply to a request was never seen: that request may still be on its way
# Returns 1 when the lock was ours, and is now handed to the next waiter or free; 0 when it was lost.
_RELEASE_OR_DEQUEUE = Script(
    _PRELUDE
    + """
if ARGV[3] == '1' then redis.call('SET', lock .. ':tombstone:' .. me, 1, 'PX', 60000) end
local holder = redis.call('GET', lock)
if holder == me then
  local waiter = next_waiter()
  if waiter then reserve(waiter) else redis.call('DEL', lock) end
  return 1
end
if redis.call('HDEL', heartbeats, me) == 1 then redis.call('LREM', queue, 1, me) end
return redis.call('GET', fence) == ARGV[2] and 1 or 0
"""
)

# ARGV[2] - ttl in ms    Returns 1, or 0 when the lock is not ours any more
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
_permits_of: WeakKeyDictionary[Any, tuple[asyncio.AbstractEventLoop, asyncio.Semaphore]] = WeakKeyDictionary()


@dataclass
class _Attempt:
    """One acquisition in progress."""

    owner: str
    asked_at: float = 0.0  # local time before the last request
    token: int = 0  # of the lease; 0 until it is granted
    server_token: int = 0  # drawn by Redis; `token` differs from it when the lock has `tokens`
    holder: str = ""
    left: float = 0.0  # seconds of the holder's lease


@dataclass(frozen=True, kw_only=True)
class LockState:
    """State of a lock as the server sees it. `owner` is None when it is free."""

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

    ttl       seconds a lease lasts without renewal; 2-3 times the expected operation, at most a day
    timeout   seconds to wait: None waits for ever, 0 is one try; then LockNotAcquired
    renew     extends the lease every ttl/3 while the body runs
    on_lost   "cancel" ends the body of `async with` and raises LockLost; "flag" only sets lease.lost. A lease from
              acquire() has no body: look at lease.lost, or call lease.check() before what can't be undone
    tokens    draws the fencing token elsewhere (fencing.postgres_tokens); the lease is checked afterwards
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
        tokens: Callable[[], Awaitable[int]] | None = None,
        clock: Clock = elapsed,
    ) -> None:
        key = f"distsys:lock:{{{hash_tag(check_text('name', name, EXAMPLE))}}}"
        super().__init__(name, key, ttl=ttl, timeout=timeout, renew=renew, on_lost=on_lost, clock=clock)
        self.redis, self.tokens = async_client(redis), tokens

    async def explain(self) -> LockState:
        """Return who holds the lock, from where, for how long, and how many wait."""
        owner, left_ms, token, waiting, now = await self._run(_EXPLAIN)
        owner = _text(owner)
        host, pid = owner.split("|")[:2] if owner.count("|") == 2 else (None, None)  # else another program wrote it
        facts: dict[str, Any] = {
            "name": self.name,
            "owner": owner or None,
            "host": host,
            "pid": int(pid) if pid else None,
        }
        held_for = max(0.0, (now - int(token)) / 1e6) if owner and token else 0.0
        remaining, token = max(0.0, left_ms / 1000), token and int(token)
        return LockState(**facts, token=token, held_for=held_for, remaining=remaining, waiting=waiting)

    async def force_release(self) -> str | None:
        """Take the lock from its holder, hand it to the next waiter, and return that holder; None if it was free.

        The holder learns of it at its next renewal and may still write until then: only a fence stops that.
        """
        owner = (await self.explain()).owner
        return owner if owner and await self._run(_RELEASE_OR_DEQUEUE, owner, "", "") else None

    # ---- acquire: ask; if it is taken, queue, block until woken, ask again

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
            # Cancelled, timed out or disconnected: the last request may have been granted, so release it.
            undo = self._run(_RELEASE_OR_DEQUEUE, attempt.owner, "", "1")
            await asyncio.wait({in_background(undo, f"undoing an acquire of {self.name!r}")}, timeout=UNDO_SECONDS)
            if timeout and isinstance(error, TimeoutError):
                raise self._refused(attempt, timeout) from None
            raise
        if not attempt.token:
            raise self._refused(attempt, 0.0)

        def extend(lease: Lease, ttl: float) -> Awaitable[bool]:
            return self._run(EXTEND, lease.owner, milliseconds(ttl))

        def release(lease: Lease) -> Awaitable[bool]:
            return self._run(_RELEASE_OR_DEQUEUE, lease.owner, attempt.server_token if lease.within_ttl else "", "")

        owner, token, asked_at = attempt.owner, attempt.token, attempt.asked_at
        lease = Lease(self, owner=owner, token=token, asked_at=asked_at, extend=extend, release=release, body=body)
        return self._add_hold(lease)

    async def _obtain(self, attempt: _Attempt, *, wait: bool) -> None:
        """Fill in the attempt's token. Without `wait` it may stay 0."""
        permits = self._block_permits()
        queued = wait and not permits.locked()
        if await self._request(attempt, queue=queued):
            return
        if not wait and attempt.holder == attempt.owner:
            raise self._refused(attempt, 0.0)  # granted too late to be of use: the caller releases it
        if not wait:
            return
        async with permits:
            granted = False
            while not granted:
                # Block until the lock is handed to us, the present lease ends, or a heartbeat is due.
                socket_timeout = options(self.redis).get("socket_timeout") or math.inf
                longest = min(MAX_BLOCK_SECONDS, self.ttl / 3, socket_timeout / 2)
                block = max(0.01, min(longest, attempt.left + 0.001)) if queued else 0.0
                granted = await self._request(attempt, queue=True, block=block)
                queued = True

    async def _request(self, attempt: _Attempt, *, queue: bool, block: float = 0.0) -> bool:
        """Ask once and record the answer. Return True when the lock was granted with enough time left."""
        attempt.asked_at = self.clock()  # the lease counts from here, though a blocked request is granted later
        answer = await self._ask(attempt.owner, queue, block)
        token, left_ms, holder = answer if isinstance(answer, list) else (answer, 0, attempt.owner)
        attempt.server_token, attempt.left, attempt.holder = token, left_ms / 1000, _text(holder)
        if token and self.tokens is not None:
            # The draw may outlast the lease. If the lease still stands afterwards, every later holder draws later.
            drawn = await self.tokens()
            token = drawn if await self._run(EXTEND, attempt.owner, milliseconds(self.ttl)) == 1 else 0
        if token and self.clock() < local_deadline(attempt.asked_at, self.ttl):
            attempt.token = token
        return attempt.token > 0

    async def _ask(self, owner: str, queue: bool, block: float = 0.0) -> Any:
        """Send the request at once; or let the server block for our wake-up first, in the same round trip."""
        args = (owner, milliseconds(self.ttl), *(() if queue else ("once",)))
        if not block:
            return await self._run(_ACQUIRE_OR_ENQUEUE, *args)
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.blpop([f"{self._key}:wake:{owner}"], timeout=block)
            pipe.eval(_ACQUIRE_OR_ENQUEUE.text, 1, self._key, *args)
            _, answer = await reraise_swallowed_cancel(pipe.execute())
        return answer

    def _block_permits(self) -> asyncio.Semaphore:
        """Return the permits to block at the server: half of the pool's connections, so that a holder can release."""
        pool, loop = getattr(self.redis, "connection_pool", self.redis), asyncio.get_running_loop()
        known = _permits_of.get(pool)
        if known is None or known[0] is not loop:
            size = getattr(pool, "max_connections", 100)
            if size < 2 or getattr(self.redis, "single_connection_client", False):
                advice = "a waiter occupies one, a holder needs another"
                raise ValueError(f"a client with one connection can't wait: {advice}")
            known = _permits_of[pool] = loop, asyncio.Semaphore(size // 2)
        return known[1]

    def _refused(self, attempt: _Attempt, waited: float) -> LockNotAcquired:
        by = f"; {attempt.holder} holds it" if attempt.holder else ""
        message = f"{self.name!r} was not obtained in {waited:g} s{by}"
        return LockNotAcquired(message, name=self.name, waited=waited, holder=attempt.holder)

    # ---- what is sent to the server

    def _run(self, script: Script, *args: Any) -> Awaitable[Any]:
        return script.run(self.redis, [self._key], *args)


def _text(reply: bytes | str | None) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply or ""
