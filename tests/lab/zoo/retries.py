"""Retries as engineers write them: right ones, and wrong ones with one plausible mistake each."""

import asyncio
import contextlib
import functools
import logging
import random
import time
from dataclasses import dataclass
from typing import Any, Awaitable, Callable

log = logging.getLogger("retries")
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
PATIENCE = 60.0


def worth_retrying(error):
    status = getattr(error, "status", None)
    if status is not None:
        return status in RETRYABLE
    return isinstance(error, (TimeoutError, ConnectionError))


def asked_wait(error):
    """Seconds the server asked us to wait, 0 if it did not."""
    return max(0.0, float(getattr(error, "retry_after", None) or 0.0))


def full_jitter(attempt, base, cap):
    return random.uniform(0, min(cap, base * 2 ** min(attempt, 30)))


# ------------------------------------------------------------------ right


def retrying(max_attempts=3, base_delay=0.1, max_delay=1.0, sleep=asyncio.sleep):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for attempt in range(max_attempts):
                try:
                    return await fn(*args, **kwargs)
                except Exception as error:
                    wait = asked_wait(error)
                    if attempt + 1 >= max_attempts or not worth_retrying(error) or wait > PATIENCE:
                        raise
                    delay = max(wait, full_jitter(attempt, base_delay, max_delay))
                await sleep(delay)

        return wrapper

    return decorate


class Retrier:
    """Equal jitter: half of the delay is fixed, half random."""

    def __init__(self, max_attempts=3, base_delay=0.1, max_delay=1.0):
        self.max_attempts, self.base_delay, self.max_delay = max_attempts, base_delay, max_delay

    def should_retry(self, error, attempt):
        return attempt < self.max_attempts and worth_retrying(error) and asked_wait(error) <= PATIENCE

    def delay(self, error, attempt):
        ceiling = min(self.max_delay, self.base_delay * 2 ** min(attempt - 1, 30))
        return max(asked_wait(error), ceiling / 2 + random.uniform(0, ceiling / 2))

    async def pause(self, seconds):
        await asyncio.sleep(seconds)

    async def call(self, fn, *args, **kwargs):
        attempt = 1
        while True:
            try:
                return await fn(*args, **kwargs)
            except Exception as error:
                if not self.should_retry(error, attempt):
                    raise
                delay = self.delay(error, attempt)
            await self.pause(delay)
            attempt += 1


def decorrelated(call, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
    """The `decorrelated jitter` of the AWS architecture blog."""

    async def resilient(path):
        delay = base_delay
        for left in range(max_attempts - 1, -1, -1):
            try:
                return await call(path)
            except Exception as error:
                wait = asked_wait(error)
                if not left or not worth_retrying(error) or wait > PATIENCE:
                    raise
            delay = min(max_delay, random.uniform(base_delay, delay * 3))
            await sleep(wait + delay if wait else delay)

    return resilient


class Attempts:
    """async for attempt in Attempts(...): with attempt: return await fn()"""

    def __init__(self, max_attempts=3, base_delay=0.1, max_delay=1.0):
        self.settings = max_attempts, base_delay, max_delay

    async def __aiter__(self):
        limit, base, cap = self.settings
        for number in range(1, limit + 1):
            attempt = _Attempt(number == limit)
            yield attempt
            if attempt.error is None:
                return
            await asyncio.sleep(max(asked_wait(attempt.error), full_jitter(number - 1, base, cap)))

    async def call(self, fn, *args, **kwargs):
        async with contextlib.aclosing(aiter(self)) as attempts:
            async for attempt in attempts:
                with attempt:
                    return await fn(*args, **kwargs)


class _Attempt:
    def __init__(self, last):
        self.last, self.error = last, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, tb):
        if isinstance(error, Exception) and not self.last and worth_retrying(error) and asked_wait(error) <= PATIENCE:
            self.error = error
            return True
        return False


