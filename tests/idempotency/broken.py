"""How to plant a bug in a function that calls a module's function of its own name, and other helpers of bugs."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
from psycopg import AsyncConnection

from tests.bugs import Plant


def edited_at_module_level(home: Any, attribute: str, old: str, new: str) -> Plant:
    """Plant like `edited`, where the function refers to a global of its own name: inside another function it would be
    taken for a variable of that one."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        function = getattr(home, attribute)
        text = textwrap.dedent(inspect.getsource(function))
        assert text.count(old) == 1, f"{attribute} no longer has this text once: {old}"
        names: dict[str, Any] = dict(function.__globals__)
        exec("from __future__ import annotations\n" + text.replace(old, new), names)
        patch.setattr(function, "__code__", names[function.__name__].__code__)

    return plant


async def committed(conn: AsyncConnection[Any]) -> None:
    """Commit without psycopg's knowledge, and begin again."""
    for command in (b"COMMIT", b"BEGIN", b"SAVEPOINT one"):
        await conn.execute(command)
