"""Circuit breaker: when a dependency fails too often, stop calling it for a while, then probe it with a few calls.

Promise  while open, no call reaches the dependency; while half open, at most `half_open_max_calls` at a time, however
         many callers come at once. An outcome counts only in the state that admitted the call. A cancelled call is
         neither a success nor a failure.
Not      a timeout: a call that hangs, hangs (put a timeout inside, see composed.py). Not shared between processes: each
         finds out by itself, on purpose, for a partition may lie between one of them and the dependency.
Units    seconds.
Errors   CircuitOpen, with retry_after; the call's own errors pass.
Source   Nygard, Release It!, 5.2; resilience4j (count and time windows, rates, slow calls).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from distsys._support.arguments import YEAR, check_count, check_number
from distsys._support.clock import Clock
from distsys.errors import CircuitOpen, Rejected
from distsys.resilience.layers import Policy
from distsys.resilience.listeners import emit, tell
from distsys.resilience.outcomes import FATAL, classify, retry_after
from distsys.resilience.windows import LastCalls, LastSeconds
from distsys.resilience.windows import TimeWindow as TimeWindow

T = TypeVar("T")
State = Literal["closed", "open", "half_open", "isolated"]
MIN_PROBE_SECONDS = 10.0  # a probe that hangs keeps its permit for at least so long, and not for ever


class Snapshot(NamedTuple):
    """Counts of the window; both are 0 unless the breaker is closed."""

    calls: int
    failures: int

    @property
    def failure_rate(self) -> float:
        """The share of calls that failed, from 0 to 1."""
        return self.failures / self.calls if self.calls else 0.0


class Change(NamedTuple):
    """A change of state, why it happened, and the window at that moment."""

    old: State
    new: State
    reason: str
    snapshot: Snapshot
    at: float  # seconds of the breaker's clock


def dependency_failed(error: Exception) -> bool:
    """Return whether an error counts against the dependency: not a caller's mistake, not a refusal of our own rules."""
    return not isinstance(error, Rejected) and classify(error) is not FATAL


class Period:
    """The time from one change of state to the next; it admits calls, and is the ticket of those it admitted.

    An outcome changes nothing if its period is over. The base class refuses calls and ignores outcomes: isolated.
    """

    state: ClassVar[State] = "isolated"

    def __init__(self, breaker: CircuitBreaker, until: float = math.inf) -> None:
        self.breaker = breaker
        self.until = until  # when a call that finds no ticket begins the next period
        self.closed = self.state == "closed"  # then every call is admitted, even without `admit`

    def admit(self, now: float) -> Period | None:
        """Return a ticket, or None to refuse the call. The breaker's lock is held."""
        return None

    def retry_after(self, now: float) -> float:
        """Return after how many seconds a refused caller should come back."""
        return self.breaker.recovery_timeout

    def counts(self) -> tuple[int, int]:
        """Return the number of calls in the window, and how many of them failed."""
        return 0, 0

    def succeeded(self) -> None:
        """Count a call that the dependency answered."""

    def failed(self, what: str, asked: float | None = None) -> None:
        """Count a failed call; `asked` is its Retry-After in seconds."""

    def abandoned(self) -> None:
        """Take back a call that ended as neither success nor failure: it was cancelled, or never got there."""


class Closed(Period):
    """A period that admits every call and counts the outcomes in a window."""

    state = "closed"

    def __init__(self, breaker: CircuitBreaker) -> None:
        super().__init__(breaker)
        length = breaker.window or breaker.failure_threshold
        self.window = LastSeconds(length, breaker.clock) if isinstance(length, TimeWindow) else LastCalls(length)
        self.succeeded = self.window.success  # type: ignore[method-assign]  # saves a call: 200 ns, not 225
        self.counts = self.window.counts  # type: ignore[method-assign]

    def admit(self, now: float) -> Period:
        """Return the ticket that every call gets."""
        return self

    def failed(self, what: str, asked: float | None = None) -> None:
        """Count a failed call, and open the breaker if there are too many."""
        breaker = self.breaker
        with breaker._lock:
            if self is not breaker.period:
                return
            self.window.failure()
            calls, failures = self.counts()
            if breaker.failure_rate is None:
                too_many = failures >= breaker.failure_threshold
            else:  # divided: 0.7 * 10 is more than 7
                too_many = calls >= breaker._enough_calls and failures / calls >= breaker.failure_rate
            if too_many:
                breaker._open(f"{failures} of {calls} calls failed, the last one: {what}", asked)