@dataclass(frozen=True)
class BackoffPolicy:
    max_attempts: int = 3
    base_delay: float = 0.1
    max_delay: float = 1.0
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep

    def delays(self):
        ceiling = self.base_delay
        for _ in range(self.max_attempts - 1):
            yield random.uniform(0.75, 1.0) * min(ceiling, self.max_delay)
            ceiling = min(ceiling * 2, self.max_delay)

    def __call__(self, fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for delay in self.delays():
                try:
                    return await fn(*args, **kwargs)
                except Exception as error:
                    if not worth_retrying(error) or (wait := asked_wait(error)) > PATIENCE:
                        raise
                    log.info("retrying after %r", error)
                await self.sleep(max(wait, delay))
            return await fn(*args, **kwargs)

        return wrapper


def recursive_retry(call, max_attempts=3, base_delay=0.1, max_delay=1.0):
    async def attempt(number, path):
        try:
            return await call(path)
        except Exception as error:
            wait = asked_wait(error)
            if number >= max_attempts or not worth_retrying(error) or wait > PATIENCE:
                raise
        await asyncio.sleep(max(wait, full_jitter(number - 1, base_delay, max_delay)))
        return await attempt(number + 1, path)

    return functools.partial(attempt, 1)


class RetriesExhausted(Exception):
    pass


class WrappingRetrier:
    """Tells how often it tried; the last error is the cause."""

    def __init__(self, call, sleep, clock, max_attempts=3, base_delay=0.1, max_delay=1.0):
        self._fn, self._sleep, self._clock = call, sleep, clock
        self._attempts, self._base, self._cap = max_attempts, base_delay, max_delay
        self._random = random.Random()

    async def __call__(self, path):
        started = self._clock()
        for attempt in range(self._attempts):
            try:
                return await self._fn(path)
            except Exception as error:
                if not worth_retrying(error):
                    raise
                if attempt == self._attempts - 1 or asked_wait(error) > PATIENCE:
                    spent = self._clock() - started
                    raise RetriesExhausted(f"{attempt + 1} attempts in {spent:.1f} s") from error
                delay = min(self._cap, self._base * 2 ** min(attempt, 30)) * self._random.uniform(0.5, 1)
                delay = max(delay, asked_wait(error))
            await self._sleep(delay)


def retry_with_timeout(max_attempts=3, base_delay=0.1, max_delay=1.0, attempt_timeout=60.0):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            attempt = 0
            while True:
                attempt += 1
                try:
                    async with asyncio.timeout(attempt_timeout):
                        return await fn(*args, **kwargs)
                except Exception as error:
                    if attempt >= max_attempts or not worth_retrying(error) or asked_wait(error) > PATIENCE:
                        raise
                    delay = asked_wait(error) + full_jitter(attempt - 1, base_delay, max_delay)
                await asyncio.sleep(delay)

        return wrapper

    return decorate


# ------------------------------------------------------------------ wrong


def retry_times(max_attempts=3, base_delay=0.1, max_delay=1.0):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            retries = 0
            while True:
                try:
                    return await fn(*args, **kwargs)
                except Exception as error:
                    wait = asked_wait(error)
                    if retries >= max_attempts or not worth_retrying(error) or wait > PATIENCE:
                        raise
                    delay = max(wait, full_jitter(retries, base_delay, max_delay))
                    retries += 1
                await asyncio.sleep(delay)

        return wrapper

    return decorate


def retry_then_raise(call, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
    async def resilient(path):
        last = None
        for attempt in range(max_attempts):
            try:
                return await call(path)
            except Exception as error:
                if not worth_retrying(error) or asked_wait(error) > PATIENCE:
                    raise
                last = error
            await sleep(max(asked_wait(last), full_jitter(attempt, base_delay, max_delay)))
        raise last

    return resilient


class ResettingRetrier(Retrier):
    async def call(self, fn, *args, **kwargs):
        for attempt in range(1, self.max_attempts + 1):
            delay = self.base_delay
            try:
                return await fn(*args, **kwargs)
            except Exception as error:
                if not self.should_retry(error, attempt):
                    raise
                wait = asked_wait(error)
            await self.pause(max(wait, delay * random.uniform(0.9, 1.1)))
            delay = min(self.max_delay, delay * 2)


class ClampedRetrier(Retrier):
    def delay(self, error, attempt):
        ceiling = max(self.max_delay, self.base_delay * 2 ** (attempt - 1))
        return max(asked_wait(error), ceiling * random.uniform(0.5, 1))


class JitteredRetrier(Retrier):
    def __init__(self, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
        super().__init__(max_attempts, base_delay, max_delay)
        self.pause = sleep

    def delay(self, error, attempt):
        delay = min(self.max_delay, self.base_delay * 2 ** min(attempt - 1, 30))
        return max(asked_wait(error), delay) + random.uniform(-0.5, 0.5)


def persistent(max_attempts=3, base_delay=0.1, max_delay=1.0, sleep=asyncio.sleep):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for attempt in range(max_attempts):
                try:
                    return await fn(*args, **kwargs)
                except BaseException as error:
                    status = getattr(error, "status", 503)
                    wait = asked_wait(error)
                    if attempt + 1 == max_attempts or status not in RETRYABLE or wait > PATIENCE:
                        raise
                await sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))

        return wrapper

    return decorate


class InterruptibleRetrier(Retrier):
    async def pause(self, seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            log.debug("backoff interrupted")


class CoroutineRetrier(Retrier):
    async def call(self, fn, *args, **kwargs):
        return await self.run(fn(*args, **kwargs))

    async def run(self, awaitable):
        for attempt in range(1, self.max_attempts + 1):
            try:
                return await awaitable
            except Exception as error:
                if not self.should_retry(error, attempt):
                    raise
                await self.pause(self.delay(error, attempt))


def retry_on_exception(call, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0, exceptions=(Exception,)):
    async def resilient(path):
        for attempt in range(max_attempts):
            try:
                return await call(path)
            except exceptions as error:
                wait = asked_wait(error)
                if attempt == max_attempts - 1 or wait > PATIENCE:
                    raise
            await sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))

    return resilient


