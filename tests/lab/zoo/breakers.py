"""Circuit breakers as engineers write them: right ones, and wrong ones with one plausible mistake each."""

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from time import monotonic

log = logging.getLogger("breakers")
CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"


class CircuitOpenError(RuntimeError):
    """The circuit is open: the dependency was not called."""


def is_outage(error):
    """True for what is the dependency's fault; a 4xx is the caller's own."""
    status = getattr(error, "status", None)
    return status is None or status >= 500


# ------------------------------------------------------------------ right


class CircuitBreaker:
    def __init__(self, failure_threshold: int = 5, recovery_timeout: float = 30.0, clock=time.monotonic):
        self.failure_threshold = failure_threshold
        self.recovery_timeout = recovery_timeout
        self.clock = clock
        self.state = CLOSED
        self.failures = 0
        self.opened_at = 0.0
        self.epoch = 0
        self.probing = False

    async def call(self, fn, *args, **kwargs):
        ticket = self.admit()
        try:
            result = await fn(*args, **kwargs)
        except Exception as error:
            if self.is_failure(error):
                self.on_failure(ticket)
            else:
                self.on_success(ticket)
            raise
        except BaseException:
            self.on_abandoned(ticket)
            raise
        self.on_success(ticket)
        return result

    def is_failure(self, error):
        return is_outage(error)

    def cooled_down(self):
        return self.clock() - self.opened_at >= self.recovery_timeout

    def admit(self):
        if self.state == OPEN and self.cooled_down():
            self.move(HALF_OPEN)
        if self.state == OPEN or (self.state == HALF_OPEN and self.probing):
            raise CircuitOpenError(f"circuit is {self.state}")
        self.probing = self.state == HALF_OPEN
        return self.epoch

    def move(self, state):
        self.state, self.failures, self.probing = state, 0, False
        self.epoch += 1
        if state == OPEN:
            self.opened_at = self.clock()

    def on_failure(self, ticket):
        if ticket != self.epoch:
            return
        self.failures += 1
        if self.state == HALF_OPEN or self.failures >= self.failure_threshold:
            self.move(OPEN)

    def on_success(self, ticket):
        if ticket != self.epoch:
            return
        if self.state == HALF_OPEN:
            self.move(CLOSED)
        self.failures = 0

    def on_abandoned(self, ticket):
        if ticket == self.epoch:
            self.probing = False


def circuit(failure_threshold=5, recovery_timeout=30.0):
    def decorate(fn):
        failures, epoch = 0, 0
        opened_at = probe = None

        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            nonlocal failures, epoch, opened_at, probe
            me = object()
            if opened_at is not None:
                if probe is not None or time.monotonic() - opened_at < recovery_timeout:
                    raise CircuitOpenError(getattr(fn, "__name__", "call"))
                probe = me
            born = epoch
            try:
                result = await fn(*args, **kwargs)
            except Exception as error:
                healthy = not is_outage(error)
                raise
            except BaseException:
                healthy = None
                raise
            else:
                healthy = True
                return result
            finally:
                mine, probe = probe is me, None if probe is me else probe
                if mine and healthy:
                    failures, opened_at, epoch = 0, None, epoch + 1
                elif mine and healthy is False:
                    opened_at = time.monotonic()
                elif born == epoch and opened_at is None and healthy is not None:
                    failures = 0 if healthy else failures + 1
                    if failures >= failure_threshold:
                        opened_at, epoch = time.monotonic(), epoch + 1

        return wrapper

    return decorate


@dataclass
class _Circuit:
    limit: int
    failures: int = 0
    retry_at: float | None = None
    probe: object = None
    generation: int = 0


