"""Base classes of every lock: the hold of one holder, and the lock as a context manager."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, Literal, TypeVar

from distsys._support.arguments import check_timeout
from distsys._support.cancellation import try_cancel
from distsys.errors import LockLost, LockNotAcquired

EXAMPLE = "'payment:order-123'"  # of a lock's name, for errors
RELEASED, UNRELEASED = "was released", "could not be released"


class Held:
    """One hold of a lock, by the running task; the loss of one with a `body` of `async with` cancels the task."""

    def __init__(self, *, body: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task, self._body, self._cancelling = task, body, task.cancelling()
        self._cancelled = self._left = False
        self._ended = ""  # why; "" while held
        self._cause: BaseException | None = None  # of its loss

    @property
    def over(self) -> bool:
        """Whether nobody asks for it any more: it was released, and there is no body whose end will."""
        return self._ended == RELEASED and not self._body

    async def release(self) -> bool:
        raise NotImplementedError

    async def leave(self, error: BaseException | None) -> bool:
        """The end of the body, whose own error is never masked: a loss beside it becomes a note."""
        self._left = True
        ours = self._cancelled and self.task.uncancel() <= self._cancelling  # a cancellation from outside stays
        own = None if ours and isinstance(error, asyncio.CancelledError) else error
        handled, loss = await self._let_go(error)
        if loss is not None and own is None:
            raise loss from self._cause
        if loss is not None and own is not None and not (isinstance(own, LockLost) and own.facts == loss.facts):
            own.add_note(str(loss))
        return handled

    async def _let_go(self, error: BaseException | None) -> tuple[bool, LockLost | None]:
        """Gives the lock back; whether that settles the body's `error`, and the loss, if it was lost before."""
        raise NotImplementedError

    def _cancel(self) -> None:
        """Cancels the body once; not when it has ended, nor when it found out by itself."""
        ended = not self._body or self._left or self.task.done()
        if not self._cancelled and not ended and self.task is not asyncio.current_task():
            self._cancelled = try_cancel(self.task)
            if not self._cancelled:
                asyncio.get_running_loop().call_soon(self._cancel)


H = TypeVar("H", bound=Held)


class Lock(Generic[H]):
    """What tasks do with any lock. They may share the object: each acquisition is a hold of its own."""

    def __init__(self, name: Any, timeout: float | None) -> None:
        self.name, self.timeout = name, self._checked(timeout)
        self._held: list[H] = []

    def __str__(self) -> str:
        return repr(self.name)

    async def __aenter__(self) -> H:
        return await self._acquire(self.timeout, body=True)

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool | None:
        return await self._take().leave(error)

    async def acquire(self, timeout: float | Literal["default"] | None = "default") -> H:
        """Waits for the lock, for `timeout` seconds if given (None: for ever, 0: one try) in place of its own.

        End it with release(), of what this returns or of the lock.
        """
        return await self._acquire(self.timeout if timeout == "default" else self._checked(timeout), body=False)

    async def try_acquire(self) -> H | None:
        """One try: the hold, or None when it is not to be had at once."""
        try:
            return await self.acquire(0)
        except LockNotAcquired:
            return None

    async def release(self) -> bool:
        """Releases what this task holds. False: it was no longer ours, so the work may not have been alone."""
        return await self._take().release()

    async def _acquire(self, timeout: float | None, *, body: bool) -> H:
        """The rule's own way to a hold."""
        raise NotImplementedError

    def _checked(self, timeout: float | None) -> float | None:
        return check_timeout(timeout)

    def _keep(self, hold: H) -> H:
        # What was ended by its own release() would stay for ever; a body's end still asks for its hold.
        self._held = [*(held for held in self._held if not held.over), hold]
        return hold

    def _take(self) -> H:
        """The newest hold of this task; else the only one, for a fixture or exit stack closed by another task."""
        mine = [hold for hold in self._held if hold.task is asyncio.current_task()]
        if not mine and len(self._held) != 1:
            raise RuntimeError(f"this task does not hold {self}: acquire it first, or release what acquire() gave")
        hold = (mine or self._held)[-1]
        self._held.remove(hold)
        return hold
