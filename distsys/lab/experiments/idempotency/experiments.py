"""What it takes to pay once: attempts that come twice, concurrently, too late, from another user, or after a crash.

A table, the ledger, counts the effects. `workload.attempts` says what a candidate is given and what it provides.
"""

from __future__ import annotations

from functools import partial

import psycopg
from psycopg.conninfo import make_conninfo

from distsys.lab.check.calls import answered
from distsys.lab.check.effects import exactly_once, one_answer, right_answers
from distsys.lab.experiments.idempotency import candidates as endpoints
from distsys.lab.experiments.idempotency.workload import attempts, consume, in_the_ledger, with_ledger
from distsys.lab.experiments.servers import own_redis
from distsys.lab.run.experiment import Actor, Experiments, Run, Signal, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy

EXPERIMENTS = experiment = Experiments(workload=attempts, prepare=with_ledger, final=in_the_ledger, check=exactly_once)
SHORT = 0.3  # seconds of a lease, where one has to end
IN_REDIS = partial(endpoints.claimed, lease=SHORT, wait=10.0)


@experiment(
    "key-per-attempt",
    "A key recognises an attempt only if all attempts at an intent carry the same one.",
    expect_violated("no key", endpoints.no_key),
    expect_violated("a uuid made inside of the retry", partial(endpoints.in_one_transaction, keys="per attempt")),
    expect_held("a uuid made once per intent", endpoints.in_one_transaction),
    expect_held("idempotency_key of the intent", partial(endpoints.in_one_transaction, keys="of the intent")),
)
async def sent_again(run: Run) -> None:
    """One payment, sent twice."""
    (w1,) = await run.start(1)
    await w1.ask()
    await w1.ask()


async def attempt(worker: Actor, **action: str) -> None:
    """Order an attempt, and return when the worker is at the point where it holds, stops or is killed."""
    worker.go(**action)
    worker.order()
    await worker.reached(*action.values())


def ended(actor: Actor) -> list[Signal]:
    """Return the signals of a request that has an outcome, or that waits."""
    return [actor.did("request"), actor.failed("request"), actor.broke("request"), actor.waiting("request")]


@experiment(
    "two-attempts-at-once",
    "Reading and marking have to be one step: between a read and an insert the other attempt reads, too.",
    expect_violated("GET, pay, SET", endpoints.mark_after),
    expect_violated("SELECT, pay, INSERT in a transaction", endpoints.select_then_insert),
    expect_held("Claims in Redis", endpoints.claimed),
    expect_held("idempotent_execute", endpoints.in_one_transaction),
)
async def at_once(run: Run) -> None:
    """w2's attempt comes while w1's is under way."""
    w1, w2 = await run.start(2)
    await attempt(w1, hold="before-effect")
    w2.order()
    await run.until(*ended(w2))
    w1.release("before-effect")


@experiment(
    "lost-commit-reply",
    "A lost reply to COMMIT hides the outcome; the next attempt finds it, if the key was committed with the effect.",
    expect_violated("a transaction, no key", endpoints.without_key, params={"replies": 1}),
    expect_held("idempotent_execute", endpoints.in_one_transaction, params={"replies": 2}),
)
async def commit_unheard(run: Run) -> None:
    """The payment commits, and the reply to COMMIT is lost; the client tries again."""
    server = await run.testbed.servers.postgres()
    link = await run.cleanup.enter_async_context(TcpProxy(server.host, server.port))
    (w1,) = await run.start(1, dsn=[make_conninfo(run.urls["dsn"], host="127.0.0.1", port=link.port)])
    await attempt(w1, hold="after-effect")
    link.cut_reply(run.params["replies"])
    run.record("server", "the reply", "is cut")
    w1.release("after-effect")
    await w1.served()
    await w1.ask()


@experiment(
    "killed-in-between",
    "A process can die between an effect and its mark, unless both are one commit.",
    expect_violated("mark after the effect, killed in between", endpoints.mark_after, point="after-effect"),
    expect_violated("mark before the effect, killed in between", endpoints.mark_before, point="before-effect"),
    expect_violated("Claims, on_unknown='rerun', killed after the effect", IN_REDIS, point="after-effect"),
    expect_held("Claims, on_unknown='block'", partial(IN_REDIS, on_unknown="block"), point="after-effect"),
    expect_held("idempotent_execute, killed before the effect", endpoints.in_one_transaction, point="before-effect"),
    expect_held("idempotent_execute, killed after the effect", endpoints.in_one_transaction, point="after-effect"),
)
async def killed(run: Run) -> None:
    """w1 is killed at the arm's point; the client tries again, at w2."""
    point = run.point("after-effect")
    w1, w2 = await run.start(2)
    await attempt(w1, kill=point)
    await w2.ask()


@experiment(
    "cached-error",
    "Cache an error under the key and the customer keeps getting it for a day, even after the fix.",
    expect_violated("every answer kept", partial(endpoints.mark_after, errors_kept=True)),
    expect_held("Claims in Redis", endpoints.claimed),
    expect_held("idempotent_execute", endpoints.in_one_transaction),
    check=partial(answered, name="request"),
)
async def declined_once(run: Run) -> None:
    """The card is declined; the owner fixes that, and tries again."""
    (w1,) = await run.start(1)
    await w1.ask(declined=True)
    run.record("healed", "the card")
    await w1.ask()


@experiment(
    "other-payload",
    "A key that comes back with another request is a mistake, and must not get the first request's answer.",
    expect_violated("the key alone", partial(endpoints.mark_after, checked=False)),
    expect_held("Claims in Redis", endpoints.claimed),
    expect_held("idempotent_execute", endpoints.in_one_transaction),
    check=right_answers,
)
async def another_amount(run: Run) -> None:
    """The key of the first order comes again with the second one's amount."""
    (w1,) = await run.start(1)
    await w1.ask(key="k")
    await w1.ask(key="k", intent="order-2", amount=99)


