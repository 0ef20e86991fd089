"""Simulated arms in processes of their own, side by side."""

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
"""How jobs are done: `one_by_one`, or `side_by_side` in processes."""


def one_by_one(jobs: Iterable[Job]) -> Iterable[Arm]:
    return (job() for job in jobs)


def line_to(sock: socket.socket) -> Connection:
    """Takes the socket over."""
    sock.setblocking(True)
    return Connection(sock.detach())


def side_by_side(lines: Sequence[Connection]) -> Each:
    """In the processes at the other ends of these `lines`, which run `serve`: a seed gives the same trace anywhere."""
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
        with ThreadPoolExecutor(len(lines)) as threads:  # they wait; a line each
            return list(threads.map(ask, jobs))

    return each


def serve(_: bytes, sock: socket.socket) -> None:
    """In a process of its own: one job after the other, until it is ended."""
    with line_to(sock) as line, suppress(EOFError):
        while True:
            try:
                line.send(line.recv()())
            except (RuntimeError, ValueError, MemoryError) as error:  # Stuck is a RuntimeError
                line.send(error)
