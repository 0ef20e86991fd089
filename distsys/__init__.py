"""Sixteen rules for distributed systems, each shown breaking and holding on real servers.

Names are loaded when first used: `import distsys` imports no driver. They are listed once, in `__init__.pyi`.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
_LISTED = re.findall(
    r"^from (\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.MULTILINE
)
_HOME = {name: module for module, name in _LISTED}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
