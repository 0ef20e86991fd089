"""Bulkhead: so many calls at a time and so many waiting, so that one slow dependency can't take every resource.

Promise  at most `max_concurrent` calls run and `max_waiting` wait, first come, first served; a permit is never lost,
         whatever is cancelled when. Tiers that share a capacity keep their floors and share the rest.
Not      a limit over several processes; a timeout of the work: `timeout` bounds the wait for a permit; reentrant: a
         call that holds a permit and asks for another may wait for itself until the timeout.
Units    calls; seconds.
Errors   BulkheadFull, with depth, expected_wait and retry_after; the call's own errors pass.
Source   Nygard, Release It!, 5.3; java.util.concurrent.ThreadPoolExecutor (rejection policies).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from enum import Enum, StrEnum
from typing import Any, TypeVar

from distsys._support.arguments import check_count, check_timeout
from distsys._support.clock import Clock
from distsys.errors import BulkheadFull
from distsys.resilience.layers import Policy
from distsys.resilience.listeners import emit

T = TypeVar("T")
SHED = "a call of a higher tier took its place"


class Tier(Enum):
    """How badly the caller needs the call: under load Optional is refused first, Critical last.

    The values are defaults: max_concurrent, max_waiting, and timeout, the seconds that a call waits for its permit.
    """

    CRITICAL = 5, 10, 300.0
    STANDARD = 8, 12, 120.0
    OPTIONAL = 4, 6, 60.0


class OnFull(StrEnum):
    """What happens to a call for which no permit is free."""

    ABORT = "abort"  # BulkheadFull at once; nothing ever waits
    QUEUE = "queue"  # it waits; BulkheadFull when the queue is full or the timeout is over
    CALLER_RUNS = "caller_runs"  # like QUEUE, but where that refuses, the call runs beyond max_concurrent
    DISCARD = "discard"  # like QUEUE, but where that refuses, None is returned without a call; a block still raises

    @classmethod
    def _missing_(cls, value: object) -> OnFull:
        raise ValueError(f"policy={value!r}: one of {', '.join(cls)}")


@dataclass(eq=False)
class _Waiter:
    """A call in a queue, until it is granted or refused; both happen under the lock."""

    wake: Callable[[], bool | None]  # False if its event loop is closed, and the waiter gone with it
    granted: bool = False
    refused: str = ""  # the reason


@dataclass(eq=False, repr=False)
class SharedCapacity:
    """One capacity for several tiers: `SharedCapacity(20, {Tier.CRITICAL: 8, Tier.STANDARD: 4, Tier.OPTIONAL: 1})`.

    A tier always gets its floor. What is left over goes to the first tier that asks and, when calls wait, to the
    highest tier that waits. When `max_waiting` calls of all tiers together wait, a call of a higher tier takes the
    place of one of the lowest tier that waits: the one that has waited longest.
    """

    capacity: int
    floors: Mapping[Tier, int]
    _: KW_ONLY
    max_waiting: int | None = None
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        check_count("capacity", self.capacity, 1, "calls at a time")
        if not all(isinstance(tier, Tier) for tier in self.floors):
            raise TypeError(f"floors={self.floors!r}: the permits of each Tier that takes part")
        self.floors = {tier: check_count(f"floor of {tier.name}", n, 0, "calls") for tier, n in self.floors.items()}
        if sum(self.floors.values()) > self.capacity:
            raise ValueError(f"floors={self.floors!r} add up to more than capacity={self.capacity!r}")
        if self.max_waiting is not None:
            check_count("max_waiting", self.max_waiting, 0, "calls")
        self.lock = threading.RLock()
        self.lanes: list[Bulkhead] = []  # the highest tier first
        self.waiting = 0  # in all queues; kept, not counted, for each release of a permit asks for it

    @property
    def spare(self) -> int:
        """The permits that a tier may still borrow; below 0 when CALLER_RUNS has taken more than there are."""
        return self.capacity - sum(self.floors.values()) - sum(lane.borrowed for lane in self.lanes)

    def add(self, lane: Bulkhead) -> None:
        """Let the bulkhead of a tier take part."""
        with self.lock:
            self.lanes.append(lane)
            self.lanes.sort(key=lambda lane: list(Tier).index(lane.tier))

    def grant_waiters(self) -> None:
        """Give the free permits to the calls that wait, the highest tier first."""
        with self.lock:
            for lane in self.lanes:
                while lane.queue and lane.take():
                    waiter = lane.next_waiter()
                    lane._update_wait_estimate()
                    waiter.granted = True
                    if waiter.wake() is False:  # should it still end, it has nothing to give back
                        waiter.granted, waiter.refused = False, "its event loop is closed"
                        lane.permits.append(None)
                        lane._repay()

    def make_room(self, lane: Bulkhead) -> bool:
        """Return whether one more call of this lane may wait; it may replace a lower tier's. Under the lock."""
        if len(lane.queue) >= lane.max_waiting:
            return False
        if self.max_waiting is None or self.waiting < self.max_waiting:
            return True
        lowest = next((other for other in reversed(self.lanes) if other.queue), None)
        if lowest is None or self.lanes.index(lowest) <= self.lanes.index(lane):
            return False
        waiter = lowest.next_waiter()
        lowest.shed += 1
        waiter.refused = SHED
        waiter.wake()
        return True


