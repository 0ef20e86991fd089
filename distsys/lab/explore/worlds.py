"""Worlds: the host, pid and clocks that each process of a candidate sees."""

from __future__ import annotations

import builtins
import contextlib
import datetime
import os
import platform
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distsys.lab.explore.loop import Process, running_process

EPOCH = 1_700_000_000.0  # seconds since 1970 at the start of a run


@dataclass(frozen=True)
class World:
    """Where the processes run: their host names, pids and clocks, and how many of them share one."""

    name: str
    hosts: tuple[str, ...] = ("host1", "host1", "host1")
    pids: tuple[int, ...] = (101, 102, 103)
    skew: tuple[float, ...] = (0.0, 3.0, -2.0)  # seconds by which wall clocks are wrong
    tasks: bool = False  # the workers are tasks of one process, with a lock each


WORLDS = (
    World("three processes of one host"),
    World("three containers with the same pid", ("a", "b", "c"), (1, 1, 1)),
    World("three tasks of one process", pids=(101, 101, 101), skew=(0.0, 0.0, 0.0), tasks=True),
)
SKEWED_CLOCKS = World("three hosts whose clocks are 30 s apart", ("a", "b", "c"), (7, 8, 9), (0.0, 30.0, -30.0))


class _Datetime(datetime.datetime):
    """A datetime whose now() is the world's."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


@contextlib.contextmanager
def inhabited(world: World, processes: list[Process], now: Callable[[], float], seed: int) -> Iterator[None]:
    """Show each process its own host, pid and clocks. `now` is the loop's time.

    Only code that looks a function up when it calls it is deceived, so the candidate's module is loaded inside.
    """
    order = {process: n for n, process in enumerate(processes)}
    chance = random.Random(seed)
    real_hash = builtins.hash

    def here() -> int | None:
        return order.get(running_process.get())  # type: ignore[arg-type]

    def wall() -> float:
        n = here()
        return EPOCH + now() + (0.0 if n is None else world.skew[n])

    def monotonic() -> float:
        n = here()
        return now() + (1000.0 if n is None or world.tasks else 1000.0 * (n + 1))

    def salted(value: Any) -> int:
        n = here()
        return real_hash(
            value if n is None or not isinstance(value, (str, bytes)) else (0 if world.tasks else n, value)
        )

    fakes: dict[tuple[Any, str], Any] = {
        (time, "time"): wall,
        (time, "time_ns"): lambda: int(wall() * 1e9),
        (time, "clock_gettime"): lambda clock: wall() if clock == time.CLOCK_REALTIME else monotonic(),
        (os, "getpid"): lambda: 1 if (n := here()) is None else world.pids[n],
        (os, "urandom"): chance.randbytes,
        (socket, "gethostname"): lambda: "explorer" if (n := here()) is None else world.hosts[n],
        (platform, "node"): lambda: "explorer" if (n := here()) is None else world.hosts[n],
        (datetime, "datetime"): _Datetime,
        (builtins, "hash"): salted,
    }
    for name in ("monotonic", "perf_counter"):
        fakes[time, name] = monotonic
        fakes[time, f"{name}_ns"] = lambda: int(monotonic() * 1e9)
    before = {place: getattr(*place) for place in fakes}
    state = random.getstate()
    random.seed(seed)
    for (module, name), fake in fakes.items():
        setattr(module, name, fake)
    try:
        yield
    finally:
        for (module, name), real in before.items():
            setattr(module, name, real)
        random.setstate(state)
