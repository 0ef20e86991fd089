"""What the idempotency experiments ask: payments, in one attempt or several, of endpoints in processes of their own.

A "request" is an attempt at an intent, an "apply" the effect: a row in the ledger, which is counted in the end. What an
attempt was "told" begins with what it asked: "order-1: 10 from ann → 10 from ann, receipt of w1".
"""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg

from distsys.idempotency.database import ensure_schema
from distsys.lab.experiment import Run
from distsys.lab.experiments.lock_scripts import on_redis
from distsys.lab.history import Finding, History, Op
from distsys.lab.spans import count
from distsys.lab.story import error
from distsys.lab.worker import Worker

_LEDGER = "CREATE TABLE IF NOT EXISTS ledger (run text NOT NULL, intent text NOT NULL)"
DEFAULTS: dict[str, Any] = {"intent": "order-1", "user": "ann", "amount": 10}


class Declined(Exception):
    """The card was declined: nothing was charged."""


async def with_ledger(run: Run) -> None:
    """One Redis, and one PostgreSQL with the ledger and the tables of the rules, in a schema of the lab's own."""
    await on_redis(run)
    run.urls["dsn"] = await run.lab.dsn()
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        await ensure_schema(conn)
        await conn.execute("SELECT pg_advisory_xact_lock(0)")
        await conn.execute(_LEDGER)


async def in_the_ledger(run: Run) -> dict[str, Any]:
    """How often each intent took effect."""
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        rows = await conn.execute("SELECT intent, count(*) FROM ledger WHERE run = %s GROUP BY 1", (run.resource,))
        return {"applied": dict(await rows.fetchall())}


async def attempts(worker: Worker, candidate: Any, **params: Any) -> None:
    """Makes the attempts that the script orders: `intent`, `key`, `amount`, `user`; one after the other.

    The candidate gets what it names of redis, conn, pool, name, charge and params, and has an async method `pay(key,
    amount, user)`, or returns such a function. `await charge(amount, conn)` takes the money, on conn or at once, and
    gives the receipt; it passes the points before-effect and after-effect. An order with declined=True has it raise
    Declined, one with clean=True calls `clean()`.
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
            with contextlib.suppress(Exception):  # on the record
                await _attempt(worker, pay, **order)
        worker.send(e="served")


async def _attempt(
    worker: Worker, pay: Any, intent: str, user: str, amount: int, key: str = "", declined: bool = False, **_: Any
) -> None:
    async with worker.op("request", intent):
        told = await pay(f"{worker.resource}:{key or intent}", amount, user)
    told = told.decode() if isinstance(told, bytes) else told
    async with worker.op("told", f"{intent}: {amount} from {user} → {told}"):
        pass


async def consume(worker: Worker, candidate: Any, **params: Any) -> None:
    """Publishes the message that an order names with `publish`; an order without it consumes what there is.

    The candidate gets redis, conn, pool, stream, consumer and handle, and runs until it is ended. `await
    handle(message, conn)` has the effect, on conn or at once. Its acknowledgement passes the point before-ack.
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


class _Acknowledging:
    """A client of Redis whose acknowledgements are on the record."""

    def __init__(self, worker: Worker, redis: Any) -> None:
        self._worker, self._redis = worker, redis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    async def xack(self, *args: Any) -> Any:
        await self._worker.checkpoint("before-ack")
        async with self._worker.op("ack"):
            return await self._redis.xack(*args)


async def effect(worker: Worker, intent: str, conn: Any) -> None:
    conn = conn or await worker.client("conn")
    async with worker.op("apply", intent):
        await conn.execute("INSERT INTO ledger VALUES (%s, %s)", (worker.resource, intent))


# ---- checks


def somebody_answered(history: History) -> Finding:
    """An endpoint that never answers does nothing twice; that proves nothing."""
    if told := history.where("told"):
        return Finding("HELD", count(len(told), "answer"))
    failed = [error(op) for op in history.where("request") if op.status != "ok"]
    return Finding("INCONCLUSIVE", f"nobody was answered: {failed[0] if failed else 'nobody asked'}")


def right_answers(history: History) -> Finding:
    """Who asks is told of what it asked, not of what another did with the same key."""
    told = [(op, *_parts(op)) for op in history.where("told")]
    wrong = [(op, asked, got) for op, _, asked, got in told if not got.startswith(asked)]
    if wrong:
        rows = [(history.at(op.end), op.process, f"asked for {asked}, was told: {got}") for op, asked, got in wrong]
        summary = f"{count(len(wrong), 'wrong answer')}: {rows[0][2]}"
        return Finding("VIOLATED", summary, tuple(op for op, *_ in wrong), tuple(rows))
    if not told:
        return somebody_answered(history)
    if len(asked := history.where("request")) < 2:
        return Finding("INCONCLUSIVE", f"only {count(len(asked), 'request')}")
    return Finding("HELD", f"{count(len(told), 'answer')} to {count(len(asked), 'request')}, none of them another's")


def one_answer(history: History) -> Finding:
    """All attempts at an intent are told the same."""
    told: dict[str, list[tuple[Op, str]]] = {}
    for op in history.where("told"):
        intent, _, got = _parts(op)
        told.setdefault(intent, []).append((op, got))
    for intent, answers in told.items():
        if (ways := len({got for _, got in answers})) > 1:
            rows = tuple((history.at(op.end), op.process, got) for op, got in answers)
            return Finding("VIOLATED", f"{intent} was answered in {ways} ways", tuple(op for op, _ in answers), rows)
    if not any(len(answers) > 1 for answers in told.values()):
        return Finding("INCONCLUSIVE", "no intent was answered twice")
    return Finding("HELD", f"{count(len(told), 'intent')}, one answer each, {sum(map(len, told.values()))} times")


def _parts(op: Op) -> tuple[str, str, str]:
    """The intent, what was asked, what was told."""
    intent, _, rest = str(op.value).partition(": ")
    asked, _, got = rest.partition(" → ")
    return intent, asked, got


def each_message_once(history: History) -> Finding:
    """What was published takes effect once, whoever dies."""
    applied, sent = history.facts["applied"], [str(op.value) for op in history.where("request", status="ok")]
    wrong = [(intent, applied.get(intent, 0)) for intent in sent if applied.get(intent, 0) != 1]
    if wrong:
        rows = [("", intent, f"applied {count(times, 'time')}") for intent, times in wrong]
        summary = f"{len(wrong)} of {count(len(sent), 'message')} not applied once: {wrong[0][0]} {rows[0][2]}"
        return Finding("VIOLATED", summary, (*history.where("ack"), *history.where("apply")), tuple(rows))
    if not any(fault.kind == "killed" for fault in history.faults):
        return Finding("INCONCLUSIVE", "no consumer was killed")
    return Finding("HELD", f"{count(len(sent), 'message')} applied once")


def never_held_up(history: History) -> Finding:
    """w3 is served while w2 is still held: nobody makes it wait."""
    asked, let_go = history.where("request", process="w3"), [f.at for f in history.faults if f.kind == "released"]
    if not asked or not let_go:
        return Finding("INCONCLUSIVE", "nobody was held, or nobody came")
    late = [op for op in asked if op.returned is None or op.returned > let_go[0]]
    if late:
        summary = f"w3 waited until w2 went on, {history.at(let_go[0])}"
        rows = [(history.at(late[0].called), "w3", summary)]
        return Finding("VIOLATED", summary, (*history.where("cleanup"), *late), tuple(rows))
    return Finding("HELD", "w3 was served while w2 was held")
