"""CircuitBreaker: every promise, on a clock moved by hand; against a model, from many threads, ended at every await."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from distsys import CircuitBreakers, RateLimited, TimeWindow, circuit_breaker, retry
from distsys.errors import BulkheadFull, CircuitOpen
from distsys.resilience import circuit_breaker as module
from distsys.resilience.circuit_breaker import Change, CircuitBreaker, Closed, HalfOpen, Period, Snapshot
from distsys.resilience.windows import LastSeconds
from tests.bugs import kills, replaced
from tests.ids import shown
from tests.resilience import broken
from tests.resilience.threads import in_threads
from tests.resilience.virtual import Clock, at_every_await, run


class Pause:
    """An await point: the call rests here until the test goes on with it."""

    def __await__(self) -> Generator[None, Any, Any]:
        return (yield)


async def work() -> Any:
    return await Pause()


def begin(policy: CircuitBreaker) -> Coroutine[Any, Any, Any]:
    """A call under way in the dependency; CircuitOpen if it does not get there."""
    call = policy.call(work)
    call.send(None)
    return call


def end(call: Coroutine[Any, Any, Any], error: BaseException | None = None) -> None:
    """It returns, or raises `error`."""
    if error is None:
        with pytest.raises(StopIteration):
            call.send("done")
        return
    with pytest.raises(type(error)) as raised:
        call.throw(error)
    assert raised.value is error


def breaker(**options: Any) -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    return circuit_breaker(**{"clock": clock, "rng": lambda: 0.0, **options}), clock


def fail(policy: CircuitBreaker, times: int = 1, error: type[Exception] = ConnectionResetError) -> None:
    for _ in range(times):
        end(begin(policy), error())


def refused(policy: CircuitBreaker) -> CircuitOpen:
    with pytest.raises(CircuitOpen) as raised:
        begin(policy)
    return raised.value


def half_open(**options: Any) -> tuple[CircuitBreaker, Clock]:
    """At the end of the cool-down."""
    policy, clock = breaker(**{"failure_threshold": 1, "recovery_timeout": 30, **options})
    fail(policy)
    clock.now += 30
    return policy, clock


# ---- against a model


class Machine(RuleBasedStateMachine):
    """Calls begin and end in any order, the clock goes on, somebody steers: state, counts and waits as the model's."""

    calls = Bundle("calls")

    @initialize(
        window=st.sampled_from([None, 4, 10, TimeWindow(10)]),
        threshold=st.integers(1, 4),
        rate=st.sampled_from([None, 0.5, 0.7]),
        minimum=st.integers(1, 4),
        needed=st.integers(1, 3),
        places=st.integers(1, 3),
        recovery=st.sampled_from([0.0, 4.0, 30.0]),
        slow=st.sampled_from([None, 5.0]),
    )
    def make(self, window: Any, threshold: int, rate: Any, minimum: int, needed: int, places: int, **more: Any) -> None:
        self.window, self.threshold, self.minimum, self.needed, self.places = window, threshold, minimum, needed, places
        self.rate = None if window is None else rate
        self.recovery, self.slow, self.clock = more["recovery"], more["slow"], Clock()
        self.breaker = circuit_breaker(
            threshold,
            self.recovery,
            window=window,
            failure_rate=self.rate,
            minimum_calls=minimum,
            success_threshold=needed,
            half_open_max_calls=places,
            slow_call_threshold=self.slow,
            clock=self.clock,
            rng=lambda: 0.5,
        )
        self.period, self.failed_probes, self.until = 0, 0, 0.0
        self.change("closed")
        self.under_way: list[Any] = []

    def change(self, state: str) -> None:
        self.period, self.state, self.counted = self.period + 1, state, []
        self.running, self.succeeded, self.give_up = 0, 0, 0.0

    def open(self, asked: float = 0.0) -> None:
        wait = max(self.recovery * 2**self.failed_probes, asked)
        self.change("open")
        self.until = self.clock.now + min(wait, 8 * self.recovery) * 1.05

    def counts(self) -> tuple[int, int]:
        failures = [failed for _, failed in self.counted]
        if isinstance(self.window, TimeWindow):
            recent = [failed for at, failed in self.counted if int(at) > int(self.clock.now) - 10]
        else:
            recent = failures[-(self.window or self.threshold) :]
        return len(recent), sum(recent)

    @rule(target=calls)
    def begins(self) -> Any:
        if self.state == "half_open" and self.running == self.places and self.clock.now >= self.give_up:
            self.failed_probes += 1
            self.open()
        if self.state == "open" and self.clock.now >= self.until:
            self.change("half_open")
        if self.state == "half_open" and self.running < self.places:
            self.running, self.give_up = self.running + 1, self.clock.now + max(self.recovery, 10)
        elif self.state != "closed":
            error = refused(self.breaker)
            waits = {"open": self.until - self.clock.now, "half_open": min(1.0, self.recovery)}
            assert (error.state, error.retry_after) == (self.state, waits.get(self.state, self.recovery))
            return multiple()
        call = (begin(self.breaker), self.period, self.clock.now)
        self.under_way.append(call[0])
        return call

    @rule(call=consumes(calls), how=st.sampled_from(["returns", "fails", "asks", "4xx", "refused", "cancel", "close"]))
    def ends(self, call: Any, how: str) -> None:
        coroutine, period, began = call
        self.under_way.remove(coroutine)
        errors = {"fails": OSError(), "asks": Asking(), "4xx": ValueError(), "refused": BulkheadFull()}
        errors["cancel"] = asyncio.CancelledError()
        if how == "close":
            coroutine.close()
        else:
            end(coroutine, errors.get(how))
        if period != self.period:
            return
        slow = how == "returns" and self.slow is not None and self.clock.now - began >= self.slow
        if how in ("refused", "cancel", "close"):
            self.running -= self.state == "half_open"
        elif how in ("fails", "asks") or slow:
            self.fails(50.0 * (how == "asks"))
        elif self.state == "half_open":
            self.running, self.succeeded = self.running - 1, self.succeeded + 1
            if self.succeeded >= self.needed:
                self.failed_probes = 0
                self.change("closed")
        else:
            self.counted.append((self.clock.now, False))

    def fails(self, asked: float) -> None:
        if self.state == "half_open":
            self.failed_probes += 1
            self.open(asked)
            return
        self.counted.append((self.clock.now, True))
        calls, failures = self.counts()
        if self.rate is None:
            reached = failures >= self.threshold
        else:
            reached = calls >= self.minimum and failures * 10 >= round(self.rate * 10) * calls
        if reached:
            self.open(asked)

    @rule(passed=st.sampled_from([0.5, 1.0, 2.5, 5.0, 11.0, 32.0, 300.0]))
    def time_goes_on(self, passed: float) -> None:
        self.clock.now += passed

    @rule(how=st.sampled_from(["reset", "force_open", "isolate"]))
    def somebody_steers(self, how: str) -> None:
        getattr(self.breaker, how)()
        if how == "force_open":
            self.open()
            return
        self.failed_probes *= how != "reset"
        self.change("closed" if how == "reset" else "isolated")

    @invariant()
    def is_as_the_model(self) -> None:
        if hasattr(self, "breaker"):
            assert self.breaker.state == self.state
            assert self.breaker.snapshot == (self.counts() if self.state == "closed" else (0, 0))

    def teardown(self) -> None:
        for coroutine in getattr(self, "under_way", ()):
            coroutine.close()


