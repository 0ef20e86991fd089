"""Locks written by somebody who did not know the scenes: right ones, and wrong ones with one mistake each."""

import asyncio
import contextlib
import os
import random
import socket
import threading
import time
import uuid

import redis.exceptions as redis_errors

FREE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"
RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) else return 0 end"
BROKEN = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)


class LockLost(Exception):
    pass


# --- asyncio ------------------------------------------------------------------------------------------------------------


class LeaseLock:
    """No renewal: release() raises if the lease ran out meanwhile."""

    def __init__(self, redis, name, ttl):
        self.redis, self.key, self.ttl = redis, f"lock:{name}", ttl
        self.token = None

    async def acquire(self):
        token = uuid.uuid4().hex
        if await self.redis.set(self.key, token, nx=True, px=int(self.ttl * 1000)):
            self.token = token
            return True
        return False

    async def release(self):
        token, self.token = self.token, None
        if token is None or not await self.redis.eval(FREE, 1, self.key, token):
            raise LockLost(self.key)


class WatchdogLock:
    """Renews itself; when it is lost the holder's task is cancelled and sees LockLost."""

    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl
        self.token = uuid.uuid4().hex

    async def __aenter__(self):
        try:
            start = time.monotonic()
            while not await self.redis.set(self.name, self.token, nx=True, px=int(self.ttl * 1000)):
                await asyncio.sleep(random.uniform(0.02, 0.08))
                start = time.monotonic()
        except BaseException:
            with contextlib.suppress(*BROKEN):
                await self.redis.eval(FREE, 1, self.name, self.token)
            raise
        self.lost = self.leaving = False
        self.watchdog = asyncio.create_task(self.watch(asyncio.current_task(), start + self.ttl))
        return self

    async def renew(self):
        return await self.redis.eval(RENEW, 1, self.name, self.token, int(self.ttl * 1000))

    async def watch(self, holder, deadline):
        while not (self.leaving or self.lost):
            await asyncio.sleep(self.ttl / 4)
            asked = time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, deadline - asked)):
                    self.lost = not await self.renew()
                deadline = asked + self.ttl
            except (TimeoutError, *BROKEN):
                self.lost = time.monotonic() >= deadline
        if not self.leaving:
            holder.cancel()

    async def __aexit__(self, kind, error, trace):
        self.leaving = True
        self.watchdog.cancel()
        await asyncio.wait([self.watchdog])
        if self.lost:
            if kind is asyncio.CancelledError:
                asyncio.current_task().uncancel()
            raise LockLost(self.name) from error
        if not await self.redis.eval(FREE, 1, self.name, self.token) and error is None:
            raise LockLost(self.name)


@contextlib.asynccontextmanager
async def redis_mutex(redis, name, ttl):
    key, token = f"mutex:{name}", os.urandom(16).hex()
    try:
        while not await redis.set(key, token, nx=True, px=round(ttl * 1000)):
            await asyncio.sleep(0.03 + random.random() * 0.04)
        yield token
    except BaseException:
        with contextlib.suppress(*BROKEN):
            await redis.eval(FREE, 1, key, token)
        raise
    if not await redis.eval(FREE, 1, key, token):
        raise LockLost(f"{name}: the work took longer than {ttl} s")


class WakeupLock:
    """The holder wakes one waiter through a list; the timeout covers a holder that died."""

    FREE_AND_WAKE = """
    if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
    redis.call('DEL', KEYS[1], KEYS[2])
    redis.call('RPUSH', KEYS[2], 1)
    redis.call('PEXPIRE', KEYS[2], 5000)
    return 1"""

    def __init__(self, redis, name, ttl):
        self.redis, self.ttl = redis, ttl
        self.key, self.wake = f"{{{name}}}:lock", f"{{{name}}}:wake"
        self.token = None

    async def acquire(self):
        token = str(uuid.uuid4())
        try:
            while not await self.redis.set(self.key, token, nx=True, px=max(1, int(self.ttl * 1000))):
                await self.redis.blpop([self.wake], timeout=0.2)
        except BaseException:
            with contextlib.suppress(*BROKEN):
                await self.redis.eval(self.FREE_AND_WAKE, 2, self.key, self.wake, token)
            raise
        self.token = token
        return True

    async def release(self):
        if not await self.redis.eval(self.FREE_AND_WAKE, 2, self.key, self.wake, self.token):
            raise LockLost(self.key)

    async def __aenter__(self):
        await self.acquire()
        return self

    async def __aexit__(self, *error):
        await self.release()


