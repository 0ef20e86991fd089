"""Token buckets on Redis, asked in batches: requests that arrive while a call is under way share the next call.

A request that finds no call under way goes out at once, so a lone request costs what its script costs. A batch is one
script call (in a cluster one per slot). Identical requests in a row are counted, not repeated. Each request gets the
answer that it would have got alone, in the order of arrival.
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
MAX_BATCH = 1_000  # requests in one call: the server does nothing else meanwhile
Clock = Callable[[], float]


class _IdenticalRequests:
    """Requests for the same cost from the same buckets, with nothing in between that touches one of them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.positions: list[int] = []  # of its buckets in the call, counted from 1
        self.futures: list[asyncio.Future[BucketReply]] = []
        self.overtaken = False  # a later request touches one of the buckets, so this group is complete

    def pack(self, buckets: int) -> bytes:
        """Return the group as the script reads it, in a call on so many buckets."""
        everything = len(self.positions) == buckets and self.positions == list(range(1, buckets + 1))
        return _pack(len(self.futures) * self.request.times, self.request.cost, *(() if everything else self.positions))

    def resolve(self, granted: int, used: list[int]) -> None:
        """Answer each caller: `granted` of all these requests, the first ones, have taken their cost."""
        times, cost, taken = self.request.times, self.request.cost, 0
        for future in self.futures:
            own = min(times, granted)
            if not future.done():
                future.set_result((own, used, taken))
            granted -= own
            taken += own * cost


class _Batch:
    """The requests of one call."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[int, Limit]] = {}  # key -> its position in the call, and its limit
        self._groups: list[_IdenticalRequests] = []
        self._newest: dict[str, _IdenticalRequests] = {}  # by the key that it touches

    def add(self, request: Request, future: asyncio.Future[BucketReply]) -> bool:
        """Return False if the request has to wait for the next call: this one has its bucket with another limit."""
        group = self._newest.get(request.keys[0])
        if group is None or group.overtaken or (group.request is not request and group.request != request):
            group = _IdenticalRequests(request)
            for key, limit in zip(request.keys, request.limits, strict=True):
                position, known = self._buckets.setdefault(key, (len(self._buckets) + 1, limit))
                if known is not limit:
                    return False
                group.positions.append(position)
            for key in request.keys:
                if key in self._newest:
                    self._newest[key].overtaken = True
                self._newest[key] = group
            self._groups.append(group)
        group.futures.append(future)
        return True

    def question(self) -> tuple[tuple[str, ...], tuple[Limit, ...], list[bytes]]:
        """Return the keys, limits and packed requests of the call."""
        packed = [group.pack(len(self._buckets)) for group in self._groups]
        return tuple(self._buckets), tuple(limit for _, limit in self._buckets.values()), packed

    def resolve(self, reply: Sequence[int]) -> None:
        """Answer each caller from the script's reply."""
        numbers = iter(reply)
        for group in self._groups:
            group.resolve(next(numbers), [next(numbers) for _ in group.positions])

    def fail(self, error: BaseException) -> None:
        """Hand the error of the call to each caller; if the call was cancelled, cancel them."""
        for future in [future for group in self._groups for future in group.futures if not future.done()]:
            future.set_exception(error) if isinstance(error, Exception) else future.cancel()


class Buckets:
    """The token buckets of one Redis; each answer takes `timeout` seconds at most, or TimeoutError (None: no bound).

    `clock` (seconds) stands in for the server's own clock, for tests and simulations.
    """

    def __init__(self, redis: Any, *, timeout: float | None = None, clock: Clock | None = None) -> None:
        self._scripts = Timed(redis, timeout)
        self.redis = self._scripts.redis
        self.timeout, self.clock = timeout, clock
        self.slot: Callable[[str], int] = redis.keyslot if isinstance(redis, RedisCluster) else lambda key: 0
        self._loop: asyncio.AbstractEventLoop  # of the call under way
        self._waiting: list[tuple[Request, asyncio.Future[BucketReply]]] | None = None  # None: no call is under way
        self._task: asyncio.Task[None] | None = None  # the loop keeps weak references only

    def ask(self, request: Request) -> Awaitable[BucketReply]:
        """Return Redis's answer; if cancelled during its own call, the request may have been granted all the same.

        The errors are the client's own and TimeoutError.
        """
        loop = asyncio.get_running_loop()
        if self._waiting is None or self._loop is not loop:  # a call under way in another loop will never end
            self._loop, self._waiting = loop, []
            return self._ask_alone(request)
        future: asyncio.Future[BucketReply] = loop.create_future()
        self._waiting.append((request, future))
        return future if self.timeout is None else asyncio.wait_for(future, self.timeout)

    async def _ask_alone(self, request: Request) -> BucketReply:
        try:
            granted, *used = await self._call(request.keys, request.limits, (_pack(request.times, request.cost),))
            return granted, used, 0
        finally:
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Send what arrived during the call, as far as it fits into one batch per slot; drop what was cancelled."""
        if not self._waiting:
            self._waiting = None
            return
        waiting = [pair for pair in self._waiting if not pair[1].done()]
        batches: defaultdict[int, _Batch] = defaultdict(_Batch)  # by slot
        sent = 0
        for request, future in waiting[:MAX_BATCH]:
            if not batches[self.slot(request.keys[0])].add(request, future):
                break
            sent += 1
        self._waiting = waiting[sent:] if sent else None
        if sent:
            self._task = self._loop.create_task(self._serve(list(batches.values())))

    async def _serve(self, batches: list[_Batch]) -> None:
        try:
            await asyncio.gather(*map(self._answer, batches))
        finally:
            self._send_waiting()

    async def _answer(self, batch: _Batch) -> None:
        try:
            batch.resolve(await self._call(*batch.question()))
        except BaseException as error:
            batch.fail(error)
            if not isinstance(error, Exception):
                raise

    def _call(self, keys: tuple[str, ...], limits: tuple[Limit, ...], requests: Sequence[bytes]) -> Awaitable[Any]:
        now = "" if self.clock is None else round(self.clock() * MICRO)
        args = (now, *[limit.packed for limit in limits], *requests)
        return self._scripts.run(SCRIPT, keys, *args)


@lru_cache(1_000)
def _pack(times: int, cost: int, *positions: int) -> bytes:
    """Return the argument for so many requests; without positions they ask all buckets of the call."""
    return struct.pack(f"<{2 + len(positions)}d", times, cost, *positions)
