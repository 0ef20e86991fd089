"""Worlds: the host, pid and clocks that each process of a candidate sees."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import datetime
import os
import platform
import random
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distsys.lab.explore.blocking import GreenEvent, GreenThread, GreenTimer, may_wait, wait_for
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


@dataclass
class _View:
    """What the running processes see."""

    world: World
    order: dict[Process, int]
    now: Callable[[], float]
    chance: random.Random
    block: Callable[[float], None]

    def here(self) -> int | None:
        """Return the number of the running process; None outside of all."""
        return self.order.get(running_process.get())  # type: ignore[arg-type]


_view: _View | None = None  # no world: everybody sees the machine as it is
_real: dict[str, Any] = {}  # what `deceive` replaced


def _wall() -> float:
    if _view is None:
        return float(_real["time"]())
    n = _view.here()
    return EPOCH + _view.now() + (0.0 if n is None else _view.world.skew[n])


def _monotonic() -> float:
    if _view is None:
        return float(_real["monotonic"]())
    n = _view.here()
    return _view.now() + (1000.0 if n is None or _view.world.tasks else 1000.0 * (n + 1))


def _gettime(clock: int) -> float:
    return float(_real["clock_gettime"](clock)) if _view is None else _wall() if clock == 0 else _monotonic()


def _sleep(seconds: float) -> None:
    if _view is None:
        _real["sleep"](seconds)
    elif may_wait():
        wait_for(asyncio.sleep(seconds))
    else:
        _view.block(seconds)


def _getpid() -> int:
    n = _view.here() if _view else None
    return int(_real["getpid"]()) if _view is None or n is None else _view.world.pids[n]


def _urandom(size: int) -> bytes:
    return bytes(_real["urandom"](size)) if _view is None else _view.chance.randbytes(size)


def _hostname() -> str:
    n = _view.here() if _view else None
    return str(_real["gethostname"]()) if _view is None or n is None else _view.world.hosts[n]


def _salted(value: Any) -> int:
    """Return a hash that is another one in each process, as PYTHONHASHSEED makes it."""
    n = _view.here() if _view else None
    if _view is None or n is None or not _has_text(value):
        return int(_real["hash"](value))
    return int(_real["hash"]((0 if _view.world.tasks else n, value)))


def _has_text(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or (isinstance(value, (tuple, frozenset)) and any(map(_has_text, value)))


class _Datetime(datetime.datetime):
    """A datetime whose now() is the world's."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


def deceive() -> None:
    """Replace what tells a process its time, pid, host and chance, in this process and for good.

    Libraries that are loaded already have bound the real functions, as globals, defaults and attributes of classes:
    those are replaced, too. Outside of a world the replacements do what the real ones do.
    """
    fakes: dict[tuple[Any, str], Any] = {
        (time, "time"): _wall,
        (time, "time_ns"): lambda: int(_wall() * 1e9),
        (time, "monotonic"): _monotonic,
        (time, "monotonic_ns"): lambda: int(_monotonic() * 1e9),
        (time, "perf_counter"): lambda: _monotonic(),
        (time, "perf_counter_ns"): lambda: int(_monotonic() * 1e9),
        (time, "clock_gettime"): _gettime,
        (time, "sleep"): _sleep,
        (os, "getpid"): _getpid,
        (os, "urandom"): _urandom,
        (socket, "gethostname"): _hostname,
        (platform, "node"): lambda: _hostname(),
        (datetime, "datetime"): _Datetime,
        (builtins, "hash"): _salted,
        (threading, "Event"): GreenEvent,
        (threading, "Thread"): GreenThread,
        (threading, "Timer"): GreenTimer,
    }
    instead = dict[Any, Any]()
    for (module, name), fake in fakes.items():
        real = getattr(module, name)
        _real.setdefault(name, real)
        instead[id(real)] = fake
        setattr(module, name, fake)
    for module in [module for name, module in list(sys.modules.items()) if not _is_ours(name)]:
        for owner in (module, *(kind for kind in list(vars(module).values()) if isinstance(kind, type))):
            if getattr(owner, "__module__", module.__name__) == module.__name__:
                _rebind(owner, instead)


def _is_ours(name: str) -> bool:
    top = name.partition(".")[0]
    return name.startswith("distsys.lab.") or (top in sys.stdlib_module_names and top != "uuid") or top == "_pytest"


def _rebind(owner: Any, instead: dict[int, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if (fake := instead.get(id(value))) is not None:
            with contextlib.suppress(AttributeError, TypeError):  # a class of C
                setattr(owner, name, fake)
        elif isinstance(value, types.FunctionType):
            value.__defaults__ = tuple(instead.get(id(one), one) for one in value.__defaults__ or ()) or None
            if value.__kwdefaults__:
                value.__kwdefaults__ = {word: instead.get(id(one), one) for word, one in value.__kwdefaults__.items()}


@contextlib.contextmanager
def inhabited(
    world: World, processes: list[Process], now: Callable[[], float], seed: int, block: Callable[[float], None]
) -> Iterator[None]:
    """Show each process its own host, pid and clocks. `now` is the loop's time, `block` what time.sleep does."""
    global _view
    state = random.getstate()
    random.seed(seed)
    _view = _View(world, {process: n for n, process in enumerate(processes)}, now, random.Random(seed), block)
    try:
        yield
    finally:
        _view = None
        random.setstate(state)
