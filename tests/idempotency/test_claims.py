"""Claims: one attempt at a time, a lease with a heartbeat, and a number that a stale owner can't get past."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from secrets import token_hex
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from distsys._support import cancellation as tasks
from distsys.errors import (
    AnswerNotKept,
    BadKey,
    Indeterminate,
    KeyInProgress,
    KeyReused,
    OutcomeUnknown,
    StoreUnavailable,
)
from distsys.idempotency import redis_store
from distsys.idempotency.claims import DAY, NOT_KEPT, Claim, Claims, Found, Store
from distsys.idempotency.database import PostgresStore, claim
from distsys.idempotency.keys import fingerprint_of
from distsys.idempotency.redis_store import RedisStore
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server
from distsys.schema import ensure_schema
from tests.bugs import edited, in_script, kills

MINE, OTHER = b"m" * 32, b"o" * 32


@pytest.fixture(params=["redis", "redis, decoding", "postgres"])
async def store(
    request: pytest.FixtureRequest, redis: Redis, redis_server: Server, pg_pool: AsyncConnectionPool
) -> AsyncIterator[Store]:
    if request.param == "postgres":
        await ensure_schema(pg_pool)
        yield PostgresStore(pg_pool)
        return
    async with Redis.from_url(redis_server.url, decode_responses="decoding" in request.param) as client:
        yield RedisStore(client)


async def fallen_silent(store: Store, key: str = "k") -> int:
    """Make a claim whose owner fell silent; return its owner number."""
    found = await store.claim(key, MINE, lease=0.001, ttl=60)
    assert found.state == "claimed"
    while (await store.claim(key, MINE, lease=60, ttl=60)).state == "running":  # until the server's clock is past it
        pass
    return found.owner


async def no_effect() -> None:
    pass


async def settled() -> None:
    """Wait until the background work of cancelled attempts has ended."""
    await asyncio.gather(*tasks._background, return_exceptions=True)


class Steps:
    """A coroutine whose task is cancelled at its n-th await."""

    def __init__(self, point: int, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.point, self.coroutine, self.reached = point, coroutine, False

    def __await__(self) -> Generator[Any, Any, None]:
        resume: Callable[[], Any] = partial(self.coroutine.send, None)
        for number in itertools.count():
            try:
                waits_for = resume()
            except StopIteration:
                return
            if number == self.point:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield waits_for
                resume = partial(self.coroutine.send, None)
            except BaseException as error:  # noqa: BLE001  it is the coroutine's
                resume = partial(self.coroutine.throw, error)

    async def run(self) -> None:
        await self


async def cancelled_at(point: int, coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Run the coroutine, cancel it at its n-th await, and return whether it got there."""
    steps = Steps(point, coroutine)
    task = asyncio.create_task(steps.run())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return steps.reached


async def test_the_first_attempt_claims_and_later_ones_get_its_answer(store: Store) -> None:
    claims, answer = Claims(store), bytes(range(256))
    async with await claims.begin("k", MINE) as claim:
        assert claim.answer is None
        await claim.done(answer)
    assert [(await claims.begin("k", MINE)).answer for _ in range(2)] == [answer, answer]


async def test_run_carries_out_once_and_answers_json(store: Store) -> None:
    ran: list[int] = []

    async def charge() -> dict[str, Any]:
        ran.append(1)
        return {"id": 1, "note": "ünïcødé"}

    claims = Claims(store)
    assert [await claims.run("k", charge, request={"amount": 1}) for _ in range(3)] == [
        {"id": 1, "note": "ünïcødé"}
    ] * 3
    assert ran == [1]
    with pytest.raises(KeyReused, match="another request"):
        await claims.run("k", charge, request={"amount": 2})


async def test_of_six_at_once_one_carries_out_and_the_others_wait_for_it(store: Store) -> None:
    ran: list[int] = []

    async def charge() -> int:
        ran.append(1)
        await asyncio.sleep(0)
        return 7

    claims = Claims(store, wait=30)
    assert await asyncio.gather(*(claims.run("k", charge) for _ in range(6))) == [7] * 6
    assert ran == [1]


async def test_while_it_runs_another_attempt_is_told_so(store: Store) -> None:
    claims = Claims(store, lease=20)
    async with await claims.begin("k", MINE) as claim:
        with pytest.raises(KeyInProgress, match="running") as refused:
            await claims.begin("k", MINE)
        assert 0 < refused.value.retry_after <= 1
        with pytest.raises(KeyReused):
            await claims.begin("k", OTHER)
        await claim.done(b"1")


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_an_attempt_that_fails_or_is_cancelled_frees_the_key(store: Store, error: type[BaseException]) -> None:
    claims = Claims(store)
    with pytest.raises(error):
        async with await claims.begin("k", MINE):
            raise error
    assert (await claims.begin("k", OTHER)).answer is None