class Open(Period):
    """A period that refuses every call, until the recovery time is over and the next call begins to probe."""

    state = "open"

    def admit(self, now: float) -> Period | None:
        """Refuse the call, or begin the half open period with it."""
        if now < self.until:
            return None
        self.breaker._change(HalfOpen(self.breaker), "the recovery time is over")
        return self.breaker.period.admit(now)

    def retry_after(self, now: float) -> float:
        """Return the seconds until the next probe."""
        return self.until - now


class HalfOpen(Period):
    """A period that admits probes, a few at a time, and ends with the first failure or with enough successes."""

    state = "half_open"

    running = successes = 0

    def admit(self, now: float) -> Period | None:
        """Return a ticket if a permit for a probe is free, or if the probes that hold them all are given up."""
        breaker = self.breaker
        if self.running < breaker.half_open_max_calls:
            self.running += 1
            self.until = now + max(breaker.recovery_timeout, MIN_PROBE_SECONDS)
            return self
        if now < self.until:  # then probes that hold every permit count as failed
            return None
        breaker._probe_failed("no probe came back")
        return breaker.period.admit(now)

    def retry_after(self, now: float) -> float:
        """Return a second at most: a probe is under way."""
        return min(1.0, self.breaker.recovery_timeout)

    def succeeded(self) -> None:
        """Count a probe that succeeded, and close the breaker if there are enough."""
        breaker = self.breaker
        with breaker._lock:
            self.running -= 1
            self.successes += 1
            if self is breaker.period and self.successes >= breaker.success_threshold:
                breaker._change(Closed(breaker), f"{self.successes} probes succeeded")

    def failed(self, what: str, asked: float | None = None) -> None:
        """Open the breaker again."""
        with self.breaker._lock:
            if self is self.breaker.period:
                self.breaker._probe_failed(what, asked)

    def abandoned(self) -> None:
        """Give the permit back."""
        with self.breaker._lock:
            self.running -= 1


