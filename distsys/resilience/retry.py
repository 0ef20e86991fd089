"""Retry: repeat a call whose failure may be transient, backing off with jitter so that clients don't act in lockstep.

Promise  at most `max_attempts` attempts, the first included; a wait that would pass the deadline is not begun; with a
         budget, retries stay below its share of the calls. The last error passes through, with its attempts as notes.
Not      for a call that may have taken effect already, unless it is idempotent: with idempotent=False, only what
         certainly did not happen is tried again. Responses that are not raised are not inspected.
Units    seconds.
Errors   the last attempt's own; TimeoutError when the deadline ends an attempt of an async function.
Source   Brooker 2015 (exponential backoff and jitter); Google SRE book, chapter 22 (retry budgets); RFC 9110 10.2.3.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

from distsys._support.arguments import YEAR, check_count, check_number
from distsys._support.clock import Clock
from distsys.errors import PatternOrderError
from distsys.resilience.layers import Function, Policy, layers, name_of
from distsys.resilience.listeners import emit
from distsys.resilience.outcomes import NOT_DONE, UNKNOWN, Outcome, classify, retry_after

T = TypeVar("T")
Jitter = Literal["full", "equal", "decorrelated", "none"]
On = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], "bool | Outcome"] | None

_around: ContextVar[tuple[int, ...]] = ContextVar("distsys_retry_layers", default=())  # max_attempts, outermost first


class RetryAmplification(UserWarning):
    """A warning: retry runs inside of retry, and their attempts multiply."""


@dataclass(eq=False, repr=False)
class RetryBudget:
    """A bound on the retries of many functions together: a share of their calls, and a few per second besides.

    ratio   retries per call: 0.1 is one for ten calls
    floor   retries per second that are always allowed, for services with few calls
    burst   how many can be saved up
    """

    ratio: float = 0.1
    _: KW_ONLY
    floor: float = 1.0
    burst: float = 10.0
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0, 1, "retries per call")
        check_number("floor", self.floor, 0, 1e6, "retries per second")
        check_number("burst", self.burst, 1, 1e6, "retries")
        self.suppressed = 0
        self._lock = threading.Lock()
        self._saved, self._refilled_at = self.burst, self.clock()

    @property
    def saved(self) -> float:
        """How many retries are left now."""
        with self._lock:
            self._refill()
            return self._saved

    def pay_in(self) -> None:
        """Credit the share of a retry that one call brings."""
        with self._lock:
            self._saved = min(self.burst, self._saved + self.ratio)

    def take(self) -> bool:
        """Spend one retry; return False, and count it as suppressed, if less than one is left."""
        with self._lock:
            self._refill()
            if self._saved < 1 - 1e-9:  # ten times 0.1 is a little less
                self.suppressed += 1
                return False
            self._saved -= 1
            return True

    def _refill(self) -> None:
        now = self.clock()
        self._saved = min(self.burst, self._saved + (now - self._refilled_at) * self.floor)
        self._refilled_at = now


@dataclass(eq=False, repr=False)
class Retry(Policy):
    """What `retry(...)` returns: a decorator; `await policy.call(fn, ...)`; and for a block, which can't run twice by
    itself: `async for attempt in policy: async with attempt: ...`, or the same without async.

    max_delay   bounds the backoff, and also what a Retry-After adds to it
    on          None: the tables of outcomes.py; else classes of errors, or a function that returns a bool or an Outcome
    timeout     seconds for all attempts together
    idempotent  False: what may have happened is not tried again; None and True: the caller vouches that it may be
    """

    rule = "retry"

    max_attempts: int = 3
    base_delay: float = 1.0
    _: KW_ONLY
    max_delay: float = 60.0
    jitter: Jitter = "full"
    on: On = None
    timeout: float | None = None
    budget: RetryBudget | None = None
    idempotent: bool | None = None
    name: str = ""
    allow_outside_breaker: bool = False
    rng: Callable[[], float] = random.random
    sleep: Callable[[float], Any] | None = None

    def __post_init__(self) -> None:
        check_count("max_attempts", self.max_attempts, 1, "attempts, the first included")
        check_number("base_delay", self.base_delay, 0, YEAR, "seconds")
        check_number("max_delay", self.max_delay, self.base_delay, YEAR, "seconds, not below base_delay")
        if self.jitter not in ("full", "equal", "decorrelated", "none"):
            raise ValueError(f"jitter={self.jitter!r}: 'full', 'equal', 'decorrelated' or 'none'")
        if self.timeout is not None:
            check_number("timeout", self.timeout, 1e-6, YEAR, "seconds for all attempts together")
        _check_on(self.on)
        if not isinstance(self.budget, RetryBudget | None):
            raise TypeError(f"budget={self.budget!r} is a {type(self.budget).__name__}; give a RetryBudget")

    def __call__(self, fn: Function) -> Function:
        """Return `fn`, sync or async, with retries. Raises PatternOrderError outside of a circuit breaker."""
        if "circuit_breaker" in layers(fn) and not self.allow_outside_breaker:
            raise PatternOrderError(
                f"retry outside of circuit_breaker on {name_of(fn)}: it would only retry refusals, and each attempt "
                "would count as a call; put @circuit_breaker above @retry, or allow_outside_breaker=True"
            )
        return super().__call__(fn)

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """Return the async function `fn`, with retries."""
        budget = self.budget

        async def run(attempts: Attempts, args: Any, kwargs: Any) -> Any:
            while True:
                with await anext(attempts):
                    return await fn(*args, **kwargs)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if budget is not None:
                budget.pay_in()
            try:
                return await fn(*args, **kwargs)
            except Exception as error:  # a success costs next to nothing: Attempts are made after the first failure
                if not self._schedule_next_attempt(attempts := Attempts(self, time.monotonic), error):
                    raise
            return await run(attempts, args, kwargs)

        async def until_deadline(*args: Any, **kwargs: Any) -> Any:
            attempts = aiter(self)
            limit = asyncio.timeout(self.timeout)
            try:
                async with limit:
                    return await run(attempts, args, kwargs)
            except TimeoutError as error:
                if limit.expired():
                    attempts.note(error, f"ended by the deadline: all attempts together had {self.timeout:g} s")
                    emit("retry", self.name, "gave_up", attempts=attempts.number, error=error)
                raise

        return call if self.timeout is None else until_deadline

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function `fn`, with retries."""

        def call(*args: Any, **kwargs: Any) -> Any:
            attempts = iter(self)
            try:  # the first attempt does without the context manager: 315 ns added to a success instead of 650
                return fn(*args, **kwargs)
            except Exception as error:
                if not self._schedule_next_attempt(attempts, error):
                    raise
            while True:
                with next(attempts):
                    return fn(*args, **kwargs)

        return call

    def __iter__(self) -> Attempts:
        """Return the attempts of one block: `for attempt in policy: with attempt: ...`."""
        return self._attempts(time.monotonic)

    def __aiter__(self) -> Attempts:
        """Return the attempts of one block: `async for attempt in policy: async with attempt: ...`."""
        return self._attempts(asyncio.get_running_loop().time)

    def _attempts(self, now: Clock) -> Attempts:
        if self.budget is not None:
            self.budget.pay_in()
        return Attempts(self, now)

    # ---- the decision

    def _schedule_next_attempt(self, attempts: Attempts, error: Exception) -> bool:
        """Decide whether there is a next attempt, and when; if there is none, a note of the error says why."""
        if why := self._reason_not_to_retry(error):
            attempts.note(error, why)
            return False
        if attempts.number >= self.max_attempts:
            attempts.note(error, "no attempts left")
            emit("retry", self.name, "gave_up", attempts=attempts.number, error=error)
            return False
        delay = self._backoff(attempts)
        if (asked := retry_after(error)) is not None:
            delay += min(asked, self.max_delay)  # plus the jitter, or all clients that were told the same come together
        if attempts.now() + delay > attempts.deadline:
            why = f"the next attempt, {delay:.3g} s later, would pass the deadline of {self.timeout:g} s"
        elif self.budget is not None and not self.budget.take():
            why = f"the retry budget is used up: {self.budget.ratio:g} retries per call"
        if why:
            attempts.note(error, why)
            emit("retry", self.name, "suppressed", attempts=attempts.number, error=error, reason=why)
            return False
        emit("retry", self.name, "retry", attempt=attempts.number, delay=delay, error=error)
        attempts.failed.append((repr(error), delay))
        attempts.number, attempts.wait = attempts.number + 1, delay
        return True

    def _reason_not_to_retry(self, error: Exception) -> str:
        """Return why this error is not worth another attempt; "" if it is."""
        outcome = classify(error)
        if self.on is None:
            worth = outcome in (NOT_DONE, UNKNOWN)
        elif isinstance(self.on, (type, tuple)):
            worth = isinstance(error, self.on) and getattr(error, "retryable", True)
        else:
            answer = self.on(error)
            if isinstance(answer, Outcome):
                outcome, answer = answer, answer in (NOT_DONE, UNKNOWN)
            worth = answer
        if not worth:
            return f"not retried: {outcome.value if self.on is None else 'on= does not ask for it'}"
        if self.idempotent is False and outcome is not NOT_DONE:
            return f"not retried: {outcome.value}, and idempotent=False"
        return ""

    def _backoff(self, attempts: Attempts) -> float:
        """Return the seconds to wait before the next attempt, jitter included."""
        longest = min(self.max_delay, self.base_delay * 2.0 ** min(attempts.number - 1, 1_000))
        if self.jitter == "none":
            return longest
        if self.jitter == "decorrelated":
            span = max(0.0, 3 * (attempts.last_delay or self.base_delay) - self.base_delay)
            attempts.last_delay = min(self.max_delay, self.base_delay + span * self.rng())
            return attempts.last_delay
        least = longest / 2 if self.jitter == "equal" else 0.0
        return least + (longest - least) * self.rng()