@experiment(
    "other-user",
    "Clients make keys, and two may make the same: without a scope one user gets the other's answer.",
    expect_violated("no scope", partial(endpoints.mark_after, scoped=False)),
    expect_held("Claims in Redis, per user", endpoints.claimed),
    expect_held("idempotent_execute, scope=user", endpoints.in_one_transaction),
    check=right_answers,
)
async def another_user(run: Run) -> None:
    """Two users have chosen the same key."""
    (w1,) = await run.start(1)
    await w1.ask(key="k")
    await w1.ask(key="k", intent="order-2", user="bob")


@experiment(
    "claim-without-lease",
    "A claim has to end with its owner: without a lease it outlives a dead owner, and the customer waits for ever.",
    expect_violated("SET NX", endpoints.set_nx),
    expect_held("Claims in Redis", IN_REDIS),
    expect_held("idempotent_execute", endpoints.in_one_transaction),
    check=partial(answered, name="request"), patience=4 * SHORT,
)  # fmt: skip
async def owner_dies(run: Run) -> None:
    """w1 dies while it holds the claim; the client tries again, at w2."""
    w1, w2 = await run.start(2)
    await attempt(w1, kill="before-effect")
    w2.order()
    if await run.until(w2.did("request"), w2.waiting("request")) == w2.waiting("request"):
        w2.kill()


@experiment(
    "stale-owner",
    "An owner that was overtaken must not overwrite the answer that was given since.",
    expect_violated("SET NX PX, then SET", partial(endpoints.set_nx, lease_ms=int(1000 * SHORT))),
    expect_held("Claims in Redis", IN_REDIS),
    check=one_answer,
)
async def owner_wakes_up(run: Run) -> None:
    """w1 is stopped past its lease; w2 pays; then w1 resumes; the client asks once more."""
    w1, w2 = await run.start(2)
    await attempt(w1, stop="before-effect")
    await w2.ask()
    w1.resume()
    await w1.served()
    await w2.ask()


async def with_own_redis(run: Run) -> None:
    """Prepare the ledger, and a Redis that this run may restart."""
    await with_ledger(run)
    run.nodes = [await own_redis(run, "node1")]
    run.urls["redis"] = run.nodes[0].url


@experiment(
    "redis-only-dedup",
    "What only Redis remembers is gone after a restart or an eviction; commit the mark with the effect.",
    expect_violated("GET, pay, SET in Redis", endpoints.mark_after),
    expect_held("Dedup, two layers", endpoints.two_layers),
    prepare=with_own_redis,
)
async def redis_forgets(run: Run) -> None:
    """The message comes again after Redis was restarted, empty."""
    (w1,) = await run.start(1)
    await w1.ask()
    await run.nodes[0].restart()
    run.record("restarted", "redis", "empty")
    await w1.ask()


@experiment(
    "consumer-killed",
    "A broker delivers at least once or at most once. Only the consumer's database can make exactly one effect.",
    expect_violated("acknowledged first, killed before the effect", endpoints.ack_first, point="before-effect"),
    expect_violated("acknowledged last, killed before that", endpoints.ack_last, point="before-ack"),
    *(
        expect_held(f"Dedup, killed {point.replace('-', ' ')}", endpoints.deduplicated, point=point)
        for point in ("before-effect", "after-effect", "before-ack")
    ),
    workload=consume, patience=1.0,
)  # fmt: skip
async def consumer_dies(run: Run) -> None:
    """w1 is killed while it handles the message; w2 takes over its messages."""
    producer, w1, w2 = await run.start(3)
    await producer.ask(publish="order-1")
    await attempt(w1, kill=run.point("after-effect"))
    w2.order()
    await run.until(w2.did("ack"), w2.waiting("consume"))
    w2.kill()


@experiment(
    "expired-before-the-retry",
    "A key protects only while it is kept: keep it longer than anybody retries.",
    expect_violated("kept for 50 ms", partial(endpoints.in_one_transaction, ttl=0.05)),
    expect_held("kept for a day", endpoints.in_one_transaction),
)
async def much_later(run: Run) -> None:
    """The retry comes when the key has expired, or should have."""
    (w1,) = await run.start(1)
    await w1.ask()
    await past_the_ttl(run)
    await w1.ask()


async def past_the_ttl(run: Run) -> None:
    """Wait until the key has expired by the database's clock."""
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        await conn.execute("SELECT pg_sleep(0.06)")
    run.record("server", "60 ms", "passed")


@experiment(
    "cleanup-under-load",
    "A cleanup that waits for one writer makes others wait behind it; one that skips locked rows does not.",
    expect_violated("one DELETE", endpoints.Cleaning),
    expect_held("delete_expired", partial(endpoints.Cleaning, at_once=False)),
    check=partial(answered, process="w3", name="request"),
    alone=True,  # the arms share a table, and one would clean up for the other
)
async def cleaned_up(run: Run) -> None:
    """Two keys have expired. w2 claims one of them anew, and is held; w1 cleans up; w3 claims the other."""
    w1, w2, w3 = await run.start(3)
    for intent in ("order-1", "order-2"):
        await w1.ask(intent=intent)
    await past_the_ttl(run)
    w2.go(hold="before-effect")
    w2.order(intent="order-2")
    await w2.reached("before-effect")
    w1.order(clean=True)
    await run.until(w1.did("cleanup"), w1.waiting("cleanup"))
    w3.order(intent="order-1")
    if await run.until(*ended(w3)) == w3.waiting("request"):
        w3.kill()
    w2.release("before-effect")
