"""The matrix as it was fixed, and what recommend() makes of it."""

from __future__ import annotations

import re
from itertools import product

import pytest

from distsys import decide
from distsys.decide.matrix import MEANING, PATTERNS, RULES, STAGES, Pattern, recommend

FIXED = """\
Event sourcing | OVERKILL | OVERKILL | OVERKILL | OVERKILL | WHEN JUSTIFIED | append-only table with a status column
Saga orchestration | OVERKILL | OVERKILL | OVERKILL | SELECTIVE | APPROPRIATE | sequential calls with manual rollback
Circuit breaker | OVERKILL | OVERKILL | BORDERLINE | APPROPRIATE | REQUIRED | try/except with a timeout
Distributed locks | OVERKILL | OVERKILL | BORDERLINE | APPROPRIATE | REQUIRED | row lock (SELECT ... FOR UPDATE)
CQRS | OVERKILL | OVERKILL | OVERKILL | OVERKILL | WHEN JUSTIFIED | one model for reads and writes
Transactional outbox | OVERKILL | OVERKILL | OVERKILL | SELECTIVE | APPROPRIATE | publish directly after commit
Rate limiting | OVERKILL | OVERKILL | SIMPLE ONLY | APPROPRIATE | REQUIRED | nginx limit or cloud WAF"""


def test_the_seven_fixed_rows_are_exactly_as_fixed() -> None:
    """Seven patterns, five stages, one alternative each: every cell, in order."""
    rows = [" | ".join((p.name, *p.cells, p.alternative)) for p in PATTERNS if not p.ours]
    assert "\n".join(rows) == FIXED
    assert STAGES == ("Interview", "Hackathon", "MVP", "Growth", "Enterprise")


def test_every_row_of_our_own_is_marked_wherever_it_is_shown() -> None:
    """A reader can always tell an opinion of this project from the fixed matrix."""
    ours = [p for p in PATTERNS if p.ours]
    assert [p.name for p in ours] == [
        "Retry & backoff", "Bulkhead isolation", "Idempotency", "Fencing tokens", "Edge computing",
    ]  # fmt: skip
    for pattern in ours:
        assert f"| {pattern.name} (ours) |" in decide.matrix_markdown()


@pytest.mark.parametrize(("pattern", "stage"), list(product([p.name for p in PATTERNS], STAGES)))
def test_one_instance_gets_the_in_process_alternative_whatever_the_stage(pattern: str, stage: str) -> None:
    """The rule of thumb comes before the matrix, and the answer says why."""
    answer = recommend(pattern, stage, 1)
    assert answer.verdict == "IN-PROCESS"
    assert answer.alternative == answer.pattern.in_process
    assert "One instance" in answer.reason


@pytest.mark.parametrize("instances", [2, 3, 10_000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_several_instances_get_the_cell_of_the_matrix(pattern: Pattern, instances: int) -> None:
    """From the second instance on the number no longer matters; the stage does."""
    for stage, cell in zip(STAGES, pattern.cells, strict=True):
        answer = recommend(pattern.name, stage, instances)
        assert (answer.verdict, answer.alternative) == (cell, pattern.alternative)
        assert answer.reason == f"{MEANING[cell]} {pattern.when}"


def test_the_answer_for_locks_changes_from_mvp_to_enterprise() -> None:
    """The change a reader sees first in the dashboard."""
    assert recommend("Distributed locks", "MVP", 3).verdict == "BORDERLINE"
    assert recommend("Distributed locks", "Enterprise", 3).verdict == "REQUIRED"


@pytest.mark.parametrize(
    ("pattern", "stage", "instances", "message"),
    [
        ("mutex", "MVP", 2, "'mutex' is none of Event sourcing"),
        ("", "MVP", 2, "'' is none of"),
        ("ing", "MVP", 2, "may be any of Event sourcing, Rate limiting"),
        ("locks", "Seed", 2, "'Seed' is none of Interview, Hackathon"),
        ("locks", "MVP", 0, "instances must be at least 1 (got 0): count running server processes"),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(
    pattern: str, stage: str, instances: int, message: str
) -> None:
    """ValueError, with the value and the choices."""
    with pytest.raises(ValueError, match=re.escape(message)):
        recommend(pattern, stage, instances)


def test_a_part_of_a_name_is_enough_when_only_one_has_it() -> None:
    """Case and the rest of the name do not matter; a full name wins over a part of another."""
    assert decide.find("LOCKS").name == "Distributed locks"
    assert decide.find("cqrs").name == "CQRS"


def test_there_are_sixteen_rules_in_six_categories_and_each_pattern_leads_to_some() -> None:
    """The map is complete: no rule without a pattern, no pattern without a rule."""
    counts = {r.category: sum(o.category == r.category for o in RULES) for r in RULES}
    assert list(counts.values()) == [3, 3, 3, 3, 2, 2]
    assert {name for p in PATTERNS for name in p.rules} == {r.name for r in RULES}


def test_the_eight_key_decisions_belong_to_patterns_that_exist() -> None:
    """Each claim is shown with the pattern it is about."""
    assert len(decide.DECISIONS) == 8
    assert {name for d in decide.DECISIONS for name in d.patterns} <= {p.name for p in PATTERNS}


def test_a_rule_that_is_not_built_links_to_nothing() -> None:
    """Coming means coming: no dead link."""
    for rule in RULES:
        assert bool(rule.modules) == bool(rule.links) == bool(rule.references)


def test_an_answer_in_words_tells_the_verdict_the_reason_and_the_alternative() -> None:
    """str() is what the command line prints."""
    text = str(recommend("rate", "Growth", 4))
    assert text.startswith("Rate limiting at Growth, 4 instances: APPROPRIATE\n")
    assert "Simpler, where it is enough: nginx limit or cloud WAF." in text
    assert "Rate-limit storage: Redis, atomic Lua." in text
    assert "Lua" not in str(recommend("rate", "MVP", 1)), "choices inside a pattern one does not need are noise"
