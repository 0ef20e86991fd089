"""Sixteen rules for distributed systems, each shown failing and then holding up on real servers.

Names are loaded when first used: `import distsys` imports no driver. They are listed once, in `__init__.pyi`.
"""

from distsys._support.lazy import load_lazily

__version__ = "0.1.0"
__all__, __getattr__ = load_lazily(__name__, __file__)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