class Asking(OSError):
    """An error like that of an HTTP client that received a Retry-After."""

    retry_after = 50.0


def test_it_is_in_the_state_of_the_model_whatever_happens() -> None:
    """Random calls, outcomes, cancellations, times and hands, for all windows and criteria."""
    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))


# ---- states, one by one


@kills("a success forgets the failures, although a window is asked for", replaced(module, "LastCalls", broken.InARow))
def test_failures_in_the_window_open_it_and_successes_between_them_do_not_help() -> None:
    """Five of the last ten: a consecutive counter would never see it when every other call fails."""
    policy, clock = breaker(failure_threshold=5, recovery_timeout=30)
    for _ in range(4):
        fail(policy)
        end(begin(policy))
    assert (policy.state, policy.snapshot) == ("closed", Snapshot(8, 4))
    fail(policy)
    assert policy.state == "open"
    assert policy.last_change == Change(
        "closed", "open", "5 of 9 calls failed, the last one: ConnectionResetError()", Snapshot(9, 5), clock.now
    )
    assert policy.last_change.snapshot.failure_rate == 5 / 9
    error = refused(policy)
    assert (error.retry_after, error.state, policy.rejected) == (30.0, "open", 1)
    assert "is open: 5 of 9 calls failed" in str(error)


def test_without_a_window_only_failures_in_a_row_count() -> None:
    """The counter of most packages, when one asks for it."""
    policy, _ = breaker(failure_threshold=3, window=None)
    for _ in range(9):
        fail(policy, 2)
        end(begin(policy))
    fail(policy, 2)
    assert policy.state == "closed"
    fail(policy)
    assert policy.state == "open"