class SerialRetrier(Retrier):
    def __init__(self, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
        super().__init__(max_attempts, base_delay, max_delay)
        self.pause = sleep
        self._lock = asyncio.Lock()

    async def call(self, fn, *args, **kwargs):
        async with self._lock:
            return await super().call(fn, *args, **kwargs)


class PoliteRetrier(Retrier):
    def delay(self, error, attempt):
        delay = min(self.max_delay, self.base_delay * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        return min(delay, asked_wait(error) or delay)


def blocking_backoff(max_attempts=3, base_delay=0.1, max_delay=1.0):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for attempt in range(max_attempts):
                try:
                    return await fn(*args, **kwargs)
                except Exception as error:
                    wait = asked_wait(error)
                    if attempt + 1 == max_attempts or not worth_retrying(error) or wait > PATIENCE:
                        raise
                time.sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))

        return wrapper

    return decorate


class CountingRetrier(Retrier):
    def __init__(self, max_attempts=3, base_delay=0.1, max_delay=1.0):
        super().__init__(max_attempts, base_delay, max_delay)
        self.attempt = 0

    async def call(self, fn, *args, **kwargs):
        self.attempt = 0
        while True:
            self.attempt += 1
            try:
                return await fn(*args, **kwargs)
            except Exception as error:
                if not self.should_retry(error, self.attempt):
                    raise
                delay = self.delay(error, self.attempt)
            await self.pause(delay)


def backoff_from(max_attempts=3, base_delay=0.1, max_delay=1.0, sleep=asyncio.sleep):
    delays = (full_jitter(n, base_delay, max_delay) for n in range(max_attempts - 1))

    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            while True:
                try:
                    return await fn(*args, **kwargs)
                except Exception as error:
                    delay, wait = next(delays, None), asked_wait(error)
                    if delay is None or not worth_retrying(error) or wait > PATIENCE:
                        raise
                await sleep(max(wait, delay))

        return wrapper

    return decorate


