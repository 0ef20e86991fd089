"""Blocking candidates on the explorer's loop: each call runs in a greenlet, which leaves the loop whenever it waits.

A reply of the server, time.sleep, an Event and the end of a thread are awaited by the loop in its place, so a blocking
client, and a thread that renews a lock, can be frozen, killed and delayed as a task can.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any, TypeVar

from distsys.lab.explore.network import Network, Pipe

T = TypeVar("T")


async def in_greenlet(call: Callable[..., T], *args: Any) -> T:
    """Call a function that may block, and return its result."""
    import greenlet

    running = greenlet.greenlet(call)
    running.gr_context = copy_context()
    waiting_for = running.switch(*args)
    while not running.dead:
        try:
            got = await waiting_for
        except BaseException as error:  # noqa: BLE001  the blocking call has to hear of it
            waiting_for = running.throw(error)
        else:
            waiting_for = running.switch(got)
    return waiting_for  # type: ignore[no-any-return]


def may_wait() -> bool:
    """Return whether the caller runs in a greenlet, so that the loop can go on while it waits."""
    import greenlet

    return greenlet.getcurrent().parent is not None


def wait_for(awaitable: Awaitable[T]) -> T:
    """Wait inside of a greenlet: the loop goes on meanwhile."""
    import greenlet

    parent = greenlet.getcurrent().parent
    assert parent is not None
    return parent.switch(awaitable)  # type: ignore[no-any-return]


class PipedSocket:
    """A pipe of the network, as the blocking client of redis uses a socket."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.timeout: float | None = None

    def sendall(self, data: bytes) -> None:
        """Send a packet."""
        self.pipe.write(bytes(data))

    def settimeout(self, seconds: float | None) -> None:
        """Set how long `recv` waits: None for ever, 0 not at all."""
        self.timeout = seconds

    def recv(self, size: int) -> bytes:
        """Return what has come; raise TimeoutError, BlockingIOError, or what the pipe has met."""
        if not self.has_come():
            if self.timeout == 0:
                raise BlockingIOError(errno.EWOULDBLOCK, "nothing has come yet")
            return wait_for(asyncio.wait_for(self.pipe.reader.read(size), self.timeout))
        return wait_for(self.pipe.reader.read(size))

    def has_come(self) -> bool:
        """Return whether `recv` would return or raise at once."""
        reader = self.pipe.reader
        return bool(reader._buffer) or reader.at_eof() or reader.exception() is not None  # type: ignore[attr-defined]

    def recv_into(self, buffer: Any) -> int:
        """Write what has come into the buffer."""
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self, how: int) -> None:
        """Do nothing: `close` follows."""

    def close(self) -> None:
        """Close the client's end."""
        self.pipe.close()


def blocking_redis_client(network: Network, retries: int) -> Any:
    """Return a blocking redis client whose connections are pipes of this network."""
    import redis
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    class PipedConnection(redis.Connection):
        def _connect(self) -> Any:
            return PipedSocket(network.open())

        def can_read(self, timeout: float = 0) -> bool:
            socket: Any = self._sock
            return socket is not None and socket.has_come()

    pool = redis.ConnectionPool(connection_class=PipedConnection, retry=Retry(ConstantBackoff(0.01), retries))
    return redis.Redis(connection_pool=pool)


class GreenEvent(threading.Event):
    """An event that a greenlet waits for without stopping the loop."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters: list[asyncio.Future[None]] = []

    def set(self) -> None:
        """Let all go on that wait."""
        super().set()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for so many seconds; return whether it is set."""
        if not may_wait() or self.is_set():
            return super().wait(timeout)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        wait_for(asyncio.wait([waiter], timeout=timeout))
        return self.is_set()


class GreenThread(threading.Thread):
    """A thread that is a task of its process, so that it stands still and dies with it."""

    _task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Start it; outside of a greenlet as a real thread."""
        if may_wait():
            self._task = asyncio.get_running_loop().create_task(in_greenlet(self.run))
            self._started.set()  # type: ignore[attr-defined]
        else:
            super().start()

    def is_alive(self) -> bool:
        """Return whether it still runs."""
        return not self._task.done() if self._task else super().is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        if self._task and may_wait():
            wait_for(asyncio.wait([self._task], timeout=timeout))
        else:
            super().join(timeout)


class GreenTimer(GreenThread):
    """A thread that calls a function after so many seconds, unless it is cancelled."""

    def __init__(self, interval: float, function: Callable[..., Any], args: Any = None, kwargs: Any = None) -> None:
        super().__init__()
        self.interval, self.function, self.args, self.kwargs = interval, function, args or [], kwargs or {}
        self.finished = GreenEvent()

    def cancel(self) -> None:
        """Stop it if it has not called yet."""
        self.finished.set()

    def run(self) -> None:
        """Wait, and call."""
        if not self.finished.wait(self.interval):
            self.function(*self.args, **self.kwargs)
        self.finished.set()
