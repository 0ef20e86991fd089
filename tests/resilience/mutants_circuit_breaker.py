"""Bugs planted in the circuit breaker, those of published packages too, each with the test that has to die of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

import pytest

from distsys.errors import CircuitOpen
from distsys.resilience import circuit_breaker as module
from distsys.resilience.circuit_breaker import CircuitBreaker, Probes
from distsys.resilience.windows import LastCalls, LastSeconds
from tests.resilience import test_circuit_breaker as promises
from tests.survival import lives

init, admit, failed = CircuitBreaker.__init__, CircuitBreaker.admit, CircuitBreaker.failed
for_async, open_, failed_ = CircuitBreaker.for_async, CircuitBreaker._open, CircuitBreaker._failed


def stampede(self: Any) -> Any:
    self.half_open_max_calls = 10**9
    return admit(self)


def late_success_closes(self: Any, fn: Any) -> Any:
    guarded = for_async(self, fn)

    async def call(*args: Any, **kwargs: Any) -> Any:
        result = await guarded(*args, **kwargs)
        if self.state == "open":
            self.reset()
        return result

    return call


def refusals_put_off(self: Any) -> Any:
    try:
        return admit(self)
    except CircuitOpen:
        self._until = self._clock() + self.recovery_timeout
        raise


def cancelled_fails(self: Any, ticket: Any) -> None:
    failed_(self, ticket, "cancelled", None)


def only_failures_judged(self: Any, ticket: Any, error: Exception) -> None:
    self._failed(ticket, repr(error), None)


def refused_probes_succeed(self: Any, ticket: Any, error: Exception) -> None:
    if self.is_failure(error):
        failed(self, ticket, error)
    else:
        ticket.success()


def counts_in_any_state(self: Any, ticket: Any, what: str, asked: float | None) -> None:
    failed_(self, self.closed or self._period, what, asked)


def wall_clock(self: Any, *args: Any, **options: Any) -> None:
    init(self, *args, **{"clock": lambda: time.time(), **options})


def no_chance(self: Any, *args: Any, **options: Any) -> None:
    init(self, *args, **{**options, "rng": lambda: 0.0})


def never_longer(self: Any, what: str, asked: float | None = None) -> None:
    self._open(what, asked)


def no_retry_after(self: Any, reason: str, asked: float | None = None) -> None:
    open_(self, reason)


def given_up_by_the_clock(self: Any) -> Any:
    if isinstance(self._period, Probes) and self._period.until <= self._clock():
        self._period.running = self.half_open_max_calls
    return admit(self)


def hangs_for_ever(self: Any) -> Any:
    if isinstance(self._period, Probes):
        self._period.until = float("inf")
    return admit(self)


def told_alone(listener: Callable[[Any], object], what: Any) -> None:
    listener(what)


def all_time(self: Any) -> Any:
    if not self._buckets:
        self._buckets.append([0, 0, 0])
    return self._buckets[-1]


def oldest_entry(self: Any, *error: Any) -> None:
    *outer, last = module._open_blocks.get()
    module._open_blocks.set(tuple(outer))
    last.__exit__(None, None, None)


class InARow(LastCalls):
    """Failures since the last success."""

    def counts(self) -> tuple[int, int]:
        self._look()
        row = len(list(takewhile(bool, reversed(self._ring))))
        return row, row


def jumping_clock() -> None:
    with pytest.MonkeyPatch.context() as patch:
        promises.test_only_a_clock_that_never_jumps_is_asked(patch)


def quiet_log() -> None:
    """The test's fixture for logs, without pytest."""
    log = type("Log", (), {"text": "LookupError: a bug of the listener\n" * 3})()
    promises.test_on_state_change_hears_of_each_change_once_and_can_neither_fail_nor_confuse_it(log)