@kills("what may have happened is free", edited(Claim, "give_up", " or self.effect_began", ""), error=RuntimeError)
@pytest.mark.parametrize("error", [RuntimeError, Indeterminate])
async def test_where_the_effect_may_have_happened_the_outcome_is_unknown(store: Store, error: type[Exception]) -> None:
    claims = Claims(store)
    with pytest.raises(error):
        async with await claims.begin("k", MINE) as claim:
            claim.effect_began = error is RuntimeError
            raise error
    with pytest.raises(OutcomeUnknown, match="may have done it"):
        await claims.begin("k", MINE)


@kills("every attempt takes over", in_script(redis_store.CLAIM_OR_WAIT, "or owner ~= ARGV[3]", ""))
async def test_an_owner_that_fell_silent_leaves_it_to_the_policy(store: Store) -> None:
    await fallen_silent(store)
    with pytest.raises(OutcomeUnknown):
        await Claims(store).begin("k", MINE)
    with pytest.raises(KeyReused):
        await Claims(store, on_unknown="rerun").begin("k", OTHER)
    async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
        assert claim.answer is None
        await claim.done(b"again")
    assert (await Claims(store).begin("k", MINE)).answer == b"again"


@pytest.mark.parametrize("found_out", [b"it was done", None])
async def test_a_policy_can_find_out_what_happened(store: Store, found_out: bytes | None) -> None:
    asked: list[str] = []

    async def reconcile(key: str) -> bytes | None:
        asked.append(key)
        return found_out

    await fallen_silent(store)
    claims = Claims(store, on_unknown=reconcile)
    async with await claims.begin("k", MINE) as claim:
        assert claim.answer == found_out
        await claim.done(b"done now")
    assert (await claims.begin("k", MINE)).answer == (found_out or b"done now")
    assert asked == ["k"]


@pytest.mark.parametrize("found_out", [b' {"paid": 1}', b'\r\n{"paid": 1}\n', b'{"paid": 1} {"paid": 2}'])
async def test_what_a_policy_found_out_is_read_as_any_json(store: Store, found_out: bytes) -> None:
    """White space around it does not matter; two JSON values in a row are an error."""

    async def reconcile(key: str) -> bytes:
        return found_out

    found = await store.claim("k", fingerprint_of(None), lease=60, ttl=60)
    await store.end("k", found.owner, "unknown", b"", 60)
    claims = Claims(store, on_unknown=reconcile)
    if b"2" in found_out:
        with pytest.raises(ValueError, match="Extra data"):
            await claims.run("k", no_effect)
    else:
        assert await claims.run("k", no_effect) == {"paid": 1}


@kills(
    "a stale owner ends what is another's", in_script(redis_store.END, "string.sub(record, 3, 18) ~= ARGV[1]", "false")
)
@kills(
    "what is done can be freed",
    in_script(redis_store.END, "if string.sub(record, 1, 1) == 'd' then return ARGV[2] == 'd' and 1 or 0 end", ""),
)
async def test_a_stale_owner_can_end_nothing(store: Store) -> None:
    stale = await fallen_silent(store)
    async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
        assert await claim.fence() > 0 == await store.fence("k", stale)
        for state in ("done", "unknown", "free"):
            assert not await store.end("k", stale, state, b"stale", 60)
        assert not await store.extend("k", stale, 60)
        await claim.done(b"new")
    assert not await store.end("k", claim.owner, "free", b"", 60), "what is done stays done"
    assert (await Claims(store).begin("k", MINE)).answer == b"new"


@kills(
    "numbers begin anew with the record",
    in_script(redis_store.END, "number = time[1] * 1000000 + time[2]", "number = 1"),
)
async def test_numbers_grow_also_where_the_record_in_between_was_deleted(store: Store) -> None:
    numbers, owners = list[int](), list[int]()
    for _ in range(3):
        async with await Claims(store).begin("k", MINE) as claim:
            numbers.append(await claim.fence())
            owners.append(claim.owner)
            assert await claim.fence() == numbers[-1]
    assert numbers == sorted(set(numbers))
    assert not await store.end("k", owners[0], "done", b"", 60)


