"""Checks of arguments. Each error has the same form: the name, the value, and what to give instead."""

from __future__ import annotations

from importlib import import_module
from typing import Any

YEAR = 366 * 86_400.0  # seconds; a longer duration is taken for a mistake


def check_is_number(name: str, value: float, unit: str) -> float:
    """Return the value if it is an int or a float, but no bool. TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give {unit} as a number")
    return value


def check_number(name: str, value: float, least: float, most: float, unit: str) -> float:
    """Return the value if it lies between the bounds, both included. TypeError, ValueError."""
    if not least <= check_is_number(name, value, unit) <= most:
        raise ValueError(f"{name}={value!r}: give {unit} from {least:g} to {'a year' if most == YEAR else f'{most:g}'}")
    return value


def check_positive(name: str, value: float, most: float, unit: str) -> float:
    """Return the value if it is above 0 and at most `most`. TypeError, ValueError."""
    if not 0 < check_is_number(name, value, unit) <= most:
        raise ValueError(f"{name}={value!r}: give {unit} above 0, at most {most:,.0f}")
    return value


def check_count(name: str, value: int, least: int, unit: str) -> int:
    """Return the value if it is an int and at least `least`. TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give {unit} as a whole number")
    if value < least:
        raise ValueError(f"{name}={value!r}: give {unit}, {least} or more")
    return value


def check_seconds(name: str, value: float, least: float = 0.001) -> float:
    """Return the value if it is a duration from `least` seconds to a year. TypeError, ValueError."""
    return check_number(name, value, least, YEAR, "seconds")


def check_timeout(timeout: float | None) -> float | None:
    """Return how long to wait, in seconds: None is for ever, 0 is one try. TypeError, ValueError."""
    if timeout is None:
        return None
    if not check_is_number("timeout", timeout, "seconds (0 is one try, None is for ever)") >= 0:
        raise ValueError(f"timeout={timeout!r} is negative: 0 is one try, None waits for ever")
    return float(timeout)


def check_text(name: str, value: Any, example: str = "", *, least: int = 1, most: int | None = None) -> str:
    """Return the value if it is a str of at least `least` characters that UTF-8 can encode. TypeError, ValueError.

    example  a good value, for the error
    most     bytes; set for text that becomes part of a PostgreSQL key, which can't hold a NUL either
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a str{f': {example}' if example else ''}")
    if len(value) < least:
        raise ValueError(
            f"{name}={value!r} is empty: give at least one character{f', as in {example}' if example else ''}"
        )
    try:
        size = len(value if value.isascii() else value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={value!r} holds a lone surrogate, half of a character: UTF-8 has no form for it"
        ) from error
    if most is not None and (size > most or "\0" in value):
        shown = repr(value) if size <= most else f"{value[:40]!r}..."
        raise ValueError(f"{name}={shown}: give at most {most} bytes, without NUL")
    return value


def optional(module: str, extra: str) -> Any:
    """Import a module of an optional package; ImportError names the extra of distsys that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'distsys[{extra}]'") from error
