"""Retry: every promise, with sleeps that are only written down and chances that are drawn by hand."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import time
import warnings
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsys import RetryBudget, circuit_breaker, resilient, retry
from distsys.errors import BulkheadFull, CircuitOpen, LockLost, PatternOrderError, Rejected, StaleToken
from distsys.resilience import retry as module
from distsys.resilience.outcomes import NOT_DONE, Outcome
from distsys.resilience.retry import Attempts, Retry, RetryAmplification, _around
from tests.bugs import kills, replaced
from tests.ids import shown
from tests.resilience import broken
from tests.resilience.virtual import Clock, at_every_await, run


class Asking(ConnectionError):
    """An error with the Retry-After of an HTTP client."""

    def __init__(self, seconds: float) -> None:
        self.retry_after = seconds


class Dependency:
    """Raises what it is given, one after the other, then returns its number of calls; writes down the waits between."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls, self.waits = list(errors), 0, list[float]()

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls

    async def asynchronous(self) -> int:
        return self()

    def policy(self, **options: Any) -> Retry:
        return retry(**{"base_delay": 1.0, "rng": lambda: 1.0, "sleep": self.waits.append, **options})

    def policy_async(self, **options: Any) -> Retry:
        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        return self.policy(**options, sleep=sleep)


def run_alone(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run like run(), but keep the error out of the task: the task or asyncio's frames would hold it."""
    errors: list[Exception] = []

    async def caught() -> Any:
        try:
            return await coroutine
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    result = run(caught())
    if errors:
        raise errors.pop()
    return result


def called(dependency: Dependency, **options: Any) -> Any:
    return dependency.policy(**options)(dependency)()


def called_async(dependency: Dependency, **options: Any) -> Any:
    return run_alone(dependency.policy_async(**options)(dependency.asynchronous)())


def called_by_policy(dependency: Dependency, **options: Any) -> Any:
    return run_alone(dependency.policy_async(**options).call(dependency.asynchronous))


def as_a_block(dependency: Dependency, **options: Any) -> Any:
    for attempt in dependency.policy(**options):
        with attempt:
            result = dependency()
            assert attempt.number == dependency.calls
    return result


def as_an_async_block(dependency: Dependency, **options: Any) -> Any:
    async def main() -> int:
        async for attempt in dependency.policy_async(**options):
            async with attempt:
                result = await dependency.asynchronous()
                assert attempt.number == dependency.calls
        return result

    return run_alone(main())


WAYS = [called, called_async, called_by_policy, as_a_block, as_an_async_block]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# ---- how often, how long


@kills("max_attempts counts retries only", replaced(Retry, "__init__", broken.retries_only), way=called)
@kills(
    "an error of its own takes the last one's place",
    replaced(Retry, "for_async", broken.error_of_its_own),
    way=called_async,
)
@kills("no notes", replaced(Attempts, "note", lambda self, error, why: None), way=as_a_block)
@each_way
def test_max_attempts_counts_the_first_one(way: Callable[..., Any]) -> None:
    """Three are three; the last error passes, the very object, and its notes tell of the others."""
    errors = [ConnectionResetError(n) for n in range(5)]
    dependency = Dependency(*errors)
    with pytest.raises(ConnectionResetError) as raised:
        way(dependency, max_attempts=3)
    assert raised.value is errors[2]
    assert (dependency.calls, dependency.waits) == (3, [1.0, 2.0])
    (note,) = raised.value.__notes__
    assert note == (
        "retry: attempt 1: ConnectionResetError(0), 1 s; attempt 2: ConnectionResetError(1), 2 s; "
        "attempt 3: no attempts left"
    )


@kills("a block ends after its first error", replaced(Attempts, "__exit__", lambda self, *_: False), way=as_a_block)
@each_way
def test_the_first_success_ends_it(way: Callable[..., Any]) -> None:
    """Its result is returned."""
    dependency = Dependency(TimeoutError(), ConnectionRefusedError())
    assert way(dependency, max_attempts=9) == 3
    assert way(Dependency()) == 1


@kills("jitter is ignored", replaced(Retry, "__init__", broken.without_jitter), jitter="full", chance=0.5)
@kills("the wait does not grow", replaced(Retry, "_backoff", broken.fixed_backoff), jitter="full", chance=0.5)
@kills("the wait grows for ever", replaced(Retry, "_backoff", broken.without_cap), jitter="full", chance=0.5)
@pytest.mark.parametrize(
    ("jitter", "chance", "waits"),
    [
        ("none", 0.3, [1, 2, 4, 8, 10, 10]),
        ("full", 0.5, [0.5, 1, 2, 4, 5, 5]),
        ("full", 0.0, [0, 0, 0, 0, 0, 0]),
        ("equal", 0.5, [0.75, 1.5, 3, 6, 7.5, 7.5]),
        ("decorrelated", 1.0, [3, 9, 10, 10, 10, 10]),
        ("decorrelated", 0.5, [2, 3.5, 5.75, 9.125, 10, 10]),
    ],
)
def test_waits_grow_to_the_longest_and_chance_has_its_part(jitter: Any, chance: float, waits: list[float]) -> None:
    """Doubling, capped at max_delay; full jitter draws from nothing to all of it."""
    dependency = Dependency(*[TimeoutError()] * 9)
    with pytest.raises(TimeoutError):
        called(dependency, max_attempts=7, max_delay=10, jitter=jitter, rng=lambda: chance)
    assert dependency.waits == waits


@given(
    jitter=st.sampled_from(["full", "equal", "decorrelated", "none"]),
    base=st.floats(0, 1e7),
    longest=st.floats(0, 3e7),
    chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=12),
)
def test_no_wait_is_longer_than_max_delay(jitter: Any, base: float, longest: float, chances: list[float]) -> None:
    """No wait is negative, whatever the random number; and three hundred attempts overflow nothing."""
    longest = max(base, longest)
    dependency = Dependency(*[TimeoutError()] * 300)
    options = {"base_delay": base, "max_delay": longest, "rng": itertools.cycle(chances).__next__}
    assert called(dependency, max_attempts=301, jitter=jitter, **options) == 301
    assert all(0 <= wait <= longest for wait in dependency.waits)


