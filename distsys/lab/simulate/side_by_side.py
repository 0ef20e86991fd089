"""Simulate arms at the same time, each in a process of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from distsys.lab.simulate.storm import Arm

Job = partial[Arm]  # of simulate_arm
Each = Callable[[Iterable[Job]], Iterable[Arm]]
"""A way to run jobs: `one_by_one`, or `side_by_side` in processes."""


def one_by_one(jobs: Iterable[Job]) -> Iterable[Arm]:
    """Run the jobs here, one after the other."""
    return (job() for job in jobs)


def line_to(sock: socket.socket) -> Connection:
    """Return a connection that takes the socket over."""
    sock.setblocking(True)
    return Connection(sock.detach())


def side_by_side(lines: Sequence[Connection]) -> Each:
    """Return a way to run jobs in the processes at the other ends of `lines`, which run `serve`.

    Its results are those of `one_by_one`, for a seed gives the same trace anywhere. Raises RuntimeError if a process
    was killed, and what a job raised.
    """
    from cloudpickle import dumps

    idle = SimpleQueue[Connection]()
    for line in lines:
        idle.put(line)

    def ask(job: Job) -> Arm:
        line = idle.get()
        try:
            line.send_bytes(dumps(job))
            answer: Arm | Exception = line.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process that simulated {job.args[0]!r} was killed: out of memory?") from None
        finally:
            idle.put(line)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def each(jobs: Iterable[Job]) -> list[Arm]:
        with ThreadPoolExecutor(len(lines)) as threads:  # they only wait, each for one line
            return list(threads.map(ask, jobs))

    return each


def serve(_: bytes, sock: socket.socket) -> None:
    """Run one job after the other, in a process of its own, until the line is closed."""
    with line_to(sock) as line, suppress(EOFError):
        while True:
            try:
                line.send(line.recv()())
            except (RuntimeError, ValueError, MemoryError) as error:  # Stuck is a RuntimeError
                line.send(error)
