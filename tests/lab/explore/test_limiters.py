"""The explorer on limiters it has never seen."""

from __future__ import annotations

from typing import Any

import pytest

from distsys.lab import Lab
from distsys.lab.explore.explorer import LIMITER_SCENES
from tests.lab.zoo import limiters as zoo


def name_of(candidate: Any) -> str:
    return str(candidate.__name__)


@pytest.mark.parametrize("limiter", zoo.RIGHT, ids=name_of)
async def test_a_right_limiter_holds_in_every_scene(lab: Lab, limiter: Any) -> None:
    """No false alarm, whether it is a window or a bucket, and whatever clock it goes by."""
    exploration = await lab.explore(limiter, kind="limiter")
    assert exploration.passed, exploration
    assert len(exploration.found) == len(LIMITER_SCENES)


@pytest.mark.parametrize("limiter", zoo.WRONG, ids=name_of)
async def test_each_mistake_is_found_by_the_scene_about_it(lab: Lab, limiter: Any) -> None:
    """With a schedule that showed it again on a server nobody has touched."""
    exploration = await lab.explore(limiter, kind="limiter")
    assert exploration.found[zoo.WRONG[limiter]].status == "VIOLATED", exploration


async def test_an_unknown_kind_is_refused(lab: Lab) -> None:
    """With the kinds there are."""
    with pytest.raises(ValueError, match="kind='cache': one of 'lock', 'limiter'"):
        await lab.explore(zoo.Window, kind="cache")
