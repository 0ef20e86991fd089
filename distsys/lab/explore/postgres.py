"""Real connections to PostgreSQL: every statement of a candidate is a step that can be delayed, lost or cut off.

A statement that waits for a lock is left waiting in the server, and looked at again after each other step.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from typing import Any, cast

import psycopg
from psycopg import waiting
from psycopg.conninfo import make_conninfo
from psycopg.pq import ConnStatus, TransactionStatus
from psycopg_pool import AsyncConnectionPool

from distsys.lab.explore.loop import Process, running_process
from distsys.lab.explore.network import Network, Step
from distsys.schema import scripts

NAMES = {"_enter_gen": "BEGIN", "_exit_gen": "COMMIT or ROLLBACK", "_commit_gen": "COMMIT", "_rollback_gen": "ROLLBACK"}
PATIENCE = 0.001  # seconds of real time without an answer: then ask whether the statement waits for a lock
ALARM = 0.015  # seconds of real time in which a server whose clock was set hears its alarms
LOST = "server closed the connection unexpectedly"
TABLES = """
CREATE TABLE IF NOT EXISTS ledger_of_the_lab (request text, amount bigint, receipt text);
CREATE TABLE IF NOT EXISTS accounts (name text PRIMARY KEY, balance bigint NOT NULL, fence_token bigint);
"""
EMPTY = """
DO $$ DECLARE name text; used bool; BEGIN
  FOR name IN SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'explored' LOOP
    EXECUTE 'SELECT EXISTS (SELECT FROM ' || name || ')' INTO used;
    IF used THEN EXECUTE 'TRUNCATE ' || name || ' RESTART IDENTITY CASCADE'; END IF;
  END LOOP;
