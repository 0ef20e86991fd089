"""Locks that nobody should write, each beside the mistake in it, and right ones in several styles.

All of them are async and take redis, name and ttl. `WRONG` says which scene has to find the mistake, and how.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from typing import Any

from distsys.locks.redis_lock import RedisLock

OWNED = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('{}', KEYS[1]{}) end return 0"
TURNS, LONG, LATE, HELD_BACK, KILLED, FROZEN, SILENT, BROKEN, FORGOTTEN, CANCELLED, NO_RETRY = range(11)


class Renewed:
    """A right one: SET NX PX, renewed by its owner, released by its owner."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        self.redis, self.name, self.ms, self.me = redis, name, int(ttl * 1000), uuid.uuid4().hex

    async def take(self) -> Any:
        return await self.redis.set(self.name, self.me, nx=True, px=self.ms)

    async def drop(self) -> Any:
        await self.redis.eval(OWNED.format("DEL", ""), 1, self.name, self.me)

    async def extend(self) -> Any:
        return await self.redis.eval(OWNED.format("PEXPIRE", ", ARGV[2]"), 1, self.name, self.me, self.ms)

    async def renew(self) -> None:
        while True:
            await asyncio.sleep(self.ms / 3000)
            if not await self.extend():
                self.task.cancel()
                return

    async def __aenter__(self) -> Renewed:
        while not await self.take():
            await asyncio.sleep(0.01)
        self.task: Any = asyncio.current_task()
        self.renewal = asyncio.create_task(self.renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.renewal.cancel()
        await self.drop()


class TakenByScript(Renewed):
    """Right: the grant is a script."""

    async def take(self) -> Any:
        script = "if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1 end return 0"
        return await self.redis.eval(script, 1, self.name, self.me, self.ms)


class TakenByTransaction(Renewed):
    """Right: WATCH, GET, MULTI, SET, EXEC."""

    async def take(self) -> Any:
        from redis.exceptions import WatchError

        async with self.redis.pipeline() as pipe:
            try:
                await pipe.watch(self.name)
                if await pipe.get(self.name) is not None:
                    return False
                pipe.multi()
                pipe.set(self.name, self.me, px=self.ms)
                await pipe.execute()
            except WatchError:
                return False
        return True


class WaitsOnAList(Renewed):
    """Right: waiters block on a list, and look again when its element comes or a short while is over."""

    async def drop(self) -> Any:
        script = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[2], 1) redis.call('PEXPIRE', KEYS[2], 1000) end"
        await self.redis.eval(script, 2, self.name, f"{self.name}:free", self.me)

    async def __aenter__(self) -> Renewed:
        while not await self.take():
            await self.redis.blpop([f"{self.name}:free"], timeout=0.1)
        self.task = asyncio.current_task()
        self.renewal = asyncio.create_task(self.renew())
        return self


class AcquireRelease:
    """Right: acquire() answers False at once, release() is awaited."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        self.lock = Renewed(redis, name, ttl)

    async def acquire(self) -> bool:
        if not await self.lock.take():
            return False
        self.lock.task = asyncio.current_task()
        self.renewal = asyncio.create_task(self.lock.renew())
        return True

    async def release(self) -> None:
        self.renewal.cancel()
        await self.lock.drop()


class NoLock(Renewed):
    async def take(self) -> Any:
        await self.redis.get(self.name)
        return True


class GetThenSet(Renewed):
    async def take(self) -> Any:
        if await self.redis.get(self.name) is not None:
            return False
        await self.redis.set(self.name, self.me, px=self.ms)
        return True


class NoTtl(Renewed):
    async def take(self) -> Any:
        return await self.redis.set(self.name, self.me, nx=True)

    async def extend(self) -> Any:
        return True


class NoRenewal(Renewed):
    async def renew(self) -> None: ...


class SetnxThenExpire(Renewed):
    async def take(self) -> Any:
        return await self.redis.setnx(self.name, self.me) and await self.redis.pexpire(self.name, self.ms)


class PlainDel(Renewed):
    async def drop(self) -> Any:
        await self.redis.delete(self.name)


class GetThenDel(Renewed):
    async def drop(self) -> Any:
        if await self.redis.get(self.name) == self.me.encode():
            await self.redis.delete(self.name)


class GetThenExpire(Renewed):
    """Renews by GET, then SET: a late renewal writes its own name over the next owner's."""

    async def extend(self) -> Any:
        if await self.redis.get(self.name) != self.me.encode():
            return False
        return await self.redis.set(self.name, self.me, px=self.ms)