@pytest.mark.parametrize("rate", [n / 10 for n in range(1, 11)])
def test_a_rate_is_reached_when_it_is_equal(rate: float) -> None:
    """7 of 10 are 0.7, although 0.7 * 10 is a little more than 7; below minimum_calls there is no rate."""
    policy, _ = breaker(failure_rate=rate, window=10, minimum_calls=10)
    for _ in range(10 - round(rate * 10)):
        end(begin(policy))
    fail(policy, round(rate * 10) - 1)
    assert policy.state == "closed"
    fail(policy)
    assert policy.state == "open"


@kills("nothing leaves a window of time", replaced(LastSeconds, "_newest", broken.all_time))
def test_calls_leave_a_window_of_time_a_tenth_at_a_time() -> None:
    """Between 0.9 and 1 of it: what failed at 1,000 s counts up to 1,059.9 s, and no longer at 1,060 s."""
    for later, state in ((59.9, "open"), (60.0, "closed")):
        policy, clock = breaker(failure_threshold=2, window=TimeWindow(60))
        clock.now = 1_020.0
        fail(policy)
        clock.now += later
        assert policy.snapshot.calls == (state == "open")
        fail(policy)
        assert policy.state == state


def test_a_slow_call_counts_as_failed_though_it_returned() -> None:
    """From slow_call_threshold on, awaited, called or as a block."""
    policy, clock = breaker(failure_threshold=3, slow_call_threshold=2)

    @policy
    def slow() -> None:
        clock.now += 2

    slow()
    with policy:
        clock.now += 1.9
    with policy:
        clock.now += 2
    assert policy.snapshot == Snapshot(3, 2)
    call = begin(policy)
    clock.now += 2
    end(call)
    assert policy.state == "open"
    assert "a call took 2 s" in policy.last_change.reason  # type: ignore[union-attr]


@kills(
    "purgatory, aiobreaker, pybreaker: half open, all callers are let in",
    replaced(CircuitBreaker, "admit", broken.stampede),
    places=3,
)
@pytest.mark.parametrize("places", [1, 3])
def test_of_fifty_callers_at_the_end_of_the_cool_down_only_the_probes_reach_the_dependency(places: int) -> None:
    """Exactly half_open_max_calls, however many come at once."""
    policy, _ = half_open(half_open_max_calls=places)
    calls, refusals = [], []
    for _ in range(50):
        try:
            calls.append(begin(policy))
        except CircuitOpen as error:
            refusals.append((error.state, error.retry_after))
    assert (len(calls), refusals) == (places, [("half_open", 1.0)] * (50 - places))
    for call in calls:
        call.close()


