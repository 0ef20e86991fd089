"""The workload of the resilience experiments: an HTTP service in a process of its own, and callers with a guard.

Three ops show what a guard does: "call", what it was asked to do; "request", what it sent; "arrive", what reached the
service. A "wait" is a sleep in between. It takes no time, for the clock and the sleep of a guard are virtual.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from itertools import cycle
from typing import Any

from distsys.lab.run.experiment import Actor, Run
from distsys.lab.run.guard import plain
from distsys.lab.run.worker import VirtualClock, Worker, task_name
from distsys.lab.testbed.servers import free_port

HANGS = "hangs"  # an answer that is held back until the next order
MAX_WRONG_PASSWORDS = 3  # then the account is locked, for the right password, too


class HttpError(Exception):
    """An error of a response whose status is 400 or more."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} {HTTPStatus(status).phrase}")
        self.status = status


async def post(port: int, path: str, key: str = "") -> str:
    """Send a POST request; return "done", or raise HttpError or an OSError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(f"POST {path} HTTP/1.0\r\nIdempotency-Key: {key}\r\n\r\n".encode())
        if not (head := await reader.readline()):
            raise ConnectionResetError("the reply never came")
        if (status := int(head.split()[1])) >= 400:
            raise HttpError(status)
    return "done"


async def dependency(run: Run) -> Actor:
    """Start the service, or restart it on its port. `await service.ask(answers=[503], path=...)` sets its answers."""
    run.urls.setdefault("dependency", free_port())
    return await run.serve("dependency", serve)


async def serve(worker: Worker, candidate: Any, **_: Any) -> None:
    """Answer with the next of the `answers`, over and over; 200 means that the request took effect, once per key.

    A path with a password in it is a login: the account is locked after MAX_WRONG_PASSWORDS.
    """
    answers: dict[str, Iterator[Any]] = {"": cycle([200])}
    ordered, keys, wrong_passwords = asyncio.Event(), set[str](), 0

    async def answer(path: str) -> int:
        nonlocal wrong_passwords
        wrong_passwords += "wrong" in path
        if "password" in path:
            return 423 if wrong_passwords >= MAX_WRONG_PASSWORDS else 401 if "wrong" in path else 200
        while (status := next(answers.get(path, answers[""]))) == HANGS:
            await ordered.wait()
        return int(status)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            path, key = head[0].split()[1], head[1].partition(": ")[2]
            async with worker.op("arrive", path):
                status = await answer(path)
            if status == 200 and not (key and key in keys):
                keys.add(key)
                async with worker.op("apply", path):
                    pass
            writer.write(f"HTTP/1.0 {status} -\r\n\r\n".encode())

    async with await asyncio.start_server(handle, "127.0.0.1", worker.job.urls["dependency"], backlog=200):
        worker.send(e="served")
        while order := await worker.orders.get():
            answers[order.get("path", "")] = cycle(order["answers"])
            ordered.set()
            ordered = asyncio.Event()
            worker.send(e="served")


async def calls(worker: Worker, candidate: Any, **settings: Any) -> None:
    """Call the service through the candidate, as the script orders: so many `times`, `together` or in turn.

    A candidate names what it needs of call, clock, sleep and the settings. One that takes `call` returns the guarded
    function; any other candidate is a decorator, or has a method call(fn, ...).
    """
    clock, timeout = VirtualClock(), 10.0

    async def call(path: str = "/", key: str = "") -> str:
        async with worker.op("request", path), asyncio.timeout(timeout):
            return await post(worker.job.urls["dependency"], path, key)

    async def sleep(seconds: float) -> None:
        async with worker.op("wait", seconds):
            clock.now += seconds

    guarded = await worker.build(candidate, call=call, clock=clock, sleep=sleep, **settings)
    if "call" not in inspect.signature(candidate).parameters:
        guarded = guarded(call) if callable(guarded) else partial(guarded.call, call)

    async def guarded_call(path: str) -> None:
        with contextlib.suppress(Exception):  # the history holds it
            async with worker.op("call", path):
                await plain(guarded, path)

    async def obey(*, times: int = 1, path: str = "/", task: str = "", together: bool = False, **more: Any) -> None:
        task_name.set(f"{worker.name}.{task}" if task else "")
        if together:
            await asyncio.gather(*(guarded_call(path) for _ in range(times)))
        else:
            for _ in range(times):
                await guarded_call(path)
        worker.send(e="served")

    async with asyncio.TaskGroup() as group:
        while order := await worker.orders.get():
            clock.now, timeout = max(clock.now, order.get("at", 0.0)), order.get("timeout", 10.0)
            worker.tasks[order.get("task", "")] = group.create_task(obey(**order))