@kills(
    "a number is the time, whatever it was before",
    in_script(
        redis_store.CLAIM_OR_WAIT,
        "math.max(time[1] * 1000000 + time[2], string.sub(record, 19, 34) + 1)",
        "time[1] * 1000000 + time[2]",
    ),
)
async def test_a_number_grows_also_where_the_clock_of_redis_was_set_back(redis: Redis) -> None:
    """The number before was drawn at a time that is now in the future."""
    store, future = RedisStore(redis), 2**52
    silent = await fallen_silent(store)
    await redis.setrange(store._keys("k")[0], 18, f"{future:016d}")
    taken = await store.claim("k", MINE, lease=60, ttl=60, takeover_from=silent)
    assert await store.fence("k", taken.owner) == future + 1


@kills(
    "a stale owner draws a number",
    in_script(
        redis_store.END,
        "if not record or string.sub(record, 3, 18) ~= ARGV[1] then return 0 end",
        "if not record or ARGV[2] ~= 'n' and string.sub(record, 3, 18) ~= ARGV[1] then return 0 end",
    ),
)
async def test_an_overtaken_attempt_learns_that_its_outcome_is_not_recorded(store: Store) -> None:
    async with await Claims(store, lease=60).begin("k", MINE) as late:
        number = await late.fence()
        await store.extend("k", late.owner, 0.001)
        while (await store.claim("k", MINE, lease=60, ttl=60)).state == "running":
            pass
        async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
            assert await claim.fence() > number
            with pytest.raises(OutcomeUnknown, match="took over"):
                await late.fence()
            with pytest.raises(OutcomeUnknown, match="took over"):
                await late.done(b"late")
            await claim.done(b"first")
    assert (await Claims(store).begin("k", MINE)).answer == b"first"


@kills(
    "a heartbeat forgets that the record outlives the lease",
    in_script(redis_store.END, "ARGV[4] + string.sub(record, 99, 111)", "ARGV[4]"),
)
@kills("no heartbeat", edited(Claims, "_send_heartbeats", "enumerate(claims)", "enumerate(())"))
async def test_the_heartbeat_keeps_a_claim_longer_than_its_lease(store: Store) -> None:
    extended = asyncio.Event()
    extend, beats = store.extend, 0

    async def counted(key: str, owner: int, lease: float) -> bool:
        nonlocal beats
        answer = await extend(key, owner, lease)
        beats += 1
        if beats == 4:
            extended.set()
        return answer

    store.extend = counted  # type: ignore[method-assign]
    async with await Claims(store, lease=0.3).begin("k", MINE) as claim:
        await extended.wait()
        assert (await store.claim("k", MINE, lease=1, ttl=60)).state == "running"
        await claim.done(b"1")
    assert not claim.lost


async def test_an_answer_that_was_not_kept_is_no_free_key(store: Store) -> None:
    async with await Claims(store).begin("k", MINE) as claim:
        await claim.done(NOT_KEPT)
    with pytest.raises(AnswerNotKept):
        await Claims(store).begin("k", MINE)


async def test_an_answer_is_kept_for_its_ttl(store: Store) -> None:
    async with await Claims(store, ttl=0.001).begin("k", MINE) as claim:
        await claim.done(b"short")
    while (await store.claim("k", OTHER, lease=60, ttl=60)).state == "done":
        pass
    assert (await store.claim("k", OTHER, lease=60, ttl=60)).state == "running", "the look above claimed it"


async def test_an_answer_is_kept_although_storing_it_was_cancelled(store: Store) -> None:
    claim = await Claims(store).begin("k", MINE)
    writing = asyncio.create_task(claim.done(b"kept"))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert (await Claims(store, wait=30).begin("k", MINE)).answer == b"kept"


# ---- cancelled attempts, lost replies, takeovers


async def test_cancelled_at_any_await_an_attempt_leaves_no_claim_behind(store: Store) -> None:
    """The key is done or free, never running; it is unknown only if the effect may have happened."""
    claims = Claims(store, lease=60)

    async def attempt(key: str, began: list[int]) -> None:
        async with await claims.begin(key, MINE) as claim:
            await asyncio.sleep(0)
            began.append(1)
            claim.effect_began = True
            for _ in range(10):  # the await's number is not the same in each run: replies come sooner or later
                await asyncio.sleep(0)
            await claim.done(b"answer")

    seen = set()
    for point in range(1_000):
        began: list[int] = []
        reached = await cancelled_at(point, attempt(f"k{point}", began))
        await settled()
        found = await store.claim(f"k{point}", MINE, lease=60, ttl=60)
        assert found.state in (("done", "unknown") if began else ("claimed",)), f"cancelled at await {point}"
        seen.add(found.state)
        if not reached:
            break
    assert seen == {"claimed", "unknown", "done"}


