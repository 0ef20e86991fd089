"""Bulkhead: so many calls at a time and so many waiting, that one slow dependency can't take all there is.

Promise  at most `max_concurrent` run and `max_waiting` wait, first come first served; a permit is never lost, whatever
         is cancelled when. Tiers that share a capacity keep their floors and share the rest.
Not      a limit over several processes; a timeout of the work: `timeout` bounds the wait for a permit; reentrant: who
         holds a permit and asks for another may wait for itself until the timeout.
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
from enum import Enum, StrEnum
from typing import Any, NamedTuple, TypeVar

from distsys._support.arguments import check_count, check_timeout
from distsys._support.clock import Clock
from distsys.errors import BulkheadFull
from distsys.resilience.layers import Function, decorate
from distsys.resilience.listeners import emit

T = TypeVar("T")
SHED = "a call of a higher tier took its place"


class Size(NamedTuple):
    """Of a tier, unless said otherwise."""

    max_concurrent: int
    max_waiting: int
    timeout: float  # seconds that a call waits for its permit


class Tier(Enum):
    """What the caller can do without: Optional first, Critical last."""

    CRITICAL = Size(5, 10, 300.0)
    STANDARD = Size(8, 12, 120.0)
    OPTIONAL = Size(4, 6, 60.0)


class OnFull(StrEnum):
    """What becomes of a call for which there is no permit."""

    ABORT = "abort"  # BulkheadFull at once; nothing ever waits
    QUEUE = "queue"  # it waits; BulkheadFull when the queue is full or the timeout is over
    CALLER_RUNS = "caller_runs"  # as QUEUE, but where that refuses the call runs, beyond max_concurrent
    DISCARD = "discard"  # as QUEUE, but where that refuses nothing is called and None is returned; a block still raises

    @classmethod
    def _missing_(cls, value: object) -> OnFull:
        raise ValueError(f"policy={value!r}: one of {', '.join(cls)}")


class _Waiter:
    """In a queue until it is granted or refused, both under the lock."""

    def __init__(self, wake: Callable[[], bool]) -> None:
        self.wake = wake  # False if its loop is gone, and with it the waiter
        self.granted, self.refused = False, ""  # why


class SharedCapacity:
    """One capacity for several tiers: `SharedCapacity(20, {Tier.CRITICAL: 8, Tier.STANDARD: 4, Tier.OPTIONAL: 1})`.

    A tier always gets its floor; what is left over goes to who asks first and, when somebody waits, to the higher tier.
    When `max_waiting` calls of all tiers together wait, a call of a higher tier takes the place of one of the lowest
    tier that waits: of the one that has waited longest.
    """

    def __init__(
        self,
        capacity: int,
        floors: Mapping[Tier, int],
        *,
        max_waiting: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.capacity = check_count("capacity", capacity, 1, "calls at a time")
        if not all(isinstance(tier, Tier) for tier in floors):
            raise TypeError(f"floors={floors!r}: the permits of each Tier that takes part")
        self.floors = {tier: check_count(f"floor of {tier.name}", floors[tier], 0, "calls") for tier in floors}
        if sum(self.floors.values()) > capacity:
            raise ValueError(f"floors={dict(floors)!r} add up to more than capacity={capacity!r}")
        self.max_waiting = None if max_waiting is None else check_count("max_waiting", max_waiting, 0, "calls")
        self.clock, self.lock = clock, threading.RLock()
        self.lanes: list[Bulkhead] = []  # the highest tier first
        self.spare = capacity - sum(self.floors.values())  # to borrow; below 0: owed by CALLER_RUNS
        self.waiting = 0

    def add(self, lane: Bulkhead) -> None:
        with self.lock:
            self.lanes.append(lane)
            self.lanes.sort(key=lambda each: list(Tier).index(each.tier))

    def hand_on(self) -> None:
        """Permits for those who wait."""
        with self.lock:
            for lane in self.lanes:
                while lane.queue and lane.take():
                    waiter = lane.next_waiter()
                    lane._time_the_queue()
                    waiter.granted = True
                    if not waiter.wake():  # should it still end, it has nothing to give back
                        waiter.granted, waiter.refused = False, "its event loop is closed"
                        lane.permits.append(None)
                        lane._pay_back()

    def make_room(self, lane: Bulkhead) -> bool:
        """Under the lock: whether one more of this lane may wait; it may take the place of a lower tier's."""
        if len(lane.queue) >= lane.max_waiting:
            return False
        if self.max_waiting is None or self.waiting < self.max_waiting:
            return True
        lowest = next((each for each in reversed(self.lanes) if each.queue), None)
        if lowest is None or self.lanes.index(lowest) <= self.lanes.index(lane):
            return False
        waiter = lowest.next_waiter()
        lowest.shed += 1
        waiter.refused = SHED
        waiter.wake()
        return True