def _check_on(on: Any) -> None:
    if on is None or (callable(on) and not isinstance(on, type)):
        return
    for kind in on if isinstance(on, tuple) else (on,):
        if kind in (Exception, BaseException):
            raise ValueError(
                f"on={on!r} retries typing errors, refused passwords and what can't succeed: name the errors that "
                "pass, or leave on=None for the tables in distsys.resilience.outcomes"
            )
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise TypeError(f"on={on!r}: classes of Exception, a function of the error, or None")


class Attempts:
    """The attempts of one call or block: `with attempt: ...` runs one, and the policy judges the error that it raises.

    No exception is kept here, for its traceback would keep whatever its frames hold.
    """

    deadline = math.inf
    number = 1  # of this attempt
    last_delay = 0.0  # of decorrelated jitter
    wait: float | None = 0.0  # before the next attempt; None: there is none
    _outside: tuple[int, ...] = ()  # the layers around the attempt that runs
    _inside: tuple[int, ...] | None = None  # these, and this one

    def __init__(self, policy: Retry, now: Clock) -> None:
        self._policy = policy
        self.now = now
        self.failed: list[tuple[str, float]] = []  # the error of each attempt before this one, and the wait after it
        if policy.timeout is not None:
            self.deadline = now() + policy.timeout

    def note(self, error: Exception, why: str) -> None:
        """Add to the error what became of all attempts; `why` is the end of this one."""
        with suppress(Exception):  # frozen errors take no notes, and must pass as they are
            before = [f"attempt {n}: {what}, {delay:.3g} s" for n, (what, delay) in enumerate(self.failed, 1)]
            error.add_note("retry: " + "; ".join([*before, f"attempt {self.number}: {why}"]))

    def __next__(self) -> Attempts:
        """Return the next attempt after its wait, if the one before it failed and may be repeated."""
        if self.wait is None:
            raise StopIteration
        if self.failed:
            (self._policy.sleep or time.sleep)(self.wait)
        self.wait = None  # unless the block fails
        return self

    async def __anext__(self) -> Attempts:
        """Like `__next__`, for `async for`."""
        if self.wait is None:
            raise StopAsyncIteration
        if self.failed:
            await (self._policy.sleep or asyncio.sleep)(self.wait)
        self.wait = None
        return self

    def __enter__(self) -> Attempts:
        """Make this layer known to the retries inside of it: layers multiply, for all run while the innermost fails.

        Only a layer that has seen a failure is known, so success costs nothing, and the warning comes when it hurts.
        """
        if self.failed:
            policy = self._policy
            self._outside = _around.get()
            self._inside = every = (*self._outside, policy.max_attempts)
            if self._outside and (product := math.prod(every)) > max(every):
                text = f"{' x '.join(map(str, every))} = {product} attempts on {policy.name!r}: retry in one layer only"
                warnings.warn(text, RetryAmplification, stacklevel=3)
            _around.set(every)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        """Swallow the error if another attempt follows."""
        if _around.get() is self._inside:  # else it is closed in another context, where nothing has to be taken back
            _around.set(self._outside)
        return isinstance(error, Exception) and self._policy._schedule_next_attempt(self, error)

    async def __aenter__(self) -> Attempts:
        """Like `__enter__`."""
        return self.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        """Like `__exit__`."""
        return self.__exit__(kind, error, traceback)


retry = Retry