class SimpleLock(LeaseLock):
    async def acquire(self):
        token = uuid.uuid4().hex
        if await self.redis.set(self.key, token, nx=True):
            self.token = token
            return True
        return False


class SetnxExpireLock(LeaseLock):
    async def acquire(self):
        token = uuid.uuid4().hex
        if await self.redis.setnx(self.key, token):
            await self.redis.pexpire(self.key, int(self.ttl * 1000))
            self.token = token
            return True
        return False


class DeleteLock:
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl

    async def acquire(self):
        start = time.monotonic()
        if not await self.redis.set(self.name, "locked", nx=True, px=int(self.ttl * 1000)):
            return False
        self.deadline = start + self.ttl
        return True

    async def release(self):
        await self.redis.delete(self.name)
        if time.monotonic() > self.deadline:
            raise LockLost(self.name)


class CompareDeleteLock(LeaseLock):
    async def release(self):
        token, self.token = self.token, None
        current = await self.redis.get(self.key)
        if token is None or current not in (token, token.encode()):
            raise LockLost(self.key)
        await self.redis.delete(self.key)


class KeepAliveLock(WatchdogLock):
    async def renew(self):
        return await self.redis.set(self.name, self.token, xx=True, px=int(self.ttl * 1000))

    async def __aexit__(self, kind, error, trace):
        self.leaving = True
        self.watchdog.cancel()
        await asyncio.wait([self.watchdog])
        if self.lost:
            if kind is asyncio.CancelledError:
                asyncio.current_task().uncancel()
            raise LockLost(self.name) from error
        await self.redis.eval(FREE, 1, self.name, self.token)


class ExpiringMutex(LeaseLock):
    async def acquire(self):
        token = uuid.uuid4().hex
        if await self.redis.set(self.key, token, nx=True, ex=int(self.ttl * 1000)):
            self.token = token
            return True
        return False


@contextlib.asynccontextmanager
async def quiet_lock(redis, name, ttl):
    token = uuid.uuid4().hex
    while not await redis.set(name, token, nx=True, px=int(ttl * 1000)):
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        await redis.eval(FREE, 1, name, token)


class HeartbeatLock:
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl, self.token = redis, name, ttl, uuid.uuid4().hex

    async def _beat(self):
        while True:
            await asyncio.sleep(self.ttl / 3)
            with contextlib.suppress(*BROKEN):
                await self.redis.eval(RENEW, 1, self.name, self.token, int(self.ttl * 1000))

    async def __aenter__(self):
        while not await self.redis.set(self.name, self.token, nx=True, px=int(self.ttl * 1000)):
            await asyncio.sleep(0.05)
        self.beat = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *error):
        self.beat.cancel()
        await self.redis.eval(FREE, 1, self.name, self.token)


class CleanupLock(WatchdogLock):
    async def __aenter__(self):
        try:
            return await super().__aenter__()
        except BaseException:
            await self.redis.delete(self.name)
            raise


class DeadlineLock:
    """SETNX with the time at which it ends, taken over with GETSET (the Redis manual's old recipe)."""

    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl

    async def acquire(self):
        now = time.time()
        mine = f"{now + self.ttl:.6f}:{uuid.uuid4().hex}"
        if not await self.redis.setnx(self.name, mine):
            current = await self.redis.get(self.name)
            if (
                current is None
                or float(current.decode().split(":")[0] if isinstance(current, bytes) else current.split(":")[0]) > now
            ):
                return False
            swap = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) return 1 end return 0"
            if not await self.redis.eval(swap, 1, self.name, current, mine):
                return False
        self.mine, self.end = mine, now + self.ttl
        return True

    async def release(self):
        freed = await self.redis.eval(FREE, 1, self.name, self.mine)
        if not freed or time.time() > self.end:
            raise LockLost(self.name)


