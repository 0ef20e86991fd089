"""Keys of PostgreSQL's advisory locks, and who holds them: a name becomes a key, a row of pg_locks a state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from psycopg import AsyncConnection
from psycopg.rows import kwargs_row

from distsys._support.arguments import check_text
from distsys.locks.hold import EXAMPLE

Key = int | tuple[int, int]


def lock_id(name: str) -> int:
    """Return the signed 64-bit id of a name: the first 8 bytes of its SHA-256, big-endian; the same on every machine.

    In SQL: `('x' || left(encode(sha256(convert_to(name, 'UTF8')), 'hex'), 16))::bit(64)::bigint`. Among n names two
    share an id with odds of about n^2 / 2^65: one in 37 million for a million names. Such two only wait for each other.
    """
    digest = hashlib.sha256(check_text("name", name, EXAMPLE).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def lock_key(name: str | Key) -> Key:
    """Return the key of a name: a str's lock_id, an int itself (the same 64-bit space), two int4 (their own space)."""
    if isinstance(name, str):
        return lock_id(name)
    parts, bits = (name, 32) if isinstance(name, tuple) else ((name,), 64)
    if len(parts) != 64 // bits or not all(type(part) is int for part in parts):
        raise TypeError(f"name={name!r} names no lock: give a str, an int, or a tuple of two ints")
    if not all(-(1 << bits - 1) <= part < 1 << bits - 1 for part in parts):
        raise ValueError(f"name={name!r} does not fit into signed {bits} bits: give its str, which is hashed")
    return name


@dataclass(frozen=True, kw_only=True)
class AdvisoryLockState:
    """A session that holds an advisory lock, or waits for it."""

    key: Key
    name: str | Key | None  # from `names`, for an id can't be turned back into a name
    pid: int | None  # None: a prepared transaction
    application_name: str
    mode: Literal["shared", "exclusive"]
    granted: bool
    waiting_since: datetime | None  # None for a holder: the server keeps it only while waiting
    blocked_by: list[int]  # pids of the holders, and of those ahead in the queue


async def held_advisory_locks(conn: AsyncConnection[Any], names: Iterable[str | Key] = ()) -> list[AdvisoryLockState]:
    """Return the holders of this database's advisory locks and their waiters: by key, holders first.

    names  label the keys
    """
    labels = {lock_key(name): name for name in names}

    def state(high: int, low: int, space: int, **facts: Any) -> AdvisoryLockState:
        key: Key = (high, low) if space == 2 else high << 32 | low & 0xFFFFFFFF
        return AdvisoryLockState(key=key, name=labels.get(key), **facts)

    async with conn.transaction(), conn.cursor(row_factory=kwargs_row(state)) as cursor:
        await cursor.execute(
            """
            SELECT classid::int AS high, objid::int AS low, objsubid AS space, pid, granted,
              waitstart AS waiting_since, coalesce(application_name, '') AS application_name,
              CASE mode WHEN 'ShareLock' THEN 'shared' ELSE 'exclusive' END AS mode,
              CASE WHEN granted THEN '{}' ELSE pg_blocking_pids(pid) END AS blocked_by
            FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
            WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            ORDER BY granted DESC, waitstart
            """
        )
        return sorted(await cursor.fetchall(), key=lambda state: order(state.key))


def order(key: Key) -> tuple[bool, tuple[int, ...]]:
    """Return what keys are sorted by: the key space, then the id."""
    return (True, key) if isinstance(key, tuple) else (False, (key,))


def oids(key: Key) -> tuple[int, int, int]:
    """Return the key as pg_locks shows it: classid, objid, objsubid."""
    high, low = key if isinstance(key, tuple) else (key >> 32, key)
    return high & 0xFFFFFFFF, low & 0xFFFFFFFF, 2 if isinstance(key, tuple) else 1