MUTANTS: list[tuple[str, Any, str, Any, Callable[[], object]]] = [
    (
        "purgatory, aiobreaker, pybreaker: half open, all callers are let in",
        CircuitBreaker,
        "admit",
        stampede,
        partial(promises.test_of_fifty_callers_at_the_end_of_the_cool_down_only_the_probes_reach_the_dependency, 3),
    ),
    (
        "the same, seen by threads",
        CircuitBreaker,
        "admit",
        stampede,
        promises.test_of_fifty_threads_only_the_probes_reach_the_dependency,
    ),
    (
        "circuitbreaker 2.1.3: a late success closes an open breaker",
        CircuitBreaker,
        "for_async",
        late_success_closes,
        promises.test_a_success_from_before_the_opening_closes_nothing,
    ),
    (
        "a late failure counts in any state",
        CircuitBreaker,
        "_failed",
        counts_in_any_state,
        promises.test_a_success_from_before_the_opening_closes_nothing,
    ),
    (
        "a success forgets the failures, although a window is asked for",
        module,
        "window_of",
        lambda length, clock: InARow(length),
        promises.test_failures_in_the_window_open_it_and_successes_between_them_do_not_help,
    ),
    (
        "refused calls put the probe off",
        CircuitBreaker,
        "admit",
        refusals_put_off,
        promises.test_a_refused_call_is_no_failure_and_puts_nothing_off,
    ),
    (
        "what another rule refused is a failure",
        CircuitBreaker,
        "failed",
        only_failures_judged,
        partial(promises.test_what_another_rule_refused_is_neither_failure_nor_success, promises.BulkheadFull()),
    ),
    (
        "a probe that another rule refused succeeds",
        CircuitBreaker,
        "failed",
        refused_probes_succeed,
        partial(promises.test_what_another_rule_refused_is_neither_failure_nor_success, CircuitOpen()),
    ),
    (
        "a 404 is a failure",
        CircuitBreaker,
        "failed",
        only_failures_judged,
        promises.test_the_callers_own_mistakes_are_answers_of_the_dependency,
    ),
    (
        "a cancelled call is a failure",
        CircuitBreaker,
        "abandoned",
        cancelled_fails,
        promises.test_a_cancelled_call_is_neither_success_nor_failure_and_gives_its_place_back,
    ),
    (
        "a cancelled probe keeps its place",
        CircuitBreaker,
        "abandoned",
        lambda self, ticket: None,
        promises.test_ended_at_every_await_a_probe_gives_its_place_back,
    ),
    (
        "the wall clock decides",
        CircuitBreaker,
        "__init__",
        wall_clock,
        jumping_clock,
    ),
    (
        "all processes probe at the same moment",
        CircuitBreaker,
        "__init__",
        no_chance,
        promises.test_the_recovery_time_is_longer_by_up_to_a_tenth,
    ),
    (
        "a failed probe makes the recovery no longer",
        CircuitBreaker,
        "_probe_failed",
        never_longer,
        promises.test_each_failed_probe_doubles_the_recovery_time_up_to_a_bound_and_success_forgets_it,
    ),
    (
        "Retry-After is ignored",
        CircuitBreaker,
        "_open",
        no_retry_after,
        promises.test_a_retry_after_of_the_dependency_is_respected_up_to_the_longest_recovery,
    ),
    (
        "with few calls it never closes",
        CircuitBreaker,
        "admit",
        given_up_by_the_clock,
        promises.test_it_closes_after_enough_probes_even_if_they_have_to_take_turns,
    ),
    (
        "a probe that hangs keeps its place for ever",
        CircuitBreaker,
        "admit",
        hangs_for_ever,
        promises.test_a_probe_that_hangs_is_given_up_when_no_other_could_be_let_in,
    ),
    (
        "nothing leaves a window of time",
        LastSeconds,
        "_newest",
        all_time,
        promises.test_calls_leave_a_window_of_time_a_tenth_at_a_time,
    ),
    (
        "a block settles the call of another breaker",
        CircuitBreaker,
        "__exit__",
        oldest_entry,
        promises.test_blocks_that_end_in_another_order_or_context_settle_their_own_calls,
    ),
    (
        "the error of a listener takes the place of the call's",
        module,
        "tell",
        told_alone,
        quiet_log,
    ),
]


@pytest.mark.parametrize(("name", "home", "attribute", "broken", "killer"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_bug_in_the_breaker_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, home: Any, attribute: str, broken: Any, killer: Callable[[], object]
) -> None:
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    assert lives(killer)
    monkeypatch.setattr(home, attribute, broken)
    assert not lives(killer)
