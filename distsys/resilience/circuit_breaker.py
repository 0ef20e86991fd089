"""Circuit breaker: when a dependency fails too often, leave it alone for a while, then ask it carefully.

Promise  open, no call reaches the dependency; half open, at most `half_open_max_calls` at a time, however many come at
         once; an outcome counts only in the state that admitted the call. A cancelled call counts as neither.
Not      a timeout: a call that hangs, hangs (put one inside, see composed.py); not shared between processes: each finds
         out by itself, which is what one wants, for a partition may be between one of them and the dependency.
Units    seconds.
Errors   CircuitOpen, with retry_after; the call's own errors pass.
Source   Nygard, Release It!, 5.2; resilience4j (count and time windows, rates, slow calls).
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar

from distsys._support.arguments import YEAR, check_count, check_number
from distsys._support.clock import Clock
from distsys.errors import CircuitOpen, Rejected
from distsys.resilience.layers import Function, decorate
from distsys.resilience.listeners import emit, tell
from distsys.resilience.outcomes import FATAL, classify, retry_after
from distsys.resilience.windows import TimeWindow as TimeWindow
from distsys.resilience.windows import Window, window_of

T = TypeVar("T")
State = Literal["closed", "open", "half_open", "isolated"]
PROBE = 10.0  # seconds that a probe is waited for, at least: one that hangs must not keep its place for ever


class Snapshot(NamedTuple):
    """Of the window, when the state changed."""

    calls: int
    failures: int

    @property
    def failure_rate(self) -> float:
        return self.failures / self.calls if self.calls else 0.0


class Change(NamedTuple):
    """The last change of state, and why."""

    old: State
    new: State
    reason: str
    snapshot: Snapshot
    at: float  # seconds of the breaker's clock


def dependency_failed(error: Exception) -> bool:
    """What counts against the dependency: all but what the caller did wrong, and refusals of other rules of ours."""
    return not isinstance(error, Rejected) and classify(error) is not FATAL


class Probes:
    """A half open period: `running` calls at a time, `succeeded` so far."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.breaker, self.until = breaker, 0.0  # when probes that keep all places are given up
        self.running = self.succeeded = 0

    def success(self) -> None:
        self.breaker._probe_succeeded(self)


class Ignored:
    """The period of a call whose outcome does not matter."""

    def success(self) -> None: ...


Ticket = Window | Probes | Ignored
"""The period in which a call was admitted: each change of state begins a new one, and outcomes of old ones are lost."""