@kills("with few calls it never closes", replaced(CircuitBreaker, "admit", broken.given_up_by_the_clock))
def test_it_closes_after_enough_probes_even_if_they_have_to_take_turns() -> None:
    """success_threshold above half_open_max_calls; and with one call in ten minutes just as well."""
    policy, clock = half_open(success_threshold=3)
    for state in ("half_open", "half_open", "closed"):
        end(begin(policy))
        assert policy.state == state
        clock.now += 600


@kills("a failed probe makes the recovery no longer", replaced(CircuitBreaker, "_probe_failed", broken.never_longer))
def test_each_failed_probe_doubles_the_recovery_time_up_to_a_bound_and_success_forgets_it() -> None:
    """30, 60, 120, 200, 200; after it has closed, 30 again."""
    policy, clock = half_open(max_recovery_timeout=200, success_threshold=1)
    for wait in (60, 120, 200, 200):
        fail(policy)
        assert refused(policy).retry_after == wait
        clock.now += wait
    end(begin(policy))
    assert policy.state == "closed"
    fail(policy)
    assert refused(policy).retry_after == 30


@kills("all processes probe at the same moment", replaced(CircuitBreaker, "__init__", broken.no_chance))
def test_the_recovery_time_is_longer_by_up_to_a_tenth() -> None:
    """Processes that opened together must not probe together."""
    for chance, wait in ((0.0, 30.0), (0.5, 31.5), (0.999, 32.997)):
        policy, _ = breaker(failure_threshold=1, recovery_timeout=30, rng=lambda chance=chance: chance)
        fail(policy)
        assert refused(policy).retry_after == pytest.approx(wait)


@kills("Retry-After is ignored", replaced(CircuitBreaker, "_open", broken.no_retry_after))
def test_a_retry_after_of_the_dependency_is_respected_up_to_the_longest_recovery() -> None:
    """The Retry-After is that of the failure that opened it; a shorter one changes nothing."""
    for asked, wait in ((5.0, 30.0), (50.0, 50.0), (1e9, 240.0)):
        policy, _ = breaker(failure_threshold=1, recovery_timeout=30)
        error = Asking()
        error.retry_after = asked
        end(begin(policy), error)
        assert refused(policy).retry_after == wait


@kills(
    "circuitbreaker 2.1.3: a late success closes an open breaker",
    replaced(CircuitBreaker, "for_async", broken.late_success_closes),
)
@kills("a late failure counts in any state", replaced(Closed, "failed", broken.counts_in_any_state))
def test_a_success_from_before_the_opening_closes_nothing() -> None:
    """Half open, such a success is not counted as a probe, nor such a failure as a failed probe."""
    policy, clock = breaker(failure_threshold=1, recovery_timeout=30, success_threshold=1)
    early, late, other = begin(policy), begin(policy), begin(policy)
    fail(policy)
    end(early)
    assert policy.state == "open"
    clock.now += 30
    probe = begin(policy)
    end(late)
    end(other, OSError())
    assert policy.state == "half_open"
    end(probe)
    assert policy.state == "closed"
    assert policy.snapshot == Snapshot(0, 0)


@kills("a cancelled call is a failure", replaced(Period, "abandoned", broken.cancelled_fails))
@kills("a cancelled probe is a failure", replaced(HalfOpen, "abandoned", broken.cancelled_fails))
def test_a_cancelled_call_is_neither_success_nor_failure_and_gives_its_place_back() -> None:
    """CancelledError and GeneratorExit end it; any number of cancelled probes opens or closes nothing."""
    policy, _ = half_open(success_threshold=2)
    for _ in range(5):
        end(begin(policy), asyncio.CancelledError())
        begin(policy).close()
    assert policy.state == "half_open"
    closed, _ = breaker(failure_threshold=1)
    end(begin(closed), asyncio.CancelledError())
    end(begin(closed), KeyboardInterrupt())
    assert (closed.state, closed.snapshot) == ("closed", Snapshot(0, 0))


