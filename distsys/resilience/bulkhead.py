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
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum, StrEnum
from typing import Any, NamedTuple, TypeVar

from distsys.clock import Clock, check_timeout
from distsys.errors import BulkheadFull
from distsys.resilience.layers import Function, check_count, decorate, name_of
from distsys.resilience.listeners import emit

T = TypeVar("T")


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


class _Waiter:
    """In a queue until it is granted or shed, both under the lock."""

    def __init__(self, wake: Callable[[], bool]) -> None:
        self.wake, self.granted, self.shed = wake, False, False


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
        self.out = dict.fromkeys(self.floors, 0)  # permits per tier; a floor is kept free before its bulkhead is made
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
                    waiter = lane.queue.popleft()
                    self.waiting -= 1
                    lane._time_the_queue()
                    waiter.granted = True
                    if not waiter.wake():  # its loop is closed; should it still end, it has nothing to give back
                        waiter.granted, waiter.shed = False, True
                        lane.permits.append(None)

    def make_room(self, lane: Bulkhead) -> bool:
        """Under the lock: whether one more of this lane may wait; it may take the place of a lower tier's."""
        if len(lane.queue) >= lane.max_waiting:
            return False
        if self.max_waiting is None or self.waiting < self.max_waiting:
            return True
        lowest = next((each for each in reversed(self.lanes) if each.queue), None)
        if lowest is None or self.lanes.index(lowest) <= self.lanes.index(lane):
            return False
        waiter = lowest.queue.popleft()
        self.waiting -= 1
        lowest.shed += 1
        waiter.shed = True
        waiter.wake()
        return True


