"""How to plant a bug in a function that calls a module's function of its own name, and other helpers of bugs."""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection


async def committed(conn: AsyncConnection[Any]) -> None:
    """Commit without psycopg's knowledge, and begin again."""
    for command in (b"COMMIT", b"BEGIN", b"SAVEPOINT one"):
        await conn.execute(command)