@dataclass(eq=False, repr=False)
class CircuitBreaker(Policy):
    """What `circuit_breaker(...)` returns: a decorator; `await policy.call(fn, ...)`; `async with policy:`, or `with`.

    failure_threshold    failed calls in the window that open it
    recovery_timeout     seconds it stays open at first. Each failed probe doubles them, and a longer Retry-After
                         counts, both up to max_recovery_timeout (8 times the first). Up to a tenth more is added by
                         chance, so that processes do not probe in lockstep
    window               the last so many calls; TimeWindow(60): the calls of a minute; None: failures in a row, which
                         is a window of failure_threshold calls
    failure_rate         instead of failure_threshold: the share of calls in the window, from minimum_calls on
    minimum_calls        calls in the window before failure_rate means anything; the window's own length, or 10
    slow_call_threshold  seconds from which a call counts as failed although it returned
    half_open_max_calls  probes at a time; success_threshold of them have to succeed, one failure opens again
    is_failure           which errors count as failures; without it dependency_failed. Other errors count as success,
                         for the dependency has answered; but Rejected counts as neither: the call never got there
    fallback             called in the place of a refused call, with its arguments
    on_state_change      called with each Change, like a listener: what it raises is logged
    metrics_only         refuses nothing, but counts in `rejected` what it would have refused: to try out settings
    """

    rule = "circuit_breaker"

    failure_threshold: int = 5
    recovery_timeout: float = 30.0
    _: KW_ONLY
    window: int | TimeWindow | None = 10
    minimum_calls: int | None = None
    failure_rate: float | None = None
    success_threshold: int = 2
    slow_call_threshold: float | None = None
    half_open_max_calls: int = 1
    max_recovery_timeout: float | None = None
    is_failure: Callable[[Exception], bool] = dependency_failed
    name: str = ""
    fallback: Callable[..., Any] | None = None
    on_state_change: Callable[[Change], None] | None = None
    metrics_only: bool = False
    clock: Clock = time.monotonic
    rng: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        window, rate = self.window, self.failure_rate
        threshold, recovery = self.failure_threshold, self.recovery_timeout
        check_count("failure_threshold", threshold, 1, "failed calls")
        check_number("recovery_timeout", recovery, 0, YEAR, "seconds")
        if rate is not None:
            check_number("failure_rate", rate, 0.001, 1, "the share of calls that fail")
        if self.slow_call_threshold is not None:
            check_number("slow_call_threshold", self.slow_call_threshold, 1e-6, YEAR, "seconds")
        for option in "is_failure", "fallback", "on_state_change":
            given = getattr(self, option)
            if not callable(given) and (given is not None or option == "is_failure"):
                raise TypeError(f"{option}={given!r} is a {type(given).__name__}; give a function")
        enough = 10 if self.minimum_calls is None else check_count("minimum_calls", self.minimum_calls, 1, "calls")
        if isinstance(window, TimeWindow):
            check_number("window", window, 0.001, YEAR, "seconds")
        elif window is not None:
            check_count("window", window, 1, "calls")
            if rate is None and threshold > window:
                text = f"failure_threshold={threshold!r} in window={window!r} calls can't be reached"
                raise ValueError(f"{text}: it would never open")
            enough = min(window, 10) if self.minimum_calls is None else enough
            if enough > window:
                raise ValueError(f"minimum_calls={enough!r} never fit into window={window!r} calls")
        elif rate is not None:
            raise ValueError(f"failure_rate={rate!r} needs a window of calls or seconds, not None")
        check_count("success_threshold", self.success_threshold, 1, "probes")
        check_count("half_open_max_calls", self.half_open_max_calls, 1, "probes at a time")
        longest = 8 * recovery if self.max_recovery_timeout is None else self.max_recovery_timeout
        unit = "seconds, not below recovery_timeout"
        self._longest_recovery = check_number("max_recovery_timeout", longest, recovery, 8 * YEAR, unit)
        self._enough_calls = enough  # for failure_rate
        self._lock = threading.RLock()
        self._failed_probes = 0  # in a row
        self.period: Period = Closed(self)
        self.rejected = 0
        self.last_change: Change | None = None

    # ---- to read and to steer

    @property
    def state(self) -> State:
        """closed, open, half_open or isolated. It stays open until the first call after the recovery time."""
        return self.period.state

    @property
    def snapshot(self) -> Snapshot:
        """The counts of the window; 0 unless closed."""
        with self._lock:
            return Snapshot(*self.period.counts())

    def reset(self) -> None:
        """Close the breaker, and forget what was counted."""
        self._change(Closed(self), "reset by hand")

    def force_open(self) -> None:
        """Open the breaker as if too many calls had failed; it recovers as usual."""
        self._open("opened by hand")

    def isolate(self) -> None:
        """Refuse every call until reset() or force_open()."""
        self._change(Period(self), "isolated by hand")

    # ---- admission and outcome, each in one synchronous stretch

    def admit(self) -> Period:
        """Return the ticket of one call: give it to succeeded() or failed(). Raises CircuitOpen when there is none."""
        with self._lock:
            now = self.clock()
            if (ticket := self.period.admit(now)) is not None:
                return ticket
            self.rejected += 1
            state = self.state
            wait = self.period.retry_after(now)
            why = self.last_change.reason if self.last_change else ""
        emit("circuit_breaker", self.name, "rejected", state=state, retry_after=wait)
        if self.metrics_only:
            return Period(self)  # a ticket whose outcome is ignored
        text = f"{self.name or 'the circuit'} is {state.replace('_', ' ')}: {why}"
        raise CircuitOpen(text, name=self.name, state=state, retry_after=wait)

    def succeeded(self, ticket: Period, took: float = 0.0) -> None:
        """Count a call that returned after `took` seconds."""
        if self.slow_call_threshold is not None and took >= self.slow_call_threshold:
            ticket.failed(f"a call took {took:.3g} s")
        else:
            ticket.succeeded()

    def failed(self, ticket: Period, error: BaseException) -> None:
        """Count a call that raised `error`: as failure, success or neither. What is_failure raises passes."""
        try:
            counts = isinstance(error, Exception) and self.is_failure(error)
        except BaseException:
            ticket.abandoned()
            raise
        if counts:
            ticket.failed(repr(error), retry_after(error))
        elif isinstance(error, Rejected) or not isinstance(error, Exception):  # it never got there, or was cancelled
            ticket.abandoned()
        else:
            ticket.succeeded()

    # ---- changes of state

    def _probe_failed(self, what: str, asked: float | None = None) -> None:
        self._failed_probes += 1
        self._open(f"a probe failed: {what}", asked)

    def _open(self, reason: str, asked: float | None = None) -> None:
        recovery = max(self.recovery_timeout * 2.0 ** min(self._failed_probes, 64), asked or 0.0)
        recovery = min(recovery, self._longest_recovery) * (1 + self.rng() / 10)
        self._change(Open(self, self.clock() + recovery), reason)

    def _change(self, period: Period, reason: str) -> None:
        """Begin a period. A listener may call the breaker, so nothing may follow a call of this."""
        with self._lock:
            change = Change(self.state, period.state, reason, self.snapshot, self.clock())
            self.period, self.last_change = period, change
            if period.closed:
                self._failed_probes = 0
            emit("circuit_breaker", self.name, "state_change", **change._asdict())
            if self.on_state_change is not None:
                tell(self.on_state_change, change)

    # ---- around functions and blocks

    def _begin(self) -> tuple[Period, float]:
        """Admit a call, and return its ticket and when it began. Raises CircuitOpen when it is refused."""
        period = self.period
        return period if period.closed else self.admit(), self.clock()

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """Return the async function `fn`, guarded."""
        timed = self.slow_call_threshold is not None

        async def call(*args: Any, **kwargs: Any) -> Any:
            ticket = self.period
            if not ticket.closed:
                try:
                    ticket = self.admit()
                except CircuitOpen:
                    if self.fallback is None:
                        raise
                    answer = self.fallback(*args, **kwargs)
                    return await answer if hasattr(answer, "__await__") else answer
            started = self.clock() if timed else 0.0
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                self.failed(ticket, error)
                raise
            if timed:
                self.succeeded(ticket, self.clock() - started)
            else:
                ticket.succeeded()
            return result

        return call

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function `fn`, guarded."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                ticket, started = self._begin()
            except CircuitOpen:
                if self.fallback is None:
                    raise
                return self.fallback(*args, **kwargs)
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                self.failed(ticket, error)
                raise
            self.succeeded(ticket, self.clock() - started)
            return result

        return call

    def __enter__(self) -> CircuitBreaker:
        """Admit a block. Raises CircuitOpen when it is refused."""
        _open_blocks.set((*_open_blocks.get(), (self, *self._begin())))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Count the outcome of the block."""
        blocks = _open_blocks.get()
        block = next((block for block in reversed(blocks) if block[0] is self), None)
        if block is None:  # it was entered in another task or context, and its outcome is lost
            return
        _open_blocks.set(tuple(other for other in blocks if other is not block))
        if error is None:
            self.succeeded(block[1], self.clock() - block[2])
        else:
            self.failed(block[1], error)

    async def __aenter__(self) -> CircuitBreaker:
        """Admit a block. Raises CircuitOpen when it is refused."""
        return self.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Count the outcome of the block."""
        self.__exit__(kind, error, traceback)


