"""RedisLock: every promise of the rule, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import redis as sync_redis
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from distsys._support.redis import Script
from distsys.errors import LockLost, LockNotAcquired
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server
from distsys.locks import redis_lock
from distsys.locks.fencing import current_token
from distsys.locks.lease import Lease
from distsys.locks.redis_lock import _ACQUIRE_OR_ENQUEUE, _RELEASE_OR_DEQUEUE, EXTEND, RESERVATION_MS, RedisLock
from tests.bugs import in_script, kills, replaced
from tests.locks.broken import exit_without_error, never, released_at_once, run_without_look

Redis = redis.asyncio.Redis


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a fact about the server, asked again and again."""
    async with asyncio.timeout(10):
        while not await fact():
            await asyncio.sleep(0)


async def waiting(lock: RedisLock, count: int) -> None:
    async def so_many() -> bool:
        return (await lock.explain()).waiting == count

    await until(so_many)


async def until_idle(redis: Redis) -> None:
    """Wait until some client is blocked at the server."""

    async def blocked() -> bool:
        return int((await redis.info("clients"))["blocked_clients"]) > 0

    await until(blocked)


async def calls(redis: Redis, command: str) -> int:
    return int((await redis.info("commandstats")).get(f"cmdstat_{command}", {"calls": 0})["calls"])