@kills("Retry-After is ignored", replaced(module, "retry_after", lambda error: None), way=called)
@kills("Retry-After is not capped", replaced(module, "retry_after", broken.any_retry_after), way=called_async)
@each_way
def test_a_retry_after_comes_on_top_of_the_backoff_and_is_capped(way: Callable[..., Any]) -> None:
    """Nobody comes earlier than asked, nor all together; a day is not waited for."""
    dependency = Dependency(Asking(5.0), Asking(86_400), Asking(-3))
    assert way(dependency, max_attempts=4, max_delay=60) == 4
    assert dependency.waits == [1 + 5, 2 + 60, 4]


@kills("a wait passes the deadline", replaced(Attempts, "__init__", broken.no_deadline), way=called)
@each_way
def test_a_wait_that_would_pass_the_deadline_is_not_begun(way: Callable[..., Any]) -> None:
    """The error passes at once and says so."""
    dependency = Dependency(TimeoutError(), TimeoutError(), TimeoutError())
    with pytest.raises(TimeoutError) as raised:
        way(dependency, base_delay=50, timeout=60, max_delay=100)
    assert (dependency.calls, dependency.waits) == (2, [50])
    assert "attempt 2: the next attempt, 100 s later, would pass the deadline of 60 s" in raised.value.__notes__[0]


def test_time_that_attempts_took_counts_against_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for sync functions and blocks: they can't be ended, but no other attempt begins."""
    for way in (called, as_a_block):
        clock, dependency = Clock(), Dependency(*[TimeoutError()] * 9)
        monkeypatch.setattr(time, "monotonic", clock)
        waits = dependency.waits

        def sleep(seconds: float, clock: Clock = clock, waits: list[float] = waits) -> None:
            clock.now += 10 + seconds
            waits.append(seconds)

        with pytest.raises(TimeoutError):
            way(dependency, max_attempts=9, timeout=26, jitter="none", sleep=sleep)
        assert waits == [1, 2]  # 23 s have passed, and 4 more would be 27
        monkeypatch.undo()


