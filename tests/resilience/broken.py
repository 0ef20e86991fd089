"""What the planted bugs put in the place of the rules' own code."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from distsys.errors import BulkheadFull, CircuitOpen
from distsys.resilience import circuit_breaker, outcomes, retry
from distsys.resilience.bulkhead import Bulkhead, SharedCapacity, Tier
from distsys.resilience.circuit_breaker import CircuitBreaker, Closed, HalfOpen
from distsys.resilience.retry import Attempts, Retry
from distsys.resilience.windows import LastCalls

# ---- circuit breaker

_init, _admit, _for_async = CircuitBreaker.__init__, CircuitBreaker.admit, CircuitBreaker.for_async
_failed, _closed_failed, _open = CircuitBreaker.failed, Closed.failed, CircuitBreaker._open


def stampede(self: Any) -> Any:
    """Admit any number of probes."""
    self.half_open_max_calls = 10**9
    return _admit(self)


def late_success_closes(self: Any, fn: Any) -> Any:
    """Close an open breaker at any success."""
    guarded = _for_async(self, fn)

    async def call(*args: Any, **kwargs: Any) -> Any:
        result = await guarded(*args, **kwargs)
        if self.state == "open":
            self.reset()
        return result

    return call


def refusals_put_off(self: Any) -> Any:
    """Begin the recovery time again at each refusal."""
    try:
        return _admit(self)
    except CircuitOpen:
        self.period.until = self.clock() + self.recovery_timeout
        raise


def only_failures_judged(self: Any, ticket: Any, error: Exception) -> None:
    """Count every error as a failure."""
    ticket.failed(repr(error), None)


def refused_probes_succeed(self: Any, ticket: Any, error: Exception) -> None:
    """Count what is no failure as a success, refusals too."""
    if self.is_failure(error):
        _failed(self, ticket, error)
    else:
        ticket.succeeded()


def cancelled_fails(self: Any) -> None:
    """Count a cancelled call as a failure."""
    self.failed("cancelled")


def counts_in_any_state(self: Any, what: str, asked: float | None = None) -> None:
    """Count a failure in the state of its end."""
    period = self.breaker.period
    if period is self:
        _closed_failed(self, what, asked)
    else:
        period.failed(what, asked)


def wall_clock(self: Any, *args: Any, **options: Any) -> None:
    """Read the wall clock."""
    _init(self, *args, **{"clock": lambda: time.time(), **options})


def no_chance(self: Any, *args: Any, **options: Any) -> None:
    """Draw no jitter."""
    _init(self, *args, **{**options, "rng": lambda: 0.0})


def never_longer(self: Any, what: str, asked: float | None = None) -> None:
    """Forget how many probes have failed."""
    self._open(what, asked)


def no_retry_after(self: Any, reason: str, asked: float | None = None) -> None:
    """Ignore a Retry-After."""
    _open(self, reason)


def given_up_by_the_clock(self: Any) -> Any:
    """Give a half open period up by the clock alone."""
    if isinstance(self.period, HalfOpen) and self.period.until <= self.clock():
        self.period.running = self.half_open_max_calls
    return _admit(self)


def hangs_for_ever(self: Any) -> Any:
    """Never give a probe up."""
    if isinstance(self.period, HalfOpen):
        self.period.until = float("inf")
    return _admit(self)


def told_alone(listener: Callable[[Any], object], what: Any) -> None:
    """Let a listener's error pass."""
    listener(what)


def all_time(self: Any) -> Any:
    """Keep one bucket for ever."""
    if not self._buckets:
        self._buckets.append([0, 0, 0])
    return self._buckets[-1]


def oldest_entry(self: Any, *error: Any) -> None:
    """Settle whichever block was entered last."""
    *outer, last = circuit_breaker._open_blocks.get()
    circuit_breaker._open_blocks.set(tuple(outer))
    last[1].succeeded()


class InARow(LastCalls):
    """A counter of failures since the last success."""

    def counts(self) -> tuple[int, int]:
        row = len(list(takewhile(bool, reversed(self._failed))))
        return row, row


# ---- retry

_retry_init, _schedule, _reason = Retry.__init__, Retry._schedule_next_attempt, Retry._reason_not_to_retry
_retry_for_async, _attempts_init, _attempts_exit = Retry.for_async, Attempts.__init__, Attempts.__exit__


def without_jitter(self: Any, *args: Any, **options: Any) -> None:
    """Ignore the jitter that was asked for."""
    _retry_init(self, *args, **{**options, "jitter": "none"})


def retries_only(self: Any, *args: Any, **options: Any) -> None:
    """Leave the first attempt out of max_attempts."""
    _retry_init(self, *args, **options)
    self.max_attempts += 1


def no_deadline(self: Any, policy: Any, now: Any) -> None:
    """Forget the deadline."""
    _attempts_init(self, policy, now)
    self.deadline = math.inf


class Least(float):
    """A number that min() takes, whatever it is compared with."""

    def __gt__(self, other: object) -> bool:
        return False

    def __lt__(self, other: object) -> bool:
        return True


def any_retry_after(error: BaseException) -> float | None:
    """Return a Retry-After that can't be capped."""
    asked = outcomes.retry_after(error)
    return None if asked is None else Least(asked)


def ambiguous_too(self: Any, error: Exception) -> str:
    """Ignore idempotent=False."""
    self.idempotent = None
    return _reason(self, error)


