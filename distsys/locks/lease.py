"""Leases: ownership for a limited time, whose holder is told before it ends.

RedisLock and Redlock grant leases. Their local deadline, renewal and loss stand here once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Literal

from distsys._support.arguments import check_is_number
from distsys._support.cancellation import in_background
from distsys._support.clock import Clock
from distsys.errors import LockLost
from distsys.locks.hold import Hold, Lock, State

logger = logging.getLogger("distsys.locks")
OnLost = Literal["cancel", "flag"]
Ask = Callable[..., Awaitable[bool]]  # about a lease: was it still ours? To extend it takes the lease and the new TTL
MAX_TTL = 86_400.0  # seconds
UNDO_SECONDS = 1.0  # a cancelled acquire waits this long for its own undoing, which then goes on in the background
RELEASE_FAILED = "could not be released"

held_leases: ContextVar[tuple[Lease, ...]] = ContextVar("distsys_held_leases", default=())
"""The leases of this context, outermost first: nested code finds its fencing token here."""


class LeasedLock(Lock["Lease"]):
    """Base class of the locks that are held by leases."""

    def __init__(
        self, name: str, key: str, *, ttl: float, timeout: float | None, renew: bool, on_lost: OnLost, clock: Clock
    ) -> None:
        if on_lost not in ("cancel", "flag"):
            raise ValueError(f"on_lost={on_lost!r}: 'cancel' ends the body, 'flag' only sets lease.lost")
        super().__init__(name, timeout)
        self._key, self.ttl = key, check_ttl(ttl)
        self.renew, self.on_lost, self.clock = renew, on_lost, clock

    def _refuse_reentry(self) -> None:
        """Raise RuntimeError if this task holds the lock already: it would wait for itself for ever."""
        task = asyncio.current_task()
        if any(lease.key == self._key and lease.held and lease.task is task for lease in held_leases.get()):
            raise RuntimeError(f"this task already holds {self}: the lock is not re-entrant; pass the lease on instead")


class Lease(Hold):
    """One grant of a lock, from its acquisition to its end.

    asked_at  local time *before* the request that granted the lease was sent. The server's TTL starts later than that,
              so `asked_at + ttl - drift` is never after the server's end of the lease
    extend    the lock's call to its store; answers whether the lease was still ours. It never shortens what the store
              has promised, so that calls may overtake each other
    release   the lock's call to its store; answers whether the lease was still ours
    body      ties the lease to the running task: its loss cancels the task, unless the lock says on_lost="flag"
    """

    def __init__(
        self, lock: LeasedLock, *, owner: str, token: int | None, asked_at: float, extend: Ask, release: Ask, body: bool
    ) -> None:
        super().__init__(lock.name, body=body)
        self.key, self.owner, self.token = lock._key, owner, token
        self._lock, self._clock = lock, lock.clock
        self._extend, self._release = extend, release
        self._timer: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._deadline = -math.inf
        self._start_ttl(asked_at, lock.ttl)
        held_leases.set((*[lease for lease in held_leases.get() if lease._state is not State.RELEASED], self))

    def __repr__(self) -> str:
        return f"<Lease {self.name!r} token={self.token} {self._reason or f'{self.remaining():.3g} s left'}>"

    # ---- what the holder can ask

    @property
    def state(self) -> State:
        """Present state, read from the clock too: after a pause the lease is lost before any timer has run."""
        return self._state if self._state is not State.HELD or self.within_ttl else State.LOST

    @property
    def held(self) -> bool:
        """True while the lease can be proved to hold."""
        return self.state is State.HELD

    @property
    def within_ttl(self) -> bool:
        """True until the local deadline, released or not."""
        return self._clock() < self._deadline

    def remaining(self) -> float:
        """Return the seconds until the local deadline, which is never after the server's; 0 when lost or released."""
        return max(0.0, self._deadline - self._clock()) if self._state is State.HELD else 0.0

    def check(self) -> None:
        """Raise LockLost unless the lease holds. It narrows the window before a write; only a fence closes it."""
        if not self.held:
            raise self._loss()

    async def extend(self, ttl: float | None = None) -> None:
        """Start the TTL anew: `ttl` seconds from now on, else as before, and never less than was left.

        Raises LockLost when the lease is no longer ours.
        """
        self.check()
        if not await self._renew(self.ttl if ttl is None else check_ttl(ttl)):
            raise self._loss()

    async def release(self) -> bool:
        """Release the lease. Return False if it was no longer ours.

        If cancelled midway, the release goes on in the background. After an error it may be called again.
        """
        held_leases.set(tuple(lease for lease in held_leases.get() if lease is not self))
        if self._state is not State.HELD and self._reason != RELEASE_FAILED:
            return self._state is State.RELEASED
        self._end(State.RELEASED, "was released")
        try:
            ours = await self._release(self)
        except asyncio.CancelledError:
            in_background(self._release(self), f"release of {self.name!r} after cancellation")
            raise
        except Exception:
            self._end(State.LOST, RELEASE_FAILED)
            raise
        if not ours:
            self._end(State.LOST, "was no longer ours when it was released")
        return self._state is State.RELEASED

    async def _finish(self, _: BaseException | None) -> bool:
        body_within_ttl = self.within_ttl
        try:
            await self.release()
        except Exception as error:  # noqa: BLE001  logged, or the cause of LockLost
            self._cause = error
            if body_within_ttl:
                logger.warning("%r could not be released and ends by its TTL: %r", self.name, error)
                self._end(State.RELEASED, RELEASE_FAILED)
        return False

    # ---- renewal and loss

    def _start_ttl(self, asked_at: float, ttl: float) -> None:
        self.ttl = ttl
        self._deadline = max(self._deadline, local_deadline(asked_at, ttl))
        left = self._deadline - self._clock()
        self._wake_in(min(left, ttl / 3) if self._lock.renew else left)

    def _wake_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._tick)

    def _tick(self) -> None:
        left = self._deadline - self._clock()
        if left <= 0:
            self.mark_lost("ended before it could be renewed" if self._lock.renew else "ended: it is not renewed")
            return
        self._wake_in(left)
        if self._lock.renew and self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._renew_in_time())

    async def _renew_in_time(self) -> None:
        try:
            async with asyncio.timeout(self.ttl / 3):  # a connection that fell silent must not cost the lease
                await self._renew(self.ttl)
        except Exception as error:  # noqa: BLE001  logged, and the cause of a later loss; there is time to try again
            self._cause = error
            logger.warning("renewal of %r failed, %.3g s left: %r", self.name, self.remaining(), error)
            if self._state is State.HELD:
                self._wake_in(min(self.ttl / 10, self._deadline - self._clock()))
        finally:
            self._renewal = None

    async def _renew(self, ttl: float) -> bool:
        """Start the TTL anew at the store; return False if the lease has ended."""
        asked_at = self._clock()
        ours = await self._extend(self, ttl)
        if self._state is not State.HELD:
            return False
        if ours:
            self._cause = None
            self._start_ttl(asked_at, ttl)
        else:
            self.mark_lost("was taken away: its key expired, was removed, or belongs to another owner")
        return ours

    def mark_lost(self, reason: str) -> None:
        """Record the loss, release at the store and cancel the body. Does nothing once the lease has ended."""
        if self._state is not State.HELD:
            return
        self._end(State.LOST, reason)
        in_background(self._release(self), f"release of {self.name!r} after its loss")
        if self._lock.on_lost == "cancel":
            self._cancel_body()

    def _end(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # its context knows the leases before this one, and theirs the ones before
        if self._renewal is not None and self._renewal is not asyncio.current_task():
            self._renewal.cancel()

    def _loss(self) -> LockLost:
        reason = self._reason or "ended while the event loop was busy"
        return LockLost(f"the lease of {self.name!r} {reason}", name=self.name, token=self.token)


def local_deadline(asked_at: float, ttl: float) -> float:
    """Return a time never after the server's end of a lease asked for at `asked_at`: less 1 % and 2 ms, for drift."""
    return asked_at + ttl * 0.99 - 0.002


def check_ttl(ttl: float) -> float:
    """Return the TTL in seconds if it is above 0 and at most a day."""
    if not local_deadline(0, check_is_number("ttl", ttl, "seconds")) > 0:
        advice = "take 2-3 times the expected operation"
        raise ValueError(f"ttl={ttl!r}: a lease must last longer than the 2 ms allowed for drift; {advice}")
    if ttl > MAX_TTL:
        advice = "it is in seconds, and renewal keeps a long job's lease alive"
        raise ValueError(f"ttl={ttl!r} is longer than a day; {advice}")
    return float(ttl)