class OwnedLock:
    def __init__(self, redis, name, ttl, owner=uuid.uuid4().hex):
        self.redis, self.key, self.ttl, self.owner = redis, f"lock:{name}", ttl, owner

    async def acquire(self):
        self.deadline = time.monotonic() + self.ttl
        return bool(await self.redis.set(self.key, self.owner, nx=True, px=int(self.ttl * 1000)))

    async def release(self):
        if not await self.redis.eval(FREE, 1, self.key, self.owner) or time.monotonic() > self.deadline:
            raise LockLost(self.key)


class FairLock(LeaseLock):
    TAKE = """
    if redis.call('LINDEX', KEYS[2], 0) ~= ARGV[1] then return 0 end
    if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
    redis.call('LPOP', KEYS[2])
    return 1"""

    async def acquire(self):
        token, queue = uuid.uuid4().hex, f"{self.key}:queue"
        await self.redis.rpush(queue, token)
        while not await self.redis.eval(self.TAKE, 2, self.key, queue, token, int(self.ttl * 1000)):
            await asyncio.sleep(0.03)
        self.token = token
        return True


class NotifiedLock(LeaseLock):
    FREE_AND_TELL = """
    if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
    redis.call('DEL', KEYS[1])
    redis.call('PUBLISH', KEYS[1] .. ':freed', '1')
    return 1"""

    async def acquire(self):
        async with self.redis.pubsub() as channel:
            await channel.subscribe(f"{self.key}:freed")
            async for _ in channel.listen():  # the first one is the subscription itself
                if await super().acquire():
                    return True

    async def release(self):
        if not await self.redis.eval(self.FREE_AND_TELL, 1, self.key, self.token):
            raise LockLost(self.key)


# --- blocking -------------------------------------------------------------------------------------------------------------


class BlockingLock:
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, f"lock/{name}", ttl
        self.token = uuid.uuid4().hex

    def acquire(self):
        return bool(self.redis.set(self.name, self.token, nx=True, px=int(self.ttl * 1000)))

    def release(self):
        if not self.redis.eval(FREE, 1, self.name, self.token):
            raise LockLost(self.name)

    def __enter__(self):
        while not self.acquire():
            time.sleep(random.uniform(0.02, 0.08))
        return self

    def __exit__(self, kind, error, trace):
        self.release()


class ThreadedRenewalLock:
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl

    def __enter__(self):
        self.token, self.stop, self.lost = uuid.uuid4().hex, threading.Event(), False
        while not self.redis.set(self.name, self.token, nx=True, px=int(self.ttl * 1000)):
            time.sleep(0.05)
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()
        return self

    def _renew(self):
        while not self.stop.wait(self.ttl / 4):
            try:
                if not self.redis.eval(RENEW, 1, self.name, self.token, int(self.ttl * 1000)):
                    self.lost = True
                    return
            except BROKEN:
                continue

    def __exit__(self, kind, error, trace):
        self.stop.set()
        self.thread.join()
        if not self.redis.eval(FREE, 1, self.name, self.token) or self.lost:
            raise LockLost(self.name)


class PipelinedLock(BlockingLock):
    def acquire(self):
        with self.redis.pipeline() as pipe:
            pipe.setnx(self.name, self.token)
            pipe.pexpire(self.name, int(self.ttl * 1000))
            created, _ = pipe.execute()
        return bool(created)


class BackgroundRenewalLock(ThreadedRenewalLock):
    def __exit__(self, kind, error, trace):
        if kind is not None:
            return False
        return super().__exit__(kind, error, trace)


class ProcessLock:
    TAKE = """
    local owner = redis.call('GET', KEYS[1])
    if owner and owner ~= ARGV[1] then return 0 end
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return 1"""

    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl
        self.owner = f"{socket.gethostname()}:{os.getpid()}"

    def acquire(self):
        return bool(self.redis.eval(self.TAKE, 1, self.name, self.owner, int(self.ttl * 1000)))

    def release(self):
        if not self.redis.eval(FREE, 1, self.name, self.owner):
            raise LockLost(self.name)


class CheckedLock:
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl, self.token = redis, name, ttl, uuid.uuid4().hex

    def acquire(self):
        if self.redis.exists(self.name):
            return False
        self.deadline = time.monotonic() + self.ttl
        self.redis.set(self.name, self.token, px=int(self.ttl * 1000))
        return True

    def release(self):
        self.redis.eval(FREE, 1, self.name, self.token)
        if time.monotonic() > self.deadline:
            raise LockLost(self.name)