@contextlib.asynccontextmanager
async def hold_in_another_task(lock: RedisLock) -> AsyncIterator[Lease]:
    """Hold the lock in another task, until the end of the block."""
    entered: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def hold() -> None:
        async with lock as lease:
            entered.set_result(lease)
            await leave.wait()

    task = asyncio.create_task(hold())
    done, _ = await asyncio.wait({task, entered}, return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        await task
    try:
        yield entered.result()
    finally:
        leave.set()
        await task


# ---- granting


async def test_the_quick_start_runs_as_written(redis: Redis) -> None:
    """`async with RedisLock(redis_client, "payment:order-123")`: inside it is held, afterwards it is free."""
    redis_client, done = redis, []

    async def process_payment(order_id: str) -> None:
        done.append((order_id, (await RedisLock(redis, "payment:order-123").explain()).owner is not None))

    async with RedisLock(redis_client, "payment:order-123"):
        await process_payment("order-123")

    assert done == [("order-123", True)]
    assert (await RedisLock(redis, "payment:order-123").explain()).owner is None


async def test_a_free_lock_costs_one_round_trip_each_way(redis: Redis) -> None:
    """One EVALSHA acquires, token included, and one releases."""
    async with RedisLock(redis, "warm"):
        pass
    await redis.config_resetstat()
    async with RedisLock(redis, "free"):
        pass
    assert await calls(redis, "evalsha") == 2
    assert await calls(redis, "blpop") == 0


@kills("the token a bare counter", in_script(_ACQUIRE_OR_ENQUEUE, "local token = now()", "local token = 1"))
async def test_each_token_is_larger_than_every_earlier_one(redis: Redis) -> None:
    """Strictly, within one microsecond too, and also after the server lost all its data."""
    tokens = []
    for i in range(60):
        if i % 20 == 19:
            await redis.flushall()
        async with RedisLock(redis, "order") as lease:
            tokens.append(lease.token)
    assert tokens == sorted(set(tokens))


@kills(
    "the token not drawn anew",
    in_script(_ACQUIRE_OR_ENQUEUE, "token = tonumber(newest) + 1", "token = tonumber(newest)"),
)
@kills("the token not remembered", in_script(_ACQUIRE_OR_ENQUEUE, "if newest and", "if false and"))
async def test_a_token_never_decreases_when_the_servers_clock_stepped_back(redis: Redis) -> None:
    """The newest token is remembered: it counts on from there until the clock has caught up."""
    async with RedisLock(redis, "clock") as first:
        pass
    ahead = first.token + 3_600_000_000
    await redis.set("distsys:lock:{clock}:fence", ahead)
    async with RedisLock(redis, "clock") as later:
        assert later.token == ahead + 1


@kills("granted to any owner", in_script(_ACQUIRE_OR_ENQUEUE, "if holder == me then", "if true then"))
@kills("released before the body ran", replaced(RedisLock, "__aenter__", released_at_once))
async def test_only_one_of_many_holds_it(redis: Redis) -> None:
    """Forty tasks, each reading and writing while the server names it the owner: no increment is lost."""
    await redis.set("counter", 0)

    async def increment() -> None:
        async with (lock := RedisLock(redis, "counter-lock")) as lease:
            value = int(await redis.get("counter"))
            assert (await lock.explain()).owner == lease.owner
            await redis.set("counter", value + 1)

    await asyncio.gather(*(increment() for _ in range(40)))
    assert int(await redis.get("counter")) == 40


async def test_scripts_that_the_server_forgot_are_brought_along(redis: Redis) -> None:
    """SCRIPT FLUSH between any two calls changes nothing."""
    lock = RedisLock(redis, "scripts")
    async with lock as lease:
        await redis.script_flush()
        await lease.extend()
        await redis.script_flush()
    await redis.script_flush()
    assert (await lock.explain()).owner is None


async def test_a_restarted_server_grants_again_with_a_larger_token(own_redis: Server) -> None:
    """The lock is forgotten with everything else; the token still grows."""
    async with Redis(port=own_redis.port) as client:  # from_url makes a client without retries
        first = await RedisLock(client, "restart").acquire()
        await own_redis.restart()
        second = await asyncio.create_task(RedisLock(client, "restart").acquire(5))
        assert second.token is not None
        assert first.token is not None
        assert second.token > first.token
        assert not await first.release()
        assert await second.release()


# ---- waiting


@kills(
    "last come, first served",
    in_script(_ACQUIRE_OR_ENQUEUE, "redis.call('RPUSH', queue, me)", "redis.call('LPUSH', queue, me)"),
)
async def test_waiters_are_served_first_come_first_served(redis: Redis) -> None:
    """Eight waiters queue one after the other and enter in that order."""
    lock, order = RedisLock(redis, "fifo"), []

    async def enter(i: int) -> None:
        async with RedisLock(redis, "fifo"):
            order.append(i)

    async with hold_in_another_task(lock):
        tasks = []
        for i in range(8):
            tasks.append(asyncio.create_task(enter(i)))
            await waiting(lock, i + 1)
    await asyncio.gather(*tasks)
    assert order == list(range(8))


async def test_a_newcomer_does_not_overtake_the_queue(redis: Redis) -> None:
    """When the lock is released, one try by a new owner is refused as long as others wait."""
    lock = RedisLock(redis, "barge")
    async with hold_in_another_task(lock):
        await lock._ask("host|1|waiter", queue=True)
    assert await RedisLock(redis, "barge").try_acquire() is None
    assert (await lock.explain()).owner == "host|1|waiter"


@kills("newcomers overtake the queue", in_script(_ACQUIRE_OR_ENQUEUE, "holder = next_waiter() or me", "holder = me"))
async def test_a_newcomer_does_not_overtake_when_a_lease_ran_out(redis: Redis) -> None:
    """No release woke a waiter: the next request hands the lock to the first in the queue."""
    lock = RedisLock(redis, "ran-out")
    async with hold_in_another_task(lock):
        await lock._ask("host|1|waiter", queue=True)
        await redis.delete("distsys:lock:{ran-out}")
        assert await RedisLock(redis, "ran-out").try_acquire() is None
        assert (await lock.explain()).owner == "host|1|waiter"
        await redis.delete("distsys:lock:{ran-out}")


@kills(
    "no waiter is woken",
    in_script(
        _RELEASE_OR_DEQUEUE,
        "if waiter then reserve(waiter) else redis.call('DEL', lock) end",
        "redis.call('DEL', lock)",
    ),
)
async def test_exactly_one_waiter_is_woken(redis: Redis) -> None:
    """A release wakes the first in the queue; the others sleep on, without asking the server."""
    lock = RedisLock(redis, "one", ttl=60)
    async with hold_in_another_task(lock):
        for i in range(3):
            await lock._ask(f"host|1|{i}", queue=True)
    assert await redis.keys("distsys:lock:{one}:wake:*") == [b"distsys:lock:{one}:wake:host|1|0"]


@kills(
    "the dead are served too",
    in_script(_RELEASE_OR_DEQUEUE, "if alive_until and tonumber(alive_until) > now() then", "if true then"),
)
async def test_a_dead_waiter_is_skipped(redis: Redis) -> None:
    """A waiter without a heartbeat in time is dropped at the next hand-over."""
    lock = RedisLock(redis, "dead")
    async with hold_in_another_task(lock):
        await lock._ask("host|1|dead", queue=True)
        await redis.hset("distsys:lock:{dead}:heartbeats", "host|1|dead", 1)
        await lock._ask("host|1|alive", queue=True)
    assert (await lock.explain()).owner == "host|1|alive"


async def test_a_waiter_that_died_a_moment_ago_delays_the_next_by_its_reservation_only(redis: Redis) -> None:
    """The reservation is not used: when it ends, the next waiter enters, long before any TTL."""
    lock = RedisLock(redis, "just-died", ttl=3600)
    async with hold_in_another_task(lock):
        await lock._ask("host|1|dead", queue=True)
        next_one = asyncio.create_task(RedisLock(redis, "just-died", ttl=3600).acquire())
        await waiting(lock, 2)
    assert 0 < await redis.pttl("distsys:lock:{just-died}") <= RESERVATION_MS
    assert await (await next_one).release()


@kills("the queue never cleaned", in_script(_RELEASE_OR_DEQUEUE, "redis.call('LREM', queue, 1, me)", ""))
async def test_a_cancelled_waiter_leaves_the_queue(redis: Redis) -> None:
    """It is not handed a lock that it would never use."""
    lock = RedisLock(redis, "leave")
    async with hold_in_another_task(lock):
        waiter = asyncio.create_task(RedisLock(redis, "leave").acquire())
        await waiting(lock, 1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert (await lock.explain()).waiting == 0
    assert (await lock.explain()).owner is None


@kills("a swallowed cancellation is forgotten", replaced(redis_lock, "reraise_swallowed_cancel", lambda work: work))
async def test_a_cancellation_that_the_client_swallowed_still_counts(redis: Redis) -> None:
    """Python 3.11's asyncio.wait_for, which redis-py uses, can return a result instead of the CancelledError."""

    class Swallowing(Redis):
        def pipeline(self, *args: Any, **kwargs: Any) -> Any:
            pipe = super().pipeline(*args, **kwargs)
            execute = pipe.execute

            async def swallow() -> Any:
                try:
                    return await execute()
                except asyncio.CancelledError:
                    return [None, [0, 1000, b"the holder"]]

            pipe.execute = swallow  # type: ignore[method-assign,assignment]
            return pipe

    lock = RedisLock(redis, "swallow")
    async with Swallowing(connection_pool=redis.connection_pool) as client, hold_in_another_task(lock):
        waiter = asyncio.create_task(RedisLock(client, "swallow").acquire())
        await waiting(lock, 1)
        await until_idle(redis)
        waiter.cancel()
        await asyncio.wait({waiter}, timeout=5)
        assert waiter.cancelled()
        assert (await lock.explain()).waiting == 0


@kills("a cancellation swallowed by release is forgotten", replaced(Script, "run", run_without_look), call="release")
@kills("a cancellation swallowed by extend is forgotten", replaced(Script, "run", run_without_look), call="extend")
@pytest.mark.parametrize("call", ["release", "extend"])
async def test_a_cancellation_that_the_client_swallowed_still_counts_for_a_lease(redis: Redis, call: str) -> None:
    """The server has done its work, and the task is cancelled all the same."""

    class Swallowing(Redis):
        async def execute_command(self, *args: Any, **options: Any) -> Any:
            answer = await super().execute_command(*args, **options)
            if tell:
                tell.pop().set()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            return answer

    answered, tell = asyncio.Event(), list[asyncio.Event]()
    async with Swallowing(connection_pool=redis.connection_pool) as client:
        lease = await RedisLock(client, "swallowed").acquire()
        tell.append(answered)
        task = asyncio.create_task(getattr(lease, call)())
        await answered.wait()
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()
        await lease.release()


async def test_a_lease_that_was_waited_for_counts_from_before_the_wait(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server grants it at some time during the wait; only the time before is certainly not too late."""
    monkeypatch.setattr("distsys.locks.redis_lock.MAX_BLOCK_SECONDS", 60)
    now = 1000.0
    async with Redis.from_url(redis_server.url, socket_timeout=None) as redis:
        lock = RedisLock(redis, "waited-for", ttl=300)
        async with hold_in_another_task(lock):
            waiter = asyncio.create_task(RedisLock(redis, "waited-for", ttl=300, clock=lambda: now).acquire())
            await waiting(lock, 1)
            await until_idle(redis)
            now += 10
        lease = await waiter
        assert lease.remaining() == pytest.approx(0.99 * 300 - 0.002 - 10)
        assert await lease.release()


async def test_a_lost_wake_up_costs_at_most_the_remaining_ttl(redis: Redis) -> None:
    """The holder is gone without a release: the waiter asks again when the lease it saw has ended."""
    await RedisLock(redis, "lost-wake", ttl=0.2)._ask("host|1|gone", queue=False)
    lease = await RedisLock(redis, "lost-wake", timeout=5).acquire()
    assert await lease.release()


async def test_more_waiters_than_connections_all_get_through(redis_server: Server) -> None:
    """Waiters use half of a small pool at most, so holders can always release."""
    async with Redis.from_url(redis_server.url, max_connections=4) as client:
        done = []

        async def enter(i: int) -> None:
            async with RedisLock(client, "small-pool"):
                done.append(i)

        async with asyncio.timeout(20):
            for batch in range(0, 12, 2):  # two newcomers at a time: the first request needs a connection as well
                tasks = [asyncio.create_task(enter(batch + i)) for i in range(2)]
                await asyncio.gather(*tasks)
        assert len(done) == 12


async def test_a_timeout_says_who_holds_the_lock_and_leaves_nothing(redis: Redis) -> None:
    """LockNotAcquired carries the holder and the wait; the queue is as before."""
    lock = RedisLock(redis, "busy", timeout=0.05)
    async with hold_in_another_task(RedisLock(redis, "busy")) as lease:
        with pytest.raises(LockNotAcquired, match=r"'busy' was not obtained in 0\.05 s") as refused:
            await lock.acquire()
        assert refused.value.holder == lease.owner
        assert refused.value.problem()["status"] == 423
        assert (await lock.explain()).waiting == 0


async def test_timeout_zero_is_one_try(redis: Redis) -> None:
    """It never queues; try_acquire answers None instead of raising."""
    async with hold_in_another_task(RedisLock(redis, "zero")):
        with pytest.raises(LockNotAcquired):
            await RedisLock(redis, "zero", timeout=0).acquire()
        assert await RedisLock(redis, "zero").try_acquire() is None
        assert (await RedisLock(redis, "zero").explain()).waiting == 0
    lease = await RedisLock(redis, "zero").try_acquire()
    assert lease is not None
    assert await lease.release()


# ---- keeping the lease, and losing it


@kills("no renewal", replaced(Lease, "_renew_in_time", never))
async def test_a_lease_is_renewed_while_the_body_runs(redis: Redis) -> None:
    """A body three times longer than the ttl keeps the lock."""
    await redis.config_resetstat()
    async with RedisLock(redis, "renewed", ttl=0.15) as lease:

        async def three_renewals() -> bool:
            return await calls(redis, "pexpire") >= 9

        await until(three_renewals)
        assert lease.held
        assert (await RedisLock(redis, "renewed").explain()).owner == lease.owner


@kills("a loss is not told", replaced(Lease, "mark_lost", lambda *_: None))
async def test_a_lease_taken_away_ends_the_body_with_lock_lost(redis: Redis) -> None:
    """The next renewal notices; the body is cancelled at its await, and LockLost comes out."""
    ended = []
    with pytest.raises(LockLost, match="taken away") as lost:
        async with RedisLock(redis, "taken", ttl=0.15) as lease:
            assert await RedisLock(redis, "taken").force_release() == lease.owner
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
    assert ended == ["cancelled"]
    assert lost.value.token == lease.token
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_on_lost_flag_lets_the_body_decide(redis: Redis) -> None:
    """The body runs on, sees lease.lost, and leaving raises LockLost all the same."""
    with pytest.raises(LockLost):
        async with RedisLock(redis, "flag", ttl=0.15, on_lost="flag") as lease:
            await RedisLock(redis, "flag").force_release()

            async def lost() -> bool:
                await redis.ping()
                return lease.lost

            await until(lost)
            with pytest.raises(LockLost):
                lease.check()


async def test_a_hung_server_ends_the_lease_before_the_server_could(own_redis: Server) -> None:
    """Renewals get no answer: the holder is told at the local deadline, and others can't have been granted by then."""
    async with Redis.from_url(own_redis.url, socket_timeout=30) as client, Redis.from_url(own_redis.url) as other:
        with pytest.raises(LockLost, match="before it could be renewed"):
            async with RedisLock(client, "hung", ttl=0.5):
                await own_redis.pause()
                try:
                    await asyncio.Event().wait()
                finally:
                    await own_redis.resume()
        async with RedisLock(other, "hung", timeout=5):
            pass


@kills("a lost lease masks the error of the body", replaced(Lease, "exit_body", exit_without_error))
async def test_the_bodys_own_error_is_never_masked(redis: Redis) -> None:
    """It passes through; that the lock was lost as well is a note on it."""
    with pytest.raises(ZeroDivisionError) as raised:
        async with RedisLock(redis, "mask"):
            await RedisLock(redis, "mask").force_release()
            async with RedisLock(redis, "mask-thief"):
                await asyncio.create_task(RedisLock(redis, "mask", renew=False).acquire())
            raise ZeroDivisionError
    assert "no longer ours" in raised.value.__notes__[0]


async def test_a_body_that_finished_under_a_foreign_lock_raises_lock_lost(redis: Redis) -> None:
    """The lock was granted again in the middle: the end of the body says so."""
    with pytest.raises(LockLost, match="no longer ours"):
        async with RedisLock(redis, "foreign"):
            await RedisLock(redis, "foreign").force_release()
            stolen = await asyncio.create_task(RedisLock(redis, "foreign").acquire())
    assert await stolen.release()


async def test_a_body_that_swallows_its_cancellation_still_ends_in_lock_lost(redis: Redis) -> None:
    """The loss can't be silenced by a broad except."""
    with pytest.raises(LockLost):
        async with RedisLock(redis, "swallow", ttl=0.15):
            await RedisLock(redis, "swallow").force_release()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


async def test_a_cancellation_from_outside_stays_a_cancellation(redis: Redis) -> None:
    """The task ends cancelled even when the lease is lost at the same time."""
    entered = asyncio.Event()

    async def body() -> None:
        async with RedisLock(redis, "outside") as lease:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                lease.mark_lost("in the same moment")

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_extend_starts_the_ttl_anew(redis: Redis) -> None:
    """With another ttl too; after the loss it raises LockLost."""
    async with RedisLock(redis, "extend", ttl=5) as lease:
        await lease.extend(60)
        assert 5 < lease.remaining() < 60
        assert 5_000 < await redis.pttl("distsys:lock:{extend}") <= 60_000
    with pytest.raises(LockLost):
        await lease.extend()


@kills("no owner check on renewal", in_script(EXTEND, "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end", ""))
async def test_a_lock_that_another_owner_holds_by_now_is_not_extended(redis: Redis) -> None:
    """That would extend the other's lease; it raises LockLost instead."""
    lease = await RedisLock(redis, "others").acquire()
    await redis.set("distsys:lock:{others}", "host|1|other", px=5_000)
    with pytest.raises(LockLost, match="taken away"):
        await lease.extend()
    assert await redis.pttl("distsys:lock:{others}") <= 5_000


async def test_a_release_that_cannot_reach_the_server_is_logged_when_the_body_was_covered(
    own_redis: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The work was exclusive from start to end: failing it now would invite a second run."""
    async with Redis.from_url(own_redis.url, retry=None) as client:
        async with RedisLock(client, "unreachable"):
            await own_redis.kill()
        assert "could not be released" in caplog.text
        await own_redis.restart()


async def test_release_and_the_lock_objects_release_end_an_acquired_lease(redis: Redis) -> None:
    """Without `async with`: acquire() gives the lease; it ends once, by either way."""
    lock = RedisLock(redis, "explicit")
    lease = await lock.acquire()
    assert await lock.release()
    assert await lease.release()
    with pytest.raises(RuntimeError, match="does not hold"):
        await lock.release()


# ---- cancellation


@pytest.mark.parametrize("steps", [*range(24), 30, 40, 60])
async def test_an_acquire_cancelled_at_any_await_leaves_no_lock_behind(redis: Redis, steps: int) -> None:
    """After so many turns of the event loop; whether the server had granted it or not, the next one enters at once."""
    task = asyncio.create_task(RedisLock(redis, "cancel", ttl=3600).acquire())
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.cancel():
        with contextlib.suppress(asyncio.CancelledError):
            assert await (await task).release()
    else:
        assert await (await task).release()
    lease = await RedisLock(redis, "cancel", timeout=0).acquire()
    assert await lease.release()


@pytest.mark.parametrize("steps", [*range(24), 30, 40, 60])
async def test_a_release_cancelled_at_any_await_still_releases(redis: Redis, steps: int) -> None:
    """The lock falls free though the task that released it was cancelled midway."""

    async def hold() -> None:
        async with RedisLock(redis, "cancel-release", ttl=3600):
            leaving.set()

    leaving = asyncio.Event()
    task = asyncio.create_task(hold())
    await leaving.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    lease = await RedisLock(redis, "cancel-release", timeout=5).acquire()
    assert await lease.release()


@kills(
    "a request is granted after its owner gave up",
    in_script(_ACQUIRE_OR_ENQUEUE, "if tombstone then return {0, 0, ''} end", ""),
)
async def test_a_request_that_arrives_after_its_cancellation_is_refused(redis: Redis) -> None:
    """The undoing leaves a tombstone: a request still on its way is not granted to an owner that has given up."""
    lock = RedisLock(redis, "tomb")
    await lock._run(_RELEASE_OR_DEQUEUE, "host|1|late", "", "1")
    token, _, _ = await lock._ask("host|1|late", queue=False)
    assert token == 0
    assert (await lock.explain()).owner is None


async def test_a_lost_reply_is_not_a_lost_lock(redis_server: Server) -> None:
    """The client's retry finds the owner granted already. `SET NX` answers "not acquired" there, and holds the lock."""
    async with TcpProxy("127.0.0.1", redis_server.port) as proxy:
        async with Redis(host="127.0.0.1", port=proxy.port) as client:
            await client.flushdb()
            await client.ping()
            proxy.cut_reply()
            assert await client.set("plain", "me", nx=True) is None
            assert await client.get("plain") == b"me"
            async with RedisLock(client, "warm"):
                pass
            proxy.cut_reply()
            lease = await RedisLock(client, "cut", timeout=5).acquire()
            assert (await RedisLock(client, "cut").explain()).owner == lease.owner
            proxy.cut_reply()
            assert await lease.release()
            assert (await RedisLock(client, "cut").explain()).owner is None


# ---- sharing, nesting


async def test_two_tasks_may_share_one_lock_object(redis: Redis) -> None:
    """Each acquisition is a lease of its own, with its own owner and token."""
    lock, leases, inside = RedisLock(redis, "shared"), [], 0

    async def enter() -> None:
        nonlocal inside
        async with lock as lease:
            inside += 1
            assert inside == 1
            leases.append(lease)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(enter() for _ in range(6)))
    assert len({lease.owner for lease in leases}) == len({lease.token for lease in leases}) == 6


@kills("a task waits for itself", replaced(RedisLock, "_refuse_reentry", lambda _: None))
async def test_acquiring_again_in_the_same_task_raises_instead_of_deadlocking(redis: Redis) -> None:
    """By another object of the same name too; another task may wait."""
    async with RedisLock(redis, "again"):
        with pytest.raises(RuntimeError, match="not re-entrant"):
            await RedisLock(redis, "again").acquire()
        assert await asyncio.create_task(RedisLock(redis, "again").try_acquire()) is None
    async with RedisLock(redis, "again"):
        pass


async def test_nested_code_finds_the_token_of_the_lease_it_runs_under(redis: Redis) -> None:
    """The innermost one, or by name; without a lease it is an error, not a zero."""
    async with RedisLock(redis, "outer") as outer, RedisLock(redis, "inner") as inner:
        assert current_token() == inner.token
        assert current_token("outer") == outer.token
        assert await asyncio.create_task(asyncio.sleep(0, current_token())) == inner.token
    with pytest.raises(LookupError, match="no lease with a fencing token"):
        current_token()


# ---- inspection and force_release


@kills(
    "granted without a TTL",
    in_script(_ACQUIRE_OR_ENQUEUE, "redis.call('SET', lock, me, 'PX', ARGV[2])", "redis.call('SET', lock, me)"),
)
@kills(
    "the ttl taken for seconds",
    in_script(
        _ACQUIRE_OR_ENQUEUE, "redis.call('SET', lock, me, 'PX', ARGV[2])", "redis.call('SET', lock, me, 'EX', ARGV[2])"
    ),
)
async def test_explain_says_who_holds_the_lock_and_how_many_wait(redis: Redis) -> None:
    """Owner, host, pid, how long, how much longer, and the queue; nothing when it is free."""
    import os
    import socket

    lock = RedisLock(redis, "explain", ttl=20)
    free = await lock.explain()
    assert (free.owner, free.waiting, free.held_for, free.remaining) == (None, 0, 0.0, 0.0)
    async with hold_in_another_task(lock) as lease:
        await lock._ask("host|1|waiter", queue=True)
        state = await lock.explain()
        assert (state.owner, state.token, state.waiting) == (lease.owner, lease.token, 1)
        assert (state.host, state.pid) == (socket.gethostname(), os.getpid())
        assert 0 <= state.held_for < 20
        assert 0 < state.remaining <= 20


async def test_explain_shows_an_owner_that_another_program_wrote(redis: Redis) -> None:
    """As it stands there; host and pid are unknown, and it can be released by force."""
    await redis.set("distsys:lock:{foreign}", "somebody else's", px=5_000)
    state = await RedisLock(redis, "foreign").explain()
    assert (state.owner, state.host, state.pid) == ("somebody else's", None, None)
    assert await RedisLock(redis, "foreign").force_release() == "somebody else's"


@kills("no owner check on release", in_script(_RELEASE_OR_DEQUEUE, "if holder == me then", "if holder then"))
async def test_force_release_hands_the_lock_on_and_the_holder_learns_of_it(redis: Redis) -> None:
    """Released from outside, the lock goes to the first waiter; a free lock answers None."""
    lock = RedisLock(redis, "force")
    assert await lock.force_release() is None
    first = await RedisLock(redis, "force").acquire()
    waiter = asyncio.create_task(RedisLock(redis, "force").acquire())
    await waiting(lock, 1)
    assert await lock.force_release() == first.owner
    second = await waiter
    assert not await first.release()
    assert await second.release()


# ---- options


async def test_a_token_from_elsewhere_is_drawn_under_a_lease_that_still_stands(redis: Redis) -> None:
    """When the lease was lost while the token was drawn, the token is thrown away and the lock asked for again."""
    drawn = []

    async def draw() -> int:
        drawn.append(len(drawn) + 1)
        if len(drawn) == 1:
            await redis.delete("distsys:lock:{elsewhere}")
        return drawn[-1]

    async with RedisLock(redis, "elsewhere", tokens=draw) as lease:
        assert lease.token == 2


async def test_it_runs_on_a_cluster(redis_cluster: redis.asyncio.RedisCluster) -> None:
    """Every script touches one slot only, whatever the name; waiting works there too."""
    for name in ("payment:order-123", "a b", "{odd}name", "}x{", "ключ"):
        lock = RedisLock(redis_cluster, name)
        async with hold_in_another_task(lock):
            waiter = asyncio.create_task(RedisLock(redis_cluster, name).acquire())
            await waiting(lock, 1)
        assert await (await waiter).release()


# ---- bad input


@given(st.text(min_size=1, max_size=40).filter(lambda s: s.encode("utf-8", "ignore").decode() == s))
def test_all_keys_of_any_name_share_one_slot(name: str) -> None:
    """Braces, spaces and unicode included; two names never share keys."""
    key = RedisLock(Redis(), name)._key
    named_after_it = [f"{key}:{part}" for part in ("fence", "queue", "heartbeats", "wake:owner", "tombstone:owner")]
    assert len({key_slot(each.encode()) for each in (key, *named_after_it)}) == 1
    assert RedisLock(Redis(), name + "}")._key != key


@pytest.mark.parametrize("name", ["two words", "ключ ✓", "{braces}", "}{", "%7B", "x" * 10_000])
async def test_any_text_is_a_name(redis: Redis, name: str) -> None:
    """Spaces, unicode, braces, ten kilobytes."""
    async with RedisLock(redis, name) as lease:
        assert (await RedisLock(redis, name).explain()).owner == lease.owner


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"name": ""}, ValueError, "is empty"),
        ({"name": b"bytes"}, TypeError, "is a bytes"),
        ({"name": None}, TypeError, "is a NoneType; give a str: 'payment:order-123'"),
        ({"ttl": 0}, ValueError, "ttl=0: a lease must last longer than the 2 ms"),
        ({"ttl": -1}, ValueError, "ttl=-1"),
        ({"ttl": float("nan")}, ValueError, "ttl=nan"),
        ({"ttl": 90_000}, ValueError, "longer than a day; it is in seconds"),
        ({"ttl": float("inf")}, ValueError, "longer than a day"),
        ({"ttl": "30"}, TypeError, "give seconds as a number"),
        ({"ttl": True}, TypeError, "is a bool"),
        ({"timeout": -1}, ValueError, "0 is one try, None waits for ever"),
        ({"timeout": "5"}, TypeError, "timeout='5'"),
        ({"on_lost": "ignore"}, ValueError, "'cancel' ends the body"),
        ({"redis": sync_redis.Redis()}, TypeError, "not an asyncio client"),
        ({"redis": None}, TypeError, "pass redis.asyncio.Redis"),
    ],
)
def test_bad_input_gets_an_error_that_names_value_and_remedy(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    """At construction, before anything reaches a server."""
    given = {"redis": Redis(), "name": "n", **wrong}
    with pytest.raises(error, match=message):
        RedisLock(given.pop("redis"), given.pop("name"), **given)  # type: ignore[arg-type]


async def test_a_client_with_one_connection_is_refused(redis_server: Server) -> None:
    """A waiter would occupy the connection that the holder needs to release."""
    async with Redis.from_url(redis_server.url, single_connection_client=True) as client:
        with pytest.raises(ValueError, match="one connection can't wait"):
            await RedisLock(client, "single").acquire()


def test_one_lock_object_serves_two_event_loops_one_after_the_other(redis_server: Server) -> None:
    """As long as the client is closed in between, as redis-py asks."""
    client = Redis.from_url(redis_server.url)
    lock = RedisLock(client, "loops")

    async def once() -> None:
        async with lock:
            assert await asyncio.create_task(RedisLock(client, "loops").try_acquire()) is None
        await client.aclose()

    asyncio.run(once())
    asyncio.run(once())


async def test_answers_as_text_are_understood_too(redis_server: Server) -> None:
    """A client with decode_responses=True."""
    async with Redis.from_url(redis_server.url, decode_responses=True) as client:
        async with hold_in_another_task(RedisLock(client, "text")) as lease:
            assert (await RedisLock(client, "text").explain()).owner == lease.owner
            with pytest.raises(LockNotAcquired, match="holds it"):
                await RedisLock(client, "text", timeout=0).acquire()