class CircuitBreaker:
    """What `circuit_breaker(...)` returns: a decorator; `await policy.call(fn, ...)`; `async with policy:`, or `with`.

    failure_threshold    failed calls in the window that open it
    recovery_timeout     seconds it stays open at first; each failed probe doubles them, a Retry-After counts if it is
                         longer, both up to max_recovery_timeout (8 times the first), and up to a tenth more is added by
                         chance, so that processes do not come back together
    window               the last so many calls; TimeWindow(60): those of a minute; None: failures in a row, so as
                         many calls as failure_threshold
    failure_rate         instead of failure_threshold: the share of calls in the window, from minimum_calls on
    minimum_calls        calls in the window before failure_rate means anything; the window's own length, or 10
    slow_call_threshold  seconds from which a call counts as failed although it returned
    half_open_max_calls  probes at a time; success_threshold of them have to succeed, one failure opens again
    is_failure           which errors count; dependency_failed without. Others count as success, for the dependency has
                         answered; but Rejected, which never got there, counts as neither
    fallback             called in the place of a refused call, with its arguments
    on_state_change      called with the breaker's Change, as listeners are: what it raises is logged
    metrics_only         refuses nothing, it only counts in `rejected`: to try settings on real traffic
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        recovery_timeout: float = 30.0,
        *,
        window: int | TimeWindow | None = 10,
        minimum_calls: int | None = None,
        failure_rate: float | None = None,
        success_threshold: int = 2,
        slow_call_threshold: float | None = None,
        half_open_max_calls: int = 1,
        max_recovery_timeout: float | None = None,
        is_failure: Callable[[Exception], bool] = dependency_failed,
        name: str = "",
        fallback: Callable[..., Any] | None = None,
        on_state_change: Callable[[Change], None] | None = None,
        metrics_only: bool = False,
        clock: Clock = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.failure_threshold = check_count("failure_threshold", failure_threshold, 1, "failed calls")
        self.recovery_timeout = check_number("recovery_timeout", recovery_timeout, 0, YEAR, "seconds")
        if isinstance(window, TimeWindow):
            check_number("window", window, 0.001, YEAR, "seconds")
        elif window is not None:
            check_count("window", window, 1, "calls")
            if failure_rate is None and failure_threshold > window:
                raise ValueError(
                    f"failure_threshold={failure_threshold!r} in window={window!r} calls can't be reached: it would "
                    "never open"
                )
        if failure_rate is not None:
            check_number("failure_rate", failure_rate, 0.001, 1, "the share of calls that fail")
            if window is None:
                raise ValueError(f"failure_rate={failure_rate!r} needs a window of calls or seconds, not None")
        if slow_call_threshold is not None:
            check_number("slow_call_threshold", slow_call_threshold, 1e-6, YEAR, "seconds")
        given: Any  # else mypy believes the callers
        for word, given in ("is_failure", is_failure), ("fallback", fallback), ("on_state_change", on_state_change):
            if not callable(given) and (given is not None or word == "is_failure"):
                raise TypeError(f"{word}={given!r} is a {type(given).__name__}; give a function")
        few = min(window, 10) if isinstance(window, int) else 10
        self.minimum_calls = few if minimum_calls is None else check_count("minimum_calls", minimum_calls, 1, "calls")
        if isinstance(window, int) and self.minimum_calls > window:
            raise ValueError(f"minimum_calls={minimum_calls!r} never fit into window={window!r} calls")
        self.success_threshold = check_count("success_threshold", success_threshold, 1, "probes")
        self.half_open_max_calls = check_count("half_open_max_calls", half_open_max_calls, 1, "probes at a time")
        longest = 8 * recovery_timeout if max_recovery_timeout is None else max_recovery_timeout
        self.max_recovery_timeout = check_number(
            "max_recovery_timeout", longest, recovery_timeout, 8 * YEAR, "seconds, not below recovery_timeout"
        )
        self.window = failure_threshold if window is None else window
        self.failure_rate, self.slow_call_threshold = failure_rate, slow_call_threshold
        self.is_failure, self.name, self.fallback = is_failure, name, fallback
        self.on_state_change, self.metrics_only = on_state_change, metrics_only
        self._clock, self._rng, self._lock = clock, rng, threading.RLock()
        self._state: State = "closed"
        self._period: Ticket = window_of(self.window, clock)
        self.closed: Window | None = self._period  # the same, while closed: one look admits nearly every call
        self._failed_probes = 0  # in a row
        self._until = 0.0  # open: when to probe
        self.rejected = 0
        self.last_change: Change | None = None

    # ---- to read and to steer

    @property
    def state(self) -> State:
        """closed, open, half_open or isolated. Open until the first call after the recovery time probes."""
        return self._state

    @property
    def snapshot(self) -> Snapshot:
        """Of the window; empty unless closed."""
        with self._lock:
            return Snapshot(*self.closed.counts()) if self.closed else Snapshot(0, 0)

    def reset(self) -> None:
        """Closes, and forgets what was counted."""
        with self._lock:
            self._failed_probes = 0
            self._change("closed", "reset by hand")

    def force_open(self) -> None:
        """Opens as if too much had failed; recovers as usual."""
        with self._lock:
            self._open("opened by hand")

    def isolate(self) -> None:
        """Refuses every call until reset() or force_open()."""
        with self._lock:
            self._change("isolated", "isolated by hand")

    # ---- admission and outcome, each in one synchronous stretch

    def admit(self) -> Ticket:
        """A ticket, to be given to succeeded(), failed() or abandoned(). CircuitOpen when there is none."""
        with self._lock:
            now, most = self._clock(), self.half_open_max_calls
            if isinstance(probes := self._period, Probes) and probes.running >= most and now >= probes.until:
                self._probe_failed("no probe came back")
            if self._state == "open" and now >= self._until:
                self._change("half_open", "the recovery time is over")
            if self.closed:
                return self.closed
            if isinstance(probes := self._period, Probes) and probes.running < most:
                probes.running, probes.until = probes.running + 1, now + max(self.recovery_timeout, PROBE)
                return probes
            self.rejected += 1
            waits = {"open": self._until - now, "half_open": min(1.0, self.recovery_timeout)}
            wait = waits.get(self._state, self.recovery_timeout)  # isolated: nobody knows, but not at once
            state, why = self._state, self.last_change.reason if self.last_change else ""
        emit("circuit_breaker", self.name, "rejected", state=state, retry_after=wait)
        if self.metrics_only:
            return Ignored()
        text = f"{self.name or 'the circuit'} is {state.replace('_', ' ')}: {why}"
        raise CircuitOpen(text, name=self.name, state=state, retry_after=wait)

    def succeeded(self, ticket: Ticket, took: float = 0.0) -> None:
        """Of a call that returned after so many seconds."""
        if self.slow_call_threshold is not None and took >= self.slow_call_threshold:
            self._failed(ticket, f"a call took {took:.3g} s", None)
        else:
            ticket.success()

    def failed(self, ticket: Ticket, error: BaseException) -> None:
        try:
            counts = isinstance(error, Exception) and self.is_failure(error)
        except BaseException:
            self.abandoned(ticket)
            raise
        if counts:
            self._failed(ticket, repr(error), retry_after(error))
        elif isinstance(error, Rejected) or not isinstance(error, Exception):  # it never got there, or was cancelled
            self.abandoned(ticket)
        else:
            ticket.success()

    def abandoned(self, ticket: Ticket) -> None:
        """Of a cancelled call: neither a success nor a failure."""
        if isinstance(ticket, Probes):
            with self._lock:
                ticket.running -= 1

    def _failed(self, ticket: Ticket, what: str, asked: float | None) -> None:
        with self._lock:
            if ticket is self._period and isinstance(ticket, Probes):
                self._probe_failed(what, asked)
            elif ticket is self.closed and not isinstance(ticket, (Probes, Ignored)):
                ticket.failure()
                calls, failures = ticket.counts()
                if self.failure_rate is None:
                    many = failures >= self.failure_threshold
                else:  # divided: 0.7 * 10 is more than 7
                    many = calls >= self.minimum_calls and failures / calls >= self.failure_rate
                if many:
                    self._open(f"{failures} of {calls} calls failed, at last: {what}", asked)

    def _probe_failed(self, what: str, asked: float | None = None) -> None:
        self._failed_probes += 1
        self._open(f"a probe failed: {what}", asked)

    def _probe_succeeded(self, probes: Probes) -> None:
        with self._lock:
            probes.running -= 1
            probes.succeeded += 1
            if probes is self._period and probes.succeeded >= self.success_threshold:
                self._failed_probes = 0
                self._change("closed", f"{probes.succeeded} probes succeeded")

    def _open(self, reason: str, asked: float | None = None) -> None:
        recovery = max(self.recovery_timeout * 2.0 ** min(self._failed_probes, 64), asked or 0.0)
        self._until = self._clock() + min(recovery, self.max_recovery_timeout) * (1 + self._rng() / 10)
        self._change("open", reason)  # the last word: who hears of it may call the breaker

    def _change(self, new: State, reason: str) -> None:
        old, self._state, snapshot, now = self._state, new, self.snapshot, self._clock()
        self.closed = window_of(self.window, self._clock) if new == "closed" else None
        self._period = self.closed or (Probes(self) if new == "half_open" else Ignored())
        self.last_change = change = Change(old, new, reason, snapshot, now)
        emit("circuit_breaker", self.name, "state_change", **change._asdict())
        if self.on_state_change is not None:
            tell(self.on_state_change, change)

    # ---- around functions and blocks

    def __call__(self, fn: Function) -> Function:
        return decorate("circuit_breaker", self, fn)

    async def call(self, fn: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> T:
        return await self.for_async(fn)(*args, **kwargs)

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        timed, clock = self.slow_call_threshold is not None, self._clock

        async def call(*args: Any, **kwargs: Any) -> Any:
            ticket: Ticket | None = self.closed
            if ticket is None:
                try:
                    ticket = self.admit()
                except CircuitOpen:
                    if self.fallback is None:
                        raise
                    instead = self.fallback(*args, **kwargs)
                    return await instead if hasattr(instead, "__await__") else instead
            started = clock() if timed else 0.0
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                self.failed(ticket, error)
                raise
            if timed:
                self.succeeded(ticket, clock() - started)
            else:
                ticket.success()
            return result

        return call

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                block = Block(self)
            except CircuitOpen:
                if self.fallback is None:
                    raise
                return self.fallback(*args, **kwargs)
            with block:
                return fn(*args, **kwargs)

        return call

    def __enter__(self) -> CircuitBreaker:
        _open_blocks.set((*_open_blocks.get(), Block(self)))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        blocks = _open_blocks.get()
        mine = next((block for block in reversed(blocks) if block.breaker is self), None)
        if mine is not None:  # else it was entered in another task or context, and its outcome is lost
            _open_blocks.set(tuple(block for block in blocks if block is not mine))
            mine.__exit__(kind, error, traceback)

    async def __aenter__(self) -> CircuitBreaker:
        return self.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.__exit__(kind, error, traceback)


class Block:
    """A call that was admitted, until its outcome is known. CircuitOpen when it is not admitted."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.breaker, self.ticket = breaker, breaker.closed or breaker.admit()
        self.started = breaker._clock()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.breaker.succeeded(self.ticket, self.breaker._clock() - self.started)
        else:
            self.breaker.failed(self.ticket, error)


_open_blocks: ContextVar[tuple[Block, ...]] = ContextVar("distsys_breaker_blocks", default=())


class CircuitBreakers:
    """A breaker per key (a host, a tenant), made when first asked for: `await breakers[host].call(fetch, url)`.

    `most` of them are kept; beyond, the closed one that was not used for longest is forgotten, and if none is closed,
    the one not used for longest.
    """

    def __init__(self, most: int = 1_000, **options: Any) -> None:
        self.most = check_count("most", most, 1, "breakers")
        self._options, self._lock = options, threading.Lock()
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        CircuitBreaker(**options)  # a wrong option is told now, not at the first call

    def __getitem__(self, key: str) -> CircuitBreaker:
        with self._lock:
            if (found := self._breakers.get(key)) is None:
                while len(self._breakers) >= self.most:
                    closed = (other for other, each in self._breakers.items() if each.state == "closed")
                    del self._breakers[next(closed, next(iter(self._breakers)))]
                found = self._breakers[key] = CircuitBreaker(**{"name": key, **self._options})
            self._breakers.move_to_end(key)
            return found

    def states(self) -> dict[str, State]:
        with self._lock:
            return {key: breaker.state for key, breaker in self._breakers.items()}


circuit_breaker = CircuitBreaker