def protect(call, clock, failure_threshold=5, recovery_timeout=30.0):
    c = _Circuit(failure_threshold)

    def trip():
        c.retry_at, c.failures, c.generation = clock() + recovery_timeout, 0, c.generation + 1

    async def protected(path):
        token = (c.generation, object())
        if c.retry_at is not None:
            if c.probe or clock() < c.retry_at:
                raise CircuitOpenError(path)
            c.probe = token
        try:
            result = await call(path)
        except Exception as error:
            if c.probe is token:
                if is_outage(error):
                    trip()
                else:
                    c.retry_at, c.generation = None, c.generation + 1
            elif token[0] == c.generation:
                c.failures = c.failures + 1 if is_outage(error) else 0
                if c.failures >= c.limit:
                    trip()
            raise
        else:
            if c.probe is token:
                c.retry_at, c.generation = None, c.generation + 1
            elif token[0] == c.generation:
                c.failures = 0
            return result
        finally:
            if c.probe is token:
                c.probe = None

    return protected


class LoopClockBreaker:
    """`async with breaker.attempt(): ...`, every attempt an object of its own."""

    class _Attempt:
        def __init__(self, breaker):
            self.breaker = breaker

        async def __aenter__(self):
            self.ticket = self.breaker._rules.admit()
            return self

        async def __aexit__(self, kind, error, tb):
            rules = self.breaker._rules
            if error is None or (isinstance(error, Exception) and not is_outage(error)):
                rules.on_success(self.ticket)
            elif isinstance(error, Exception):
                rules.on_failure(self.ticket)
            else:
                rules.on_abandoned(self.ticket)
            return False

    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        self._rules = CircuitBreaker(
            failure_threshold, recovery_timeout, clock=lambda: asyncio.get_running_loop().time()
        )

    def attempt(self):
        return self._Attempt(self)

    async def call(self, fn, *args, **kwargs):
        async with self.attempt():
            return await fn(*args, **kwargs)


class _Closed:
    def __init__(self, owner):
        self.owner, self.bad = owner, 0

    def enter(self):
        return self

    def leave(self, healthy):
        if healthy is None:
            return
        self.bad = 0 if healthy else self.bad + 1
        if self.bad >= self.owner.failure_threshold:
            self.owner.become(self, _Open)


class _Open:
    def __init__(self, owner):
        self.owner, self.since = owner, owner.now()

    def enter(self):
        if self.owner.now() - self.since < self.owner.recovery_timeout:
            raise CircuitOpenError("open")
        self.owner.become(self, _HalfOpen)
        return self.owner.state.enter()


class _HalfOpen:
    def __init__(self, owner):
        self.owner, self.busy = owner, False

    def enter(self):
        if self.busy:
            raise CircuitOpenError("a probe is under way")
        self.busy = True
        return self

    def leave(self, healthy):
        self.busy = False
        if healthy is not None:
            self.owner.become(self, _Closed if healthy else _Open)


class StatePatternBreaker:
    """A result is told to the state the call began in; a state that is gone no longer matters."""

    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        self.failure_threshold, self.recovery_timeout = failure_threshold, recovery_timeout
        self.state = _Closed(self)

    def now(self):
        return monotonic()

    def become(self, old, new):
        if self.state is old:
            self.state = new(self)

    def __call__(self, fn):
        @functools.wraps(fn)
        async def guarded(*args, **kwargs):
            entered = self.state.enter()
            healthy = None
            try:
                result = await fn(*args, **kwargs)
                healthy = True
                return result
            except Exception as error:
                healthy = not is_outage(error)
                raise
            finally:
                entered.leave(healthy)

        return guarded


class LastCallsBreaker(CircuitBreaker):
    """Opens when `failure_threshold` of the last twice as many calls failed."""

    def __init__(self, failure_threshold=5, recovery_timeout=30.0, clock=time.monotonic):
        super().__init__(failure_threshold, recovery_timeout, clock)
        self.window = deque(maxlen=2 * failure_threshold)

    def move(self, state):
        super().move(state)
        self.window.clear()

    def on_failure(self, ticket):
        if ticket != self.epoch:
            return
        self.window.append(True)
        if self.state == HALF_OPEN or sum(self.window) >= self.failure_threshold:
            self.move(OPEN)

    def on_success(self, ticket):
        if ticket != self.epoch:
            return
        if self.state == HALF_OPEN:
            self.move(CLOSED)
        self.window.append(False)