class Bulkhead(Policy):
    """What `bulkhead(...)` returns: a decorator; `await policy.call(fn, ...)`; `async with policy:`; `with policy:`.

    tier      CRITICAL 5 running, 10 waiting, for at most 300 s; STANDARD 8, 12, 120 s; OPTIONAL 4, 6, 60 s
    policy    what happens to a call for which no permit is free: see OnFull
    capacity  shared with other tiers, and then with its clock; max_concurrent then bounds what is borrowed too
    clock     by which expected_wait is estimated
    """

    rule = "bulkhead"

    def __init__(
        self,
        tier: Tier = Tier.STANDARD,
        *,
        max_concurrent: int | None = None,
        max_waiting: int | None = None,
        timeout: float | None = None,
        policy: OnFull | str = OnFull.QUEUE,
        name: str = "",
        capacity: SharedCapacity | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if not isinstance(tier, Tier):
            raise TypeError(f"tier={tier!r}: Tier.CRITICAL, Tier.STANDARD or Tier.OPTIONAL")
        if not isinstance(capacity, SharedCapacity | None):
            raise TypeError(f"capacity={capacity!r} is a {type(capacity).__name__}; give a SharedCapacity")
        concurrent, waiting, patience = tier.value
        concurrent = concurrent if capacity is None else capacity.capacity
        concurrent = concurrent if max_concurrent is None else max_concurrent
        self.tier, self.name, self.policy = tier, name, OnFull(policy)
        self.max_concurrent = check_count("max_concurrent", concurrent, 1, "calls")
        self.max_waiting = check_count("max_waiting", waiting if max_waiting is None else max_waiting, 0, "calls")
        self.timeout = check_timeout(patience if timeout is None else timeout)
        self.rejected = self.shed = 0
        self.queue: deque[_Waiter] = deque()
        if capacity is None:
            capacity = SharedCapacity(self.max_concurrent, {tier: self.max_concurrent}, clock=clock)
        elif tier not in capacity.floors:
            raise ValueError(f"tier={tier!r} has no floor in this capacity; it has {list(capacity.floors)}")
        elif any(lane.tier is tier for lane in capacity.lanes):
            raise ValueError(f"tier={tier!r} of this capacity has a bulkhead: use that one for all its calls")
        elif self.max_concurrent < capacity.floors[tier]:
            raise ValueError(f"max_concurrent={max_concurrent!r} is below the floor, {capacity.floors[tier]!r}")
        self._capacity, self._lock, self._floor = capacity, capacity.lock, capacity.floors[tier]
        self.permits = deque([None] * self._floor)  # the free ones of its floor; pop() and append() need no lock
        self.borrowed = 0  # calls that run beyond its floor; with CALLER_RUNS also beyond max_concurrent
        self._interval = self._last_grant = 0.0  # seconds between grants while calls waited, a moving average
        capacity.add(self)

    @property
    def running(self) -> int:
        """How many calls run."""
        return self._floor - len(self.permits) + self.borrowed

    @property
    def depth(self) -> int:
        """How many calls wait."""
        return len(self.queue)

    @property
    def utilisation(self) -> float:
        """The share of max_concurrent that runs; above 1 with CALLER_RUNS."""
        return self.running / self.max_concurrent

    # ---- permits

    def try_enter(self) -> bool:
        """Take a permit if one is free and no call waits for it; return whether it did."""
        if self.queue:
            return False
        try:
            self.permits.pop()
        except IndexError:
            return self._borrow()
        return True

    def take(self) -> bool:
        """Take a permit if one is free, whoever waits; return whether it did."""
        with suppress(IndexError):
            self.permits.pop()
            return True
        return self._borrow()

    def leave(self) -> None:
        """Give a permit back, to the next call that waits."""
        self.permits.append(None)
        if self.borrowed:
            self._repay()
        if self._capacity.waiting:  # read after the permit is back: a call that queues up looks for permits afterwards
            self._capacity.grant_waiters()

    def _borrow(self, anyway: bool = False) -> bool:
        """Take a permit beyond the floor: one that no other floor needs, or `anyway`."""
        with self._lock:
            if not anyway and (self._capacity.spare < 1 or self.running >= self.max_concurrent):
                return False
            self.borrowed += 1
            self._repay()  # a permit of the floor may have come back since it was looked for
            return True

    def _repay(self) -> None:
        """Give borrowed permits back first: nothing is borrowed while a permit of the floor is free."""
        with self._lock, suppress(IndexError):
            while self.borrowed:
                self.permits.pop()
                self.borrowed -= 1

    async def wait(self, discard: bool = False) -> bool:
        """Wait for a permit, after try_enter() had none. Without one raises BulkheadFull; with `discard`, False."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> bool:
            try:
                _done(woken) if asyncio._get_running_loop() is loop else loop.call_soon_threadsafe(_done, woken)
            except RuntimeError:
                return False
            return True

        with self._in_queue(waiter := _Waiter(wake)):
            if not woken.done():
                async with asyncio.timeout(self.timeout):
                    await woken
        return self._may_run(waiter, discard)

    def wait_sync(self, discard: bool = False) -> bool:
        """Like `wait`, for threads: the calling thread blocks."""
        woken = threading.Event()
        with self._in_queue(waiter := _Waiter(woken.set)):
            if not woken.wait(None if self.timeout is None else min(self.timeout, threading.TIMEOUT_MAX)):
                raise TimeoutError
        return self._may_run(waiter, discard)

    @contextmanager
    def _in_queue(self, waiter: _Waiter) -> Iterator[None]:
        """Queue the waiter until it is woken, times out or is cancelled. One that need not or may not wait is woken."""
        self._queue_up(waiter)
        try:
            yield
        except TimeoutError:
            self._withdraw(waiter, timed_out=True)
        except BaseException:
            self._withdraw(waiter)
            raise

    def _queue_up(self, waiter: _Waiter) -> None:
        with self._lock:
            if self.try_enter():  # a permit came back meanwhile
                waiter.granted = True
            elif self.policy is OnFull.ABORT:
                waiter.refused = "no permit is free"
            elif not self._capacity.make_room(self):
                waiter.refused = "the queue is full"
            else:
                if not self.queue:
                    self._last_grant = self._capacity.clock()
                self.queue.append(waiter)
                self._capacity.waiting += 1
                self._capacity.grant_waiters()  # whoever gave a permit back meanwhile saw no waiter
                return
        waiter.wake()

    def next_waiter(self) -> _Waiter:
        """Take the first waiter out of the queue. Under the lock."""
        self._capacity.waiting -= 1
        return self.queue.popleft()

    def _withdraw(self, waiter: _Waiter, timed_out: bool = False) -> None:
        """Leave the queue. A permit that came at that moment is kept on a timeout, and passed on on a cancellation."""
        with self._lock:
            if waiter.granted:
                if not timed_out:
                    self.leave()
            elif not waiter.refused:
                self.queue.remove(waiter)
                self._capacity.waiting -= 1
                waiter.refused = f"no permit came free within {self.timeout:g} s"

    def _may_run(self, waiter: _Waiter, discard: bool) -> bool:
        if waiter.granted:
            return True
        if self.policy is OnFull.CALLER_RUNS:
            return self._borrow(anyway=True)
        with self._lock:
            self.rejected += 1
            depth, running, why = self.depth, self.running, waiter.refused
        wait, kind = (depth + 1) * self._interval, "shed" if why is SHED else "rejected"
        emit("bulkhead", self.name, kind, tier=self.tier.name, depth=depth, running=running, reason=why)
        if discard:
            return False
        text = f"{self.name or self.tier.name.lower()}: {why} ({running} running, {depth} waiting)"
        raise BulkheadFull(text, name=self.name, depth=depth, expected_wait=wait, retry_after=wait or 1.0)

    def _update_wait_estimate(self) -> None:
        now = self._capacity.clock()
        passed, self._last_grant = now - self._last_grant, now
        self._interval = passed if not self._interval else 0.8 * self._interval + 0.2 * passed

    # ---- around functions and blocks

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """Return the async function `fn`, guarded."""
        discard = self.policy is OnFull.DISCARD

        async def call(*args: Any, **kwargs: Any) -> Any:
            if not self.try_enter() and not await self.wait(discard):
                return None
            try:
                return await fn(*args, **kwargs)
            finally:
                self.leave()

        return call

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function `fn`, guarded."""
        discard = self.policy is OnFull.DISCARD

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.try_enter() and not self.wait_sync(discard):
                return None
            try:
                return fn(*args, **kwargs)
            finally:
                self.leave()

        return call

    def __enter__(self) -> Bulkhead:
        """Take a permit, or block the thread until there is one. Raises BulkheadFull."""
        if not self.try_enter():
            self.wait_sync()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the permit back."""
        self.leave()

    async def __aenter__(self) -> Bulkhead:
        """Take a permit, or wait for one. Raises BulkheadFull."""
        if not self.try_enter():
            await self.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give the permit back."""
        self.leave()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


bulkhead = Bulkhead