@kills("refused calls put the probe off", replaced(CircuitBreaker, "admit", broken.refusals_put_off))
def test_a_refused_call_is_no_failure_and_puts_nothing_off() -> None:
    """However many are refused, the probe comes when it was said."""
    policy, clock = breaker(failure_threshold=1, recovery_timeout=30)
    fail(policy)
    for _ in range(30):
        refused(policy)
        clock.now += 1
    begin(policy).close()
    assert policy.state == "half_open"


@kills(
    "what another rule refused is a failure",
    replaced(CircuitBreaker, "failed", broken.only_failures_judged),
    error=BulkheadFull(),
)
@kills(
    "a probe that another rule refused succeeds",
    replaced(CircuitBreaker, "failed", broken.refused_probes_succeed),
    error=CircuitOpen(),
)
@pytest.mark.parametrize("error", [BulkheadFull(), RateLimited("later"), CircuitOpen()], ids=repr)
def test_what_another_rule_refused_is_neither_failure_nor_success(error: Exception) -> None:
    """It never got to the dependency: no opening when it was closed, no closing when it was half open."""
    policy, _ = breaker(failure_threshold=1)
    end(begin(policy), error)
    assert (policy.state, policy.snapshot) == ("closed", Snapshot(0, 0))
    probing, _ = half_open(success_threshold=1)
    for _ in range(3):
        end(begin(probing), error)
        assert probing.state == "half_open"


@kills("a 404 is a failure", replaced(CircuitBreaker, "failed", broken.only_failures_judged))
def test_the_callers_own_mistakes_are_answers_of_the_dependency() -> None:
    """A 404 or a ValueError opens nothing; is_failure decides otherwise."""
    policy, _ = breaker(failure_threshold=1)
    fail(policy, 9, ValueError)
    assert policy.snapshot == Snapshot(9, 0)
    strict, _ = breaker(failure_threshold=1, is_failure=lambda error: isinstance(error, KeyError))
    fail(strict, 1, ConnectionResetError)
    fail(strict, 1, KeyError)
    assert strict.state == "open"


def test_an_is_failure_that_raises_keeps_no_place() -> None:
    """Its error passes, with the call's as context; the next probe is let in."""

    def judge(error: Exception) -> bool:
        raise LookupError("no judgement")

    policy, _ = breaker(is_failure=judge)
    policy.force_open()
    policy.clock.now += 33  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(LookupError) as raised:
            begin(policy).throw(OSError())
        assert isinstance(raised.value.__context__, OSError)


@kills("a probe that hangs keeps its place for ever", replaced(CircuitBreaker, "admit", broken.hangs_for_ever))
def test_a_probe_that_hangs_is_given_up_when_no_other_could_be_let_in() -> None:
    """After the recovery time, but not before ten seconds; what it says later does not matter."""
    for recovery, patience in ((1, 10), (30, 30)):
        policy, clock = half_open(recovery_timeout=recovery, success_threshold=1)
        hangs = begin(policy)
        clock.now += patience - 0.1
        refused(policy)
        assert policy.state == "half_open"
        clock.now += 0.1
        refused(policy)
        assert (policy.state, policy.last_change.reason) == ("open", "a probe failed: no probe came back")  # type: ignore[union-attr]
        end(hangs)
        assert policy.state == "open"