async def test_a_waiter_cancelled_at_any_await_returns_its_connection_as_it_was(
    pg: str, pg_pool: AsyncConnectionPool
) -> None:
    await ensure_schema(pg_pool)
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False) as pool:
        store = PostgresStore(pool)
        found = await store.claim("k", MINE, lease=60, ttl=60)
        for point in range(1_000):
            reached = await cancelled_at(point, store.wait("k", found.owner, 0.01))
            async with pool.connection() as conn:
                assert not conn.autocommit, f"cancelled at await {point}"
            if not reached:
                break
        assert point > 2


@kills(
    "a cancelled attempt keeps its claim",
    edited(RedisStore, "claim", "except BaseException as error:", "except Exception as error:"),
)
@kills(
    "taken over, cancelled and free",
    edited(RedisStore, "claim", '"unknown" if takeover_from else "free"', '"free"'),
    takes_over=True,
)
@pytest.mark.parametrize("takes_over", [False, True])
async def test_cancelled_when_its_claim_is_made_an_attempt_gives_it_back(redis: Redis, takes_over: bool) -> None:
    """It is cancelled when the reply of Redis has arrived; then the key is free, or unknown as before."""
    store, execute, cancelled = RedisStore(redis), redis.execute_command, False
    if takes_over:
        await fallen_silent(store)

    async def cancelled_once_claimed(*args: Any, **options: Any) -> Any:
        nonlocal cancelled
        reply = await execute(*args, **options)
        if reply == (1 if takes_over else None) and not cancelled:
            cancelled, task = True, asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)  # where the cancellation strikes
        return reply

    redis.execute_command = cancelled_once_claimed  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(Claims(store, on_unknown="rerun").begin("k", MINE))
    await settled()
    found = await store.claim("k", MINE, lease=60, ttl=60)
    assert (cancelled, found.state) == (True, "unknown" if takes_over else "claimed")


async def test_cancelled_while_it_takes_over_an_attempt_leaves_the_outcome_unknown(store: Store) -> None:
    for point in range(1_000):
        await fallen_silent(store, f"k{point}")
        reached = await cancelled_at(point, Claims(store, on_unknown="rerun").begin(f"k{point}", MINE))
        await settled()
        if not reached:
            break
        assert (await store.claim(f"k{point}", MINE, lease=60, ttl=60)).state == "unknown"
    assert point > 0


@kills(
    "held up by a claim of its own",
    in_script(redis_store.CLAIM_OR_WAIT, "state == 'r' and owner == string.sub(ARGV[1], 3, 18)", "false"),
    lost="a reply",
)
@pytest.mark.parametrize("lost", ["a reply", "every reply"])
async def test_whichever_reply_of_redis_is_lost_there_is_one_effect(
    redis: Redis, redis_server: Server, lost: str
) -> None:
    """The client asks again: it is not blocked by its own claim, and does not learn of a takeover that never was."""
    for number in range(1, 4):
        ran: list[int] = []

        async def charge(ran: list[int] = ran) -> int:
            ran.append(1)
            return 7

        async with TcpProxy(redis_server.host, redis_server.port) as link:
            retry = Retry(NoBackoff(), 1 if lost == "a reply" else 0)
            async with Redis.from_url(link.through(redis_server.url), retry=retry) as client:
                claims, key = Claims(RedisStore(client)), f"{lost} {number}"
                await claims.run(f"scripts are loaded {key}", no_effect)
                link.cut_reply(number)
                if lost == "a reply":
                    assert await claims.run(key, charge) == 7
                else:
                    with suppress(exceptions.ConnectionError):
                        await claims.run(key, charge)
                await settled()
                found = await RedisStore(redis).claim(key, fingerprint_of(None), lease=60, ttl=60)
        assert found.state == ("done" if ran else "claimed")
        assert len(ran) <= 1


