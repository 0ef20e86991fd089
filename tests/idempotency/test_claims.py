"""Claims: one attempt at a time, a lease with a heartbeat, and a number that a stale owner can't get past."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool
from redis import exceptions
from redis.asyncio import Redis

from distsys.errors import AnswerNotKept, Indeterminate, KeyInProgress, KeyReused, OutcomeUnknown, StoreUnavailable
from distsys.idempotency.claims import NOT_KEPT, Claims, Store
from distsys.idempotency.database import PostgresStore, ensure_schema
from distsys.idempotency.redis_store import RedisStore
from distsys.lab.servers import Server

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
    """A claim whose owner died: its number."""
    found = await store.claim(key, MINE, lease=0.001, ttl=60)
    assert found.state == "claimed"
    while (await store.claim(key, MINE, lease=60, ttl=60)).state == "running":  # until the server's clock is past it
        pass
    return found.fence


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


async def test_of_twenty_at_once_one_carries_out_and_the_others_wait_for_it(store: Store) -> None:
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


@pytest.mark.parametrize("error", [RuntimeError, Indeterminate])
async def test_where_the_effect_may_have_happened_the_outcome_is_unknown(store: Store, error: type[Exception]) -> None:
    claims = Claims(store)
    with pytest.raises(error):
        async with await claims.begin("k", MINE) as claim:
            claim.effect_began = error is RuntimeError
            raise error
    with pytest.raises(OutcomeUnknown, match="may have done it"):
        await claims.begin("k", MINE)


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
    assert (await claims.begin("k", MINE)).answer == found_out or b"done now"
    assert asked == ["k"]


async def test_a_stale_owner_can_end_nothing(store: Store) -> None:
    stale = await fallen_silent(store)
    async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
        assert claim.fence > stale
        for state in ("done", "unknown", "free"):
            assert not await store.end("k", stale, state, b"stale", 60)
        assert not await store.extend("k", stale, 60)
        await claim.done(b"new")
    assert not await store.end("k", claim.fence, "free", b"", 60), "what is done stays done"
    assert (await Claims(store).begin("k", MINE)).answer == b"new"


async def test_numbers_grow_also_where_the_record_in_between_was_deleted(store: Store) -> None:
    numbers = []
    for _ in range(3):
        async with await Claims(store).begin("k", MINE) as claim:
            numbers.append(claim.fence)
    assert numbers == sorted(set(numbers))
    assert not await store.end("k", numbers[0], "done", b"", 60)


async def test_an_overtaken_attempt_is_told_that_its_outcome_is_on_no_record(store: Store) -> None:
    async with await Claims(store, lease=60).begin("k", MINE) as late:
        await store.extend("k", late.fence, 0.001)
        while (await store.claim("k", MINE, lease=60, ttl=60)).state == "running":
            pass
        async with await Claims(store, on_unknown="rerun").begin("k", MINE) as claim:
            with pytest.raises(OutcomeUnknown, match="took over"):
                await late.done(b"late")
            await claim.done(b"first")
    assert (await Claims(store).begin("k", MINE)).answer == b"first"


async def test_the_heartbeat_keeps_a_claim_longer_than_its_lease(store: Store) -> None:
    extended = asyncio.Event()
    extend, beats = store.extend, 0

    async def counted(key: str, fence: int, lease: float) -> bool:
        nonlocal beats
        answer = await extend(key, fence, lease)
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


async def test_cancelled_while_it_is_written_down_the_answer_is_kept_all_the_same(store: Store) -> None:
    claim = await Claims(store).begin("k", MINE)
    writing = asyncio.create_task(claim.done(b"kept"))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert (await Claims(store, wait=30).begin("k", MINE)).answer == b"kept"


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
