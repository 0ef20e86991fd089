"""Inside a worker process: the candidate under test, the work it guards, and a record of both that survives SIGKILL.

A worker is a fork of the supervisor. It tells its controller of each call before it makes it and again after
(`Worker.op`), and obeys at named points (`checkpoint`): stop itself with SIGSTOP, be killed, hold while its event loop
runs on, or block its event loop. All of it travels over one socket, as JSON lines; never through the tested servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import random
import signal
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from distsys.errors import Rejected
from distsys.lab.run.guard import looks_sync

_current: Worker | None = None
task_name: ContextVar[str] = ContextVar("distsys_lab_task", default="")

Workload = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Job:
    """The work of one worker. It travels by cloudpickle, so a class from a notebook cell can be a candidate."""

    name: str
    seed: int
    workload: Workload
    candidate: Any
    urls: dict[str, Any]  # "redis", "bank", "dsn": str; "nodes": list[str]
    resource: str  # the name of the lock, unique to the run
    ttl: float
    patience: float  # an acquire that takes longer is reported as "waiting"
    params: dict[str, Any] = field(default_factory=dict)


async def checkpoint(point: str) -> None:
    """Mark a named point in a candidate or workload, where a fault can strike. Outside a worker it does nothing."""
    if _current is not None:
        await _current.checkpoint(point)


def main(payload: bytes, sock: socket.socket) -> None:
    """Run the job in `payload` and report on `sock`. The supervisor calls it in the forked process."""
    import cloudpickle

    sock.setblocking(True)
    asyncio.run(_work(cloudpickle.loads(payload), sock))


async def _work(job: Job, sock: socket.socket) -> None:
    global _current
    async with contextlib.AsyncExitStack() as stack:
        worker = _current = Worker(job, sock, stack)
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, worker.read)
        stack.callback(loop.remove_reader, sock)
        try:
            await worker.prepare()
            worker.send(e="ready")
            await worker.started.wait()
            await job.workload(worker, job.candidate, **worker.params)
        except Exception as error:  # noqa: BLE001  whatever the candidate raised is reported
            worker.send(e="crash", detail=f"{type(error).__name__}: {error}")


@dataclass
class Call:
    """One call while it runs; what its body sets here goes into the record."""

    value: Any = None
    token: int | None = None


class Worker:
    """A worker as its workload sees it: clients, candidates, the record of calls, and points where faults strike."""

    def __init__(self, job: Job, sock: socket.socket, stack: contextlib.AsyncExitStack) -> None:
        self.job, self.name, self.ttl, self.resource = job, job.name, job.ttl, job.resource
        self.rng = random.Random(f"{job.seed}:{job.name}")
        self.params = {key: value for key, value in job.params.items() if key != "pool_size"}
        self.started = asyncio.Event()  # the script has let it go
        self._sock, self._stack = sock, stack
        self._armed: dict[str, str] = {}
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._inbox = b""
        self._ids = 0
        self.now = time.monotonic  # what the record goes by
        self.orders: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._clients: dict[str, Any] = {}
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self.leased = False  # whether the candidate was given a ttl

    # ---- the record

    def send(self, **event: Any) -> None:
        """Tell the controller of an event, with the time by the worker's clock."""
        self._sock.sendall(json.dumps({**event, "t": self.now()}, default=repr).encode() + b"\n")

    @contextlib.asynccontextmanager
    async def op(self, name: str, value: Any = None, *, token: int | None = None) -> AsyncIterator[Call]:
        """Record one call, before it is made and after. A Rejected makes it "fail", any other error "info"."""
        self._ids += 1
        head = {"id": self._ids, "name": name, "task": task_name.get() or None}
        self.send(e="call", **head, value=value, token=token)
        call, outcome = Call(value, token), {"e": "ok"}
        timer = asyncio.get_running_loop().create_task(self._report_if_waiting(head))
        try:
            yield call
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            outcome = {"e": "fail" if isinstance(error, Rejected) else "info", "detail": said}
            raise
        finally:
            timer.cancel()
            self.send(**outcome, **head, value=call.value, token=call.token)

    async def _report_if_waiting(self, head: dict[str, Any]) -> None:
        """Report a call that takes longer than the patience.

        Ten short sleeps instead of a long one: a process without CPU time must have run ten times before it says so.
        """
        for _ in range(10):
            await asyncio.sleep(self.job.patience / 10)
        self.send(e="waiting", **head)

    # ---- faults

    async def checkpoint(self, point: str) -> None:
        """Do what the script has ordered for this point: stop, die, hold, block, or nothing."""
        action = self._armed.pop(point, None)
        if action is None:
            return
        self.send(e="at", point=point, action=action)
        if action in ("stop", "kill"):
            os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
        elif action == "hold":
            await self._released[point].wait()
        elif action == "block":
            while not self._released[point].is_set():
                self.read()

    def read(self) -> None:
        """Take the controller's orders off the socket, and obey them."""
        data = self._sock.recv(65536)
        if not data:
            os._exit(0)  # the controller is gone
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._obey(**json.loads(line))

    def _obey(self, do: str, point: str = "", action: str = "", **order: Any) -> None:
        if do == "arm":
            self._armed[point] = action
        elif do == "release":
            self._released[point].set()
        elif do == "cancel":
            self.tasks[point].cancel()
            self.send(e="at", point="cancelled", action="cancel")
        else:  # "go", "order" or "finish": an empty order ends the work
            if do != "go":
                self.orders.put_nowait(order)
            if do != "finish":
                self.started.set()

    # ---- clients and candidates

    async def prepare(self) -> None:
        """Connect before the start, so that no run is decided by which worker connects faster."""
        if "redis" in self.job.urls:
            await (await self.client("redis")).ping()
        if "dsn" in self.job.urls:
            await self.client("conn")

    async def client(self, kind: str) -> Any:
        """Return one of CLIENTS: connected when first asked for, closed with the worker."""
        if kind not in self._clients:
            self._clients[kind] = await self._connect(kind)
        return self._clients[kind]

    async def _connect(self, kind: str) -> Any:
        urls, enter = self.job.urls, self._stack.enter_async_context
        if kind in ("redis", "bank"):
            return await enter(_redis_client(urls.get(kind) or urls["redis"]))
        if kind == "clients":
            return [await enter(_redis_client(url)) for url in urls["nodes"]]
        if kind == "redis_sync":
            import redis

            return self._stack.enter_context(redis.Redis.from_url(urls["redis"]))
        if kind == "conn":
            import psycopg

            return await enter(await psycopg.AsyncConnection.connect(urls["dsn"], autocommit=True))
        from psycopg_pool import AsyncConnectionPool

        size, how = self.job.params.get("pool_size", 2), {"autocommit": True}
        return await enter(AsyncConnectionPool(urls["dsn"], min_size=size, max_size=size, open=False, kwargs=how))

    async def build(self, candidate: Any, **extra: Any) -> Any:
        """Call the candidate with what its parameters name: redis, clients, conn, pool, dsn, url, name, ttl, extra.

        TypeError for a parameter that is none of these and has no default.
        """
        wanted, given = inspect.signature(candidate).parameters, getattr(candidate, "keywords", ())  # by a partial
        urls, arguments = self.job.urls, dict[str, Any]()
        facts = {"name": self.resource, "ttl": self.ttl, "dsn": urls.get("dsn"), "url": urls.get("redis"), **extra}
        for name, parameter in wanted.items():
            kind = ALIASES.get(name, name)
            if name in given:
                continue
            if kind in facts:
                arguments[name] = facts[kind]
                self.leased = self.leased or kind == "ttl"
            elif kind in CLIENTS:
                sync = kind == "redis" and looks_sync(candidate)
                arguments[name] = await self.client("redis_sync" if sync else kind)
            elif parameter.default is parameter.empty and "VAR_" not in parameter.kind.name:
                label = getattr(candidate, "__qualname__", repr(candidate))
                raise TypeError(
                    f"{label} asks for {name!r}; the lab can give redis, redis_sync, clients, conn, pool, "
                    "dsn, url, name, ttl: wrap it in a function of those"
                )
        positional = [arguments.pop(n) for n, p in wanted.items() if p.kind is p.POSITIONAL_ONLY and n in arguments]
        return candidate(*positional, **arguments)


CLIENTS = ("redis", "redis_sync", "bank", "clients", "conn", "pool")
ALIASES = {
    "redis_client": "redis", "client": "redis", "r": "redis", "rds": "redis",
    "redis_clients": "clients", "nodes": "clients", "masters": "clients",
    "connection": "conn", "db": "conn", "conn_or_pool": "pool", "redis_url": "url",
    "key": "name", "lock_name": "name", "resource": "name", "lock_key": "name",
    "ttl_seconds": "ttl", "expire": "ttl",
}  # fmt: skip


def _redis_client(url: str) -> Any:
    """Return a client as most programs make it, with the retries that Redis.from_url leaves out."""
    import redis.asyncio

    options: dict[str, Any] = dict(redis.asyncio.connection.parse_url(url))
    return redis.asyncio.Redis(**options)


class VirtualClock:
    """A clock that moves when the script says so, and a little with each request; seconds."""

    now = 0.0

    def __call__(self) -> float:
        """Return what the clock shows."""
        return self.now