@kills(
    "a claim is lost with the reply to its COMMIT",
    edited(PostgresStore, "claim", "conn, conn.transaction():", "conn:"),
    autocommit=True,
)
@kills(
    "a claim whose COMMIT failed is kept",
    edited(PostgresStore, "claim", "await asyncio.wait([asking])", "await asking"),
    autocommit=False,
)
@pytest.mark.parametrize("autocommit", [False, True])
async def test_whichever_reply_of_postgresql_is_lost_there_is_one_effect(
    pg: str, postgres: Server, autocommit: bool
) -> None:
    """The reply to the COMMIT of a claim counts too: a claim that nobody knows of would block the key."""
    async with await psycopg.AsyncConnection.connect(pg) as conn:
        await ensure_schema(conn)
    reached = 0
    for number in range(1, 100):
        ran: list[int] = []

        async def charge(ran: list[int] = ran) -> int:
            ran.append(1)
            return 7

        async with TcpProxy(postgres.host, postgres.port) as link:
            url, how = make_conninfo(pg, port=link.port), {"autocommit": autocommit}
            async with AsyncConnectionPool(url, min_size=1, max_size=1, open=False, kwargs=how) as pool:
                await pool.wait()
                link.cut_reply(number)
                with suppress(psycopg.OperationalError):
                    assert await Claims(PostgresStore(pool)).run(f"lost {number}", charge) == 7
                    reached = number
                await settled()
            async with await psycopg.AsyncConnection.connect(pg) as conn:
                found = await claim(conn, "", "", f"lost {number}", fingerprint_of(None), lease=60, ttl=60)
        assert found.state in (("done", "unknown", "running") if ran else ("claimed",))
        if reached:
            break
    assert reached > 4


@kills(
    "a claim that nobody can extend is not lost", edited(Claim, "lost", "time.monotonic() > self._lease_end", "False")
)
async def test_heartbeats_that_fail_are_tried_again_and_meanwhile_the_claim_counts_as_lost(
    redis: Redis, redis_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with TcpProxy(redis_server.host, redis_server.port) as link:
        async with Redis.from_url(link.through(redis_server.url), retry=Retry(NoBackoff(), 0)) as client:
            async with await Claims(RedisStore(client), lease=0.3).begin("k", MINE) as claim:
                link.drop()
                while (await RedisStore(redis).claim("k", MINE, lease=60, ttl=60)).state == "running":
                    pass
                while not claim.lost:
                    await asyncio.sleep(0)
                link.heal()
                while claim.lost:
                    await asyncio.sleep(0)
                assert (await RedisStore(redis).claim("k", MINE, lease=60, ttl=60)).state == "running"
                await claim.done(b"1")
    assert "the heartbeat of 'k' failed" in caplog.text
    assert (await Claims(RedisStore(redis)).begin("k", MINE)).answer == b"1"


async def test_more_claims_than_the_client_has_connections_are_all_kept_alive(
    redis: Redis, redis_server: Server
) -> None:
    """The pool refuses heartbeats while all connections are taken: it must not refuse the same claims each time."""
    beats: Counter[str] = Counter()
    fourth = asyncio.Event()

    class Counting(RedisStore):
        async def extend(self, key: str, owner: int, lease: float) -> bool:
            extended = await super().extend(key, owner, lease)
            beats[key] += extended
            if beats[key] == 4:
                fourth.set()
            return extended

    async with Redis.from_url(redis_server.url, max_connections=2) as client:
        claims = Claims(RedisStore(redis), lease=1.2)
        begun = [await claims.begin(f"one of many {number}", MINE) for number in range(20)]
        claims.store = Counting(client)
        await fourth.wait()
        claims.store = RedisStore(redis)
        assert len(beats) == len(begun)
        for claim in begun:
            await claim.done(b"1")


async def test_a_heartbeat_that_comes_late_makes_no_unknown_outcome_a_running_attempt(store: Store) -> None:
    """The heartbeat was sent before its claim ended. There is no fencing number any more, either."""
    claim = await Claims(store, lease=60).begin("k", MINE)
    async with claim:
        claim.effect_began = True
    assert not await store.extend("k", claim.owner, 60)
    assert not await store.fence("k", claim.owner)
    assert (await store.claim("k", MINE, lease=60, ttl=60)).state == "unknown"


async def test_an_overtaken_owner_learns_it_by_its_heartbeat_and_ends_nothing(store: Store) -> None:
    async with await Claims(store, lease=0.3).begin("k", MINE) as stale:
        while True:  # between two heartbeats, as after a long pause of the process
            await store.extend("k", stale.owner, 0.001)
            found = await store.claim("k", MINE, lease=60, ttl=60, takeover_from=stale.owner)
            if found.state == "claimed":
                break
        while not stale.lost:
            await store.claim("k", MINE, lease=60, ttl=60)
        with pytest.raises(OutcomeUnknown):
            await stale.done(b"stale")
        await stale.done(b"said twice")
    assert await store.end("k", found.owner, "done", b"new", 60)
    assert (await Claims(store).begin("k", MINE)).answer == b"new"


async def test_of_many_takeovers_of_an_unknown_outcome_one_succeeds(store: Store) -> None:
    await fallen_silent(store)
    claims = Claims(store, on_unknown="rerun")
    taken = await asyncio.gather(*(claims.begin("k", MINE) for _ in range(5)), return_exceptions=True)
    (claim,) = [each for each in taken if not isinstance(each, BaseException)]
    assert all(isinstance(each, KeyInProgress) for each in taken if each is not claim)
    async with claim:
        await claim.done(b"once")


async def test_waiters_in_postgresql_leave_the_owner_a_connection(pg: str) -> None:
    """The pool has one connection, which three waiters use: the owner still extends its lease and keeps its answer."""
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, open=False, timeout=10) as pool:
        await ensure_schema(pool)
        store = PostgresStore(pool)
        async with await Claims(store, lease=60).begin("k", MINE) as claim:
            waiting = [asyncio.create_task(Claims(store, wait=60).begin("k", MINE)) for _ in range(3)]
            while pool.get_stats().get("requests_waiting", 0) < 2:
                await asyncio.sleep(0)
            assert await store.extend("k", claim.owner, 60)
            await claim.done(b"1")
        assert [(await each).answer for each in waiting] == [b"1"] * 3


