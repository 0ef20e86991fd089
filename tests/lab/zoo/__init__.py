"""Candidates of every kind: right ones, and wrong ones beside the scene that has to find them.

Each kind has a module with RIGHT and WRONG, and NOT_FOUND for mistakes that no scene shows.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from distsys.lab.explore.explorer import KINDS

ZOO = tuple(KINDS)


def zoo(kind: str) -> ModuleType:
    """Return the candidates of a kind."""
    return importlib.import_module(f"tests.lab.zoo.{ {'retry': 'retries'}.get(kind, kind + 's') }")


def scene_of(kind: str, candidate: Any) -> str:
    """Return the title of the scene that has to show this candidate's mistake."""
    expected = zoo(kind).WRONG[candidate]
    scene = expected[0] if isinstance(expected, tuple) else expected
    return scene if isinstance(scene, str) else KINDS[kind].scenes[scene].title


def name_of(candidate: Any) -> str:
    """Return a candidate's name."""
    return str(candidate.__name__)