class Bulkhead:
    """What `bulkhead(...)` returns: a decorator; `await policy.call(fn, ...)`; `async with policy:`; `with policy:`.

    tier      CRITICAL 5 running, 10 waiting, for at most 300 s; STANDARD 8, 12, 120 s; OPTIONAL 4, 6, 60 s
    policy    what becomes of a call for which there is no permit: see OnFull
    capacity  shared with other tiers, and then with its clock; max_concurrent then bounds what is borrowed too
    clock     by which expected_wait is reckoned
    """

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
        size = tier.value
        least = size.max_concurrent if capacity is None else capacity.capacity
        self.tier, self.name, self.policy = tier, name, OnFull(policy)
        self.max_concurrent = check_count(
            "max_concurrent", least if max_concurrent is None else max_concurrent, 1, "calls"
        )
        self.max_waiting = check_count(
            "max_waiting", size.max_waiting if max_waiting is None else max_waiting, 0, "calls"
        )
        self.timeout = check_timeout(size.timeout if timeout is None else timeout)
        self.rejected = self.shed = 0
        self.queue: deque[_Waiter] = deque()
        if capacity is None:
            capacity = SharedCapacity(self.max_concurrent, {tier: self.max_concurrent}, clock=clock)
        elif tier not in capacity.floors:
            raise ValueError(f"tier={tier!r} has no floor in this capacity; it has {list(capacity.floors)}")
        elif any(each.tier is tier for each in capacity.lanes):
            raise ValueError(f"tier={tier!r} of this capacity has a bulkhead: use that one for all its calls")
        elif self.max_concurrent < capacity.floors[tier]:
            raise ValueError(f"max_concurrent={max_concurrent!r} is below the floor, {capacity.floors[tier]!r}")
        self._capacity, self._lock, self._floor = capacity, capacity.lock, capacity.floors[tier]
        self.permits = deque([None] * self._floor)  # its own, that are free; pop() and append() need no lock
        self._borrowed = 0  # what runs beyond its own; CALLER_RUNS also beyond max_concurrent
        self._interval, self._handed_on = 0.0, 0.0  # seconds between permits handed on while calls waited
        capacity.add(self)

    @property
    def running(self) -> int:
        return self._floor - len(self.permits) + self._borrowed

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self.queue)

    @property
    def utilisation(self) -> float:
        """The share of max_concurrent that runs; above 1 with CALLER_RUNS."""
        return self.running / self.max_concurrent

    # ---- permits

    def try_enter(self) -> bool:
        """Takes a permit if there is one and nobody waits for it."""
        return not self.queue and self.take()

    def take(self) -> bool:
        try:
            self.permits.pop()
        except IndexError:
            return self._borrow()
        return True

    def leave(self) -> None:
        """Gives the permit back, to the next who waits."""
        self.permits.append(None)
        if self._borrowed:
            self._pay_back()
        if self._capacity.waiting:  # looked at after the permit is back, as who queues up looks for it afterwards
            self._capacity.hand_on()

    def _borrow(self, anyway: bool = False) -> bool:
        """A permit beyond its own: one that no floor needs, or `anyway`."""
        with self._lock:
            if not anyway and (self._capacity.spare < 1 or self.running >= self.max_concurrent):
                return False
            self._borrowed += 1
            self._capacity.spare -= 1
            self._pay_back()  # one of its own may have come back since it was looked for
            return True

    def _pay_back(self) -> None:
        """What runs beyond its own permits is given back first: nothing is borrowed while one of them is free."""
        with self._lock, suppress(IndexError):
            while self._borrowed:
                self.permits.pop()
                self._borrowed -= 1
                self._capacity.spare += 1

    async def wait(self, discard: bool = False) -> bool:
        """For a permit, after try_enter() had none. BulkheadFull if it gets none; with `discard`, False."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> bool:
            if asyncio._get_running_loop() is loop:
                _done(woken)
                return True
            try:
                loop.call_soon_threadsafe(_done, woken)
            except RuntimeError:
                return False
            return True

        with self._in_queue(waiter := _Waiter(wake)):
            if not woken.done():
                async with asyncio.timeout(self.timeout):
                    await woken
        return self._may_run(waiter, discard)

    def wait_sync(self, discard: bool = False) -> bool:
        """The same, for threads."""
        woken = threading.Event()

        def wake() -> bool:
            woken.set()
            return True

        with self._in_queue(waiter := _Waiter(wake)):
            if not woken.wait(None if self.timeout is None else min(self.timeout, threading.TIMEOUT_MAX)):
                raise TimeoutError
        return self._may_run(waiter, discard)

    @contextmanager
    def _in_queue(self, waiter: _Waiter) -> Iterator[None]:
        """Until it is woken, times out or is cancelled. Who need not or may not wait is woken at once."""
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
                    self._handed_on = self._capacity.clock()
                self.queue.append(waiter)
                self._capacity.waiting += 1
                self._capacity.hand_on()  # a permit that came back meanwhile saw nobody waiting
                return
        waiter.wake()

    def next_waiter(self) -> _Waiter:
        """Under the lock: out of the queue."""
        self._capacity.waiting -= 1
        return self.queue.popleft()

    def _withdraw(self, waiter: _Waiter, timed_out: bool = False) -> None:
        """Out of the queue; or, if the permit came at the same moment, keeps it on a timeout, else passes it on."""
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

    def _time_the_queue(self) -> None:
        now = self._capacity.clock()
        passed, self._handed_on = now - self._handed_on, now
        self._interval = passed if not self._interval else 0.8 * self._interval + 0.2 * passed

    # ---- around functions and blocks

    def __call__(self, fn: Function) -> Function:
        return decorate("bulkhead", self, fn)

    async def call(self, fn: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> T:
        return await self.for_async(fn)(*args, **kwargs)

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
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
        if not self.try_enter():
            self.wait_sync()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def __aenter__(self) -> Bulkhead:
        if not self.try_enter():
            await self.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


bulkhead = Bulkhead