_Block = tuple[CircuitBreaker, Period, float]  # who admitted it, its ticket, and when it began
_open_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("distsys_breaker_blocks", default=())


class CircuitBreakers:
    """A breaker per key (a host, a tenant), made when it is first asked for: `await breakers[host].call(fetch, url)`.

    At most `most` breakers are kept. Beyond that number the closed breaker that was not used for longest is forgotten,
    and if none is closed, the one that was not used for longest.
    """

    def __init__(self, most: int = 1_000, **options: Any) -> None:
        self.most = check_count("most", most, 1, "breakers")
        self._options = options
        self._lock = threading.Lock()
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        CircuitBreaker(**options)  # raises for a wrong option now, not at the first call

    def __getitem__(self, key: str) -> CircuitBreaker:
        """Return the breaker of this key."""
        with self._lock:
            if (found := self._breakers.get(key)) is None:
                while len(self._breakers) >= self.most:
                    closed = (other for other, breaker in self._breakers.items() if breaker.state == "closed")
                    del self._breakers[next(closed, next(iter(self._breakers)))]
                found = self._breakers[key] = CircuitBreaker(**{"name": key, **self._options})
            self._breakers.move_to_end(key)
            return found

    def states(self) -> dict[str, State]:
        """Return the state of each breaker by its key."""
        with self._lock:
            return {key: breaker.state for key, breaker in self._breakers.items()}


circuit_breaker = CircuitBreaker
