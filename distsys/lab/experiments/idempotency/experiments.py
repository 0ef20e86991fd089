"""What it takes to pay once: attempts that come twice, at once, too late, from somebody else, or after a crash.

The effects are counted in a ledger, a table. The lab gives a candidate what its parameters name of redis, conn, pool,
name and charge; it has `pay(key, amount, user)`, or returns such a function.
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
from distsys.lab.history.history import Finding, History
from distsys.lab.history.words import count
from distsys.lab.run.experiment import Actor, Experiment, Run, Signal, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy

# ---- checks


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


# ---- scripts


paying = partial(Experiment, workload=attempts, prepare=with_ledger, final=in_the_ledger, check=exactly_once)
SHORT = 0.3  # seconds of a lease, where one has to end
IN_REDIS = partial(endpoints.claimed, lease=SHORT, wait=10.0)


async def sent_again(run: Run) -> None:
    """The same payment, sent twice."""
    (w1,) = await run.start(1)
    await w1.ask()
    await w1.ask()


keys = paying(
    name="key-per-attempt",
    claim="A key recognises an attempt only if all attempts at an intent carry the same one.",
    arms=(
        expect_violated("no key", endpoints.no_key),
        expect_violated("a uuid made inside of the retry", partial(endpoints.in_one_transaction, keys="per attempt")),
        expect_held("a uuid made once per intent", endpoints.in_one_transaction),
        expect_held("idempotency_key of the intent", partial(endpoints.in_one_transaction, keys="of the intent")),
    ),
    script=sent_again,
)


def ended(actor: Actor) -> list[Signal]:
    return [actor.did("request"), actor.failed("request"), actor.broke("request"), actor.waiting("request")]


async def at_once(run: Run) -> None:
    """w2's attempt comes while w1's is under way."""
    w1, w2 = await run.start(2)
    w1.go(hold="before-effect")
    w1.order()
    await w1.reached("before-effect")
    w2.order()
    await run.until(*ended(w2))
    w1.release("before-effect")


race = paying(
    name="two-attempts-at-once",
    claim="Looking and marking have to be one step: between a look and an insert the other attempt looks, too.",
    arms=(
        expect_violated("GET, pay, SET", endpoints.mark_after),
        expect_violated("SELECT, pay, INSERT in a transaction", endpoints.select_then_insert),
        expect_held("Claims in Redis", endpoints.claimed),
        expect_held("idempotent_execute", endpoints.in_one_transaction),
    ),
    script=at_once,
)


async def commit_unheard(run: Run) -> None:
    """The payment commits, and the reply that says so is lost; the client tries again."""
    server = await run.testbed.servers.postgres()
    link = await run.cleanup.enter_async_context(TcpProxy(server.host, server.port))
    (w1,) = await run.start(1, dsn=[make_conninfo(run.urls["dsn"], host="127.0.0.1", port=link.port)])
    w1.go(hold="after-effect")
    w1.order()
    await w1.reached("after-effect")
    link.cut_reply(run.params["replies"])
    run.record("server", "the reply", "is cut")
    w1.release("after-effect")
    await w1.served()
    await w1.ask()


unheard = paying(
    name="lost-commit-reply",
    claim="Who did not hear of a commit can't know of it; the next attempt can, if the key was committed, too.",
    arms=(
        expect_violated("a transaction, no key", endpoints.without_key, params={"replies": 1}),
        expect_held("idempotent_execute", endpoints.in_one_transaction, params={"replies": 2}),
    ),
    script=commit_unheard,
)


async def killed(run: Run) -> None:
    """w1 is killed on its way; the client tries again, at w2."""
    point = run.arm.point or "after-effect"
    w1, w2 = await run.start(2)
    w1.go(kill=point)
    w1.order()
    await w1.reached(point)
    await w2.ask()


crash = paying(
    name="killed-in-between",
    claim="Between an effect and its mark there is a moment in which a process can die: unless both are one commit.",
    arms=(
        expect_violated("mark after the effect, killed in between", endpoints.mark_after, point="after-effect"),
        expect_violated("mark before the effect, killed in between", endpoints.mark_before, point="before-effect"),
        expect_violated("Claims, on_unknown='rerun', killed after the effect", IN_REDIS, point="after-effect"),
        expect_held("Claims, on_unknown='block'", partial(IN_REDIS, on_unknown="block"), point="after-effect"),
        expect_held(
            "idempotent_execute, killed before the effect", endpoints.in_one_transaction, point="before-effect"
        ),
        expect_held("idempotent_execute, killed after the effect", endpoints.in_one_transaction, point="after-effect"),
    ),
    script=killed,
)


async def declined_once(run: Run) -> None:
    """The card is declined; its owner sees to that, and tries again."""
    (w1,) = await run.start(1)
    await w1.ask(declined=True)
    run.record("healed", "the card")
    await w1.ask()


errors = paying(
    name="cached-error",
    claim="An error under the key is what the customer gets for a day, whatever has been mended since.",
    arms=(
        expect_violated("every answer kept", endpoints.every_answer_kept),
        expect_held("Claims in Redis", endpoints.claimed),
        expect_held("idempotent_execute", endpoints.in_one_transaction),
    ),
    script=declined_once,
    check=partial(answered, name="request"),
)


async def another_amount(run: Run) -> None:
    """The key of the first order comes again with the second one's amount."""
    (w1,) = await run.start(1)
    await w1.ask(key="k")
    await w1.ask(key="k", intent="order-2", amount=99)


async def another_user(run: Run) -> None:
    """Two users have chosen the same key."""
    (w1,) = await run.start(1)
    await w1.ask(key="k")
    await w1.ask(key="k", intent="order-2", user="bob")