class FewProbesBreaker:
    """Up to three probes at a time; the first answer decides."""

    def __init__(self, call, clock, failure_threshold=5, recovery_timeout=30.0, probes=3):
        self.fn, self.clock = call, clock
        self.failure_threshold, self.recovery_timeout, self.probes = failure_threshold, recovery_timeout, probes
        self._switch(CLOSED)

    def _switch(self, mode):
        self.epoch = {"mode": mode, "since": self.clock(), "failures": 0, "free": self.probes}

    async def __call__(self, *args, **kwargs):
        if self.epoch["mode"] == OPEN and self.clock() >= self.epoch["since"] + self.recovery_timeout:
            self._switch(HALF_OPEN)
        epoch = self.epoch
        if epoch["mode"] == OPEN or (epoch["mode"] == HALF_OPEN and epoch["free"] == 0):
            raise CircuitOpenError(epoch["mode"])
        epoch["free"] -= epoch["mode"] == HALF_OPEN
        try:
            result = await self.fn(*args, **kwargs)
        except Exception as error:
            self._record(epoch, not is_outage(error))
            raise
        except BaseException:
            epoch["free"] += epoch["mode"] == HALF_OPEN
            raise
        self._record(epoch, True)
        return result

    def _record(self, epoch, healthy):
        if epoch is not self.epoch:
            return
        epoch["failures"] = 0 if healthy else epoch["failures"] + 1
        if epoch["mode"] == HALF_OPEN:
            self._switch(CLOSED if healthy else OPEN)
        elif epoch["failures"] >= self.failure_threshold:
            self._switch(OPEN)


class TimerBreaker:
    """The event loop's own timer moves it from open to half open."""

    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        self.failure_threshold, self.recovery_timeout = failure_threshold, recovery_timeout
        self.state, self.failures, self.version = CLOSED, 0, 0

    def _set(self, state):
        self.state, self.failures, self.version = state, 0, self.version + 1
        if state == OPEN:
            asyncio.get_running_loop().call_later(self.recovery_timeout, self._set, HALF_OPEN)

    async def call(self, fn, *args):
        if self.state in (OPEN, "probing"):
            raise CircuitOpenError(self.state)
        if self.state == HALF_OPEN:
            self._set("probing")
        version = self.version
        healthy = None
        try:
            result = await fn(*args)
            healthy = True
        except Exception as error:
            healthy = not is_outage(error)
            raise
        finally:
            if version == self.version:
                if self.state == "probing":
                    self._set(HALF_OPEN if healthy is None else CLOSED if healthy else OPEN)
                elif healthy is not None:
                    self.failures = 0 if healthy else self.failures + 1
                    if self.failures >= self.failure_threshold:
                        self._set(OPEN)
        return result


# ------------------------------------------------------------------ wrong


class LifetimeFailuresBreaker(CircuitBreaker):
    def on_success(self, ticket):
        if ticket == self.epoch and self.state == HALF_OPEN:
            self.move(CLOSED)


class StrictThresholdBreaker(CircuitBreaker):
    def on_failure(self, ticket):
        if ticket != self.epoch:
            return
        self.failures += 1
        if self.state == HALF_OPEN or self.failures > self.failure_threshold:
            self.move(OPEN)


class ElapsedMillisBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=time.monotonic)

    def cooled_down(self):
        elapsed_ms = (self.clock() - self.opened_at) * 1000
        return elapsed_ms >= self.recovery_timeout


class NotifyingBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0, clock=time.monotonic):
        super().__init__(failure_threshold, recovery_timeout, clock)
        self.events = asyncio.Queue(maxsize=1000)

    async def publish(self, event):
        await asyncio.sleep(0)
        if not self.events.full():
            self.events.put_nowait(event)

    async def call(self, fn, *args, **kwargs):
        if self.state == OPEN and self.cooled_down():
            self.move(HALF_OPEN)
        if self.state == OPEN or (self.state == HALF_OPEN and self.probing):
            raise CircuitOpenError(self.state)
        if self.state == HALF_OPEN:
            await self.publish("probe")
            self.probing = True
        ticket = self.epoch
        try:
            result = await fn(*args, **kwargs)
        except Exception as error:
            (self.on_failure if is_outage(error) else self.on_success)(ticket)
            raise
        except BaseException:
            self.on_abandoned(ticket)
            raise
        self.on_success(ticket)
        return result


