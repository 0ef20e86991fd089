"""The dashboard, driven through its controls' values; the browser layer does the same with a mouse."""

from __future__ import annotations

import re

import pytest

from distsys.decide.dashboard import INK, LINK, PAPER, QUIET, TONES, Dashboard, answer_html
from distsys.decide.matrix import PATTERNS, STAGES, recommend


def test_another_stage_is_another_answer() -> None:
    """MVP to Enterprise: the one HTML widget changes, and nothing else is needed."""
    board = Dashboard("Distributed locks", stage="MVP", instances=3)
    assert "BORDERLINE" in board.answer.value
    board.stage.value = "Enterprise"
    assert "REQUIRED" in board.answer.value
    assert "BORDERLINE" not in board.answer.value


def test_one_instance_is_answered_in_process() -> None:
    """The number of instances outranks the stage."""
    board = Dashboard("Distributed locks", stage="Enterprise", instances=3)
    board.instances.value = 1
    assert "IN-PROCESS" in board.answer.value
    assert "asyncio.Lock" in board.answer.value


def test_every_control_says_what_it_is() -> None:
    """A description labels each for screen readers."""
    board = Dashboard()
    assert [c.description for c in (board.pattern, board.stage, board.instances)] == ["Pattern", "Stage", "Instances"]


def test_without_a_kernel_the_card_is_shown() -> None:
    """The bundle holds the answer as HTML and as text beside the live view."""
    bundle = Dashboard()._repr_mimebundle_()
    assert "BORDERLINE" in bundle["text/html"]
    assert bundle["text/plain"].startswith("Distributed locks at MVP, 3 instances: BORDERLINE")


def test_the_current_stage_is_marked_in_words_not_only_in_colour() -> None:
    """The strip marks one stage with an arrow, and none when there is one instance."""
    assert "▸ Growth" in answer_html(recommend("locks", "Growth", 2))
    assert "▸" not in answer_html(recommend("locks", "Growth", 1))


@pytest.mark.parametrize(
    ("ink", "paper"),
    [(INK, PAPER), (QUIET, PAPER), (LINK, PAPER), *sorted({(ink, paper) for _, ink, paper in TONES.values()})],
)
def test_every_text_has_a_contrast_of_at_least_four_and_a_half_to_one(ink: str, paper: str) -> None:
    """WCAG AA; the card brings its own paper, so the theme does not matter."""
    light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("pattern", [p.name for p in PATTERNS])
def test_every_answer_is_balanced_markup(pattern: str) -> None:
    """Whatever is chosen, each tag that opens closes."""
    for stage in STAGES:
        for instances in (1, 2):
            html = answer_html(recommend(pattern, stage, instances))
            for tag in ("div", "span", "a", "b"):
                assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>")


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
