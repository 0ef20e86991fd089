"""Public names that are loaded when first used, and listed once: in the stub beside the package's `__init__.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def load_lazily(package: str, init: str) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` of a package, whose stub has `from module import name as name` for each."""
    listed = re.findall(r"^from (\S+) import (\w+) as", Path(init).with_suffix(".pyi").read_text("utf-8"), re.MULTILINE)
    home = {name: module for module, name in listed}

    def load(name: str) -> Any:
        if name in home:
            return getattr(import_module(home[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted(home), load