@kills("the wall clock decides", replaced(CircuitBreaker, "__init__", broken.wall_clock))
def test_only_a_clock_that_never_jumps_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock, set forward a thousand years, ends no recovery time."""
    policy = circuit_breaker()
    policy.force_open()
    monkeypatch.setattr(time, "time", lambda: 4e10)
    assert 29 < refused(policy).retry_after < 33


# ---- by hand


def test_it_is_steered_by_hand() -> None:
    """isolate() until reset(); force_open() recovers; both forget what runs; reset() forgets failed probes as well."""
    policy, clock = breaker(failure_threshold=2, recovery_timeout=30, success_threshold=1)
    running = begin(policy)
    policy.isolate()
    end(running, OSError())
    clock.now += 1e6
    assert (refused(policy).state, refused(policy).retry_after) == ("isolated", 30.0)
    policy.reset()
    fail(policy)
    assert policy.state == "closed"
    policy.force_open()
    assert policy.last_change.reason == "opened by hand"  # type: ignore[union-attr]
    clock.now += 30
    fail(policy)
    assert refused(policy).retry_after == 60
    policy.reset()
    fail(policy, 2)
    assert refused(policy).retry_after == 30


def test_metrics_only_changes_state_but_refuses_nothing() -> None:
    """`rejected` says how many it would have refused; their outcomes do not matter."""
    policy, clock = breaker(failure_threshold=1, recovery_timeout=30, metrics_only=True, success_threshold=1)
    fail(policy, 4)
    assert (policy.state, policy.rejected) == ("open", 3)
    clock.now += 30
    probe, other = begin(policy), begin(policy)
    end(other, OSError())
    assert policy.state == "half_open"
    end(probe)
    assert policy.state == "closed"


def test_a_fallback_answers_for_refused_calls_only() -> None:
    """It gets their arguments, and may be async. An error of the call passes; so does a CircuitOpen from further in."""

    async def later(x: int) -> str:
        return f"async {x}"

    def now(x: int) -> str:
        return f"sync {x}"

    async def inner(x: int) -> None:
        raise CircuitOpen

    async def outer() -> list[str]:
        answers = []
        for fallback in (later, now):
            policy, _ = breaker(fallback=fallback)
            with pytest.raises(CircuitOpen):
                await policy.call(inner, 7)
            policy.isolate()
            answers.append(await policy.call(inner, 7))
        return [*answers, policy(lambda x: None)(8)]

    assert run(outer()) == ["async 7", "sync 7", "sync 8"]


@kills("the error of a listener takes the place of the call's", replaced(module, "tell", broken.told_alone))
def test_on_state_change_hears_of_each_change_once_and_can_neither_fail_nor_confuse_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its error is logged; the call's own error passes; the recovery time holds; the listener may call the breaker."""
    heard: list[tuple[str, str]] = []

    def listener(change: Change) -> None:
        heard.append((change.old, change.new))
        if change.new == "open":
            assert refused(policy).retry_after == 30
        raise LookupError("a bug of the listener")

    policy, clock = breaker(failure_threshold=1, recovery_timeout=30, success_threshold=1, on_state_change=listener)
    fail(policy)
    refused(policy)
    clock.now += 30
    end(begin(policy))
    assert heard == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    assert caplog.text.count("LookupError: a bug of the listener") == 3
    again, _ = breaker(failure_threshold=1, on_state_change=lambda change: change.new == "open" and again.reset())
    fail(again)
    assert again.state == "closed"
    end(begin(again))


# ---- from outside


def test_every_way_to_call_counts_the_same() -> None:
    """Sync and async functions, methods, partials, callables, blocks, policy.call()."""

    class Service:
        def __init__(self) -> None:
            self.policy, _ = breaker(failure_threshold=9)

        def sync(self, x: int = 0) -> int:
            return x

        async def asynchronous(self, x: int = 0) -> int:
            """Its text stays."""
            return x

        async def __call__(self, x: int) -> int:
            return x

    service = Service()
    policy = service.policy
    wrapped = policy(service.asynchronous)
    assert (wrapped.__name__, wrapped.__doc__) == ("asynchronous", "Its text stays.")

    async def main() -> None:
        assert await wrapped(1) == await policy(partial(service.asynchronous, 1))() == await policy(service)(1) == 1
        assert await policy.call(service.asynchronous, x=2) == 2
        assert policy(service.sync)(3) == policy(partial(service.sync, 3))() == policy(int)("3") == 3
        async with policy as entered:
            assert entered is policy
        with policy:
            pass

    run(main())
    assert policy.snapshot == Snapshot(9, 0)
    assert policy.name.endswith("Service.asynchronous")
    for _ in range(8):
        with pytest.raises(ConnectionResetError), policy:
            raise ConnectionResetError
    assert policy.snapshot == Snapshot(10, 8)