payload = paying(
    name="other-payload",
    claim="A key that comes back with another request is a mistake, and no reason to answer the first one's.",
    arms=(
        expect_violated("the key alone", partial(endpoints.mark_after, checked=False)),
        expect_held("Claims in Redis", endpoints.claimed),
        expect_held("idempotent_execute", endpoints.in_one_transaction),
    ),
    script=another_amount,
    check=right_answers,
)

leak = paying(
    name="other-user",
    claim="Keys are made by clients, and two make the same: without a scope one is given the other's answer.",
    arms=(
        expect_violated("no scope", partial(endpoints.mark_after, scoped=False)),
        expect_held("Claims in Redis, per user", endpoints.claimed),
        expect_held("idempotent_execute, scope=user", endpoints.in_one_transaction),
    ),
    script=another_user,
    check=right_answers,
)


async def owner_dies(run: Run) -> None:
    """w1 dies with the claim in its hand; the client tries again, at w2."""
    w1, w2 = await run.start(2)
    w1.go(kill="before-effect")
    w1.order()
    await w1.reached("before-effect")
    w2.order()
    if await run.until(w2.did("request"), w2.waiting("request")) == w2.waiting("request"):
        w2.kill()


stuck = paying(
    name="claim-without-lease",
    claim="A claim has to end with its owner: one without a lease outlives it, and the customer waits for ever.",
    arms=(
        expect_violated("SET NX", endpoints.set_nx),
        expect_held("Claims in Redis", IN_REDIS),
        expect_held("idempotent_execute", endpoints.in_one_transaction),
    ),
    script=owner_dies,
    check=partial(answered, name="request"),
    patience=4 * SHORT,
)


async def owner_wakes_up(run: Run) -> None:
    """w1 stands still past its lease; w2 pays, and then w1 goes on; the client asks once more."""
    w1, w2 = await run.start(2)
    w1.go(stop="before-effect")
    w1.order()
    await w1.reached("before-effect")
    await w2.ask()
    w1.resume()
    await w1.served()
    await w2.ask()


stale = paying(
    name="stale-owner",
    claim="An owner that was overtaken must not write over the answer that was given since.",
    arms=(
        expect_violated("SET NX PX, then SET", partial(endpoints.set_nx, lease_ms=int(1000 * SHORT))),
        expect_held("Claims in Redis", IN_REDIS),
    ),
    script=owner_wakes_up,
    check=one_answer,
)


async def with_own_redis(run: Run) -> None:
    await with_ledger(run)
    run.nodes = [await own_redis(run, "node1")]
    run.urls["redis"] = run.nodes[0].url


async def redis_forgets(run: Run) -> None:
    """The message comes again after Redis was restarted, empty."""
    (w1,) = await run.start(1)
    await w1.ask()
    await run.nodes[0].restart()
    run.record("restarted", "redis", "empty")
    await w1.ask()


forgotten = paying(
    name="redis-only-dedup",
    claim="What only Redis remembers is gone with a restart or an eviction; the mark belongs to the effect's commit.",
    arms=(
        expect_violated("EXISTS, pay, SET in Redis", endpoints.one_layer),
        expect_held("Dedup, two layers", endpoints.two_layers),
    ),
    script=redis_forgets,
    prepare=with_own_redis,
)


async def consumer_dies(run: Run) -> None:
    """w1 is killed while it handles the message; w2 takes over what it left."""
    producer, w1, w2 = await run.start(3)
    await producer.ask(publish="order-1")
    w1.go(kill=run.arm.point)
    w1.order()
    await w1.reached(run.arm.point)
    w2.order()
    await run.until(w2.did("ack"), w2.waiting("consume"))
    w2.kill()


consumers = paying(
    name="consumer-killed",
    claim="A broker delivers at least once or at most once. Exactly one effect is made by the consumer's database.",
    arms=(
        expect_violated("acknowledged first, killed before the effect", endpoints.ack_first, point="before-effect"),
        expect_violated("acknowledged last, killed before that", endpoints.ack_last, point="before-ack"),
        *(
            expect_held(f"Dedup, killed {point.replace('-', ' ')}", endpoints.deduplicated, point=point)
            for point in ("before-effect", "after-effect", "before-ack")
        ),
    ),
    workload=consume,
    script=consumer_dies,
    check=each_message_once,
    patience=1.0,
)


async def much_later(run: Run) -> None:
    """The retry comes when the key has expired, or should have."""
    (w1,) = await run.start(1)
    await w1.ask()
    await past_the_ttl(run)
    await w1.ask()


async def past_the_ttl(run: Run) -> None:
    """By the database's clock, which decides."""
    async with await psycopg.AsyncConnection.connect(run.urls["dsn"]) as conn:
        await conn.execute("SELECT pg_sleep(0.06)")
    run.record("server", "60 ms", "later")


expiry = paying(
    name="expired-before-the-retry",
    claim="A key protects for as long as it is kept: longer than anybody retries.",
    arms=(
        expect_violated("kept for 50 ms", partial(endpoints.in_one_transaction, ttl=0.05)),
        expect_held("kept for a day", endpoints.in_one_transaction),
    ),
    script=much_later,
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
    await run.until(*ended(w3))
    w2.release("before-effect")


cleanup = paying(
    name="cleanup-under-load",
    claim="A cleanup that waits for one writer makes others wait behind it; one that skips what is locked does not.",
    arms=(
        expect_violated("one DELETE", endpoints.Cleaning),
        expect_held("delete_expired", partial(endpoints.Cleaning, at_once=False)),
    ),
    script=cleaned_up,
    check=never_held_up,
    alone=True,  # the arms share a table, and one would clean up for the other
)

EXPERIMENTS = (
    keys,
    race,
    unheard,
    crash,
    errors,
    payload,
    leak,
    stuck,
    stale,
    forgotten,
    consumers,
    expiry,
    cleanup,
)
