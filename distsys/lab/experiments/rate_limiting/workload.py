"""The workload of the rate-limiting experiments: workers that ask a limiter for what the script orders."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from redis.exceptions import RedisError

from distsys.errors import RateLimited
from distsys.lab.run.guard import plain
from distsys.lab.run.worker import VirtualClock, Worker


async def requests(
    worker: Worker, candidate: Any, *, limit: float = 10, window: float = 60.0, clock: str = "server"
) -> None:
    """Ask a limiter for what the script orders, one request after the other; record each as an "admit".

    The limiter is asked by allow(), try_acquire() or is_allowed(), and is given a `clock` if it takes one.
    clock  "virtual": a clock that the script moves, by which the record and the event loop go, too
           "client": the worker's own, on each worker a minute ahead of the one before
           "server": none
    """
    virtual = VirtualClock()
    options: dict[str, Any] = {"limit": limit, "window": window, "nginx": worker.job.urls.get("nginx")}
    if clock == "virtual":
        options["clock"] = worker.now = virtual
        asyncio.get_running_loop().time = virtual  # type: ignore[method-assign]  # for leases and timeouts
    elif clock == "client":
        options["clock"] = lambda: time.time() + 60 * int(worker.name[1:])
    limiter = await worker.build(candidate, **options)
    ask = next(found for n in ("allow", "try_acquire", "is_allowed") if (found := getattr(limiter, n, None)))
    while order := await worker.orders.get():
        virtual.now = max(virtual.now, order.pop("at", 0.0))
        times, arguments = order.pop("times"), {"key": worker.resource, **order}
        for _ in range(times):
            try:
                async with worker.op("admit", order or None):
                    _require_allowed(await plain(ask, **arguments))
            except (RateLimited, RedisError, OSError):
                pass  # recorded as refused, or as of unknown outcome
            virtual.now += 1e-5
        worker.send(e="served")


def _require_allowed(answer: Any) -> None:
    """Raise RateLimited, which is recorded as a refusal, unless the answer is yes."""
    if not answer:
        raise RateLimited(f"come again in {answer.retry_after:.3g} s" if hasattr(answer, "retry_after") else None)