def retry_and_log(call, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
    async def resilient(path):
        for attempt in range(1, max_attempts + 1):
            try:
                return await call(path)
            except Exception as error:
                wait = asked_wait(error)
                if not worth_retrying(error) or wait > PATIENCE:
                    raise
                log.warning("attempt %d/%d for %s failed: %r", attempt, max_attempts, path, error)
            if attempt < max_attempts:
                await sleep(max(wait, full_jitter(attempt - 1, base_delay, max_delay)))

    return resilient


def bounded_attempts(max_attempts=3, base_delay=0.1, max_delay=1.0):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for attempt in range(max_attempts):
                delay = min(max_delay, base_delay * 2 ** min(attempt, 30))
                try:
                    return await asyncio.wait_for(fn(*args, **kwargs), timeout=delay)
                except Exception as error:
                    wait = asked_wait(error)
                    if attempt + 1 == max_attempts or not worth_retrying(error) or wait > PATIENCE:
                        raise
                await asyncio.sleep(max(wait, delay * random.uniform(0.5, 1)))

        return wrapper

    return decorate


class BackgroundRetrier(Retrier):
    def __init__(self, max_attempts=3, base_delay=0.1, max_delay=1.0):
        super().__init__(max_attempts, base_delay, max_delay)
        self._tasks = set()

    async def call(self, fn, *args, **kwargs):
        task = asyncio.create_task(super().call(fn, *args, **kwargs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


class ReproducibleRetrier(Retrier):
    def __init__(self, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0, seed=42):
        super().__init__(max_attempts, base_delay, max_delay)
        self.pause, self.seed = sleep, seed

    def delay(self, error, attempt):
        rng = random.Random(self.seed + attempt)
        ceiling = min(self.max_delay, self.base_delay * 2 ** min(attempt - 1, 30))
        return max(asked_wait(error), rng.uniform(ceiling / 2, ceiling))


def first_error_retry(call, max_attempts=3, base_delay=0.1, max_delay=1.0):
    async def resilient(path):
        failure = None
        for attempt in range(max_attempts):
            try:
                return await call(path)
            except Exception as error:
                failure = failure or error
                wait = asked_wait(error)
                if not worth_retrying(error) or wait > PATIENCE:
                    break
            if attempt < max_attempts - 1:
                await asyncio.sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))
        raise failure

    return resilient


def cache_busting_retry(call, max_attempts=3, base_delay=0.1, max_delay=1.0):
    async def resilient(path):
        for attempt in range(max_attempts):
            try:
                return await call(path)
            except Exception as error:
                wait = asked_wait(error)
                if attempt == max_attempts - 1 or not worth_retrying(error) or wait > PATIENCE:
                    raise
            path = f"{path}{'&' if '?' in path else '?'}retry={attempt + 1}"
            await asyncio.sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))

    return resilient


class ThrottleAwareRetrier(Retrier):
    async def call(self, fn, *args, **kwargs):
        attempt = 1
        while True:
            try:
                return await fn(*args, **kwargs)
            except Exception as error:
                if not self.should_retry(error, attempt):
                    raise
                delay = self.delay(error, attempt)
                if not asked_wait(error):
                    attempt += 1
            await self.pause(delay)


class BudgetRetrier(Retrier):
    """No more than a handful of retries in flight, so that we do not storm a weak server."""

    def __init__(self, max_attempts=3, base_delay=0.1, max_delay=1.0, budget=10):
        super().__init__(max_attempts, base_delay, max_delay)
        self.budget = budget

    async def call(self, fn, *args, **kwargs):
        for attempt in range(1, self.max_attempts + 1):
            try:
                result = await fn(*args, **kwargs)
                if attempt == 1:
                    return result
                self.budget = min(10, self.budget)
                return result
            except Exception as error:
                if not self.should_retry(error, attempt) or self.budget <= 0:
                    raise
                self.budget -= 1
                delay = self.delay(error, attempt)
            await self.pause(delay)