@pytest.mark.parametrize(("failures", "number"), [(0, 1), (1, 2)])
def test_the_deadline_ends_an_attempt_of_an_async_function(failures: int, number: int) -> None:
    """TimeoutError after exactly the timeout, and its note names the attempt that was under way."""
    dependency = Dependency(*[ConnectionResetError()] * failures)

    @retry(timeout=10, rng=lambda: 1.0)
    async def hangs() -> None:
        dependency()
        await asyncio.sleep(1_000)

    async def main() -> float:
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError) as raised:
            await hangs()
        assert f"attempt {number}: ended by the deadline: all attempts together had 10 s" in raised.value.__notes__[0]
        return asyncio.get_running_loop().time() - began

    assert run(main()) == 10


# ---- what is tried again


def on_reset(error: Exception) -> bool:
    return isinstance(error, ConnectionResetError)


def says_not_done(error: Exception) -> Outcome:
    return NOT_DONE


SAID: list[tuple[Exception, dict[str, Any], bool]] = [
    (ConnectionRefusedError(), {}, True),
    (ConnectionResetError(), {}, True),
    (TimeoutError(), {"idempotent": True}, True),
    (LockLost(), {}, True),
    (BulkheadFull(), {}, True),
    (Rejected(), {}, True),
    (StaleToken(), {}, False),
    (CircuitOpen(), {}, False),
    (TypeError(), {}, False),
    (KeyError(), {}, False),
    (AssertionError(), {}, False),
    (RuntimeError("nobody knows"), {}, False),
    (ConnectionRefusedError(), {"idempotent": False}, True),
    (BulkheadFull(), {"idempotent": False}, True),
    (ConnectionResetError(), {"idempotent": False}, False),
    (TimeoutError(), {"idempotent": False}, False),
    (LockLost(), {"idempotent": False}, False),
    (KeyError(), {"on": KeyError}, True),
    (KeyError(), {"on": (OSError, LookupError)}, True),
    (ValueError(), {"on": (OSError, LookupError)}, False),
    (ConnectionResetError(), {"on": on_reset}, True),
    (TimeoutError(), {"on": on_reset}, False),
    (ConnectionResetError(), {"on": on_reset, "idempotent": False}, False),
    (RuntimeError(), {"on": says_not_done, "idempotent": False}, True),
]


@kills(
    "an ambiguous outcome is tried again",
    replaced(Retry, "_reason_not_to_retry", broken.ambiguous_too),
    error=TimeoutError(),
    options={"idempotent": False},
)
@kills(
    "whatever raised is tried again",
    replaced(Retry, "_reason_not_to_retry", lambda self, error: ""),
    error=TypeError(),
    options={},
)
@kills("an open breaker is knocked at", replaced(CircuitOpen, "retryable", True), error=CircuitOpen(), options={})
@kills(
    "a full bulkhead is not tried again", replaced(BulkheadFull, "retryable", False), error=BulkheadFull(), options={}
)
@pytest.mark.parametrize(("error", "options", "again"), SAID, ids=[shown(f"{e!r} {o}") for e, o, _ in SAID])
def test_what_is_tried_again_is_what_may_pass_and_do_no_harm(
    error: Exception, options: dict[str, Any], again: bool
) -> None:
    """The tables or on= decide; with idempotent=False only what certainly did not happen is tried again."""
    dependency = Dependency(error)
    if again:
        assert called(dependency, **options) == 2
        return
    with pytest.raises(type(error)) as raised:
        called(dependency, **options)
    assert dependency.calls == 1
    assert "attempt 1: not retried: " in raised.value.__notes__[0]


