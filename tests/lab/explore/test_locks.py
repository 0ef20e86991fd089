"""The explorer on locks it has never seen: each mistake found for its reason, and nothing found in a right one."""

from __future__ import annotations

from typing import Any

import pytest

from distsys.lab import Lab
from distsys.lab.explore.explorer import LOCK_SCENES, Found
from tests.lab.zoo import locks as zoo


def name_of(candidate: Any) -> str:
    return str(candidate.__name__)


@pytest.mark.parametrize("lock", zoo.RIGHT, ids=name_of)
async def test_a_right_lock_holds_in_every_scene(lab: Lab, lock: Any) -> None:
    """No false alarm: every command, with every disturbance, in three worlds."""
    exploration = await lab.explore(lock)
    assert exploration.passed, exploration
    assert exploration.schedules > 100
    assert len(exploration.found) == len(LOCK_SCENES)


@pytest.mark.parametrize("lock", zoo.WRONG, ids=name_of)
async def test_each_mistake_is_found_for_its_reason(lab: Lab, lock: Any) -> None:
    """By the scene that is about it, with a schedule that showed it again on a server nobody has touched."""
    scene, words = zoo.WRONG[lock]
    exploration = await lab.explore(lock)
    found = exploration.found[scene]
    assert found.status == "VIOLATED", exploration
    assert words in found.summary
    assert found.story
    assert str(exploration).startswith(f"{lock.__name__}: VIOLATED")
    assert found.summary in exploration._repr_html_()


async def test_the_search_is_the_same_every_time(lab: Lab) -> None:
    """The same candidate gives the same schedules and the same verdicts, whatever the machine does."""
    first, second = [await lab.explore(zoo.GetThenDel) for _ in range(2)]
    assert [(f.scene, f.status, f.schedules, f.schedule) for f in first.found] == [
        (f.scene, f.status, f.schedules, f.schedule) for f in second.found
    ]


async def test_a_schedule_can_be_replayed_alone(lab: Lab) -> None:
    """In real time, with its story: what a reader does with the schedule that a counterexample names."""
    found = (await lab.explore(zoo.GetThenDel)).found[zoo.HELD_BACK]
    (again,) = (await lab.explore(zoo.GetThenDel, schedule=found.schedule)).found
    assert (again.status, again.schedule) == ("VIOLATED", found.schedule)
    (undisturbed,) = (await lab.explore(zoo.GetThenDel, schedule="")).found
    assert undisturbed.status == "HELD"


async def test_each_scene_is_told_as_soon_as_it_is_known(lab: Lab) -> None:
    """A reader sees the verdicts come."""
    heard = list[Found]()
    exploration = await lab.explore(zoo.Renewed, heard=heard.append)
    assert heard == exploration.found


async def test_what_cannot_be_explored_says_why(lab: Lab) -> None:
    """A wrong shape is not a verdict on the lock."""

    class Zookeeper:
        def __init__(self, zookeeper: object) -> None: ...

    class Blocking:
        def __init__(self, redis: object, name: str) -> None: ...
        def acquire(self) -> bool:
            return True

        def release(self) -> None: ...

    for candidate, words in ((Zookeeper, "'zookeeper'"), (Blocking, "only async locks")):
        exploration = await lab.explore(candidate)
        assert exploration.status == "INCONCLUSIVE"
        assert words in exploration.found[0].summary


async def test_the_fixture_explores_in_an_async_test_too(explore_lock: Any) -> None:
    """As in a reader's own suite."""
    exploration = explore_lock(zoo.NoLock)
    assert exploration.status == "VIOLATED"