async def test_done_twice_keeps_the_first_answer(store: Store) -> None:
    async with await Claims(store).begin("k", MINE) as claim:
        await claim.done(b"first")
        await claim.done(b"second")
        assert await store.end("k", claim.owner, "done", b"third", 60), "a retry after a lost reply"
    assert (await Claims(store).begin("k", MINE)).answer == b"first"


@kills(
    "an error of the bank is one of Redis",
    edited(Claims, "_owner_to_take_over", "except Exception as error", "except ValueError as error"),
)
async def test_a_policy_that_cannot_find_out_leaves_the_outcome_unknown(store: Store) -> None:
    """This holds even if its error looks like one of the store, and on_failure is "open"."""

    async def ask_the_bank(key: str) -> bytes:
        raise ConnectionError("the bank")

    number = await fallen_silent(store)
    with pytest.raises(OutcomeUnknown, match="not known yet") as refused:
        await Claims(store, on_unknown=ask_the_bank, on_failure="open").begin("k", MINE)
    assert isinstance(refused.value.__cause__, ConnectionError)
    assert "bank" not in str(refused.value)
    found = await store.claim("k", MINE, lease=60, ttl=60)
    assert (found.state, found.owner) == ("unknown", number)


async def test_while_a_policy_finds_out_another_attempt_may_take_over(store: Store) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(key: str) -> bytes:
        began.set()
        await go_on.wait()
        return b"found out too late"

    await fallen_silent(store)
    slow = asyncio.create_task(Claims(store, on_unknown=slowly).begin("k", MINE))
    await began.wait()
    async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
        await claim.done(b"done meanwhile")
    go_on.set()
    assert (await slow).answer == b"done meanwhile"


@kills("what was done but is no JSON is free", edited(Claims, "run", "claim.effect_began = True", "pass"))
async def test_what_answers_no_json_may_have_happened_all_the_same(store: Store) -> None:
    async def charge() -> object:
        return object()

    with pytest.raises(TypeError, match="kept as JSON"):
        await Claims(store).run("k", charge)
    with pytest.raises(OutcomeUnknown):
        await Claims(store).run("k", charge)


async def test_an_answer_that_cannot_be_encrypted_was_an_effect_all_the_same(store: Store) -> None:
    def without_a_key(_: bytes) -> bytes:
        raise ValueError("no key")

    with pytest.raises(ValueError, match="no key"):
        async with await Claims(store, encrypt=without_a_key).begin("k", MINE) as claim:
            await claim.done(b"secret")
    with pytest.raises(OutcomeUnknown):
        await Claims(store).begin("k", MINE)


async def test_answers_are_kept_encrypted_those_found_out_later_too(store: Store) -> None:
    async def reconcile(key: str) -> bytes:
        return b"found"

    options: dict[str, Any] = {"encrypt": lambda data: data[::-1], "decrypt": lambda data: data[::-1]}
    claims = Claims(store, on_unknown=reconcile, **options)
    async with await claims.begin("done", MINE) as claim:
        await claim.done(b"secret")
    await fallen_silent(store, "unknown")
    for key, answer in {"done": b"secret", "unknown": b"found"}.items():
        assert [(await claims.begin(key, MINE)).answer for _ in range(2)] == [answer] * 2
        assert (await store.claim(key, MINE, lease=60, ttl=60)).answer == answer[::-1]
    async with await claims.begin("too long", MINE) as claim:
        await claim.done(NOT_KEPT)
    with pytest.raises(AnswerNotKept):
        await claims.begin("too long", MINE)