def half_open_guard(call, clock, failure_threshold=5, recovery_timeout=30.0):
    state = {"failures": 0, "opened_at": None, "probing": False, "epoch": 0}

    async def guarded(path):
        probe = False
        if state["opened_at"] is not None:
            if state["probing"] or clock() - state["opened_at"] < recovery_timeout:
                raise CircuitOpenError(path)
            probe = state["probing"] = True
        epoch = state["epoch"]
        try:
            result = await call(path)
        except Exception as error:
            if probe:
                state["probing"] = False
            if not is_outage(error):
                if probe:
                    state.update(opened_at=None, failures=0, epoch=epoch + 1)
                raise
            if probe:
                state["opened_at"] = clock()
            elif epoch == state["epoch"] and state["opened_at"] is None:
                state["failures"] += 1
                if state["failures"] >= failure_threshold:
                    state.update(opened_at=clock(), epoch=epoch + 1)
            raise
        if probe:
            state.update(opened_at=None, failures=0, probing=False, epoch=epoch + 1)
        elif epoch == state["epoch"]:
            state["failures"] = 0
        return result

    return guarded


class IgnoredErrorsBreaker(CircuitBreaker):
    ignored = (400, 401, 403, 404, 409, 422, 429)

    async def call(self, fn, *args, **kwargs):
        ticket = self.admit()
        try:
            result = await fn(*args, **kwargs)
        except Exception as error:
            if getattr(error, "status", None) in self.ignored:
                raise
            self.on_failure(ticket)
            raise
        except BaseException:
            self.on_abandoned(ticket)
            raise
        self.on_success(ticket)
        return result


class SimpleBreaker:
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        self.failure_threshold, self.recovery_timeout = failure_threshold, recovery_timeout
        self.failures, self.state, self.opened_at, self.probe = 0, CLOSED, 0.0, None

    def __call__(self, fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            me = object()
            if self.state == OPEN:
                if self.probe or time.monotonic() - self.opened_at < self.recovery_timeout:
                    raise CircuitOpenError("circuit open")
                self.probe = me
            try:
                result = await fn(*args, **kwargs)
            except Exception as error:
                if is_outage(error):
                    self._failed(probe=self.probe is me)
                else:
                    self._succeeded()
                raise
            else:
                self._succeeded()
                return result
            finally:
                if self.probe is me:
                    self.probe = None

        return wrapper

    def _succeeded(self):
        self.failures, self.state = 0, CLOSED

    def _failed(self, probe):
        if self.state == OPEN and not probe:
            return
        self.failures += 1
        if probe or self.failures >= self.failure_threshold:
            self.state, self.opened_at = OPEN, time.monotonic()


class StragglerBreaker(CircuitBreaker):
    def move(self, state):
        failures = self.failures
        super().move(state)
        self.failures = 0 if state == CLOSED else failures

    def on_failure(self, ticket):
        self.failures += 1
        if self.state == HALF_OPEN or self.failures >= self.failure_threshold:
            self.move(OPEN)


class TryBlockBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: asyncio.get_running_loop().time())

    async def call(self, fn, *args, **kwargs):
        ticket = self.epoch
        try:
            ticket = self.admit()
            result = await fn(*args, **kwargs)
        except Exception as error:
            (self.on_failure if is_outage(error) else self.on_success)(ticket)
            raise
        except BaseException:
            self.on_abandoned(ticket)
            raise
        self.on_success(ticket)
        return result


class EveryExitBreaker(CircuitBreaker):
    async def call(self, fn, *args, **kwargs):
        ticket = self.admit()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            if is_outage(error):
                self.on_failure(ticket)
            else:
                self.on_success(ticket)
            raise
        self.on_success(ticket)
        return result


class TimestampBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: time.time())


def with_circuit_breaker(failure_threshold=5, recovery_timeout=30.0):
    def decorate(fn):
        @functools.wraps(fn)
        async def wrapper(*args, **kwargs):
            breaker = CircuitBreaker(failure_threshold, recovery_timeout)
            return await breaker.call(fn, *args, **kwargs)

        return wrapper

    return decorate


def named_circuit(failure_threshold=5, recovery_timeout=30.0, registry={}):
    def decorate(fn):
        name = getattr(fn, "__name__", "call")
        if name not in registry:
            registry[name] = CircuitBreaker(failure_threshold, recovery_timeout, clock=lambda: time.monotonic())
        return functools.wraps(fn)(functools.partial(registry[name].call, fn))

    return decorate


def quiet_probe_guard(call, failure_threshold=5, recovery_timeout=30.0):
    breaker = CircuitBreaker(failure_threshold, recovery_timeout, clock=lambda: time.monotonic())

    async def guarded(path):
        ticket = breaker.admit()
        try:
            result = await call(path)
        except Exception as error:
            if not is_outage(error):
                breaker.on_success(ticket)
                raise
            probe = breaker.state == HALF_OPEN
            breaker.on_failure(ticket)
            if not probe:
                raise
            log.warning("still down: %s", error)
        except BaseException:
            breaker.on_abandoned(ticket)
            raise
        else:
            breaker.on_success(ticket)
            return result

    return guarded


class LockedBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0, clock=time.monotonic):
        super().__init__(failure_threshold, recovery_timeout, clock)
        self._lock = asyncio.Lock()

    async def call(self, fn, *args, **kwargs):
        async with self._lock:
            return await super().call(fn, *args, **kwargs)


class FirstOpenedBreaker:
    def __init__(self, call, failure_threshold=5, recovery_timeout=30.0):
        self._fn, self._threshold, self._timeout = call, failure_threshold, recovery_timeout
        self._failures, self._opened_at, self._probe, self._epoch = 0, None, None, 0

    def _trip(self):
        if self._opened_at is None:
            self._opened_at = time.monotonic()
            self._epoch += 1

    def _close(self):
        self._opened_at, self._failures = None, 0
        self._epoch += 1

    async def __call__(self, path):
        token = object()
        if self._opened_at is not None:
            if self._probe or time.monotonic() - self._opened_at < self._timeout:
                raise CircuitOpenError(path)
            self._probe = token
        epoch = self._epoch
        try:
            result = await self._fn(path)
        except Exception as error:
            if epoch == self._epoch:
                if not is_outage(error):
                    self._close() if self._probe is token else None
                else:
                    self._failures += 1
                    if self._failures >= self._threshold:
                        self._trip()
            raise
        else:
            if self._probe is token:
                self._close()
            elif epoch == self._epoch and self._opened_at is None:
                self._failures = 0
            return result
        finally:
            if self._probe is token:
                self._probe = None


class FreshCountBreaker(CircuitBreaker):
    def on_failure(self, ticket):
        if ticket != self.epoch:
            return
        self.failures += 1
        self.probing = False
        if self.failures >= self.failure_threshold:
            self.move(OPEN)


class StickyCountBreaker(CircuitBreaker):
    def move(self, state):
        failures = self.failures
        super().move(state)
        self.failures = failures

    def on_success(self, ticket):
        if ticket != self.epoch:
            return
        if self.state == HALF_OPEN:
            self.move(CLOSED)
        else:
            self.failures = 0


class AnyErrorBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: time.monotonic())

    def is_failure(self, error):
        return True


class ThreadSafeBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: time.monotonic())
        self._lock = threading.Lock()

    async def call(self, fn, *args, **kwargs):
        with self._lock:
            return await super().call(fn, *args, **kwargs)


class TripReportingBreaker(CircuitBreaker):
    async def call(self, fn, *args, **kwargs):
        before = self.epoch
        try:
            return await super().call(fn, *args, **kwargs)
        except CircuitOpenError:
            raise
        except Exception as error:
            if self.state == OPEN and self.epoch != before:
                raise CircuitOpenError("too many failures, circuit opened") from error
            raise


