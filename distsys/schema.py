"""The tables of all rules on PostgreSQL, created by one call."""

from __future__ import annotations

from importlib.resources import files

from distsys._support.postgres import Database, connection, rows

_SCRIPTS = {"distsys.locks": "fencing.sql", "distsys.idempotency": "schema.sql"}
_LAST_TABLES = ("distsys_fence", "distsys_failures")  # the last one that each script creates


async def ensure_schema(db: Database) -> None:
    """Create the tables and sequences of every rule on PostgreSQL that are missing.

    db  a psycopg AsyncConnection, or an AsyncConnectionPool

    Call it at a deployment or at the start of the app; many processes may call it at once. If nothing is missing it
    changes nothing and waits for no writer, as CREATE INDEX IF NOT EXISTS would.
    """
    async with connection(db) as conn, conn.transaction():
        missing = await rows(
            conn, "SELECT 1 FROM unnest(%s::text[]) AS t WHERE to_regclass(t) IS NULL", [[*_LAST_TABLES]]
        )
        if missing:
            # IF NOT EXISTS alone fails when two transactions create the same table at once.
            await rows(conn, "SELECT pg_advisory_xact_lock(hashtext('distsys.schema'))")
            for script in scripts():
                await conn.execute(script)


def scripts() -> list[bytes]:
    """Return the SQL that makes all tables which are missing."""
    return [files(package).joinpath(script).read_bytes() for package, script in _SCRIPTS.items()]
