"""What tasks do with a lock; and a lease: exclusive for a while, whose holder is told before the while is over.

The rules grant locks for different reasons. What is the same for all of them stands here once: which task holds what,
and how a body is told of its loss and ends; for RedisLock and Redlock also a lease's local deadline and its renewal.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Literal

from distsys._support.cancellation import in_background
from distsys._support.clock import Clock
from distsys.errors import LockLost
from distsys.locks.hold import RELEASED, UNRELEASED, Held, Lock

logger = logging.getLogger("distsys.locks")
OnLost = Literal["cancel", "flag"]
MAX_TTL = 86_400.0
UNDO_WAIT = 1.0  # how long a cancelled acquire waits for its own undoing, which otherwise goes on in the background

held_leases: ContextVar[tuple[Lease, ...]] = ContextVar("distsys_held_leases", default=())
"""The leases of this context, outermost first: nested code finds its fencing token here."""


class LeasedLock(Lock["Lease"]):
    """A lock that is held by leases, and what is the same for all of them."""

    def __init__(
        self,
        name: str,
        key: str,
        *,
        ttl: float,
        timeout: float | None,
        renew: bool,
        on_lost: OnLost,
        clock: Clock,
    ) -> None:
        if on_lost not in ("cancel", "flag"):
            raise ValueError(f"on_lost={on_lost!r}: 'cancel' ends the body, 'flag' only sets lease.lost")
        super().__init__(name, timeout)
        self._key, self.ttl, self.renew, self.on_lost, self.clock = key, check_ttl(ttl), renew, on_lost, clock

    def _refuse_reentry(self) -> None:
        """A task that waits for a lock it holds itself would wait for ever: say so at once."""
        task = asyncio.current_task()
        if any(lease.key == self._key and lease.held and lease.task is task for lease in held_leases.get()):
            raise RuntimeError(f"this task already holds {self}: the lock is not re-entrant; pass the lease on instead")


class Lease(Held):
    """One grant of a lock, from its acquisition to its end.

    `extend(ttl)` and `release()` are the lock's own calls to its store; each answers whether the lease was still ours.
    `extend` never shortens what the store has promised, so that calls may overtake each other.
    `asked_at` is the local time *before* the request that granted the lease was sent: the server's TTL starts later
    than that, so `asked_at + ttl - drift` is never after the server's end of the lease.
    With a `body` the lease is tied to the running task: lost, it cancels that, unless the lock says on_lost="flag".
    """

    def __init__(
        self,
        lock: LeasedLock,
        *,
        owner: str,
        token: int | None,
        asked_at: float,
        extend: Callable[[Lease, float], Awaitable[bool]],
        release: Callable[[Lease], Awaitable[bool]],
        body: bool,
    ) -> None:
        super().__init__(body=body)
        self.name, self.key, self.owner, self.token, self.ttl = lock.name, lock._key, owner, token, lock.ttl
        self._extend, self._release, self._clock, self._renew = extend, release, lock.clock, lock.renew
        self._on_lost = lock.on_lost
        self._timer: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._deadline = -math.inf
        self._granted(asked_at, lock.ttl)
        held_leases.set((*[lease for lease in held_leases.get() if lease._ended != RELEASED], self))

    def __repr__(self) -> str:
        state = self._ended or f"{self.remaining():.3g} s left"
        return f"<Lease {self.name!r} token={self.token} {state}>"

    # ---- what the holder can ask

    @property
    def lost(self) -> bool:
        """True once the lease can no longer be proved to hold: read from the clock, so true at once after a pause."""
        return self._ended != RELEASED and not self.held

    @property
    def held(self) -> bool:
        return not self._ended and self.covered

    @property
    def covered(self) -> bool:
        """Whether the present moment lies inside the lease's own time, released or not."""
        return self._clock() < self._deadline

    def remaining(self) -> float:
        """Seconds until the local deadline, which is never later than the server's; 0 when lost or released."""
        return 0.0 if self._ended else max(0.0, self._deadline - self._clock())

    def check(self) -> None:
        """Raises LockLost unless the lease still holds. Narrows the window before a write; only a fence closes it."""
        if not self.held:
            raise self._loss()

    async def extend(self, ttl: float | None = None) -> None:
        """Starts the TTL anew: `ttl` seconds from now on, else as before, and never less than was left.

        Raises LockLost when the lease is no longer ours.
        """
        self.check()
        if not await self._ask_again(self.ttl if ttl is None else check_ttl(ttl)):
            raise self._loss()

    async def release(self) -> bool:
        """Gives the lease back. False: it was no longer ours.

        Cancelled midway, it goes on in the background; after an error it may be called again.
        """
        held_leases.set(tuple(lease for lease in held_leases.get() if lease is not self))
        if self._ended not in ("", UNRELEASED):
            return self._ended == RELEASED
        self._end(RELEASED)
        try:
            ours = await self._release(self)
        except asyncio.CancelledError:
            in_background(self._release(self), f"release of {self.name!r} after cancellation")
            raise
        except Exception:
            self._ended = UNRELEASED
            raise
        if not ours:
            self._ended = "was no longer ours when it was released"
        return ours

    async def _let_go(self, _: BaseException | None) -> tuple[bool, LockLost | None]:
        covered = self.covered
        try:
            ours = await self.release()
        except Exception as error:  # noqa: BLE001  logged, or the cause of LockLost
            self._cause = error
            if covered:  # the whole body ran inside the lease; what could not be given back ends by its TTL
                logger.warning("%r could not be released and ends by its TTL: %r", self.name, error)
            ours = covered
        return False, None if ours else self._loss()

    # ---- renewal and loss

    def _granted(self, asked_at: float, ttl: float) -> None:
        self.ttl, self._deadline = ttl, max(self._deadline, local_deadline(asked_at, ttl))
        left = self._deadline - self._clock()
        self._wake_in(min(left, self.ttl / 3) if self._renew else left)

    def _wake_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._tick)

    def _tick(self) -> None:
        left = self._deadline - self._clock()
        if left <= 0:
            self.lose("ended before it could be renewed" if self._renew else "ended: it is not renewed")
            return
        self._wake_in(left)
        if self._renew and self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._renew_now())

    async def _renew_now(self) -> None:
        try:
            async with asyncio.timeout(self.ttl / 3):  # a connection that fell silent must not cost the lease
                await self._ask_again(self.ttl)
        except Exception as error:  # noqa: BLE001  logged, and the cause of a later loss; there is time to try again
            self._cause = error
            logger.warning("renewal of %r failed, %.3g s left: %r", self.name, self.remaining(), error)
            if not self._ended:
                self._wake_in(min(self.ttl / 10, self._deadline - self._clock()))
        finally:
            self._renewal = None

    async def _ask_again(self, ttl: float) -> bool:
        asked_at = self._clock()
        ours = await self._extend(self, ttl)
        if self._ended:
            return False
        if ours:
            self._cause = None
            self._granted(asked_at, ttl)
        else:
            self.lose("was taken away: its key expired, was removed, or belongs to another owner")
        return ours

    def lose(self, why: str) -> None:
        """The lease has ended, by whatever was found out; its body learns of it. Nothing happens once it has ended."""
        if self._ended:
            return
        self._end(why)
        in_background(self._release(self), f"release of {self.name!r} after its loss")
        if self._on_lost == "cancel":
            self._cancel()

    def _end(self, why: str) -> None:
        self._ended = why
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # its context knows the leases before this one, and theirs the ones before
        if self._renewal is not None and self._renewal is not asyncio.current_task():
            self._renewal.cancel()

    def _loss(self) -> LockLost:
        why = self._ended or "ended while the event loop was busy"
        return LockLost(f"the lease of {self.name!r} {why}", name=self.name, token=self.token)


def local_deadline(asked_at: float, ttl: float) -> float:
    """Never after the server's end of a lease asked for at `asked_at`: less 1 % and 2 ms, for clocks that drift."""
    return asked_at + ttl * 0.99 - 0.002


def check_ttl(ttl: float) -> float:
    """A TTL in seconds, above 0 and at most a day."""
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(f"ttl={ttl!r} is a {type(ttl).__name__}; give seconds as a number")
    if not local_deadline(0, ttl) > 0:
        raise ValueError(
            f"ttl={ttl!r}: a lease lasts longer than 0 s after 2 ms for drift; take 2-3 times the expected operation"
        )
    if ttl > MAX_TTL:
        raise ValueError(
            f"ttl={ttl!r} is longer than a day; it is in seconds, and renewal keeps a long job's lease alive"
        )
    return float(ttl)