class SnapshotBreaker:
    @dataclass
    class _State:
        failures: int = 0
        opened_at: float | None = None
        probing: list = field(default_factory=list)

    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        self.threshold, self.timeout, self.state = failure_threshold, recovery_timeout, self._State()

    async def call(self, fn, *args):
        state, now = self.state, asyncio.get_running_loop().time
        probe = state.opened_at is not None
        if probe and (state.probing or now() - state.opened_at < self.timeout):
            raise CircuitOpenError("open")
        failures = state.failures
        if probe:
            state.probing.append(args)
        try:
            result = await fn(*args)
        except Exception as error:
            if state is self.state:
                if is_outage(error):
                    state.failures = failures + 1
                    if probe or state.failures >= self.threshold:
                        self.state = self._State(state.failures, now())
                elif probe:
                    self.state = self._State()
                else:
                    state.failures = 0
            raise
        finally:
            if probe:
                state.probing.clear()
        if probe and state is self.state:
            self.state = self._State()
        state.failures = 0
        return result


class ContextBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: time.monotonic())

    async def __aenter__(self):
        self._ticket = self.admit()
        return self

    async def __aexit__(self, kind, error, tb):
        if error is None or (isinstance(error, Exception) and not is_outage(error)):
            self.on_success(self._ticket)
        elif isinstance(error, Exception):
            self.on_failure(self._ticket)
        else:
            self.on_abandoned(self._ticket)
        return False

    async def call(self, fn, *args, **kwargs):
        async with self:
            return await fn(*args, **kwargs)


class ShieldedBreaker(CircuitBreaker):
    async def call(self, fn, *args, **kwargs):
        async def shielded():
            return await asyncio.shield(fn(*args, **kwargs))

        return await super().call(shielded)


def one_probe_guard(call, clock, failure_threshold=5, recovery_timeout=30.0):
    breaker = CircuitBreaker(failure_threshold, recovery_timeout, clock)

    async def guarded(path):
        ticket = breaker.admit()
        try:
            result = await call(path)
        except Exception as error:
            (breaker.on_failure if is_outage(error) else breaker.on_success)(ticket)
            raise
        else:
            breaker.on_success(ticket)
            return result
        finally:
            breaker.probing = False

    return guarded


class SemaphoreBreaker(CircuitBreaker):
    def __init__(self, failure_threshold=5, recovery_timeout=30.0):
        super().__init__(failure_threshold, recovery_timeout, clock=lambda: asyncio.get_running_loop().time())
        self._probes = asyncio.Semaphore(1)

    async def call(self, fn, *args, **kwargs):
        if self.state == OPEN and self.cooled_down():
            self.move(HALF_OPEN)
        if self.state == OPEN:
            raise CircuitOpenError("open")
        if self.state == CLOSED:
            return await self._run(fn, args, kwargs)
        async with self._probes:
            return await self._run(fn, args, kwargs)

    async def _run(self, fn, args, kwargs):
        ticket = self.epoch
        try:
            result = await fn(*args, **kwargs)
        except Exception as error:
            (self.on_failure if is_outage(error) else self.on_success)(ticket)
            raise
        self.on_success(ticket)
        return result


