"""Candidates of every kind: right ones, and wrong ones beside the scene that has to find them.

Each kind has a module with RIGHT and WRONG, and NOT_FOUND for mistakes that no scene shows.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from distsys.lab.explore.explorer import KINDS

ZOO = tuple(KINDS)


MODULES = {
    "lock": ("locks", "locks_unseen"),
    "limiter": ("limiters", "limiters_unseen"),
    "endpoint": ("endpoints",),
    "breaker": ("breakers",),
    "retry": ("retries",),
}


def zoo(kind: str) -> SimpleNamespace:
    """Return the candidates of a kind, from all its modules."""
    modules = [importlib.import_module(f"tests.lab.zoo.{name}") for name in MODULES[kind]]
    tables = {name: {} for name in ("WRONG", "NOT_FOUND")}
    for module in modules:
        for name, table in tables.items():
            table.update(getattr(module, name, {}))
    return SimpleNamespace(RIGHT=[one for module in modules for one in module.RIGHT], **tables)


def scene_of(kind: str, candidate: Any) -> str:
    """Return the title of the scene that has to show this candidate's mistake."""
    expected = zoo(kind).WRONG[candidate]
    scene = expected[0] if isinstance(expected, tuple) else expected
    return scene if isinstance(scene, str) else KINDS[kind].scenes[scene].title


def about(kind: str, candidate: Any) -> tuple[int, ...]:
    """Return the numbers of the scenes to try with a wrong candidate: the one about its mistake, where scenes are slow."""
    titles = [scene.title for scene in KINDS[kind].scenes]
    return (1 + titles.index(scene_of(kind, candidate)),) if KINDS[kind].served else ()


def name_of(candidate: Any) -> str:
    """Return a candidate's name."""
    return str(candidate.__name__)
