"""The explorer on candidates of every kind: nothing found in a right one, each mistake found for its reason."""

from __future__ import annotations

from typing import Any

import pytest

from distsys.lab import Lab
from distsys.lab.explore.explorer import KINDS
from tests.lab.zoo import about, name_of, scene_of, zoo
from tests.lab.zoo.with_globals import counted

SAMPLED = {"lock": 4, "limiter": 3, "endpoint": 4, "breaker": 1, "retry": 1}  # every so many; `make zoo` takes all


def some(kind: str, table: str) -> list[Any]:
    """Return what is tried here, of the right or of the wrong ones."""
    return [
        pytest.param(kind, candidate, id=f"{kind}-{name_of(candidate)}")
        for candidate in list(getattr(zoo(kind), table))[:: SAMPLED[kind]]
    ]


@pytest.mark.parametrize(("kind", "candidate"), [case for kind in KINDS for case in some(kind, "RIGHT")])
async def test_a_right_one_holds_in_every_scene(lab: Lab, kind: str, candidate: Any) -> None:
    """No false alarm."""
    exploration = await lab.explore(candidate, kind=kind)
    assert exploration.passed, exploration
    assert len(exploration.verdicts) == len(KINDS[kind].scenes)


@pytest.mark.parametrize(("kind", "candidate"), [case for kind in KINDS for case in some(kind, "WRONG")])
async def test_a_mistake_is_found_by_the_scene_about_it(lab: Lab, kind: str, candidate: Any) -> None:
    """With a story, and a picture of the run."""
    exploration = await lab.explore(candidate, kind=kind, only=about(kind, candidate))
    violated = {found.scene: found for found in exploration.violated()}
    assert scene_of(kind, candidate) in violated, exploration
    assert all(found.card and found.card.svg() for found in violated.values())
    assert str(exploration).startswith(f"{name_of(candidate)}: VIOLATED")


async def test_an_unknown_kind_is_refused(lab: Lab) -> None:
    """With the kinds there are."""
    with pytest.raises(ValueError, match="kind='cache': one of 'lock', 'limiter'"):
        await lab.explore(object, kind="cache")


async def test_a_candidate_that_cannot_be_copied_is_explored_all_the_same(lab: Lab) -> None:
    """A module of a company holds locks, sockets and clients in its globals."""
    assert (await lab.explore(counted, kind="retry")).passed
