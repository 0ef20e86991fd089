"""Token buckets on Redis, asked together: requests that arrive while a call is under way go out as the next one.

Nothing waits when nothing is under way, so a lone request costs what its script costs. A batch is one script call (in a
cluster one per slot), in which like requests on the same buckets are counted, not repeated; each gets the answer it
would have got alone, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from redis.asyncio import RedisCluster

from distsys._support.redis import Script, Timed
from distsys.rate_limiting.decision import MICRO, BucketReply, Limit, Request

SCRIPT = Script(files(__package__).joinpath("token_bucket.lua").read_text())
BATCH = 1_000  # requests in one call: the server does nothing else meanwhile
Clock = Callable[[], float]


class _Run:
    """Requests that differ in nothing, one after the other."""

    def __init__(self, request: Request, numbers: list[int]) -> None:
        self.request, self.numbers = request, numbers
        self.futures: list[asyncio.Future[BucketReply]] = []

    def answer(self, granted: int, used: list[int]) -> None:
        times, cost, taken = self.request.times, self.request.cost, 0
        for future in self.futures:
            if not future.done():
                future.set_result((used, taken * cost))
            taken = min(taken + times, granted)


class _Batch:
    """The requests of one call."""

    def __init__(self) -> None:
        self.limits: dict[str, Limit] = {}
        self.runs: list[_Run] = []
        self._newest: dict[str, _Run] = {}  # that touches a key

    def add(self, request: Request, future: asyncio.Future[BucketReply]) -> bool:
        """False when it has to wait for the next call, for one of its buckets is in this one with another limit."""
        run = self._newest.get(request.keys[0])
        if (
            run is None
            or (run.request is not request and run.request != request)
            or (len(request.keys) > 1 and not self._newest_of_all(run))
        ):
            for key, limit in zip(request.keys, request.limits, strict=True):
                if self.limits.setdefault(key, limit) is not limit:
                    return False
            number = {key: number for number, key in enumerate(self.limits, 1)}
            run = _Run(request, [number[key] for key in request.keys])
            self.runs.append(run)
            self._newest.update(dict.fromkeys(request.keys, run))
        run.futures.append(future)
        return True

    def _newest_of_all(self, run: _Run) -> bool:
        return all(self._newest[key] is run for key in run.request.keys)


class Buckets:
    """Asks one Redis. Each answer takes `timeout` seconds at most, or TimeoutError; None: as long as the client waits.

    `clock` (seconds) stands in for the server's own clock, for tests and simulations.
    """

    def __init__(self, redis: Any, *, timeout: float | None = None, clock: Clock | None = None) -> None:
        self._scripts = Timed(redis, timeout)
        self.redis, self.timeout, self.clock = self._scripts.redis, timeout, clock
        self.slot: Callable[[str], int] = redis.keyslot if isinstance(redis, RedisCluster) else lambda key: 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[Request, asyncio.Future[BucketReply]]] | None = None  # None: no call is under way
        self._task: asyncio.Task[None] | None = None  # the loop keeps weak references only

    def ask(self, request: Request) -> Awaitable[BucketReply]:
        """Cancelled while its own call is under way, the request may have been granted all the same."""
        loop = asyncio.get_running_loop()
        if self._waiting is None or self._loop is not loop:  # a call under way in another loop will never end
            self._loop, self._waiting = loop, []
            return self._ask_alone(request)
        future: asyncio.Future[BucketReply] = loop.create_future()
        self._waiting.append((request, future))
        return future if self.timeout is None else asyncio.wait_for(future, self.timeout)

    async def _ask_alone(self, request: Request) -> BucketReply:
        try:
            _, *used = await self._call(request.keys, request.limits, (_pack(request.times, request.cost),))
            return used, 0
        finally:
            self._send()

    def _send(self) -> None:
        """What has arrived meanwhile goes out, as far as it fits; who was cancelled meanwhile is not asked for."""
        if not self._waiting:
            self._waiting = None
            return
        waiting = [each for each in self._waiting if not each[1].done()]
        batches: defaultdict[int, _Batch] = defaultdict(_Batch)  # by slot
        sent = 0
        for request, future in waiting[:BATCH]:
            if not batches[self.slot(request.keys[0])].add(request, future):
                break
            sent += 1
        self._waiting = waiting[sent:] if sent else None
        if sent and self._loop is not None:
            self._task = self._loop.create_task(self._serve(list(batches.values())))

    async def _serve(self, batches: list[_Batch]) -> None:
        try:
            await asyncio.gather(*map(self._answer, batches))
        finally:
            self._send()

    async def _answer(self, batch: _Batch) -> None:
        try:
            every = list(range(1, len(batch.limits) + 1))
            runs = [
                _pack(
                    len(run.futures) * run.request.times,
                    run.request.cost,
                    *(run.numbers if run.numbers != every else ()),
                )
                for run in batch.runs
            ]
            reply = iter(await self._call(tuple(batch.limits), tuple(batch.limits.values()), runs))
            for run in batch.runs:
                run.answer(next(reply), [next(reply) for _ in run.numbers])
        except BaseException as error:
            for future in [future for run in batch.runs for future in run.futures if not future.done()]:
                future.set_exception(error) if isinstance(error, Exception) else future.cancel()
            if not isinstance(error, Exception):
                raise

    def _call(self, keys: tuple[str, ...], limits: tuple[Limit, ...], runs: Sequence[bytes]) -> Awaitable[Any]:
        now = "" if self.clock is None else round(self.clock() * MICRO)
        args = (now, *[limit.packed for limit in limits], *runs)
        return self._scripts.run(SCRIPT, keys, *args)


@lru_cache(1_000)
def _pack(times: int, cost: int, *numbers: int) -> bytes:
    """Without numbers: from all buckets of the call."""
    return struct.pack(f"<{2 + len(numbers)}d", times, cost, *numbers)
