"""Shared by the rules on PostgreSQL: a connection or a pool as `db`, and rows as tuples."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import tuple_row
from psycopg.sql import Composed
from psycopg_pool import AsyncConnectionPool

Database = AsyncConnection[Any] | AsyncConnectionPool[Any]


@asynccontextmanager
async def connection(db: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """Give the connection itself, or one from the pool for the length of the block. TypeError for anything else."""
    given: object = db
    if isinstance(given, AsyncConnection):
        yield given
    elif isinstance(given, AsyncConnectionPool):
        async with given.connection() as conn:
            yield conn
    else:
        raise TypeError(f"db={db!r} is a {type(db).__name__}: pass a psycopg AsyncConnection or an AsyncConnectionPool")


async def rows(conn: AsyncConnection[Any], query: str | Composed, parameters: Any = None) -> list[Any]:
    """Run a query and return its rows as tuples, whatever row factory the connection has.

    A missing table is an UndefinedTable with a note that says how to create it.
    """
    text = query.encode() if isinstance(query, str) else query
    try:
        cursor = await conn.cursor(row_factory=tuple_row).execute(text, parameters)
        return await cursor.fetchall()
    except psycopg.errors.UndefinedTable as error:
        error.add_note("`await distsys.ensure_schema(db)` creates the tables of distsys: call it once per database")
        raise