def generator() -> Any:
    yield


async def async_generator() -> Any:
    yield


@pytest.mark.parametrize("decorator", [circuit_breaker(), retry()], ids=["breaker", "retry"])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (generator, "generator, a generator, which runs after the call is over"),
        (async_generator, "async_generator, a generator"),
        (partial(generator), "a generator"),
        (staticmethod(work), "put it below @classmethod and @staticmethod"),
        (classmethod(work), "put it below @classmethod"),
        (42, "got 42"),
    ],
    ids=shown,
)
def test_what_can_not_be_guarded_is_refused_with_the_reason(decorator: Any, fn: Any, message: str) -> None:
    """The error comes when the function is decorated."""
    with pytest.raises(TypeError) as error:
        decorator(fn)
    assert message in str(error.value)


def test_the_quick_start_runs_as_written() -> None:
    """Three attempts are one call of the breaker; five calls that failed open it."""
    attempts = 0

    @circuit_breaker(failure_threshold=5, recovery_timeout=30)
    @retry(max_attempts=3, base_delay=1.0)
    async def call_external_api() -> None:
        nonlocal attempts
        attempts += 1
        raise ConnectionResetError

    async def main() -> None:
        for _ in range(5):
            with pytest.raises(ConnectionResetError):
                await call_external_api()
        with pytest.raises(CircuitOpen) as error:
            await call_external_api()
        assert 29 < error.value.retry_after <= 33

    run(main())
    assert attempts == 15


@kills("a cancelled probe keeps its place", replaced(HalfOpen, "abandoned", Period.abandoned))
def test_ended_at_every_await_a_probe_gives_its_place_back() -> None:
    """Decorated, by call() and in a block: whatever ends the probe, the next one is admitted at once."""

    async def thrice() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def block(policy: CircuitBreaker) -> None:
        async with policy:
            await thrice()

    ways: list[Callable[[CircuitBreaker], Coroutine[Any, Any, Any]]]
    ways = [lambda policy: policy.call(thrice), lambda policy: policy(thrice)(), block]
    for way in ways:

        async def scene(end: Any, way: Any = way) -> None:
            policy, _ = half_open(success_threshold=9)
            with suppress(asyncio.CancelledError):
                await end(way(policy))
            assert policy.state == "half_open"
            begin(policy).close()

        assert at_every_await(scene) == 3


@kills("a block settles the call of another breaker", replaced(CircuitBreaker, "__exit__", broken.oldest_entry))
def test_blocks_that_end_in_another_order_or_context_settle_their_own_calls() -> None:
    """Two generators in one task, entered a, b and left a, b; and a coroutine that is closed in a foreign context."""
    one, _ = half_open(success_threshold=1)
    two, _ = half_open(success_threshold=1)

    def held(policy: CircuitBreaker) -> Any:
        with policy:
            yield

    first, second = held(one), held(two)
    next(first), next(second)
    assert next(first, "end") == "end"
    assert (one.state, two.state) == ("closed", "half_open")
    assert next(second, "end") == "end"
    assert two.state == "closed"
    third = held(one)
    contextvars.copy_context().run(next, third)
    third.close()
    assert one.snapshot == Snapshot(0, 0)


# ---- from many threads


@kills("half open, all threads are let in", replaced(CircuitBreaker, "admit", broken.stampede))
def test_of_fifty_threads_only_the_probes_reach_the_dependency() -> None:
    """They come at once and the probes return when all have been answered."""
    policy, _ = half_open(half_open_max_calls=3, success_threshold=9)
    reached, answers, all_answered = [], [], threading.Event()

    @policy
    def dependency() -> None:
        reached.append(1)
        assert len(reached) <= 3 or all_answered.set()
        assert all_answered.wait(10)

    def call() -> None:
        try:
            dependency()
        except CircuitOpen:
            answers.append(1)
            if len(answers) == 47:
                all_answered.set()

    in_threads(50, call)
    assert (len(reached), policy.rejected) == (3, 47)


