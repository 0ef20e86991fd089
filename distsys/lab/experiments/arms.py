"""What an arm is there for: the mistake that has to break in every run, or the rule that has to hold."""

from __future__ import annotations

from typing import Any

from distsys.lab.experiment import Arm


def breaks(name: str, candidate: Any, **more: Any) -> Arm:
    return Arm(name=name, candidate=candidate, expected="VIOLATED", **more)


def holds(name: str, candidate: Any, **more: Any) -> Arm:
    return Arm(name=name, candidate=candidate, expected="HELD", **more)