def test_a_loop_that_ends_with_open_claims_leaves_them_to_their_lease(redis_server: Server) -> None:
    """It looks like a process that died: no error, no warning, and the claim is not freed."""

    async def ends_early(url: str, owner: list[int]) -> None:
        claim = await Claims(RedisStore(Redis.from_url(url)), lease=0.3).begin("closing", MINE)
        owner.append(claim.owner)

    async def look(url: str) -> Found:
        async with Redis.from_url(url) as redis:
            while (found := await RedisStore(redis).claim("closing", MINE, lease=60, ttl=60)).state == "running":
                pass
            return found

    def both(url: str) -> tuple[list[int], Found]:
        owner: list[int] = []
        asyncio.run(ends_early(url, owner))
        return owner, asyncio.run(look(url))

    with ThreadPoolExecutor() as pool:  # a thread of its own, for this one may have a loop
        owner, found = pool.submit(both, redis_server.url).result()
    assert (found.state, [found.owner]) == ("unknown", owner)


def test_loops_in_several_threads_share_a_key(redis_server: Server) -> None:
    ran: list[int] = []

    async def charge() -> int:
        ran.append(1)
        await asyncio.sleep(0)
        return 7

    async def one(url: str) -> Any:
        async with Redis.from_url(url) as redis:
            return await Claims(RedisStore(redis), wait=30).run("threads", charge)

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(asyncio.run, one(redis_server.url)) for _ in range(4)]
        assert [each.result() for each in results] == [7] * 4
    assert ran == [1]


# ---- names and bounds

NAMES = ["a", "{", "}", "{}", "a}b", "%7B", "größe 🦆", "a\0b", "a:ended", " ", "k" * 255, "*", "a\r\nDEL b"]


async def test_any_text_is_a_key_and_no_two_share_a_claim(store: Store) -> None:
    no_nul = not isinstance(store, RedisStore)  # PostgreSQL's text does not have it
    names = [name for name in NAMES if not (no_nul and "\0" in name)]
    for name in names:
        async with await Claims(store).begin(name, MINE) as claim:
            await claim.done(name.encode())
    assert [(await Claims(store).begin(name, MINE)).answer for name in names] == [name.encode() for name in names]
    with pytest.raises(BadKey, match="empty"):
        await Claims(store).begin("", MINE)


@pytest.mark.parametrize("fingerprint", [b"", b"short", b"l" * 33])
async def test_a_fingerprint_of_another_length_claims_nothing(store: Store, fingerprint: bytes) -> None:
    """Redis keeps the fingerprint in a fixed place of the record."""
    with pytest.raises(ValueError, match="32 bytes"):
        await Claims(store).begin("k", fingerprint)
    assert (await store.claim("k", MINE, lease=60, ttl=60)).state == "claimed"


async def test_stores_with_other_names_keep_other_claims(redis: Redis) -> None:
    for name in ("", "a", "a:{b}", "a:b"):
        async with await Claims(RedisStore(redis, name=name)).begin("k", MINE) as claim:
            assert claim.answer is None
            await claim.done(name.encode())


async def test_a_cluster_keeps_claims_and_wakes_waiters(redis_cluster: RedisCluster) -> None:
    claims = Claims(RedisStore(redis_cluster, name=token_hex(8)), wait=30)
    for name in NAMES:
        ran: list[int] = []

        async def charge(ran: list[int] = ran) -> int:
            ran.append(1)
            await asyncio.sleep(0)
            return 7

        assert await asyncio.gather(*(claims.run(name, charge) for _ in range(3))) == [7] * 3
        assert ran == [1]


async def test_a_year_is_as_good_as_a_second(store: Store) -> None:
    year = 366 * DAY
    async with await Claims(store, ttl=year, lease=year).begin("k", MINE) as claim:
        found = await store.claim("k", MINE, lease=60, ttl=60)
        assert found.state == "running"
        assert year - 3600 < found.lease_left <= year
        await claim.done(b"1")
    assert (await Claims(store).begin("k", MINE)).answer == b"1"
    with pytest.raises(ValueError, match="to a year"):
        Claims(store, ttl=year + 1)