def test_the_note_says_why_it_was_not_tried_again() -> None:
    """The outcome; that it is not idempotent; or that on= did not name it."""
    for error, options, why in (
        (KeyError(), {}, "the same call would fail again"),
        (TimeoutError(), {"idempotent": False}, "it may have happened, and idempotent=False"),
        (ConnectionRefusedError(), {"on": KeyError}, "on= does not ask for it"),
    ):
        with pytest.raises(type(error)) as raised:
            called(Dependency(error), **options)
        assert raised.value.__notes__ == [f"retry: attempt 1: not retried: {why}"]


@kills(
    "a cancelled call is tried again",
    replaced(Retry, "for_async", broken.cancellation_too),
    way=called_async,
    error=asyncio.CancelledError,
)
@each_way
@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_call_is_never_tried_again(way: Callable[..., Any], error: type[BaseException]) -> None:
    """Cancellation above all."""
    dependency = Dependency(TimeoutError(), error(), TimeoutError())
    with pytest.raises(BaseException) as raised:  # noqa: PT011  any of them
        way(dependency)
    assert isinstance(raised.value, error)
    assert dependency.calls == 2


def test_an_error_that_takes_no_notes_passes_as_it_is() -> None:
    """A frozen one."""

    class Frozen(ConnectionError):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError("frozen")

    with pytest.raises(Frozen):
        called(Dependency(Frozen(), Frozen(), Frozen()))


# ---- the budget


@kills("the budget is not charged", replaced(RetryBudget, "take", lambda self: True))
@kills("calls pay nothing in", replaced(RetryBudget, "pay_in", lambda self: None))
@kills("tenths do not add up", replaced(RetryBudget, "take", broken.exactly_one))
def test_a_budget_suppresses_retries_and_says_so() -> None:
    """One call in ten may be tried again; the rest fail with the reason in a note."""
    budget = RetryBudget(0.1, floor=0, burst=1)
    for _ in range(2):
        dependency = Dependency(TimeoutError(), TimeoutError())
        with pytest.raises(TimeoutError) as raised:
            called(dependency, budget=budget)
    assert (dependency.calls, budget.suppressed) == (1, 2)
    assert "attempt 1: the retry budget is used up: 0.1 retries per call" in raised.value.__notes__[0]
    for _ in range(8):
        called(Dependency(), budget=budget)
    assert called(Dependency(TimeoutError()), budget=budget) == 2


@given(
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.5]),
    floor=st.sampled_from([0.0, 0.5, 2.0]),
    burst=st.sampled_from([1.0, 5.0]),
    steps=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0, 9.0]), st.integers(0, 3)), max_size=60),
)
def test_retries_stay_below_their_share(ratio: float, floor: float, burst: float, steps: list[Any]) -> None:
    """At any time: at most burst + ratio * calls + floor * seconds; and from a full one `burst` are there."""
    clock = Clock()
    budget = RetryBudget(ratio, floor=floor, burst=burst, clock=clock)
    retries = 0
    for calls, (passed, failures) in enumerate(steps, 1):
        clock.now += passed
        dependency = Dependency(*[TimeoutError()] * failures)
        try:
            as_a_block(dependency, max_attempts=9, budget=budget)
        except TimeoutError:
            assert budget.saved < 1
        retries += dependency.calls - 1
        assert retries <= burst + ratio * calls + floor * (clock.now - 1_000) + 1e-6
        assert 0 <= budget.saved + 1e-6 <= burst + 1e-6


@kills("the budget is each function's own", replaced(RetryBudget, "take", lambda self: True))
def test_a_budget_is_shared_by_many_functions() -> None:
    """A retry that one function has used is gone for the others."""
    budget = RetryBudget(0, floor=0, burst=3)
    for left in (2, 1, 0):
        assert called(Dependency(TimeoutError()), budget=budget) == 2
        assert budget.saved == left
    with pytest.raises(TimeoutError):
        called_async(Dependency(TimeoutError()), budget=budget)


# ---- layers


