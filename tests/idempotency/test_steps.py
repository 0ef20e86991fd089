"""Operations in steps: after a crash they resume, and no step that has ended runs again."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import cloudpickle
import pytest
from psycopg_pool import AsyncConnectionPool

from distsys.errors import KeyInProgress, KeyReused, OutcomeUnknown
from distsys.idempotency import steps
from distsys.idempotency.database import delete_expired
from distsys.idempotency.steps import Steps, complete_orphans, execute_steps
from distsys.lab.run.worker import Job, checkpoint
from distsys.lab.testbed.processes import Processes
from tests.bugs import edited, kills
from tests.idempotency.test_database import charge, effects, ledger, select

__all__ = ["ledger"]
LEASE = 60.0
POINTS = ["begun", "order written", "order kept", "charged", "charge kept", "mailed"]
SCALARS: list[Any] = [None, 1, 1.5, "ünï\0", [1, {"a": None}], {"b": [True]}]


async def order(steps: Steps, request: Any) -> dict[str, Any]:
    """Write here, call a service, write here, with a checkpoint after each."""
    await checkpoint("begun")
    async with steps.step("order", transaction=True) as one:
        if one.pending:
            one.result = await charge(one.connection, f"order {request}")
            await checkpoint("order written")
    await checkpoint("order kept")
    async with steps.step("charge") as two:
        if two.pending:
            two.result = await call(steps, two.key)
            await checkpoint("charged")
    await checkpoint("charge kept")
    async with steps.step("mail") as three:
        if three.pending:
            three.result = await call(steps, three.key)
            await checkpoint("mailed")
    return {"order": one.result["number"], "charge": two.result, "mail": three.result}


async def call(steps: Steps, key: str) -> str:
    """Call a service, which counts calls by key."""
    async with steps._pool.connection() as conn:
        await charge(conn, f"called {key}")
    return key


async def calls(pool: AsyncConnectionPool) -> list[int]:
    """Return how often the service was called with each key."""
    async with pool.connection() as conn:
        query = "SELECT count(*) FROM ledger WHERE what LIKE 'called %' GROUP BY what ORDER BY min(number)"
        return [count for (count,) in await (await conn.execute(query)).fetchall()]


async def fell_silent(pool: AsyncConnectionPool) -> None:
    """End the lease of an attempt that died."""
    await select(pool, "UPDATE distsys_idempotency SET leased_until = now() WHERE leased_until > now() RETURNING 1")


async def works(worker: Any, candidate: Any, dsn: str) -> None:
    async with AsyncConnectionPool(dsn, min_size=1, max_size=2, open=False) as pool:
        await execute_steps(pool, "k", "orders", order, request=7, lease=LEASE)


@pytest.fixture(scope="module")
async def processes() -> AsyncIterator[Processes]:
    processes = await Processes.start()
    yield processes
    await processes.aclose()


async def killed(processes: Processes, dsn: str, point: str) -> None:
    """Run a worker that is killed at this point."""
    here = sys.modules[__name__]
    other = sys.modules[charge.__module__]
    for module in (here, other):  # by value: a worker imports no test
        cloudpickle.register_pickle_by_value(module)
    payload = cloudpickle.dumps(Job("w", 1, works, None, {}, "", 1.0, 1.0, {"dsn": dsn}))
    for module in (here, other):
        cloudpickle.unregister_pickle_by_value(module)
    worker = await processes.fork("distsys.lab.run.worker:main", payload, name="w")
    assert worker.sock is not None
    loop, said = asyncio.get_running_loop(), b""
    for command in ({"do": "arm", "point": point, "action": "kill"}, {"do": "go"}):
        await loop.sock_sendall(worker.sock, json.dumps(command).encode() + b"\n")
    while data := await loop.sock_recv(worker.sock, 1 << 16):
        said += data
    worker.close()
    assert await worker.exited() == -signal.SIGKILL, said


@pytest.mark.parametrize("by", ["a retry", "the completer"])
@pytest.mark.parametrize("point", POINTS)
async def test_killed_anywhere_it_resumes_after_the_steps_that_have_ended(
    processes: Processes, ledger: AsyncConnectionPool, pg: str, point: str, by: str
) -> None:
    """The step in progress is repeated with the same key; rows of this database are written once."""
    await killed(processes, pg, point)
    with pytest.raises(KeyInProgress):
        await execute_steps(ledger, "k", "orders", order, request=7)
    assert await complete_orphans(ledger, {"orders": order}) == []
    await fell_silent(ledger)
    if by == "a retry":
        answer = await execute_steps(ledger, "k", "orders", order, request=7)
    else:
        [answer] = await complete_orphans(ledger, {"orders": order})
    assert await effects(ledger, "order 7") == 1
    assert await calls(ledger) == [1 + (point == "charged"), 1 + (point == "mailed")]
    assert await execute_steps(ledger, "k", "orders", order, request=7) == answer
    assert await complete_orphans(ledger, {"orders": order}) == []
    assert sum(await calls(ledger)) == 2 + (point in ("charged", "mailed"))


async def test_a_failed_attempt_ends_at_once_and_the_next_resumes(ledger: AsyncConnectionPool) -> None:
    ran: Counter[str] = Counter()

    async def operation(steps: Steps, request: Any) -> list[Any]:
        results = []
        for name in ("a", "b", "c"):
            async with steps.step(name) as step:
                if step.pending:
                    ran[name] += 1
                    if name == "c" and ran[name] < 3:
                        raise RuntimeError("not yet")
                    step.result = ran.total()
            results.append(step.result)
        return results

    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            await execute_steps(ledger, "k", "e", operation)
    assert await execute_steps(ledger, "k", "e", operation) == [1, 2, 5]
    assert ran == {"a": 1, "b": 1, "c": 3}


@pytest.mark.parametrize("result", SCALARS, ids=repr)
async def test_a_result_is_replayed_as_json(ledger: AsyncConnectionPool, result: Any) -> None:
    """None is a result as well."""
    seen: list[Any] = []

    async def operation(steps: Steps, request: Any) -> None:
        async with steps.step("only") as step:
            seen.append((step.pending, step.result))
            if step.pending:
                step.result = result
        if len(seen) == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await execute_steps(ledger, "k", "e", operation)
    assert await execute_steps(ledger, "k", "e", operation) is None
    assert seen == [(True, None), (False, result)]


async def test_the_key_of_a_step_is_its_own_and_the_same_in_each_attempt(ledger: AsyncConnectionPool) -> None:
    """Each scope, endpoint, key and name gives another key."""
    keys: list[str] = []

    async def operation(steps: Steps, request: Any) -> None:
        for name in ("a", "b"):
            async with steps.step(name) as step:
                keys.append(step.key)
        if len(keys) == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await execute_steps(ledger, "k", "e", operation)
    await execute_steps(ledger, "k", "e", operation)
    assert keys[:2] == keys[2:]
    for names in (("l", "e", ""), ("k", "f", ""), ("k", "e", "s")):
        await execute_steps(ledger, names[0], names[1], operation, scope=names[2])
    assert len(set(keys)) == 8


@kills(
    "a name that comes twice is answered with the first result",
    edited(steps.Steps, "step", "self._ended.add(name)", "pass"),
)
async def test_a_name_that_comes_twice_in_an_attempt_is_a_mistake(ledger: AsyncConnectionPool) -> None:
    """In a loop the second would be answered with the first one's result; after a failure it may come again."""

    async def loops(steps: Steps, request: Any) -> None:
        for number in range(2):
            async with steps.step("charge") as step:
                step.result = number

    async def tries_again(steps: Steps, request: Any) -> Any:
        for number in range(3):
            try:
                async with steps.step("charge") as step:
                    step.result = 2 // (number // 2)
            except ZeroDivisionError:
                continue
        return step.result

    with pytest.raises(ValueError, match="step 'charge' has ended in this attempt: in a loop name each"):
        await execute_steps(ledger, "k", "e", loops)
    assert await execute_steps(ledger, "l", "e", tries_again) == 2


