"""Names of parametrized tests: the same in every process, which is how pytest-xdist shares them out."""

from __future__ import annotations

import re


def shown(value: object) -> str:
    """The value in words, without the address of an object."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