WRONG = {
    LifetimeFailuresBreaker: (
        "one call in a hundred fails",
        "a success never resets the count in the closed state: five failures in the whole life (a healthy dependency with 1 % failures) open it",
    ),
    StrictThresholdBreaker: (
        "the dependency is down: callers are refused at once, until it is back",
        "`>` for `>=`: it opens only after the sixth failure in a row",
    ),
    ElapsedMillisBreaker: (
        "the dependency is down: callers are refused at once, until it is back",
        "elapsed milliseconds are compared with seconds: it probes 30 ms after opening instead of 30 s",
    ),
    NotifyingBreaker: (
        "50 callers when the recovery time is over",
        "it awaits between looking at the probe flag and setting it: of 50 callers at once after the recovery timeout, all go through",
    ),
    half_open_guard: (
        "the probe is cancelled",
        "a cancelled probe (CancelledError is no Exception) never gives the probe flag back: it refuses for ever",
    ),
    IgnoredErrorsBreaker: (
        "the probe is answered 404",
        "a probe that ends with a 4xx is re-raised without giving the probe back or closing: it refuses for ever",
    ),
    SimpleBreaker: (
        "a success comes late, from before the opening",
        "a success of a call that began before the opening closes the open circuit at once",
    ),
    StragglerBreaker: (
        "failures come late, from before the opening",
        "failures of calls that began before the opening open it anew each time: they push the recovery timeout forward, and one that comes during the half-open state ends it",
    ),
    TryBlockBreaker: (
        "refused callers go on asking",
        "the refusal is raised inside the try and so counted as a failure: every fifth refused call renews the recovery timeout (under steady traffic it never probes), and one refused while a probe is under way reopens it",
    ),
    EveryExitBreaker: (
        "callers go away",
        "cancelled calls count as failures: five callers that hang up open it, a cancelled probe opens it for another full timeout",
    ),
    with_circuit_breaker: (
        "the dependency is down: callers are refused at once, until it is back",
        "a new breaker for each call: it never opens",
    ),
    named_circuit: (
        "two dependencies: one is down",
        "a mutable default registry by the function's name: two functions of the same name (two dependencies) share a circuit, one's outage refuses the other's calls",
    ),
    quiet_probe_guard: (
        "the probe fails",
        "the error of a failed probe is logged and swallowed: the caller gets None as a result",
    ),
    LockedBreaker: (
        "50 callers when the recovery time is over",
        "an asyncio.Lock is held while the dependency is called: concurrent calls go one after another, and calls that should be refused wait behind a hung one",
    ),
    FirstOpenedBreaker: (
        "the probe fails",
        "a failed probe does not renew opened_at: after the first recovery timeout each caller in turn probes the dead dependency",
    ),
    FreshCountBreaker: (
        "the probe fails",
        "half open it needs five failures again before it reopens: five calls in a row go to the dead dependency after each timeout",
    ),
    StickyCountBreaker: (
        "it closes, and counts anew",
        "closing by a probe leaves the old failure count: the first failure right after a recovery opens it again",
    ),
    ThreadSafeBreaker: (
        "a healthy dependency is called, and its answers and errors come through",
        "a threading.Lock is held across the await: a second call at the same time blocks the event loop for ever",
    ),
    SnapshotBreaker: (
        "failures come all at once",
        "the count is read before the await and written after it: 50 calls failing at the same time count as one, it opens late",
    ),
    ContextBreaker: (
        "a call from before the opening ends while a probe is under way",
        "the ticket is kept on the shared context manager: with concurrent calls a late result from before the opening uses the probe's ticket and closes or reopens the circuit while the probe is still out",
    ),
    ShieldedBreaker: (
        "callers go away",
        "the call is shielded: cancelling the caller leaves the call to the dependency running in the background",
    ),
    one_probe_guard: (
        "a call from before the opening ends while a probe is under way",
        "each call's finally clears the probe flag, also one that began before the opening: a second probe goes through while the first is under way",
    ),
    SemaphoreBreaker: (
        "50 callers when the recovery time is over",
        "half-open callers queue for the probe instead of being refused, and do not look at the state again: after a failed probe all 50 go to the dead dependency one after another",
    ),
}
NOT_FOUND = {
    TimestampBreaker: "time.time() as its clock: the wall clock set back keeps it open far longer, set forward lets it probe early",
    AnyErrorBreaker: "the caller's own errors (404, 422) count as failures: one client with bad requests opens it for all",
    TripReportingBreaker: "the failure that trips it reaches its caller as CircuitOpenError (the real error only as its cause), though the dependency was called",
}
RIGHT = [
    CircuitBreaker,
    circuit,
    protect,
    LoopClockBreaker,
    StatePatternBreaker,
    LastCallsBreaker,
    FewProbesBreaker,
    TimerBreaker,
]