END $$
"""


class Statement(Step):
    """A statement on its way to the server."""

    def __init__(self, pipe: PgPipe, running: Any, text: str) -> None:
        super().__init__(pipe.process, cast(Any, pipe), b"")
        self.running, self.text = running, " ".join(text.split())
        self.state: Any = None  # what psycopg waits for
        self.sent = False
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def signature(self) -> tuple[bytes, ...]:
        """The text of the statement, without its parameters."""
        return (self.text.encode(),)

    def __str__(self) -> str:
        return self.text if len(self.text) <= 70 else self.text[:69] + "…"

    def give(self, answer: Any) -> None:
        """Let the client go on with an answer or an error."""
        if not self.answer.done():
            if isinstance(answer, Exception):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)


class PgPipe:
    """One connection of a candidate. The network knows it as it knows a pipe to Redis."""

    def __init__(self, server: Postgres, process: Process, connection: Any) -> None:
        self.server, self.network, self.process, self.connection = server, server.network, process, connection
        self.socket, self.pid = connection.pgconn.socket, connection.pgconn.backend_pid
        self.closed = self.silent = False
        self.unsent = 0
        self.asked: Statement | None = None  # what the client waits for
        self.withheld: list[tuple[Statement, Any]] = []
        self.expected = 0  # 1 while a statement waits in the server for a lock
        self.network.pipes.add(cast(Any, self))

    async def ask(self, running: Any, text: str) -> Any:
        """Make a step of the statement, and return its answer."""
        if self.closed:
            return waiting.wait(running, self.socket, interval=0.1)
        step = self.asked = Statement(self, running, text)
        self.network.send(step)
        try:
            return await step.answer
        except asyncio.CancelledError:
            self._cancel(step)
            raise
        finally:
            self.asked = None

    def _cancel(self, step: Statement) -> None:
        """The client gives up: the server had the statement all the same, and is asked to end it."""
        if step in self.network.pending:
            self.network.pending.remove(step)
            self.execute(step)
        if not step.sent or self.silent:
            self.close()
        elif self.expected:
            self.connection.pgconn.get_cancel().cancel()
            select.select([self.socket], [], [], 1.0)
            self._drive(step)

    def execute(self, step: Statement) -> None:
        """Send the statement, and take its answer unless it has to wait for a lock."""
        self.unsent -= 1
        step.sent = True
        if not self.closed:
            self._drive(step)

    def receive(self, *, block: bool) -> None:
        """Look whether a statement that waited for a lock goes on."""
        if self.asked and not self._is_blocked():
            self._drive(self.asked)

    def _is_blocked(self) -> bool:
        if select.select([self.socket], [], [], 0)[0]:
            return False
        return bool(self.server.ask("SELECT cardinality(pg_blocking_pids(%s)) > 0", self.pid))

    def _drive(self, step: Statement) -> None:
        self.expected = 0
        answer: Any
        try:
            step.state = next(step.running) if step.state is None else step.state
            while ready := self._ready(step.state):
                step.state = step.running.send(ready)
        except StopIteration as done:
            answer = done.value
        except psycopg.Error as error:
            answer = error
        else:
            self.expected = 1
            return
        if self.silent:
            self.withheld.append((step, answer))
        else:
            step.give(answer)

    def _ready(self, state: int) -> int:
        """Wait for the server; return 0 when the statement waits for a lock."""
        reads, writes = ([self.socket] if state & way else [] for way in (waiting.WAIT_R, waiting.WAIT_W))
        while True:
            found = select.select(reads, writes, [], PATIENCE)
            if found[0] or found[1]:
                return (waiting.READY_R if found[0] else 0) | (waiting.READY_W if found[1] else 0)
            if self._is_blocked():
                return 0

    def speak(self) -> None:
        """End of a silence: the client is given what was withheld."""
        self.silent = False
        withheld, self.withheld = self.withheld, []
        for step, answer in withheld:
            step.give(answer)

    def close(self) -> None:
        """End the connection: the server rolls back, and drops what the session holds.

        The client is not told. It finds out as it does in a real network: when it uses the connection again.
        """
        if not self.closed:
            self.closed = True
            self.network.pipes.discard(cast(Any, self))
            if self.connection.pgconn.status == ConnStatus.OK:
                with socket.socket(fileno=os.dup(self.socket)) as line:
                    line.shutdown(socket.SHUT_RDWR)
            while not self.expected and self.server.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s", self.pid):
                pass  # it is about to end

    def reset(self) -> None:
        """Break the connection: the client gets an error for what it waits for."""
        step = self.asked
        self.close()
        if step and step.sent:
            step.give(psycopg.OperationalError(LOST))
        elif step:
            self._drive(step)


def make_tables(dsn: str, setup: str) -> None:
    """Make a fresh schema with the tables of the lab, of the rules, and what `setup` makes for the candidate."""
    with psycopg.connect(dsn, autocommit=True, options="-csearch_path=explored") as conn:
        conn.execute("DROP SCHEMA IF EXISTS explored CASCADE")
        conn.execute("CREATE SCHEMA explored")
        for script in (*scripts(), TABLES.encode(), setup.encode()):
            if script.strip():
                conn.execute(script)


class Postgres:
    """The server of one run, and what a candidate is given of it."""

    def __init__(self, network: Network, dsn: str) -> None:
        self.network, self.dsn = network, dsn
        self._control = psycopg.connect(dsn, autocommit=True, options="-csearch_path=explored")
        self._end_others()
        self._control.execute(EMPTY)
        self._control.execute("INSERT INTO accounts VALUES ('explored', 0)")

    def ask(self, sql: str, *values: Any) -> Any:
        """Return the first value of the first row; None without a row."""
        row = self._control.execute(sql, values).fetchone()
        return row[0] if row else None

    def rows(self, sql: str) -> list[Any]:
        """Return all rows."""
        return self._control.execute(sql).fetchall()

    def run(self, sql: str) -> None:
        """Execute a statement of the explorer's own."""
        self._control.execute(sql)

    def look_again(self) -> bool:
        """Let statements go on whose lock timeout, or deadlock, the server has noticed; return whether some wait."""
        pipes: list[Any] = list(self.network.pipes)
        waiting_now = [pipe for pipe in pipes if isinstance(pipe, PgPipe) and pipe.expected]
        if waiting_now:
            select.select([pipe.socket for pipe in waiting_now], [], [], ALARM)
            self.network.poll()
        return bool(waiting_now)

    def end(self) -> None:
        """End every session of this run."""
        self._end_others()
        self._control.close()

    def _end_others(self) -> None:
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        others += " AND application_name = 'explored'"
        self._control.execute(f"SELECT pg_terminate_backend(pid) {others}")
        while self.ask(f"SELECT 1 {others}"):
            pass  # they are about to end

    async def open(self, kind: str) -> Any:
        """Return a connection ("conn") or a pool of connections ("pool"), in autocommit mode."""
        if kind == "conn":
            return await self._kind().connect(self._settings, autocommit=True)
        options: dict[str, Any] = {"kwargs": {"autocommit": True}, "min_size": 1, "max_size": 4, "open": False}
        pool = AsyncConnectionPool(self._settings, connection_class=self._kind(), **options)
        await pool.open()
        return pool

    @property
    def _settings(self) -> str:
        return make_conninfo(self.dsn, options="-csearch_path=explored", application_name="explored")

    def _kind(self) -> Any:
        server = self

        class GatedConnection(psycopg.AsyncConnection[Any]):
            pipe: PgPipe | None = None

            @classmethod
            async def connect(cls, conninfo: str = "", **settings: Any) -> Any:
                process = running_process.get()
                assert process is not None
                if process in server.network.cut or server.network.closed:
                    raise psycopg.OperationalError("connection refused")
                own = ("autocommit", "row_factory", "prepare_threshold", "cursor_factory")
                chosen = {name: settings.pop(name) for name in own if name in settings}
                settings.pop("context", None)
                made: Any = waiting.wait_conn(cls._connect_gen(make_conninfo(conninfo, **settings)), interval=0.1)
                made._autocommit = chosen.pop("autocommit", False)
                for name, value in chosen.items():
                    if value is not None:
                        setattr(made, name, value)
                made.pipe = PgPipe(server, process, made)
                return made

            async def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
                name, idle = gen.__name__, self.pgconn.transaction_status == TransactionStatus.IDLE
                if self.pipe is None or (idle and name in ("_rollback_gen", "_commit_gen")) or name.startswith("_set_"):
                    return waiting.wait(gen, self.pgconn.socket, interval=0.1)
                return await self.pipe.ask(gen, _text(gen, self))

        return GatedConnection


def _text(running: Any, connection: Any) -> str:
    query, name = running.gi_frame.f_locals.get("query"), str(running.__name__)
    if query is None:
        return NAMES.get(name, name.strip("_").removesuffix("_gen").upper())
    if isinstance(query, bytes):
        return query.decode()
    return str(query if isinstance(query, str) else query.as_string(connection))
