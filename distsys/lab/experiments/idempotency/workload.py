"""Workloads of the idempotency experiments: payments, in one or several attempts, at endpoints in worker processes.

In the history a "request" is an attempt at an intent, and an "apply" is the effect: a row in the ledger, which the lab
counts at the end. A "told" is an answer, after what was asked: "order-1: 10 from ann → 10 from ann, receipt of w1".
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import psycopg

from distsys.lab.experiments.servers import on_redis
from distsys.lab.run.experiment import Run
from distsys.lab.run.worker import Worker
from distsys.schema import ensure_schema

DEFAULTS: dict[str, Any] = {"intent": "order-1", "user": "ann", "amount": 10}


class Declined(Exception):
    """The card was declined: nothing was charged."""


async def with_ledger(run: Run) -> None:
    """Prepare one Redis, and one PostgreSQL with the ledger and the tables of the rules, in a schema of the lab."""
    await on_redis(run)
    run.urls["dsn"] = await run.testbed.dsn()
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        await ensure_schema(conn)
        await conn.execute("SELECT pg_advisory_xact_lock(0)")
        await conn.execute("CREATE TABLE IF NOT EXISTS ledger (run text NOT NULL, intent text NOT NULL)")


async def in_the_ledger(run: Run) -> dict[str, Any]:
    """Return how often each intent took effect."""
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        rows = await conn.execute("SELECT intent, count(*) FROM ledger WHERE run = %s GROUP BY 1", (run.resource,))
        return {"applied": dict(await rows.fetchall())}


async def attempts(worker: Worker, candidate: Any, **params: Any) -> None:
    """Make the attempts that the script orders, one after the other: `intent`, `key`, `amount`, `user`.

    The candidate gets what it names of redis, conn, pool, name, charge and params, and has an async method `pay(key,
    amount, user)`, or returns such a function. `await charge(amount, conn)` takes the money, in the transaction of conn
    or at once, and returns the receipt; it passes the points before-effect and after-effect. An order with
    declined=True lets it raise Declined, one with clean=True calls `clean()`.
    """
    order: dict[str, Any] = {}

    async def charge(amount: int, conn: Any = None) -> str:
        await worker.checkpoint("before-effect")
        if order.get("declined"):
            raise Declined
        await effect(worker, order["intent"], conn)
        await worker.checkpoint("after-effect")
        return f"{amount} from {order['user']}, receipt of {worker.name}"

    endpoint = await worker.build(candidate, charge=charge, **params)
    pay = getattr(endpoint, "pay", endpoint)
    while order := await worker.orders.get():
        if order.get("clean"):
            async with worker.op("cleanup"):
                await endpoint.clean()
        else:
            order = {**DEFAULTS, **order}
            intent, user, amount = order["intent"], order["user"], order["amount"]
            with contextlib.suppress(Exception):  # it is in the history
                async with worker.op("request", intent):
                    told = await pay(f"{worker.resource}:{order.get('key') or intent}", amount, user)
                told = told.decode() if isinstance(told, bytes) else told
                async with worker.op("told", f"{intent}: {amount} from {user} → {told}"):
                    pass
        worker.send(e="served")


async def consume(worker: Worker, candidate: Any, **params: Any) -> None:
    """Publish the message that an order names with `publish`; for an order without it, consume.

    The candidate gets redis, conn, pool, stream, consumer and handle, and runs until it is killed. `await
    handle(message, conn)` has the effect, in the transaction of conn or at once. Its acknowledgement passes the point
    before-ack.
    """
    stream = f"{worker.resource}:orders"

    async def handle(message: dict[bytes, bytes], conn: Any = None) -> None:
        await worker.checkpoint("before-effect")
        await effect(worker, message[b"intent"].decode(), conn)
        await worker.checkpoint("after-effect")

    redis, names = _Acknowledging(worker, await worker.client("redis")), {"stream": stream, "consumer": worker.name}
    while order := await worker.orders.get():
        if intent := order.get("publish"):
            async with worker.op("request", intent):
                await redis.xadd(stream, {"intent": intent})
            worker.send(e="served")
        else:
            async with worker.op("consume"):
                await (await worker.build(candidate, redis=redis, **names, handle=handle, **params))


@dataclass
class _Acknowledging:
    """A client of Redis whose acknowledgements are in the history."""

    _worker: Worker
    _redis: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    async def xack(self, *args: Any) -> Any:
        """Acknowledge, after the point before-ack."""
        await self._worker.checkpoint("before-ack")
        async with self._worker.op("ack"):
            return await self._redis.xack(*args)


async def effect(worker: Worker, intent: str, conn: Any) -> None:
    """Add a row to the ledger."""
    conn = conn or await worker.client("conn")
    async with worker.op("apply", intent):
        await conn.execute("INSERT INTO ledger VALUES (%s, %s)", (worker.resource, intent))
