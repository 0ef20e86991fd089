"""The explorer on locks it has never seen: each mistake found for its reason, and nothing found in a right one."""

from __future__ import annotations

from typing import Any

import pytest

from distsys.lab import Lab
from distsys.lab.explore.build import WrongShape
from distsys.lab.explore.exploration import SceneVerdict
from tests.lab.zoo import locks as zoo


async def test_the_search_is_the_same_every_time(lab: Lab) -> None:
    """The same candidate gives the same schedules and the same verdicts, whatever the machine does."""
    first, second = [await lab.explore(zoo.GetThenDel) for _ in range(2)]
    assert [(f.scene, f.status, f.schedules, f.schedule) for f in first.verdicts] == [
        (f.scene, f.status, f.schedules, f.schedule) for f in second.verdicts
    ]


async def test_a_schedule_can_be_replayed_alone(lab: Lab) -> None:
    """In real time, with its story: what a reader does with the schedule that a counterexample names."""
    found = (await lab.explore(zoo.GetThenDel)).verdicts[zoo.HELD_BACK]
    (again,) = (await lab.explore(zoo.GetThenDel, schedule=found.schedule)).verdicts
    assert (again.status, again.schedule) == ("VIOLATED", found.schedule)
    (undisturbed,) = (await lab.explore(zoo.GetThenDel, schedule="")).verdicts
    assert undisturbed.status == "HELD"


async def test_each_scene_is_told_as_soon_as_it_is_known(lab: Lab) -> None:
    """A reader sees the verdicts come."""
    heard = list[SceneVerdict]()
    exploration = await lab.explore(zoo.Renewed, heard=heard.append)
    assert heard == exploration.verdicts


async def test_what_cannot_be_explored_says_why(lab: Lab) -> None:
    """A wrong shape is not a verdict on the lock."""

    class Zookeeper:
        def __init__(self, zookeeper: object) -> None: ...

    class Closed:
        def __init__(self, redis: object, name: str) -> None: ...

    class Failing:
        def __init__(self, redis: object) -> None:
            raise RuntimeError("no")

    for candidate, words in ((Zookeeper, "'zookeeper'"), (Closed, "Closed"), (Failing, "RuntimeError: no")):
        with pytest.raises(WrongShape, match=words):
            await lab.explore(candidate)


async def test_the_fixture_explores_in_an_async_test_too(explore_lock: Any) -> None:
    """As in a reader's own suite."""
    exploration = explore_lock(zoo.NoLock)
    assert exploration.status == "VIOLATED"
