"""Errors: what a caller may conclude, and what each carries."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from distsys import errors
from distsys.errors import DistsysError, Indeterminate, LockLost, LockNotAcquired, Rejected, StaleToken

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, DistsysError)]
each = pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)


@each
def test_every_error_says_whether_the_work_may_have_happened(error: type[DistsysError]) -> None:
    """Each derives from exactly one of the two roots."""
    assert error is DistsysError or issubclass(error, Rejected) != issubclass(error, Indeterminate)


def test_what_was_refused_is_rejected_and_what_was_lost_is_indeterminate() -> None:
    """The lab records the first as a failure, the second as unknown."""
    assert {e.__name__ for e in ALL if issubclass(e, Indeterminate)} == {"Indeterminate", "LockLost", "OutcomeUnknown"}


@each
def test_the_docstring_is_the_default_message(error: type[DistsysError]) -> None:
    """The first line of the docstring, unless a message is given."""
    assert error.__doc__ is not None
    assert str(error()) == error.__doc__.splitlines()[0]
    assert str(error("more exactly this")) == "more exactly this"


def test_facts_are_attributes() -> None:
    """A missing fact is an AttributeError that names the facts there are."""
    error = StaleToken("late", expected=34, actual=33)
    assert (error.expected, error.actual) == (34, 33)
    with pytest.raises(AttributeError, match=r"StaleToken carries no 'holder'; it carries \['actual', 'expected'\]"):
        _ = error.holder


@each
def test_every_error_is_an_rfc_9457_problem(error: type[DistsysError]) -> None:
    """Status, type, title and detail; facts that JSON knows beside them, never in their place."""
    problem = error("what happened", name="n", token=7, title="not mine", errors=[ValueError()]).problem()
    assert json.loads(json.dumps(problem)) == problem
    assert problem["detail"] == "what happened"
    assert problem["type"].startswith(("urn:distsys:", "https://iana.org/assignments/http-problem-types#"))
    ours = (error.__doc__ or "").splitlines()[0].removesuffix(".")
    assert problem["title"] == (error.problem_type[1] if error.problem_type else ours)
    assert 400 <= problem["status"] < 600
    assert (problem["name"], problem["token"], "errors" in problem) == ("n", 7, False)


def test_a_problem_type_is_the_errors_name_in_lower_case() -> None:
    """The name of the class, with hyphens."""
    assert LockNotAcquired().problem()["type"] == "urn:distsys:lock-not-acquired"
    assert (LockNotAcquired().problem()["status"], LockLost().problem()["status"]) == (423, 503)


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_an_error_survives_the_way_between_processes(again: object) -> None:
    """A pickled or copied error has the same type, message and facts."""
    error = LockLost("gone", name="n", token=7)
    twin = again(error)  # type: ignore[operator]
    assert (type(twin), str(twin), twin.facts, twin.token) == (LockLost, "gone", error.facts, 7)