class _Lent:
    """The permits of one tier of a shared capacity, as a deque of a bulkhead's own permits behaves."""

    def __init__(self, capacity: SharedCapacity, tier: Tier, most: int) -> None:
        self.capacity, self.tier, self.most = capacity, tier, most

    def pop(self) -> None:
        capacity, tier = self.capacity, self.tier
        with capacity.lock:
            own, floors = capacity.out[tier], capacity.floors
            taken = sum(max(out, floors[each]) for each, out in capacity.out.items())
            if own >= floors[tier] and (own >= self.most or taken >= capacity.capacity):
                raise IndexError
            capacity.out[tier] += 1

    def append(self, permit: None) -> None:
        with self.capacity.lock:
            self.capacity.out[self.tier] -= 1

    def __len__(self) -> int:
        return self.most - self.capacity.out[self.tier]


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
        self.tier, self.name, self.policy = tier, name, _policy(policy)
        self.max_concurrent = check_count(
            "max_concurrent", least if max_concurrent is None else max_concurrent, 1, "calls"
        )
        self.max_waiting = check_count(
            "max_waiting", size.max_waiting if max_waiting is None else max_waiting, 0, "calls"
        )
        self.timeout = check_timeout(size.timeout if timeout is None else timeout)
        self.rejected = self.shed = 0
        self.queue: deque[_Waiter] = deque()
        self.permits: deque[None] | _Lent = deque([None] * self.max_concurrent)  # pop() and append() need no lock
        self._overdrawn = 0  # calls that run beyond max_concurrent
        if capacity is None:
            capacity = SharedCapacity(self.max_concurrent, {tier: self.max_concurrent}, clock=clock)
        else:
            if tier not in capacity.floors:
                raise ValueError(f"tier={tier!r} has no floor in this capacity; it has {list(capacity.floors)}")
            if any(each.tier is tier for each in capacity.lanes):
                raise ValueError(f"tier={tier!r} of this capacity has a bulkhead: use that one for all its calls")
            if self.max_concurrent < capacity.floors[tier]:
                raise ValueError(f"max_concurrent={max_concurrent!r} is below the floor, {capacity.floors[tier]!r}")
            self.permits = _Lent(capacity, tier, self.max_concurrent)
        self._capacity, self._lock = capacity, capacity.lock
        self._interval, self._handed_on = 0.0, 0.0  # seconds between permits handed on while calls waited
        capacity.add(self)

    @property
    def running(self) -> int:
        return self.max_concurrent - len(self.permits) + self._overdrawn

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
            return False
        return True

    def leave(self) -> None:
        """Gives the permit back, to the next who waits."""
        if self._overdrawn:
            with self._lock:
                if self._overdrawn:
                    self._overdrawn -= 1
                    return
        self.permits.append(None)
        if self._capacity.waiting:  # looked at after the permit is back, as who queues up looks for it afterwards
            self._capacity.hand_on()

    async def wait(self) -> None:
        """For a permit, after try_enter() had none."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> bool:
            """False if its loop is gone, and with it the waiter."""
            if asyncio._get_running_loop() is loop:
                _done(woken)
                return True
            try:
                loop.call_soon_threadsafe(_done, woken)
            except RuntimeError:
                return False
            return True

        if (waiter := self._queue_up(wake)) is None:
            return
        try:
            async with asyncio.timeout(self.timeout):
                await woken
        except TimeoutError:
            self._withdraw(waiter, timed_out=True)
        except BaseException:
            self._withdraw(waiter)
            raise
        self._look(waiter)

    def wait_sync(self) -> None:
        """The same, for threads."""
        woken = threading.Event()

        def wake() -> bool:
            woken.set()
            return True

        if (waiter := self._queue_up(wake)) is None:
            return
        try:
            if not woken.wait(None if self.timeout is None else min(self.timeout, threading.TIMEOUT_MAX)):
                self._withdraw(waiter, timed_out=True)
        except BaseException:
            self._withdraw(waiter)
            raise
        self._look(waiter)

    def _queue_up(self, wake: Callable[[], bool]) -> _Waiter | None:
        """None: it may run at once after all."""
        with self._lock:
            if self.try_enter():
                return None
            if self.policy is not OnFull.ABORT and self._capacity.make_room(self):
                if not self.queue:
                    self._handed_on = self._capacity.clock()
                self.queue.append(waiter := _Waiter(wake))
                self._capacity.waiting += 1
                self._capacity.hand_on()  # a permit that came back meanwhile saw nobody waiting
                return waiter
            if self.policy is OnFull.CALLER_RUNS:
                self._overdrawn += 1
                return None
        raise self._refusal("no permit is free" if self.policy is OnFull.ABORT else "the queue is full")

    def _withdraw(self, waiter: _Waiter, timed_out: bool = False) -> None:
        """Out of the queue; or, if the permit came at the same moment, keeps it on a timeout, else passes it on."""
        with self._lock:
            if waiter.granted:
                if not timed_out:
                    self.leave()
            elif not waiter.shed:
                self.queue.remove(waiter)
                self._capacity.waiting -= 1

    def _look(self, waiter: _Waiter) -> None:
        if waiter.granted:
            return
        if self.policy is OnFull.CALLER_RUNS:
            with self._lock:
                self._overdrawn += 1
            return
        if waiter.shed:
            raise self._refusal("a call of a higher tier took its place", "shed")
        raise self._refusal(f"no permit came free within {self.timeout:g} s")

    def _time_the_queue(self) -> None:
        now = self._capacity.clock()
        passed, self._handed_on = now - self._handed_on, now
        self._interval = passed if not self._interval else 0.8 * self._interval + 0.2 * passed

    def _refusal(self, why: str, kind: str = "rejected") -> BulkheadFull:
        with self._lock:
            self.rejected += 1
            depth = self.depth
        wait = (depth + 1) * self._interval
        emit("bulkhead", self.name, kind, tier=self.tier.name, depth=depth, running=self.running, reason=why)
        text = f"{self.name or self.tier.name.lower()}: {why} ({self.running} running, {depth} waiting)"
        return BulkheadFull(text, name=self.name, depth=depth, expected_wait=wait, retry_after=wait or 1.0)

    # ---- around functions and blocks

    def __call__(self, fn: Function) -> Function:
        self.name = self.name or name_of(fn)
        return decorate("bulkhead", fn, self.for_async, self.for_sync)

    async def call(self, fn: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> T:
        result: T = await self.for_async(fn)(*args, **kwargs)
        return result

    def for_async(self, fn: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if not self.try_enter():
                try:
                    await self.wait()
                except BulkheadFull:
                    if self.policy is OnFull.DISCARD:
                        return None
                    raise
            try:
                return await fn(*args, **kwargs)
            finally:
                self.leave()

        return call

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.try_enter():
                try:
                    self.wait_sync()
                except BulkheadFull:
                    if self.policy is OnFull.DISCARD:
                        return None
                    raise
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


def _policy(policy: OnFull | str) -> OnFull:
    try:
        return OnFull(policy)
    except ValueError:
        raise ValueError(f"policy={policy!r}: one of {', '.join(OnFull)}") from None


bulkhead = Bulkhead