@kills("layers do not know of each other", replaced(module, "_around", broken.Alone()))
def test_three_layers_warn_that_their_attempts_multiply() -> None:
    """3 x 3 x 3 = 27: told when the innermost is called the 9th time in vain, by decorators and blocks."""
    for way in (called, called_async, as_a_block, as_an_async_block):
        dependency = Dependency(*[TimeoutError()] * 99)
        if way in (called, as_a_block):
            innermost: Any = partial(way, dependency)
            outer = retry(sleep=lambda _: None)(retry(sleep=lambda _: None, name="middle")(innermost))
        else:

            async def no_time(seconds: float) -> None: ...

            async def block() -> None:
                async for attempt in dependency.policy_async():  # noqa: B023
                    async with attempt:
                        await dependency.asynchronous()  # noqa: B023

            policy = dependency.policy_async()
            innermost = policy(dependency.asynchronous) if way is called_async else block
            layered = retry(sleep=no_time)(retry(sleep=no_time, name="middle")(innermost))
            outer = lambda layered=layered: run(layered())  # noqa: E731
        with warnings.catch_warnings(record=True) as caught, pytest.raises(TimeoutError):
            warnings.simplefilter("always")
            outer()
        texts = [str(each.message) for each in caught if each.category is RetryAmplification]
        assert any(text.startswith("3 x 3 x 3 = 27 attempts on ") for text in texts), way
        assert any(text.startswith("3 x 3 = 9 attempts on 'middle': retry in one layer only") for text in texts)
        assert dependency.calls == 27
        assert _around.get() == ()


def test_one_layer_and_layers_of_one_attempt_warn_of_nothing() -> None:
    """Warnings are errors here."""
    innermost = retry(sleep=lambda _: None)(Dependency(*[TimeoutError()] * 3))
    with pytest.raises(TimeoutError):
        retry(max_attempts=1)(innermost)()


@kills("a coroutine closed elsewhere changes that context", replaced(Attempts, "__exit__", broken.sets_the_old))
def test_a_coroutine_that_is_closed_elsewhere_leaves_that_context_alone() -> None:
    """A coroutine that is closed where it ran, or cancelled, leaves its own context as it was."""

    async def no_time(seconds: float) -> None: ...

    policy = retry(5, sleep=no_time)
    seen: list[Any] = []

    async def fails() -> None:
        """The first time; the second lasts for ever."""
        seen.append(_around.get())
        if len(seen) % 2:
            raise TimeoutError
        await asyncio.Future()

    async def main() -> None:
        call, foreign = policy.call(fails), contextvars.copy_context()
        foreign.run(call.send, None)
        _around.set((7,))
        call.close()
        assert _around.get() == (7,)
        assert foreign[_around] == (5,)
        own = policy.call(fails)
        with pytest.warns(RetryAmplification, match="7 x 5 = 35"):
            own.send(None)
        own.close()
        assert _around.get() == (7,)

    run(main())
    assert seen == [(), (5,), (7,), (7, 5)]


@kills("retry is let outside of a breaker", replaced(module, "layers", lambda fn: ()))
def test_retry_outside_of_a_breaker_is_refused_when_it_is_decorated() -> None:
    """Through partials too, by resilient() as well; unless it is explicitly allowed."""

    @circuit_breaker()
    def guarded() -> int:
        return 1

    for fn in (guarded, partial(guarded)):
        for wrong in (retry(), resilient(retry=retry())):
            with pytest.raises(PatternOrderError, match=r"retry outside of circuit_breaker on .*put @circuit_"):
                wrong(fn)
    assert retry(allow_outside_breaker=True)(guarded)() == 1
    assert circuit_breaker()(retry()(guarded.__wrapped__))() == 1


# ---- what it leaves behind


