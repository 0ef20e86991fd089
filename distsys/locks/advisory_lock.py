"""Advisory lock: PostgreSQL holds it for one transaction or one session, and releases it when that ends.

Promise  one holder per key, or any number of shared ones, while its transaction or session lives; waiters queue in the
         server in order of arrival, and never poll; a connection that dies cancels the body and raises LockLost.
Not      a fence: a client cut off by the network learns of it by TCP keepalive (keepalives_idle and tcp_user_timeout in
         the DSN), and the server may free the lock before. Not safe across a failover, which forgets every lock. No
         fresh data in REPEATABLE READ: a transaction lock is waited for *after* the snapshot was taken.
Units    seconds, float. A name becomes a signed 64-bit id; two int4 are a second key space, apart from the first.
Errors   LockNotAcquired after `timeout`, LockDeadlock, LockLost, SharedSession behind a proxy; psycopg.Error passes.
Source   PostgreSQL documentation, 13.3.5 "Advisory Locks" and 9.28.10; its src/backend/storage/lmgr/README.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import psycopg
from psycopg import AsyncConnection, generators
from psycopg.errors import DeadlockDetected, InvalidSqlStatementName, LockNotAvailable, QueryCanceled, error_from_result
from psycopg.pq import ConnStatus, ExecStatus, PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from distsys._support.clock import elapsed
from distsys._support.postgres import Database
from distsys.errors import DistsysError, LockDeadlock, LockLost, LockNotAcquired, SharedSession
from distsys.locks.advisory_keys import Key, lock_key, oids, order
from distsys.locks.hold import Hold, Lock, State

Connection = AsyncConnection[Any]
MAX_TIMEOUT = 2_147_483.0  # lock_timeout is 31 bits of milliseconds: 24 days
BUSY_SECONDS = 0.1  # until the watch looks again at a connection that psycopg was reading
CONNECTION_DIED = "its connection died"
IN_TRANSACTION = (TransactionStatus.INTRANS, TransactionStatus.INERROR)
ROLL_BACK = b"ROLLBACK TO distsys_lock; RELEASE distsys_lock"

_session_keys: WeakKeyDictionary[Connection, set[Key]] = WeakKeyDictionary()
_prepared: WeakKeyDictionary[Connection, dict[str, bytes]] = WeakKeyDictionary()  # SQL -> its name, or b""
_numbers = itertools.count()


class ConnectionHold(Hold):
    """One hold of a lock, on `connection`."""

    def __init__(
        self,
        lock: AdvisoryLock,
        connection: Connection,
        borrowed: AbstractAsyncContextManager[Connection],
        *,
        body: bool,
    ) -> None:
        super().__init__(lock.name, body=body)
        self.lock, self.connection = lock, connection
        self._borrowed = borrowed  # gives the connection back
        self._backend_pid = 0  # of the session that holds the lock
        self._finished, self._loop = False, asyncio.get_running_loop()
        self._fd = -1  # of the watch
        self._pending_read: asyncio.Handle | None = None

    @property
    def settled(self) -> bool:
        """True once the hold has finished, lost or not, and no body is left whose end would ask for it."""
        return self._finished and not self._body

    async def release(self) -> bool:
        """Unlock a session hold, and roll back what is not committed. Return True.

        Raises LockLost if it was lost, and RuntimeError for a transaction lock, which ends with its transaction.
        """
        if self.lock.scope == "transaction":
            raise RuntimeError(f"{self.lock} ends with its transaction: commit or roll back, or use scope='session'")
        await self._finish(None)
        if self.lost:
            raise self._loss() from self._cause
        return True

    def _mark_lost(self, reason: str, cause: BaseException | None = None) -> None:
        """Record the loss. A connection that dies under a transaction without a block is not watched: it just fails."""
        if self._state is State.HELD:
            self._state, self._reason, self._cause = State.LOST, reason, cause

    def _loss(self) -> LockLost:
        return LockLost(f"{self.lock} was lost, and another holder may have it by now: {self._reason}", name=self.name)

    # ---- the watch, on a second descriptor of the socket: psycopg adds and removes a reader of its own on the first

    def _unwatch(self) -> None:
        if self._pending_read is not None:
            self._pending_read.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _add_reader(self) -> None:
        self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        pgconn = self.connection.pgconn
        if self.connection.lock.locked() or pgconn.pipeline_status != PipelineStatus.OFF:
            # psycopg reads, and will meet the end itself. A slow COPY leaves data unread for long: don't spin on it.
            self._loop.remove_reader(self._fd)
            self._pending_read = self._loop.call_later(BUSY_SECONDS, self._add_reader)
            return
        try:
            pgconn.consume_input()
            while notify := pgconn.notifies():  # what is read here psycopg would not see any more
                if pgconn.notify_handler:
                    pgconn.notify_handler(notify)
        except psycopg.OperationalError as error:
            self._mark_lost(CONNECTION_DIED, error)
            self._unwatch()
            self._cancel_body()

    # ---- the end

    async def _finish(self, error: BaseException | None) -> bool:
        settled = False
        if not self._finished:
            self._finished = True
            self._unwatch()
            try:
                try:
                    if self.lock.scope == "session":
                        await self._unlock(error)
                finally:
                    settled = await self._give_back(error)
            except psycopg.OperationalError as failure:
                if not self.connection.closed:
                    raise
                self._mark_lost(CONNECTION_DIED, failure)
        if self._state is State.HELD:
            self._state = State.RELEASED
        return settled

    async def _give_back(self, error: BaseException | None) -> bool:
        """Give the connection back to its owner. Return True if that settles `error`, as with psycopg.Rollback."""
        self._unwatch()
        if self.lock.scope == "session":
            _session_keys.get(self.connection, set()).discard(self.lock.keys[0])
        details = (type(error), error, error.__traceback__) if error else (None, None, None)
        return bool(await self._borrowed.__aexit__(*details))

    async def _unlock(self, error: BaseException | None) -> None:
        """Unlock a session hold. A connection not proved unlocked is closed, which unlocks it: no pool ever gets it."""
        conn, unlocked = self.connection, False
        try:
            try:  # our work is visible, or gone, before the next holder comes
                if conn.pgconn.transaction_status in IN_TRANSACTION:
                    await (conn.commit() if self._body and error is None else conn.rollback())
            finally:
                async with conn.lock:
                    if conn.pgconn.transaction_status == TransactionStatus.IDLE:
                        same_session = "pg_backend_pid() = $1", self._backend_pid
                        answer = await self.lock._query(conn, "advisory_unlock", *same_session)
                        unlocked = answer == [self._backend_pid, b"t"]
            if not unlocked:
                self._mark_lost("at its end this session did not hold it any more, or was another one")
        finally:
            if not unlocked:
                conn.pgconn.finish()


class AdvisoryLock(Lock[ConnectionHold]):
    """`async with AdvisoryLock(pool, "invoice:42") as hold: await hold.connection.execute(...)`

    conn_or_pool  a psycopg AsyncConnection; or an AsyncConnectionPool, of which each hold and each waiter takes one
                  connection for itself (give locks a pool of their own, or waiters can starve the holder's work)
    name          a str (see lock_id), an int, or two ints
    scope         "transaction": until commit or rollback. With a pool the block is the transaction. With a connection
                  the transaction is the caller's: the lock outlasts the block, and acquiring it again inside is free.
                  "session": until the end of the block; a transaction which the body left open is committed before
                  (rolled back if it failed). Postgres grants a session again what it holds, so a second hold of a key
                  on one connection is refused.
    shared        any number of shared holders, or one exclusive
    timeout       seconds to wait: None waits for ever, 0 is one try; then LockNotAcquired, and the transaction is
                  still usable
    proxy         "session": the connection goes through a proxy that is known to pool whole sessions

    A cancelled wait leaves nothing held; only a transaction lock granted at that moment stays, until its transaction
    ends. With a pool, tasks may share one object: each has its own hold. Not re-entrant: a task that acquires it again
    gets a RuntimeError at once.
    """

    def __init__(
        self,
        conn_or_pool: Database,
        name: str | Key,
        *,
        scope: Literal["transaction", "session"] = "transaction",
        shared: bool = False,
        timeout: float | None = None,
        proxy: Literal["session"] | None = None,
    ) -> None:
        source: object = conn_or_pool
        if not isinstance(source, (AsyncConnection, AsyncConnectionPool)):
            raise TypeError(f"conn_or_pool={source!r}: pass a psycopg AsyncConnection or an AsyncConnectionPool")
        if scope not in ("transaction", "session"):
            raise ValueError(f"scope={scope!r}: 'transaction' or 'session'")
        if proxy not in (None, "session"):
            raise ValueError(f"proxy={proxy!r}: 'session' if it pools sessions, else None and scope='transaction'")
        super().__init__(name, timeout)
        self.keys: tuple[Key, ...] = (lock_key(name),)
        self.source, self.scope = conn_or_pool, scope
        self.shared, self.proxy = shared, proxy

    def __str__(self) -> str:
        shown = repr(self.name)
        return f"advisory lock {shown if len(shown) <= 100 else shown[:100] + '...'}"

    def _check_timeout(self, timeout: float | None) -> float | None:
        seconds = super()._check_timeout(timeout)
        if seconds is not None and seconds > MAX_TIMEOUT:
            most = f"Postgres counts to {MAX_TIMEOUT:.0f} s, 24 days"
            raise ValueError(f"timeout={timeout!r}: {most}; None waits for ever")
        return seconds

    # ---- acquire

    async def _acquire(self, timeout: float | None, *, body: bool) -> ConnectionHold:
        if self.scope == "transaction" and not body and isinstance(self.source, AsyncConnectionPool):
            raise RuntimeError(f"{self}: with a pool the block is the transaction, so use `async with`")
        if any(hold.task is asyncio.current_task() and not hold._finished for hold in self._holds):
            raise RuntimeError(f"this task already holds {self}: it is not re-entrant, pass the hold on instead")
        started, watched = elapsed(), body or self.scope == "session"
        lock = self._lock_session if self.scope == "session" else self._lock_transaction
        borrowed = self._borrow_connection(timeout)
        try:
            hold = ConnectionHold(self, await borrowed.__aenter__(), borrowed, body=body)
            try:
                if hold.connection.pgconn.pipeline_status != PipelineStatus.OFF:
                    advice = "a pipeline does not wait for answers; acquire before `conn.pipeline()`"
                    raise RuntimeError(f"{self}: {advice}")  # noqa: TRY301  the way out is the same as for any error
                if watched:
                    hold._fd = os.dup(hold.connection.pgconn.socket)  # before the lock is ours, for this may fail
                if not await lock(hold, timeout and max(0.001, started + timeout - elapsed())):
                    raise self._refusal(started)  # noqa: TRY301  as above
            except BaseException as error:
                await hold._give_back(error)
                raise
        except (PoolTimeout, LockNotAvailable, QueryCanceled, DeadlockDetected) as error:
            raise self._refusal(started, error) from error
        if watched:
            hold._pending_read = hold._loop.call_soon(hold._add_reader)  # a body that never waits ends before
            self._add_hold(hold)
        return hold

    def _borrow_connection(self, timeout: float | None) -> AbstractAsyncContextManager[Connection]:
        """Lend the caller's own connection, once for each key of a session lock, or one of the pool."""
        if isinstance(self.source, AsyncConnectionPool):
            pooled = self.source.connection(timeout or None)
            return self._transaction_of(pooled) if self.scope == "transaction" else pooled
        if self.scope == "session":
            keys, key = _session_keys.setdefault(self.source, set()), self.keys[0]
            if key in keys:
                raise RuntimeError(f"{self} is held or awaited on this connection already: use another, or a pool")
            keys.add(key)
        return nullcontext(self.source)

    @asynccontextmanager
    async def _transaction_of(self, pooled: AbstractAsyncContextManager[Connection]) -> AsyncIterator[Connection]:
        async with pooled as conn, conn.transaction():
            yield conn

    async def _lock_session(self, hold: ConnectionHold, timeout: float | None) -> bool:
        """Lock in one round trip, which begins no transaction."""
        conn = hold.connection
        limit = math.ceil(timeout * 1000) if timeout else ""
        # A proxy tells its clients a made-up pid. Then no row comes back, and the lock is not even tried.
        where, pid = "$1 IN (0, pg_backend_pid())", 0 if self.proxy else conn.pgconn.backend_pid
        where += " AND ($2 = '' OR set_config('lock_timeout', $2, true) <> '')"  # for this statement alone
        async with conn.lock:
            if conn.pgconn.transaction_status in IN_TRANSACTION:
                raise RuntimeError(f"{self}: this connection is in a transaction; commit, or use scope='transaction'")
            function = "try_advisory_lock" if timeout == 0 else "advisory_lock"
            try:
                row = await self._query(conn, function, where, pid, limit)
            except BaseException as error:
                await self._undo_grant(conn, error)
                raise
        if row is None:
            raise SharedSession(
                f"{self}: scope='session' is refused: the pid of the server's process is not the one given at connect. "
                "A proxy in between may run our next statement in another session, and give this one, locked, to "
                "another client. Use scope='transaction', or connect directly, or proxy='session' if it pools sessions"
            )
        hold._backend_pid = row[0]
        return bool(row[1] != b"f")

    async def _undo_grant(self, conn: Connection, error: BaseException) -> None:
        """Unlock after a grant that raced the timeout or the cancel: Postgres reports the error and keeps the lock.

        Each key has at most one hold on a connection, so a lock of ours in pg_locks can only be that grant.
        """
        mode = "ShareLock" if self.shared else "ExclusiveLock"
        try:
            if conn.pgconn.status == ConnStatus.OK:
                ours = f"pid = pg_backend_pid() AND granted AND locktype = 'advisory' AND mode = '{mode}'"
                granted = f"EXISTS (SELECT FROM pg_locks WHERE {ours} AND (classid, objid, objsubid) = ($1, $2, $3))"
                await self._query(conn, "advisory_unlock", granted, *oids(self.keys[0]))
        except BaseException as failure:
            conn.pgconn.finish()
            if not isinstance(failure, psycopg.Error):
                raise
            error.add_note(f"the connection is closed: it could not say whether {self} was granted ({failure})")

    async def _lock_transaction(self, hold: ConnectionHold, timeout: float | None) -> bool:
        """Lock in one round trip. Rolling back to the savepoint frees what was locked and restores lock_timeout."""
        conn, got = hold.connection, True
        if conn.autocommit and conn.pgconn.transaction_status == TransactionStatus.IDLE:
            advice = "acquire it inside `async with conn.transaction()`, or use scope='session'"
            raise RuntimeError(f"{self}: in autocommit and outside a transaction it would be gone at once; {advice}")
        cursor = conn.cursor(row_factory=tuple_row)  # its first statement begins the transaction as the connection says
        keep = limit = restore = ""
        if timeout:
            left = f"{math.ceil(timeout * 1000)} - 1000 * extract(epoch FROM clock_timestamp() - statement_timestamp())"
            keep = "SELECT set_config('distsys.lock_timeout', current_setting('lock_timeout'), true);"
            limit = f"SELECT set_config('lock_timeout', greatest(1, ceil({left}))::int::text, true);"
            restore = "SELECT set_config('lock_timeout', current_setting('distsys.lock_timeout'), true);"
        locks = "".join(f"{limit} SELECT {call};" for call in self._calls("pg_advisory_xact_lock"))
        tries = " AND ".join(self._calls("pg_try_advisory_xact_lock"))
        try:
            if timeout == 0:
                await cursor.execute(f"SAVEPOINT distsys_lock; SELECT {tries}".encode(), prepare=False)
                got = bool(cursor.nextset()) and await cursor.fetchone() == (True,)
                await cursor.execute(b"RELEASE distsys_lock" if got else ROLL_BACK, prepare=False)
            else:
                message = f"SAVEPOINT distsys_lock; {keep}{locks}{restore} RELEASE distsys_lock"
                await cursor.execute(message.encode(), prepare=False)
        except (LockNotAvailable, QueryCanceled, DeadlockDetected, asyncio.CancelledError) as error:
            if conn.pgconn.transaction_status == TransactionStatus.INERROR and not conn.lock.locked():
                try:
                    await cursor.execute(ROLL_BACK, prepare=False)
                except psycopg.Error as failure:
                    error.add_note(f"the transaction stays aborted: {failure}")
            raise
        return got

    async def _query(self, conn: Connection, function: str, where: str, *args: object) -> list[Any] | None:
        """Call the function and return [pid of the server's process, answer]; None where `where` does not hold."""
        ids = key if isinstance(key := self.keys[0], tuple) else (key,)
        numbers = ", ".join(f"${len(args) + place}" for place in range(1, len(ids) + 1))
        call = f"pg_{function}{'_shared' if self.shared else ''}({numbers})"
        row = await _first_row(conn, f"SELECT pg_backend_pid(), {call} WHERE {where}", *args, *ids)
        return row and [int(row[0] or 0), row[1]]

    def _calls(self, function: str) -> list[str]:
        keys = (f"'{k[0]}'::int, '{k[1]}'::int" if isinstance(k, tuple) else f"'{k}'::bigint" for k in self.keys)
        return [f"{function}{'_shared' if self.shared else ''}({key})" for key in keys]

    def _refusal(self, started: float, error: psycopg.Error | None = None) -> DistsysError:
        if isinstance(error, DeadlockDetected):
            return LockDeadlock(f"{self}: {error}; take locks in one order, as advisory_locks() does", name=self.name)
        waited, said = elapsed() - started, f" ({error.diag.message_primary})" if error else ""
        message = f"{self} was not obtained in {waited:.3g} s{said}; held_advisory_locks() shows who holds it"
        if isinstance(error, PoolTimeout):
            message = f"{self}: the pool has no connection free ({error}); raise its max_size"
        return LockNotAcquired(message, name=self.name, waited=waited)


def advisory_locks(
    conn_or_pool: Database, *names: str | Key, shared: bool = False, timeout: float | None = None
) -> AdvisoryLock:
    """Return a lock of several names for one transaction: all or none, in one round trip.

    timeout  seconds, for the whole wait

    The locks are taken in the order of (key space, id), each once, so no two such calls can deadlock with each other.
    Raises ValueError without names; the lock raises what AdvisoryLock does.
    """
    if not names:
        raise ValueError("advisory_locks() without names would lock nothing: give at least one")
    lock = AdvisoryLock(conn_or_pool, names[0], shared=shared, timeout=timeout)
    lock.keys, lock.name = tuple(sorted({lock_key(name) for name in names}, key=order)), names
    return lock


async def _first_row(conn: Connection, sql: str, *args: object) -> list[bytes | None] | None:
    """Return the first row of a statement, without psycopg's implicit transaction. The caller holds conn.lock.

    From its second use on the statement is prepared: parsing and planning are a third of the server's work for a lock.
    """
    names, values = _prepared.setdefault(conn, {}), [str(arg).encode() for arg in args]

    async def answer() -> Any:
        result = (await conn.wait(generators.execute(conn.pgconn)))[-1]
        if result.status == ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
        return result

    if names.get(sql) == b"":
        name = b"distsys_%d" % next(_numbers)
        conn.pgconn.send_prepare(name, sql.encode())
        await answer()
        names[sql] = name
    try:
        if name := names.setdefault(sql, b""):
            conn.pgconn.send_query_prepared(name, values)
        else:
            conn.pgconn.send_query_params(sql.encode(), values)
        result = await answer()
    except InvalidSqlStatementName:  # DISCARD ALL, by a pool that resets what comes back to it
        names.clear()
        return await _first_row(conn, sql, *args)
    return [result.get_value(0, column) for column in range(result.nfields)] if result.ntuples else None