def cancellation_too(self: Any, fn: Any) -> Any:
    """Repeat a cancelled call."""

    async def stubborn(*args: Any, **kwargs: Any) -> Any:
        try:
            return await fn(*args, **kwargs)
        except asyncio.CancelledError:
            return await fn(*args, **kwargs)

    return _retry_for_async(self, stubborn)


def error_of_its_own(self: Any, fn: Any) -> Any:
    """Raise another error than the last one."""
    guarded = _retry_for_async(self, fn)

    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await guarded(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("all attempts failed") from error

    return call


def holds_the_errors(self: Any, attempts: Any, error: Exception) -> Any:
    """Keep each exception."""
    attempts.errors = [*getattr(attempts, "errors", ()), error]
    return _schedule(self, attempts, error)


def sets_the_old(self: Any, *error: Any) -> bool:
    """Take the layer back in whatever context runs."""
    if self._inside is not None:
        retry._around.set(self._outside)
    return _attempts_exit(self, *error)


class Alone:
    """A context variable that remembers nothing."""

    def get(self) -> tuple[int, ...]:
        return ()

    def set(self, every: tuple[int, ...]) -> None: ...


def exactly_one(self: Any) -> bool:
    """Spend a retry only if exactly one is there."""
    with self._lock:
        self._refill()
        self.suppressed += self._saved < 1
        taken = self._saved >= 1
        self._saved -= taken
        return taken


def fixed_backoff(self: Any, attempts: Any) -> float:
    """Wait about as long each time."""
    return self.base_delay * self.rng()


def without_cap(self: Any, attempts: Any) -> float:
    """Double the wait for ever."""
    return self.base_delay * 2.0 ** (attempts.number - 1) * self.rng()


# ---- bulkhead

_bulkhead_init, _queue_up, _withdraw = Bulkhead.__init__, Bulkhead._queue_up, Bulkhead._withdraw
_borrow, _make_room = Bulkhead._borrow, SharedCapacity.make_room


def keeps_it_when_cancelled(self: Any, fn: Any) -> Any:
    """Give the permit back only after a success."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        if not self.try_enter():
            await self.wait()
        result = await fn(*args, **kwargs)
        self.leave()
        return result

    return call


def grant_lost(self: Any, waiter: Any, timed_out: bool = False) -> None:
    """Forget a permit that was granted to a cancelled waiter."""
    if not waiter.granted:
        _withdraw(self, waiter, timed_out)


def stays_in_the_queue(self: Any, waiter: Any, timed_out: bool = False) -> None:
    """Leave a cancelled waiter in the queue."""
    if waiter.granted and not timed_out:
        self.leave()


def passed_on_when_timed_out(self: Any, waiter: Any, timed_out: bool = False) -> None:
    """Pass a granted permit on at the timeout."""
    if waiter.granted and timed_out:
        waiter.granted = False
        self.leave()
    else:
        _withdraw(self, waiter, timed_out)


def last_come_first_served(self: Any, waiter: Any) -> None:
    """Put a waiter at the head of the queue."""
    _queue_up(self, waiter)
    if self.queue and self.queue[-1] is waiter:
        self.queue.rotate(1)


def granted_to_nobody(self: Any) -> None:
    """Leave the permit granted when the waiter's event loop is closed."""
    with self.lock:
        for lane in self.lanes:
            while lane.queue and lane.take():
                waiter = lane.next_waiter()
                lane._update_wait_estimate()
                waiter.granted = True
                if waiter.wake() is False:
                    lane.permits.append(None)


def sheds_nobody(self: Any, lane: Any) -> bool:
    """Refuse a higher tier when the queues are full."""
    return len(lane.queue) < lane.max_waiting and (self.max_waiting is None or self.waiting < self.max_waiting)


def sheds_the_newest(self: Any, lane: Any) -> bool:
    """Shed the waiter that came last."""
    for other in self.lanes:
        other.queue.reverse()
    try:
        return _make_room(self, lane)
    finally:
        for other in self.lanes:
            other.queue.reverse()


def nothing_lent(self: Any, anyway: bool = False) -> bool:
    """Lend no permit to another tier."""
    return anyway and _borrow(self, anyway)


def lowest_first(self: Any, lane: Any) -> None:
    """Serve the lowest tier first."""
    with self.lock:
        self.lanes.append(lane)
        self.lanes.sort(key=lambda lane: -list(Tier).index(lane.tier))


def repays_nothing(self: Any) -> None:
    """Keep what is borrowed when a permit comes back."""
    self.permits.append(None)
    if self._capacity.waiting:
        self._capacity.grant_waiters()


def since_the_process_began(self: Any) -> None:
    """Take the age of the process for the wait."""
    self._interval = self._capacity.clock()


def always(policy: Any) -> Callable[..., None]:
    """Ignore the policy that was asked for."""
    return lambda self, *args, **options: _bulkhead_init(self, *args, **{**options, "policy": policy})


def discards_what_the_call_raised(self: Any, fn: Any) -> Any:
    """Return None for a refusal of any bulkhead."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with self:
                return fn(*args, **kwargs)
        except BulkheadFull:
            return None

    return call


# ---- all together


def merged_without_a_ticket(self: Any, breaker: Any, gate: Any, stacked: Any) -> Any:
    """Ask for the ticket when the call is over."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        if not breaker.period.closed or not gate.try_enter():
            return await stacked(*args, **kwargs)
        try:
            result = await stacked.__wrapped__.__wrapped__(*args, **kwargs)
        except Exception as error:
            breaker.failed(breaker.period, error)
            raise
        finally:
            gate.leave()
        breaker.succeeded(breaker.period)
        return result

    return call