async def test_a_record_outlives_its_ttl_while_its_owner_sends_heartbeats(store: Store) -> None:
    async with await Claims(store, ttl=0.001, lease=60).begin("k", MINE) as claim:
        for _ in range(20):
            assert await store.extend("k", claim.owner, 60)
            assert (await store.claim("k", MINE, lease=60, ttl=60)).state == "running"


@kills(
    "no time to live",
    in_script(
        redis_store.CLAIM_OR_WAIT,
        "redis.call('SET', KEYS[1], record, 'PX', ARGV[2])",
        "redis.call('SET', KEYS[1], record)",
    ),
)
async def test_every_record_in_redis_has_a_time_to_live(redis: Redis) -> None:
    store = RedisStore(redis)
    claims = Claims(store, ttl=1_000, lease=10, wait=30)
    async with await claims.begin("k", MINE) as claim:
        record, ended = store._keys("k", claim.owner)
        waiting = asyncio.create_task(claims.begin("k", MINE))
        while (await redis.getrange(record, 1, 1)) != b"1":
            pass
        assert await redis.ttl(record) == pytest.approx(1_010, abs=60)
        await claim.done(b"1")
    assert (await waiting).answer == b"1"
    assert set(await redis.keys()) == {record.encode(), ended.encode()}
    assert await redis.ttl(record) == pytest.approx(1_000, abs=60)
    assert await redis.ttl(ended) == pytest.approx(60, abs=59)
    taken_over = await store.claim("o", MINE, lease=10, ttl=1_000, takeover_from=await fallen_silent(store, "o"))
    assert taken_over.state == "claimed"
    assert await redis.ttl(store._keys("o")[0]) == pytest.approx(1_010, abs=60)


async def test_a_waiter_is_not_interrupted_by_its_socket_timeout(redis: Redis, redis_server: Server) -> None:
    """Each single wait ends before the timeout; otherwise it would look like a Redis that is down."""
    async with Redis.from_url(redis_server.url, socket_timeout=0.4, retry=Retry(NoBackoff(), 0)) as client:
        async with await Claims(RedisStore(redis), lease=60).begin("k", MINE) as claim:
            with pytest.raises(KeyInProgress):
                await Claims(RedisStore(client), wait=1).begin("k", MINE)
            await claim.done(b"1")


@kills(
    "unprotected beside one that runs",
    edited(Claims, "begin", 'self.on_failure == "closed" or found', 'self.on_failure == "closed"'),
)
async def test_what_is_known_to_run_is_not_carried_out_unprotected(redis: Redis, redis_server: Server) -> None:
    """A waiter with on_failure="open" loses Redis while another attempt runs."""
    ran: list[int] = []

    async def charge() -> None:
        ran.append(1)

    async with TcpProxy(redis_server.host, redis_server.port) as link:
        url = link.through(redis_server.url)
        async with Redis.from_url(url, socket_timeout=0.4, retry=Retry(NoBackoff(), 0)) as client:
            claims = Claims(RedisStore(client), on_failure="open", wait=60)
            async with await Claims(RedisStore(redis), lease=60).begin("k", fingerprint_of(None)) as claim:
                waiting = asyncio.create_task(claims.run("k", charge))
                while not (await redis.info("clients"))["blocked_clients"]:
                    pass  # until the waiter knows of the other attempt
                link.drop()
                with pytest.raises(StoreUnavailable):
                    await waiting
                await settled()
                await claim.done(b"1")
    assert ran == []


# ---- without its store


@pytest.mark.parametrize("policy", ["open", "closed", None])
async def test_without_its_redis_the_policy_answers(own_redis: Server, policy: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    ran: list[int] = []

    async def charge() -> int:
        ran.append(1)
        return 1

    async with Redis.from_url(own_redis.url) as redis:
        claims = Claims(RedisStore(redis, timeout=5), on_failure=policy)
        await own_redis.kill()
        if policy == "open":
            assert await claims.run("k", charge) == 1
            assert "unprotected" in caplog.text
        else:
            with pytest.raises(StoreUnavailable if policy else exceptions.ConnectionError):
                await claims.run("k", charge)
    assert ran == [1] * (policy == "open")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttl": 0}, "ttl=0"),
        ({"lease": -1}, "lease=-1"),
        ({"ttl": "1"}, "is a str"),
        ({"lease": True}, "is a bool"),
        ({"wait": float("nan")}, "wait=nan"),
        ({"on_unknown": "hope"}, "on_unknown='hope'"),
        ({"on_failure": "local"}, "on_failure='local'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        Claims(None, **options)  # type: ignore[arg-type]
