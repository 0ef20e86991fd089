"""What the idempotency experiments check, on histories written by hand."""

from __future__ import annotations

import pytest

from distsys.lab.check.effects import exactly_once, one_answer, right_answers
from distsys.lab.history.history import Check, History
from distsys.lab.show.story import story
from tests.lab.histories import history, op

ASKED = [op("w1", "request", 0, 1, "order-1"), op("w2", "request", 2, 3, "order-1")]
ANN = op("w1", "told", 1, 1.1, "order-1: 10 from ann → 10 from ann, receipt of w1")
AGAIN = op("w2", "told", 3, 3.1, "order-1: 10 from ann → 10 from ann, receipt of w1")
LATER = op("w2", "told", 4, 4.1, "order-1: 10 from ann → 10 from ann, receipt of w2")
LEAKED = op("w2", "told", 3, 3.1, "order-2: 10 from bob → 10 from ann, receipt of w1")
PUBLISHED = op("w1", "request", 0, 1, "m")
KILLED = [(2, "killed", "w2")]

CASES: list[tuple[Check, History, str]] = [
    (right_answers, history(), "INCONCLUSIVE"),
    (right_answers, history(ASKED[0], ANN), "INCONCLUSIVE"),
    (right_answers, history(*ASKED, ANN, AGAIN), "HELD"),
    (right_answers, history(*ASKED, ANN), "HELD"),  # the second one was refused
    (right_answers, history(*ASKED, ANN, LEAKED), "VIOLATED"),
    (one_answer, history(), "INCONCLUSIVE"),
    (one_answer, history(*ASKED, ANN), "INCONCLUSIVE"),
    (one_answer, history(*ASKED, ANN, AGAIN), "HELD"),
    (one_answer, history(*ASKED, ANN, LEAKED), "INCONCLUSIVE"),  # of another intent
    (one_answer, history(*ASKED, ANN, AGAIN, LATER), "VIOLATED"),
    (exactly_once, history(PUBLISHED, applied={"m": 1}), "INCONCLUSIVE"),
    (exactly_once, history(PUBLISHED, faults=KILLED, applied={"m": 1}), "HELD"),
    (exactly_once, history(PUBLISHED, faults=KILLED, applied={"m": 2}), "VIOLATED"),
    (exactly_once, history(PUBLISHED, faults=KILLED, applied={}), "VIOLATED"),
    (exactly_once, history(op("w1", "request", 0, None, "m"), faults=KILLED, applied={}), "HELD"),  # not published
]


@pytest.mark.parametrize(
    ("check", "seen", "status"), CASES, ids=[f"{c.__name__}-{n}" for n, (c, *_) in enumerate(CASES)]
)
def test_a_check_says_what_the_history_shows(check: Check, seen: History, status: str) -> None:
    """Held, violated with a witness, or that the danger was never there."""
    finding = check(seen)
    assert finding.status == status, finding
    assert finding.summary
    assert bool(finding.violations) == (status == "VIOLATED")
    assert set(finding.witness) <= set(seen)


def test_the_story_tells_who_was_answered_what() -> None:
    """In the reader's words, not in the record's."""
    seen = history(*ASKED, ANN, LEAKED)
    assert "w2 answered order-2: 10 from bob → 10 from ann, receipt of w1." in story(seen, right_answers(seen))