@kills(
    "the errors are kept", replaced(Retry, "_schedule_next_attempt", broken.holds_the_errors), way=called, failures=3
)
@each_way
@pytest.mark.parametrize("failures", [1, 3])
def test_no_exception_outlives_its_call(way: Callable[..., Any], failures: int) -> None:
    """No cycle holds the errors and, through their tracebacks, what the frames held: they go without the collector."""

    class Error(ConnectionError):
        pass

    def call() -> list[weakref.ref[Error]]:
        errors = [Error(n) for n in range(failures)]
        references = [weakref.ref(error) for error in errors]
        dependency = Dependency(*errors)
        del errors
        with suppress(Error):
            way(dependency)
        return references

    call()
    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in call()] == [None] * failures
    finally:
        gc.enable()


def test_ended_at_every_await_nothing_is_left() -> None:
    """Attempts and waits, decorated, with a deadline, as a block: no other attempt, no layer."""

    async def scene(end: Any, way: int) -> None:
        dependency, budget = Dependency(TimeoutError(), TimeoutError()), RetryBudget(0, floor=0, burst=5)
        policy = retry(rng=lambda: 1.0, budget=budget, timeout=100 if way else None)

        async def work() -> None:
            await asyncio.sleep(0)
            dependency()

        async def block() -> None:
            async for attempt in policy:
                async with attempt:
                    await work()

        with suppress(asyncio.CancelledError):
            await end(block() if way == 2 else policy.call(work))
        calls = dependency.calls
        await asyncio.sleep(1_000)
        assert dependency.calls == calls
        assert budget.saved == 5 - (2 - len(dependency.errors))
        assert _around.get() == ()

    for way in range(3):
        assert at_every_await(lambda end, way=way: scene(end, way)) == 5


# ---- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(retry, 0), ValueError, "max_attempts=0: give attempts, the first included, 1 or more"),
        (partial(retry, 2.5), TypeError, "max_attempts=2.5 is a float"),
        (partial(retry, print), TypeError, "max_attempts=<built-in function print> is a builtin_function_or_method"),
        (partial(retry, base_delay=-1), ValueError, "base_delay=-1: give seconds from 0"),
        (partial(retry, base_delay=float("nan")), ValueError, "base_delay=nan"),
        (partial(retry, base_delay="1"), TypeError, "base_delay='1' is a str; give seconds as a number"),
        (partial(retry, max_delay=0.5), ValueError, "max_delay=0.5: give seconds, not below base_delay from 1"),
        (partial(retry, jitter="some"), ValueError, "jitter='some': 'full', 'equal', 'decorrelated' or 'none'"),
        (partial(retry, timeout=0), ValueError, "timeout=0: give seconds for all attempts together from 1e-06"),
        (partial(retry, on=Exception), ValueError, "on=<class 'Exception'> retries typing errors, refused passwords"),
        (partial(retry, on=(OSError, BaseException)), ValueError, "name the errors that pass"),
        (partial(retry, on=KeyboardInterrupt), TypeError, "on=<class 'KeyboardInterrupt'>: classes of Exception"),
        (partial(retry, on=[OSError]), TypeError, "on=[<class 'OSError'>]: classes of Exception, a function"),
        (partial(retry, on=int), TypeError, "on=<class 'int'>"),
        (partial(retry, on=(OSError, print)), TypeError, "a function of the error, or None"),
        (partial(retry, budget=0.1), TypeError, "budget=0.1 is a float; give a RetryBudget"),
        (partial(RetryBudget, 1.5), ValueError, "ratio=1.5: give retries per call from 0 to 1"),
        (partial(RetryBudget, floor=-1), ValueError, "floor=-1: give retries per second from 0"),
        (partial(RetryBudget, burst=0), ValueError, "burst=0: give retries from 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_mean_nothing_are_refused(make: Any, error: type[Exception], message: str) -> None:
    """The error comes when the policy is made, and names the value and its bound."""
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_no_class_in_on_retries_what_an_open_breaker_refused() -> None:
    """Rejected is a class of errors worth another try; those of them that can't pass yet stay out of it."""
    for error, calls in ((BulkheadFull(), 2), (CircuitOpen(), 1), (StaleToken(), 1)):
        dependency = Dependency(error)
        with suppress(CircuitOpen, StaleToken):
            dependency.policy(on=Rejected)(dependency)()
        assert dependency.calls == calls
