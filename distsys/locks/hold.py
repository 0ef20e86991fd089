"""Base classes of every lock: one hold of it, and the lock as a context manager."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

from distsys._support.arguments import check_timeout
from distsys._support.cancellation import cancel_if_deliverable
from distsys.errors import LockLost, LockNotAcquired

EXAMPLE = "'payment:order-123'"  # a lock's name, for error messages


class State(Enum):
    """State of a hold: it begins as HELD, and leaves that state once."""

    HELD = "held"
    RELEASED = "released"
    LOST = "lost"


class Hold:
    """One hold of a lock by the running task; with a `body` of `async with`, its loss cancels that task."""

    def __init__(self, name: Any, *, body: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.name, self.task = name, task
        self._body, self._body_ended = body, False
        self._cancelling, self._cancelled = task.cancelling(), False  # the count is of cancellations that are not ours
        self._state, self._reason = State.HELD, ""  # the reason is for a state other than HELD
        self._cause: BaseException | None = None  # of the loss

    @property
    def state(self) -> State:
        """Present state of the hold."""
        return self._state

    @property
    def lost(self) -> bool:
        """True once the lock was lost before its release."""
        return self.state is State.LOST

    @property
    def settled(self) -> bool:
        """True once the hold was released and no body is left whose end would ask for it."""
        return self._state is State.RELEASED and not self._body

    async def release(self) -> bool:
        """Release the lock. Each rule says what it answers when the hold was lost."""
        raise NotImplementedError

    async def exit_body(self, error: BaseException | None) -> bool:
        """End the body of `async with`, and return True if that settles its `error`.

        Raises LockLost if the hold was lost. An error of the body's own is never masked: the loss becomes its note.
        """
        self._body_ended = True
        ours = self._cancelled and self.task.uncancel() <= self._cancelling  # a cancellation from outside stays
        own = None if ours and isinstance(error, asyncio.CancelledError) else error
        settled = await self._finish(error)
        if self._state is State.LOST:
            loss = self._loss()
            if own is None:
                raise loss from self._cause
            if not (isinstance(own, LockLost) and own.facts == loss.facts):
                own.add_note(str(loss))
        return settled

    async def _finish(self, error: BaseException | None) -> bool:
        """Release at the end of the body; leave the state LOST or RELEASED. Return True if that settles `error`."""
        raise NotImplementedError

    def _loss(self) -> LockLost:
        """Make the error that tells the holder what happened."""
        raise NotImplementedError

    def _cancel_body(self) -> None:
        """Cancel the body once, unless it has ended or found the loss itself."""
        ended = not self._body or self._body_ended or self.task.done()
        if not self._cancelled and not ended and self.task is not asyncio.current_task():
            self._cancelled = cancel_if_deliverable(self.task)
            if not self._cancelled:
                asyncio.get_running_loop().call_soon(self._cancel_body)


H = TypeVar("H", bound=Hold)


class Lock(Generic[H]):
    """A lock as tasks use it. Tasks may share one object: each acquisition is a hold of its own."""

    def __init__(self, name: Any, timeout: float | None) -> None:
        self.name = name
        self.timeout = self._check_timeout(timeout)
        self._holds: list[H] = []

    def __str__(self) -> str:
        return repr(self.name)

    async def __aenter__(self) -> H:
        return await self._acquire(self.timeout, body=True)

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool | None:
        return await self._pop_hold().exit_body(error)

    async def acquire(self, timeout: float | Literal["default"] | None = "default") -> H:
        """Acquire the lock and return the hold; end it with its release(), or with the lock's.

        timeout  seconds to wait, in place of the lock's own: None waits for ever, 0 is one try

        Raises LockNotAcquired after the timeout.
        """
        return await self._acquire(self.timeout if timeout == "default" else self._check_timeout(timeout), body=False)

    async def try_acquire(self) -> H | None:
        """Try once, and return the hold, or None if the lock is not free."""
        try:
            return await self.acquire(0)
        except LockNotAcquired:
            return None

    async def release(self) -> bool:
        """Release what this task holds. Return False if it was no longer ours: the work may not have been alone."""
        return await self._pop_hold().release()

    async def _acquire(self, timeout: float | None, *, body: bool) -> H:
        """Acquire the lock in the rule's own way."""
        raise NotImplementedError

    def _check_timeout(self, timeout: float | None) -> float | None:
        return check_timeout(timeout)

    def _add_hold(self, hold: H) -> H:
        # A hold that was ended by its own release() would stay for ever; the end of a body still asks for its hold.
        self._holds = [*(other for other in self._holds if not other.settled), hold]
        return hold

    def _pop_hold(self) -> H:
        """Remove and return this task's newest hold; else the only one, for a fixture closed by another task."""
        mine = [hold for hold in self._holds if hold.task is asyncio.current_task()]
        if not mine and len(self._holds) != 1:
            raise RuntimeError(f"this task does not hold {self}: acquire it first, or release what acquire() gave")
        hold = (mine or self._holds)[-1]
        self._holds.remove(hold)
        return hold
