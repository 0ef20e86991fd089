"""The lab: real servers, real processes, faults at exact points, and a checker's verdict. See `Lab.open`.

A rule never imports it. `checkpoint` is free outside of an experiment, so a candidate may keep its named points.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distsys.lab.run.experiment import Arm as Arm
    from distsys.lab.run.experiment import Experiment as Experiment
    from distsys.lab.run.worker import checkpoint as checkpoint
    from distsys.lab.session import Lab as Lab

_HOME = {"Arm": "experiment", "Experiment": "experiment", "Lab": "session", "checkpoint": "worker"}
__all__ = sorted(_HOME)  # computed: one list, not two


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