class AdaptiveRetrier(Retrier):
    def __init__(self, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
        super().__init__(max_attempts, base_delay, max_delay)
        self.pause, self.current = sleep, base_delay

    def delay(self, error, attempt):
        delay = self.current * random.uniform(0.5, 1)
        self.current = min(self.max_delay, self.current * 2)
        return max(asked_wait(error), delay)


def until_result(max_attempts=3, base_delay=0.1, max_delay=1.0, sleep=asyncio.sleep):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            for attempt in range(max_attempts):
                wait = 0.0
                try:
                    result = await fn(*args, **kwargs)
                    if result or attempt == max_attempts - 1:
                        return result
                except Exception as error:
                    wait = asked_wait(error)
                    if attempt == max_attempts - 1 or not worth_retrying(error) or wait > PATIENCE:
                        raise
                await sleep(max(wait, full_jitter(attempt, base_delay, max_delay)))

        return wrapper

    return decorate


class BaseCappedRetrier(Retrier):
    def delay(self, error, attempt):
        ceiling = min(self.max_delay, self.base_delay) * 2 ** (attempt - 1)
        return max(asked_wait(error), ceiling * random.uniform(0.5, 1))


class RetryFailed(Exception):
    def __init__(self, attempts, message):
        super().__init__(f"gave up after {attempts} attempts: {message}")


def domain_retry(call, sleep, max_attempts=3, base_delay=0.1, max_delay=1.0):
    retrier = Retrier(max_attempts, base_delay, max_delay)
    retrier.pause = sleep

    async def resilient(path):
        failure = None
        try:
            return await retrier.call(call, path)
        except Exception as error:
            failure = RetryFailed(max_attempts, error)
        raise failure

    return resilient


WRONG = {
    retry_times: ("it fails for good", "max_attempts is counted as retries: four calls in all with max_attempts=3"),
    retry_then_raise: ("it fails for good", "it sleeps once more after the last attempt before it raises"),
    ResettingRetrier: (
        "200 callers fail at one moment",
        "the delay is set back to base_delay at the head of each round: the waits never grow",
    ),
    ClampedRetrier: (
        "200 callers fail at one moment",
        "max() for min(): max_delay is a lower bound, the first wait is already about max_delay, later ones have no bound",
    ),
    JitteredRetrier: (
        "200 callers fail at one moment",
        "jitter of +-0.5 s around small delays without a clamp: negative delays (no wait at all), and less than retry_after",
    ),
    persistent: (
        "the caller is cancelled while a request is under way",
        "`except BaseException` with a default status of 503: cancellation and KeyboardInterrupt (and programming errors) are retried",
    ),
    InterruptibleRetrier: (
        "the caller is cancelled between two attempts",
        "a cancellation during the backoff is swallowed: the next attempt is made and the task goes on",
    ),
    CoroutineRetrier: (
        "it fails, and then it works",
        "the coroutine object is awaited again: the second attempt is RuntimeError (cannot reuse already awaited coroutine) in place of the call",
    ),
    retry_on_exception: ("errors of the caller: 400, 401, 404, 422", "each Exception is retried: also 400/401/404/422"),
    SerialRetrier: (
        "a slow call, beside others",
        "a lock is held over attempts and backoff: calls of many tasks go one after another",
    ),
    PoliteRetrier: (
        "the server says when to come back",
        "min() for max(): with retry_after longer than the backoff it waits less than the server asked for",
    ),
    blocking_backoff: ("it fails, and then it works", "time.sleep blocks the event loop during the backoff"),
    CountingRetrier: (
        "many callers share the retry",
        "the attempt counter is on the shared object and set to 0 by each call: with several tasks at once calls get too few or too many attempts",
    ),
    backoff_from: (
        "it fails, and then it works",
        "one generator of delays for the decorator: once two retries have been made, no later call is ever retried",
    ),
    retry_and_log: (
        "it fails for good",
        "after the last attempt it falls out of the loop and returns None in place of the error",
    ),
    bounded_attempts: (
        "a slow call, beside others",
        "the backoff delay is used as the attempt's timeout: a healthy call that takes longer than 0.1 s is cut off and repeated",
    ),
    BackgroundRetrier: (
        "the caller is cancelled between two attempts",
        "the retry loop runs in a shielded task: the caller's cancellation does not stop calls and retries",
    ),
    ReproducibleRetrier: (
        "200 callers fail at one moment",
        "the jitter's generator is seeded anew with a constant: all clients wait exactly alike",
    ),
    first_error_retry: (
        "it fails for good",
        "the first error reaches the caller, not the last (after 503 then 404: the 503)",
    ),
    cache_busting_retry: (
        "it fails, and then it works",
        "retries are made with another argument than the caller's (?retry=1 added)",
    ),
    ThrottleAwareRetrier: (
        "the server says when to come back",
        "errors with retry_after do not count as attempts: a server that always says 429 is called without end",
    ),
    BudgetRetrier: (
        "many callers share the retry",
        "the retry budget is never refilled: after ten retries in the object's life nothing is retried any more",
    ),
    AdaptiveRetrier: (
        "200 callers fail at one moment",
        "the grown delay is kept on the object and never set back: a later call's (or another task's) first wait is about max_delay",
    ),
    until_result: (
        "a success is returned, whatever it is",
        "a falsy result ([], 0, None, '') is taken for a failure and the call repeated",
    ),
    BaseCappedRetrier: (
        "many attempts: the waits stay within bounds",
        "the cap is applied before the exponent: with many attempts (more than 4 with 0.1 and 1.0) the waits grow without bound",
    ),
    domain_retry: (
        "it fails for good",
        "raised outside of the except: the last error is neither raised nor the cause, only text in another class's message (also for a 404)",
    ),
}
RIGHT = [retrying, Retrier, decorrelated, Attempts, BackoffPolicy, recursive_retry, WrappingRetrier, retry_with_timeout]
