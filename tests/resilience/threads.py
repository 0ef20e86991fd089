"""Many threads that start at the same moment and take turns often."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def fast_switches() -> Iterator[None]:
    """Let threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(count: int, task: Callable[[], Any]) -> list[Any]:
    """Run `task` in `count` threads at once; return their results."""
    start = threading.Barrier(count)

    def body() -> Any:
        start.wait(10)
        return task()

    with fast_switches(), ThreadPoolExecutor(count) as pool:
        return [future.result(60) for future in [pool.submit(body) for _ in range(count)]]
