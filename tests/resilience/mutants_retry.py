"""Bugs planted in retry and in the tables of outcomes, each with the test that has to die of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from distsys.errors import BulkheadFull, CircuitOpen
from distsys.resilience import outcomes
from distsys.resilience import retry as module
from distsys.resilience.outcomes import UNKNOWN
from distsys.resilience.retry import Attempts, Retry, RetryBudget
from tests.resilience import test_outcomes as tables
from tests.resilience import test_retry as promises
from tests.survival import lives

init, goes_on, hopeless, for_async = Retry.__init__, Retry._goes_on, Retry._hopeless, Retry.for_async
begin, leave = Attempts.__init__, Attempts.__exit__


def without(**forced: Any) -> Callable[..., None]:
    """Whatever is asked for, these options are something else."""
    return lambda self, *args, **options: init(self, *args, **{**options, **forced})


def retries_only(self: Any, *args: Any, **options: Any) -> None:
    init(self, *args, **options)
    self.max_attempts += 1


def no_deadline(self: Any, policy: Any, now: Any) -> None:
    begin(self, policy, now)
    self.deadline = None


class Least(float):
    """min() takes it, whatever it is compared with."""

    def __gt__(self, other: object) -> bool:
        return False

    def __lt__(self, other: object) -> bool:
        return True


def any_retry_after(error: BaseException) -> float | None:
    asked = outcomes.retry_after(error)
    return None if asked is None else Least(asked)


def ambiguous_too(self: Any, error: Exception) -> str:
    self.idempotent = None
    return hopeless(self, error)


def cancellation_too(self: Any, fn: Any) -> Any:
    async def stubborn(*args: Any, **kwargs: Any) -> Any:
        try:
            return await fn(*args, **kwargs)
        except asyncio.CancelledError:
            return await fn(*args, **kwargs)

    return for_async(self, stubborn)


def error_of_its_own(self: Any, fn: Any) -> Any:
    guarded = for_async(self, fn)

    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await guarded(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("all attempts failed") from error

    return call


def holds_the_errors(self: Any, attempts: Any, error: Exception) -> Any:
    attempts.errors = [*getattr(attempts, "errors", ()), error]
    return goes_on(self, attempts, error)


def sets_the_old(self: Any, *error: Any) -> bool:
    if self._inside is not None:
        module._around.set(self._outside)
    return leave(self, *error)


class Alone:
    """A context variable that remembers nothing."""

    def get(self) -> tuple[int, ...]:
        return ()

    def set(self, every: tuple[int, ...]) -> None: ...


def free(self: Any) -> bool:
    return True


def exactly_one(self: Any) -> bool:
    with self._lock:
        self._refill()
        self.suppressed += self._saved < 1
        taken = self._saved >= 1
        self._saved -= taken
        return taken


def fixed_backoff(self: Any, attempts: Any) -> float:
    return self.base_delay * self._rng()


def without_cap(self: Any, attempts: Any) -> float:
    return self.base_delay * 2.0 ** (attempts.number - 1) * self._rng()


JITTER = partial(promises.test_waits_grow_to_the_longest_and_chance_has_its_part, "full", 0.5, [0.5, 1, 2, 4, 5, 5])
OFTEN = promises.test_max_attempts_counts_the_first_one


def table(*said: Any) -> Callable[[], object]:
    return partial(promises.test_what_is_tried_again_is_what_may_pass_and_do_no_harm, *said)


def kind(error: BaseException) -> Callable[[], object]:
    return lambda: tables.test_an_error_is_what_its_code_or_class_says(
        error, next(outcome for each, outcome in tables.KINDS if type(each) is type(error))
    )


def unauthorised() -> None:
    """Of a real response."""
    response = tables.httpx.Response(401, request=tables.request)
    with pytest.raises(tables.httpx.HTTPStatusError) as raised:
        response.raise_for_status()
    table(raised.value, {}, False)()


MUTANTS: list[tuple[str, Any, str, Any, Callable[[], object]]] = [
    ("jitter is ignored", Retry, "__init__", without(jitter="none"), JITTER),
    ("the wait does not grow", Retry, "_backoff", fixed_backoff, JITTER),
    ("the wait grows for ever", Retry, "_backoff", without_cap, JITTER),
    ("max_attempts counts retries only", Retry, "__init__", retries_only, partial(OFTEN, promises.called)),
    (
        "an error of its own takes the last one's place",
        Retry,
        "for_async",
        error_of_its_own,
        partial(OFTEN, promises.called_async),
    ),
    ("no notes", Attempts, "note", lambda self, error, why: None, partial(OFTEN, promises.as_a_block)),
    (
        "a wait passes the deadline",
        Attempts,
        "__init__",
        no_deadline,
        partial(promises.test_a_wait_that_would_pass_the_deadline_is_not_begun, promises.called),
    ),
    (
        "Retry-After is ignored",
        module,
        "retry_after",
        lambda error: None,
        partial(promises.test_a_retry_after_comes_on_top_of_the_backoff_and_is_capped, promises.called),
    ),
    (
        "Retry-After is not capped",
        module,
        "retry_after",
        any_retry_after,
        partial(promises.test_a_retry_after_comes_on_top_of_the_backoff_and_is_capped, promises.called_async),
    ),
    ("the budget is not charged", RetryBudget, "take", free, promises.test_a_budget_suppresses_retries_and_says_so),
    (
        "the budget is each function's own",
        RetryBudget,
        "take",
        free,
        promises.test_a_budget_is_shared_by_many_functions,
    ),
    (
        "calls pay nothing in",
        RetryBudget,
        "pay_in",
        lambda self: None,
        promises.test_a_budget_suppresses_retries_and_says_so,
    ),
    ("tenths do not add up", RetryBudget, "take", exactly_one, promises.test_a_budget_suppresses_retries_and_says_so),
    (
        "an ambiguous outcome is tried again",
        Retry,
        "_hopeless",
        ambiguous_too,
        table(TimeoutError(), {"idempotent": False}, False),
    ),
    ("whatever raised is tried again", Retry, "_hopeless", lambda self, error: "", table(TypeError(), {}, False)),
    ("an open breaker is knocked at", CircuitOpen, "retryable", True, table(CircuitOpen(), {}, False)),
    ("a full bulkhead is not tried again", BulkheadFull, "retryable", False, table(BulkheadFull(), {}, True)),
    ("a 401 is tried again", outcomes, "HTTP_STATUS", {**outcomes.HTTP_STATUS, 401: UNKNOWN}, unauthorised),
    (
        "a commit that was cut off did not happen",
        outcomes,
        "SQLSTATE",
        {"08": outcomes.NOT_DONE},
        kind(tables.sql.ConnectionFailure()),
    ),
    (
        "a cancelled call is tried again",
        Retry,
        "for_async",
        cancellation_too,
        partial(promises.test_what_ends_the_call_is_never_tried_again, promises.called_async, asyncio.CancelledError),
    ),
    (
        "a coroutine closed elsewhere changes that context",
        Attempts,
        "__exit__",
        sets_the_old,
        promises.test_a_coroutine_that_is_closed_elsewhere_leaves_that_context_alone,
    ),
    (
        "layers do not know of each other",
        module,
        "_around",
        Alone(),
        promises.test_three_layers_warn_that_their_attempts_multiply,
    ),
    (
        "retry is let outside of a breaker",
        module,
        "layers",
        lambda fn: (),
        promises.test_retry_outside_of_a_breaker_is_refused_when_it_is_decorated,
    ),
    (
        "the errors are kept",
        Retry,
        "_goes_on",
        holds_the_errors,
        partial(promises.test_no_exception_outlives_its_call, promises.called, 3),
    ),
    (
        "a block ends after its first error",
        Attempts,
        "__exit__",
        lambda self, *_: False,
        partial(promises.test_the_first_success_ends_it, promises.as_a_block),
    ),
]


@pytest.mark.parametrize(("name", "home", "attribute", "broken", "killer"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_bug_in_retry_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, home: Any, attribute: str, broken: Any, killer: Callable[[], object]
) -> None:
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    assert lives(killer)
    monkeypatch.setattr(home, attribute, broken)
    assert not lives(killer)
