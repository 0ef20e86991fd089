"""Arguments, checked in the same words everywhere: the name, the value, and what to give instead."""

from __future__ import annotations

from importlib import import_module
from typing import Any

YEAR = 366 * 86_400.0  # seconds: longer is a slip of the keyboard


def check_number(name: str, value: float, least: float, most: float, unit: str) -> float:
    """Between the bounds, both included."""
    if not least <= _number(name, value, unit) <= most:
        raise ValueError(f"{name}={value!r}: {unit}, from {least:g} to {'a year' if most == YEAR else f'{most:g}'}")
    return value


def check_positive(name: str, value: float, most: float, unit: str) -> float:
    if not 0 < _number(name, value, unit) <= most:
        raise ValueError(f"{name}={value!r}: {unit}, above 0 and at most {most:,.0f}")
    return value


def check_count(name: str, value: int, least: int, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give {unit} as a whole number")
    if value < least:
        raise ValueError(f"{name}={value!r}: {unit}, {least} or more")
    return value


def check_seconds(name: str, value: float, least: float = 0.001) -> float:
    return check_number(name, value, least, YEAR, "seconds")


def check_timeout(timeout: float | None) -> float | None:
    """How long to wait, in seconds: None for ever, 0 one try."""
    if timeout is None:
        return None
    if not _number("timeout", timeout, "seconds, 0: one try, None: for ever,") >= 0:
        raise ValueError(f"timeout={timeout!r}: a wait is not negative; 0 is one try, None waits for ever")
    return float(timeout)


def optional(module: str, extra: str) -> Any:
    """A module of a package that not everybody has."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'distsys[{extra}]'") from error


def _number(name: str, value: float, unit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give {unit} as a number")
    return value