@kills(
    "an owner that was overtaken keeps its step",
    edited(
        steps,
        "_KEEP",
        "(scope, endpoint, key, fence) = (%s, %s, %s, %s) AND leased_until > 'epoch'",
        "(scope, endpoint, key) = (%s, %s, %s) AND %s > 0",
    ),
)
async def test_an_owner_that_was_overtaken_can_keep_nothing(ledger: AsyncConnectionPool) -> None:
    """It keeps neither a result, nor the rows of that step, nor the answer."""
    slow, go_on = asyncio.Event(), asyncio.Event()

    async def operation(steps: Steps, request: Any) -> str:
        async with steps.step("write", transaction=True) as step:
            if step.pending:
                step.result = await charge(step.connection, "k")
                if not slow.is_set():
                    slow.set()
                    await go_on.wait()
        return "done"

    late = asyncio.create_task(execute_steps(ledger, "k", "e", operation, lease=LEASE))
    await slow.wait()
    await fell_silent(ledger)
    assert await execute_steps(ledger, "k", "e", operation, lease=LEASE) == "done"
    go_on.set()
    with pytest.raises(OutcomeUnknown, match="step 'write': the lease ended without a heartbeat and another took over"):
        await late
    assert await effects(ledger) == 1


async def test_an_attempt_that_is_overtaken_at_its_end_is_told(ledger: AsyncConnectionPool) -> None:
    fences: list[int] = []

    async def operation(steps: Steps, request: Any) -> int:
        fences.append(steps.fence)
        if len(fences) == 1:
            await fell_silent(ledger)
            await execute_steps(ledger, "k", "e", operation)
        return steps.fence

    with pytest.raises(OutcomeUnknown, match="took over"):
        await execute_steps(ledger, "k", "e", operation)
    assert await execute_steps(ledger, "k", "e", operation) == fences[1] > fences[0]