class RenewsAnybodys(Renewed):
    """Extends and releases without asking whose it is."""

    async def extend(self) -> Any:
        return await self.redis.pexpire(self.name, self.ms)

    async def drop(self) -> Any:
        await self.redis.delete(self.name)


class OwnerIsThePid(Renewed):
    """The owner is host and pid, and an owner may enter again: two tasks of one process are one owner."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        super().__init__(redis, name, ttl)
        self.me = f"{socket.gethostname()}:{os.getpid()}"

    async def take(self) -> Any:
        return await super().take() or await self.redis.get(self.name) == self.me.encode()


class OwnerIsThePidAlone(OwnerIsThePid):
    """Two containers have pid 1."""

    def __init__(self, redis: Any, name: str, ttl: float) -> None:
        super().__init__(redis, name, ttl)
        self.me = str(os.getpid())


class ExpiryByTheClientsClock(Renewed):
    """The value is the time of its end by the client's clock; whoever thinks it is over takes the lock."""

    async def take(self) -> Any:
        now = time.time()
        if await self.redis.setnx(self.name, now + self.ms / 1000):
            return True
        until = float(await self.redis.get(self.name) or 0)
        if until >= now:
            return False
        await self.redis.set(self.name, now + self.ms / 1000)
        return True

    async def extend(self) -> Any:
        return await self.redis.set(self.name, time.time() + self.ms / 1000)

    async def drop(self) -> Any:
        await self.redis.delete(self.name)


class TtlTooShort(Renewed):
    """Seconds where milliseconds are meant."""

    async def take(self) -> Any:
        return await self.redis.set(self.name, self.me, nx=True, px=max(1, self.ms // 1000))

    async def extend(self) -> Any:
        return True


class ForgetsOnCancel(Renewed):
    """Takes the lock without a lease, and gives it back only when the body ends well."""

    async def take(self) -> Any:
        return await self.redis.set(self.name, self.me, nx=True)

    async def renew(self) -> None: ...

    async def __aexit__(self, kind: object, *_: object) -> None:
        self.renewal.cancel()
        if kind is None:
            await self.drop()


class WaitsForEverOnAList(WaitsOnAList):
    """Waiters block until somebody releases; a holder that was killed releases nothing."""

    async def __aenter__(self) -> Renewed:
        while not await self.take():
            await self.redis.blpop([f"{self.name}:free"], timeout=0)
        self.task = asyncio.current_task()
        self.renewal = asyncio.create_task(self.renew())
        return self


class AsksAgainWithoutNx(Renewed):
    """After a broken connection it sets the lock, whoever holds it."""

    async def take(self) -> Any:
        from redis.exceptions import ConnectionError as Broken

        try:
            return await super().take()
        except Broken:
            return await self.redis.set(self.name, self.me, px=self.ms)


class RenewalRecreates(Renewed):
    """A renewal that comes after the end makes the lock anew."""

    async def extend(self) -> Any:
        if await self.redis.get(self.name) in (None, self.me.encode()):
            return await self.redis.set(self.name, self.me, px=self.ms)
        return False


class WaitersRenew(Renewed):
    """Waiters prolong the lease of a holder that is dead."""

    async def take(self) -> Any:
        taken = await super().take()
        if not taken:
            await self.redis.pexpire(self.name, self.ms)
        return taken


RIGHT = (Renewed, TakenByScript, TakenByTransaction, WaitsOnAList, AcquireRelease, RedisLock)
AT_ONCE, NOBODY = "inside at once", "nobody"
WRONG = {
    NoLock: (TURNS, AT_ONCE),
    GetThenSet: (LATE, AT_ONCE),
    NoTtl: (KILLED, NOBODY),
    NoRenewal: (LONG, AT_ONCE),
    SetnxThenExpire: (KILLED, NOBODY),
    PlainDel: (HELD_BACK, AT_ONCE),
    GetThenDel: (HELD_BACK, AT_ONCE),
    GetThenExpire: (HELD_BACK, "thrown out"),
    RenewsAnybodys: (HELD_BACK, AT_ONCE),
    OwnerIsThePid: (TURNS, AT_ONCE),
    OwnerIsThePidAlone: (TURNS, AT_ONCE),
    ExpiryByTheClientsClock: (TURNS, AT_ONCE),
    TtlTooShort: (TURNS, AT_ONCE),
    ForgetsOnCancel: (CANCELLED, NOBODY),
    WaitsForEverOnAList: (KILLED, NOBODY),
    AsksAgainWithoutNx: (NO_RETRY, ""),
    RenewalRecreates: (LATE, "thrown out"),
    WaitersRenew: (KILLED, NOBODY),
}
"""By mistake: the scene that has to show it, and words of its summary."""