class AvailableLock(BlockingLock):
    open = False

    def acquire(self):
        try:
            self.open = False
            return super().acquire()
        except redis_errors.RedisError:
            self.open = True  # rather work without the lock than not at all
            return True

    def release(self):
        if not self.open:
            super().release()


class CounterLock:
    TAKE = """
    if redis.call('INCR', KEYS[1]) == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) return 1 end
    redis.call('DECR', KEYS[1])
    return 0"""

    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, f"busy:{name}", ttl

    def acquire(self):
        self.deadline = time.monotonic() + self.ttl
        return self.redis.eval(self.TAKE, 1, self.name, int(self.ttl * 1000)) == 1

    def release(self):
        self.redis.decr(self.name)
        if time.monotonic() > self.deadline:
            raise LockLost(self.name)


WRONG = {
    SimpleLock: ("a process is killed", "no TTL: a killed holder, or a lost reply of SET, strands the lock for ever"),
    SetnxExpireLock: (
        "a process is killed",
        "SETNX and PEXPIRE are two commands: a crash or error between them strands the lock for ever",
    ),
    DeleteLock: (
        "a command is held back until another worker is inside",
        "DEL without an owner check: a holder that overran its ttl frees the next one's lock",
    ),
    CompareDeleteLock: (
        "a command is held back until another worker is inside",
        "GET and DEL are two commands: if the lock expires and another takes it between them, the other's lock is freed",
    ),
    KeepAliveLock: (
        "a process stands still until another is inside",
        "the heartbeat renews with SET XX, without an owner check: a holder that stalled longer than the ttl overwrites the next one's lock and is not told",
    ),
    ExpiringMutex: (
        "a process is killed",
        "ex gets milliseconds, so a killed holder's lock is free only after 1000 times its ttl",
    ),
    quiet_lock: (
        "the work takes longer than the TTL",
        "work that is longer than the ttl is neither renewed nor told: two hold it and no one hears of it",
    ),
    HeartbeatLock: (
        "a process stands still in the midst of long work, and goes on",
        "the result of the renewal and of the release is ignored: a holder that stalled longer than the ttl goes on beside another and is never told",
    ),
    CleanupLock: ("a worker is cancelled", "a waiter that is cancelled (or fails) deletes the holder's lock"),
    DeadlineLock: (
        "nothing is disturbed: three workers take turns",
        "the end is judged by each client's wall clock: a client whose clock is ahead takes a lock that is still held",
    ),
    OwnedLock: (
        "a command is held back until another worker is inside",
        "the default owner is made once per process, so a holder that overran frees the lock of another task in its process",
    ),
    FairLock: (
        "a process is killed",
        "a waiter that was cancelled or killed stays at the head of the queue and nobody gets in any more",
    ),
    NotifiedLock: (
        "the work takes longer than the TTL",
        "waiters wait only for the message of a release: after a killed holder (or a lost message) they never wake up",
    ),
    PipelinedLock: (
        "a process is killed",
        "PEXPIRE runs also when SETNX failed: each waiter's try renews the lock of a dead holder, so it is never free",
    ),
    BackgroundRenewalLock: (
        "a worker is cancelled",
        "an exception in the work leaves the renewal thread running and the lock held while the process lives",
    ),
    ProcessLock: (
        "nothing is disturbed: three workers take turns",
        "the owner is the process: two threads (or objects) of one process hold the lock at once",
    ),
    CheckedLock: (
        "a command is late, by less than half a TTL",
        "EXISTS, then SET without NX: two clients at once both take it",
    ),
    AvailableLock: ("a connection breaks", "an error of Redis at acquire counts as granted, so two work at once"),
    CounterLock: (
        "a command is held back until another worker is inside",
        "DECR without an owner: a holder that overran frees the next one's lock, or leaves -1 without a TTL and nobody gets in again",
    ),
}
RIGHT = [LeaseLock, WatchdogLock, redis_mutex, WakeupLock, BlockingLock, ThreadedRenewalLock]