async def test_of_many_at_once_one_carries_it_out(ledger: AsyncConnectionPool) -> None:
    """The others get KeyInProgress or its answer."""
    attempts = [execute_steps(ledger, "k", "orders", order, request=7) for _ in range(20)]
    answers = await asyncio.gather(*attempts, return_exceptions=True)
    done = [answer for answer in answers if not isinstance(answer, KeyInProgress)]
    assert done == done[:1] * len(done) != []
    assert (await effects(ledger, "order 7"), await calls(ledger)) == (1, [1, 1])


async def test_another_request_is_refused_whether_it_is_done_or_not(ledger: AsyncConnectionPool) -> None:
    async def fails(steps: Steps, request: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await execute_steps(ledger, "k", "orders", fails, request=7)
    for _ in range(2):
        with pytest.raises(KeyReused):
            await execute_steps(ledger, "k", "orders", order, request=8)
        await execute_steps(ledger, "k", "orders", order, request=7)


@kills(
    "the steps of an expired key are replayed",
    edited(steps, "_DELETE_STEPS", "DELETE FROM distsys_steps WHERE", "SELECT 1 FROM distsys_steps WHERE NOT"),
)
async def test_a_key_that_has_expired_starts_anew(ledger: AsyncConnectionPool) -> None:
    """Its steps start anew too, whether or not the expired rows were deleted; deleting a key deletes its steps."""
    for delete in (False, True):
        assert await execute_steps(ledger, "k", "orders", order, request=7)
        await select(ledger, "UPDATE distsys_idempotency SET expires_at = now() RETURNING 1")
        if delete:
            assert await delete_expired(ledger) == 1
            assert await select(ledger, "SELECT count(*) FROM distsys_steps") == (0,)
    assert await execute_steps(ledger, "k", "orders", order, request=8)
    assert (await effects(ledger, "order 7"), await effects(ledger, "order 8")) == (2, 1)


@kills("what always fails is tried first", edited(steps, "_ORPHANS", "ORDER BY fence", "ORDER BY expires_at"))
async def test_an_orphan_that_always_fails_does_not_block_others(ledger: AsyncConnectionPool) -> None:
    """The orphan tried least recently comes first; its error is among the answers, and it still expires."""
    tried: list[Any] = []

    async def operation(steps: Steps, request: Any) -> Any:
        tried.append(request)
        if request in ("bad", "worse") or tried.count(request) == 1:
            raise RuntimeError(request)
        return request

    for name in ("bad", "worse", "good"):
        with pytest.raises(RuntimeError):
            await execute_steps(ledger, name, "e", operation, request=name, ttl=100)
    (expires,) = await select(ledger, "SELECT max(expires_at) FROM distsys_idempotency WHERE key <> 'good'")
    answers = [await complete_orphans(ledger, {"e": operation}, batch=1, lease=1) for _ in range(4)]
    assert list(itertools.chain(*map(repr, answers))) == list(
        "[RuntimeError('bad')][RuntimeError('worse')]['good'][RuntimeError('bad')]"
    )
    assert (await select(ledger, "SELECT max(expires_at) <= %s FROM distsys_idempotency WHERE key <> 'good'", expires))[
        0
    ]


async def test_a_request_that_kills_its_worker_expires_all_the_same(ledger: AsyncConnectionPool) -> None:
    """Each attempt of the completer adds its lease, and takes it off what is left."""

    async def operation(steps: Steps, request: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await execute_steps(ledger, "k", "e", operation, ttl=100)
    (before,) = await select(ledger, "SELECT expires_at FROM distsys_idempotency")

    async def looks(steps: Steps, request: Any) -> Any:
        return (await select(ledger, "SELECT expires_at < %s + interval '50' FROM distsys_idempotency", before))[0]

    assert await complete_orphans(ledger, {"e": looks}, lease=60) == [True]


async def test_a_step_without_a_transaction_has_no_connection(ledger: AsyncConnectionPool) -> None:
    async def operation(steps: Steps, request: Any) -> None:
        async with steps.step("call") as step:
            await charge(step.connection)

    with pytest.raises(RuntimeError, match=r"steps.step\(name, transaction=True\)"):
        await execute_steps(ledger, "k", "e", operation)


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (7, TypeError), ("a\0", ValueError)])
async def test_a_step_has_a_name(ledger: AsyncConnectionPool, name: Any, error: type[Exception]) -> None:
    async def operation(steps: Steps, request: Any) -> None:
        async with steps.step(name):
            pass

    with pytest.raises(error, match="step="):
        await execute_steps(ledger, "k", "e", operation)