@pytest.mark.parametrize("window", [4_000, TimeWindow(3_000)], ids=str)
def test_threads_lose_no_outcome(window: Any) -> None:
    """Eight at a time, every fifth call fails; the window counts them all; a moving one of time never breaks."""
    policy, _ = breaker(failure_threshold=4_000, window=window)
    moving, clock = breaker(failure_threshold=10**6, window=TimeWindow(10))

    @policy
    def call(number: int) -> None:
        if number % 5 == 0:
            raise OSError

    def task() -> None:
        for number in range(500):
            with suppress(OSError):
                call(number)
            clock.now += 1
            with moving:
                pass
            assert moving.snapshot.calls <= 4_000

    in_threads(8, task)
    assert policy.snapshot == Snapshot(4_000, 800)


# ---- a breaker per key


def test_each_key_has_a_breaker_and_the_registry_is_bounded() -> None:
    """Beyond `most` the closed one that was not used for longest goes, open ones stay while there is a closed one."""
    breakers = CircuitBreakers(3, failure_threshold=1)
    fail(breakers["a"])
    _ = breakers["b"], breakers["c"], breakers["b"]
    assert breakers["a"].name == "a"
    _ = breakers["d"]
    assert breakers.states() == {"b": "closed", "a": "open", "d": "closed"}
    for key in "bd":
        fail(breakers[key])
    _ = breakers["e"]
    assert (len(breakers.states()), "a" in breakers.states()) == (3, False)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"failure_threshold": 0}, ValueError, "failure_threshold=0: give failed calls, 1 or more"),
        ({"failure_threshold": 2.5}, TypeError, "failure_threshold=2.5 is a float"),
        ({"failure_threshold": True}, TypeError, "failure_threshold=True is a bool"),
        ({"failure_threshold": 11}, ValueError, "failure_threshold=11 in window=10 calls can't be reached"),
        ({"recovery_timeout": -1}, ValueError, "recovery_timeout=-1: give seconds from 0"),
        ({"recovery_timeout": float("nan")}, ValueError, "recovery_timeout=nan"),
        ({"recovery_timeout": "30"}, TypeError, "recovery_timeout='30' is a str; give seconds as a number"),
        ({"window": 0}, ValueError, "window=0: give calls, 1 or more"),
        ({"window": 60.0}, TypeError, "window=60.0 is a float"),
        ({"window": TimeWindow(0)}, ValueError, "window=0.0: give seconds from 0.001"),
        ({"failure_rate": 0}, ValueError, "failure_rate=0: give the share of calls that fail from 0.001 to 1"),
        ({"failure_rate": 50}, ValueError, "failure_rate=50"),
        ({"failure_rate": 0.5, "window": None}, ValueError, "failure_rate=0.5 needs a window"),
        ({"minimum_calls": 0}, ValueError, "minimum_calls=0"),
        ({"minimum_calls": 11}, ValueError, "minimum_calls=11 never fit into window=10 calls"),
        ({"success_threshold": 0}, ValueError, "success_threshold=0: give probes, 1 or more"),
        ({"half_open_max_calls": 0}, ValueError, "half_open_max_calls=0: give probes at a time, 1 or more"),
        ({"slow_call_threshold": 0}, ValueError, "slow_call_threshold=0: give seconds from 1e-06"),
        ({"max_recovery_timeout": 29}, ValueError, "max_recovery_timeout=29: give seconds, not below recovery_timeout"),
        ({"is_failure": None}, TypeError, "is_failure=None is a NoneType; give a function"),
        ({"fallback": []}, TypeError, "fallback=[] is a list; give a function"),
        ({"on_state_change": "log"}, TypeError, "on_state_change='log' is a str"),
    ],
    ids=lambda value: shown(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error comes when the breaker or a registry is made, and names the value and its bound."""
    for make in (circuit_breaker, partial(CircuitBreakers, 9)):
        with pytest.raises(error) as raised:
            make(**options)
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="most=0: give breakers, 1 or more"):
        CircuitBreakers(0)
