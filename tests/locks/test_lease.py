"""Lease: its deadline, its renewal, its loss and the end of its body, whichever lock grants it.

The store behind a lease is two callables. Here they answer, fail, hang and are counted as a test needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from distsys._support.cancellation import in_background
from distsys._support.clock import elapsed
from distsys._support.redis import hash_tag, milliseconds
from distsys.errors import LockLost, LockNotAcquired
from distsys.locks import hold
from distsys.locks import lease as leases
from distsys.locks.lease import MAX_TTL, Lease, LeasedLock, check_ttl, held_leases, local_deadline
from distsys.locks.redis_lock import RedisLock
from tests.bugs import kills, replaced
from tests.locks.broken import add_and_keep, start_ttl_even_if_shorter


def kills_swallowed_cancellation(test: Any) -> Any:
    """Plant the bug where wait_for can swallow a cancellation: before Python 3.12."""
    bug = replaced(hold, "cancel_if_deliverable", lambda body: body.cancel())
    mark = kills("the body is told when it can't hear", bug, turns=1, work_turns=1)
    return mark(test) if sys.version_info < (3, 12) else test


class Store:
    """Store of a lock. Each `extend` takes its answer from `extends`; the last answer is repeated."""

    def __init__(self, *extends: Callable[[], Awaitable[bool]], release: Callable[[], Awaitable[bool]] | None = None):
        self.extends, self.release_answer = list(extends) or [yes], release or yes
        self.asked: list[float] = []
        self.released = 0

    async def extend(self, _: Lease, ttl: float) -> bool:
        self.asked.append(ttl)
        return await (self.extends.pop(0) if len(self.extends) > 1 else self.extends[0])()

    async def release(self, _: Lease) -> bool:
        self.released += 1
        return await self.release_answer()

    def lease(self, name: str = "n", *, body: bool = False, **options: Any) -> Lease:
        options = {"ttl": 3600.0, "clock": asyncio.get_running_loop().time, **options}
        return self.of(a_lock(name, **options), body=body)

    def of(self, lock: LeasedLock, *, body: bool = False) -> Lease:
        asked_at = lock.clock()
        return Lease(lock, owner="me", token=7, asked_at=asked_at, extend=self.extend, release=self.release, body=body)

    @contextlib.asynccontextmanager
    async def body(self, **options: Any) -> AsyncIterator[Lease]:
        """`async with` a lock."""
        lease = self.lease(body=True, **options)
        try:
            yield lease
        except BaseException as error:
            await lease.exit_body(error)
            raise
        else:
            await lease.exit_body(None)


def a_lock(name: str = "n", **options: Any) -> LeasedLock:
    options = {"ttl": 3600.0, "timeout": None, "renew": True, "on_lost": "cancel", "clock": elapsed, **options}
    return LeasedLock(name, name, **options)


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


async def fail() -> bool:
    raise ConnectionError("the store is away")


async def for_ever() -> bool:
    await asyncio.Event().wait()
    return True


def soon(*calls: Callable[[], Any]) -> None:
    """Run all calls in the next turn of the event loop, when the body waits."""

    def all_at_once() -> None:
        for call in calls:
            call()

    asyncio.get_running_loop().call_soon(all_at_once)


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


class Hands:
    """Clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- time


@given(asked_at=st.floats(0, 1e9), ttl=st.floats(0.01, MAX_TTL))
def test_the_local_deadline_is_before_the_stores(asked_at: float, ttl: float) -> None:
    """It is earlier by 1 % and 2 ms; the store's TTL began after the request was sent."""
    assert local_deadline(asked_at, ttl) < asked_at + ttl
    assert local_deadline(asked_at, ttl) == pytest.approx(asked_at + 0.99 * ttl - 0.002)


@kills("no allowance for drift", replaced(leases, "local_deadline", lambda asked_at, ttl: asked_at + ttl))
async def test_a_lease_knows_from_the_clock_alone_that_it_has_ended() -> None:
    """After a pause or a long synchronous stretch no timer has run yet: lost, check() and extend() know it anyway."""
    clock, store = Hands(), Store()
    lease = store.lease(ttl=10, clock=clock)
    assert (lease.held, lease.lost, lease.within_ttl, lease.remaining()) == (True, False, True, pytest.approx(9.898))
    clock.now += 9.8
    lease.check()
    clock.now += 0.1
    assert (lease.held, lease.lost, lease.within_ttl, lease.remaining()) == (False, True, False, 0.0)
    with pytest.raises(LockLost, match="while the event loop was busy") as lost:
        lease.check()
    assert (lost.value.name, lost.value.token) == ("n", 7)
    with pytest.raises(LockLost):
        await lease.extend()
    assert store.asked == []


async def test_a_grant_whose_answer_came_too_late_is_given_back(redis: Redis) -> None:
    """The answer to one try took longer than the lease lasts: not acquired, and no grant stays until the TTL."""
    clock = Hands()

    def leaping() -> float:
        clock.now += 60
        return clock.now

    with pytest.raises(LockNotAcquired):
        await RedisLock(redis, "late", ttl=60, timeout=0, clock=leaping).acquire()
    lease = await RedisLock(redis, "late", timeout=0).acquire()
    assert await lease.release()


async def test_a_body_that_blocked_the_loop_past_the_deadline_is_cancelled_at_its_next_wait() -> None:
    """The store is asked once more at the end, and its answer counts."""
    clock, reached = Hands(), []
    with pytest.raises(LockLost, match="before it could be renewed"):
        async with Store(release=no).body(ttl=0.01, clock=clock) as lease:
            clock.now += 1
            for _ in range(1000):  # the timer is due in 3 ms at the latest
                await asyncio.sleep(0.001)
            reached.append(lease)
    assert reached == []


async def test_a_body_that_was_blocked_and_goes_on_with_redis_is_stopped(redis: Redis) -> None:
    """Its first command after the deadline is the last: not even Python 3.11's wait_for swallows the cancellation."""
    written = 0
    with pytest.raises(LockLost):
        async with RedisLock(redis, "blocked", ttl=0.05) as lease:
            await redis.ping()
            while not lease.lost:
                pass
            for _ in range(100):
                await redis.incr("written")
                written += 1
    assert written <= 1
    assert cancelling() == 0


@kills_swallowed_cancellation
@pytest.mark.parametrize("work_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("turns", range(8))
async def test_a_body_that_only_waits_for_quick_work_is_stopped(turns: int, work_turns: int) -> None:
    """In a loop of wait_for the loss gets through whenever it comes, also in the turn in which the work is done."""
    rounds = 0

    async def work() -> None:
        for _ in range(work_turns):
            await asyncio.sleep(0)

    def after(turns: int, lease: Lease) -> None:
        soon(lambda: after(turns - 1, lease) if turns else lease.mark_lost("was lost"))

    with pytest.raises(LockLost):
        async with Store().body() as lease:
            after(turns, lease)
            while rounds < 1000:
                await asyncio.wait_for(work(), 10)
                rounds += 1
                if work_turns == 0 and sys.version_info >= (3, 12):
                    await asyncio.sleep(0)  # there wait_for itself gives the loss no turn to come in
    assert rounds < 100
    assert cancelling() == 0


# ---- release


async def test_a_released_lease_is_neither_held_nor_lost() -> None:
    """It is released once; releasing it again is no error; calls that need a held lease say why it is not held."""
    store = Store()
    lease = store.lease()
    assert "3.5" in repr(lease)
    assert await lease.release()
    assert await lease.release()
    assert store.released == 1
    assert (lease.held, lease.lost, lease.remaining()) == (False, False, 0.0)
    assert "was released" in repr(lease)
    for call in (lease.extend(), asyncio.sleep(0, lease.extend)):
        with pytest.raises(LockLost, match="'n' was released"):
            await call
            lease.check()


async def test_a_release_that_failed_may_be_tried_again() -> None:
    """Until then it is unknown whether the lease holds, so it counts as lost."""
    store = Store(release=fail)
    lease = store.lease()
    with pytest.raises(ConnectionError):
        await lease.release()
    assert lease.lost
    with pytest.raises(LockLost, match="could not be released"):
        lease.check()
    store.release_answer = yes
    assert await lease.release()
    assert not lease.lost
    assert store.released == 2


async def test_a_failed_release_in_the_body_is_tried_again_at_its_end() -> None:
    """The body ignored the error."""
    store = Store(release=fail)
    async with store.body() as lease:
        with pytest.raises(ConnectionError):
            await lease.release()
        store.release_answer = yes
    assert store.released == 2


async def test_a_body_may_release_early() -> None:
    """Its end has nothing left to do."""
    store = Store()
    async with store.body() as lease:
        assert await lease.release()
    assert store.released == 1


async def test_a_cancelled_release_goes_on_in_the_background() -> None:
    """A second request is sent: the first may have been lost with its connection."""
    gate = asyncio.Event()

    async def slowly() -> bool:
        return await gate.wait()

    store = Store(release=slowly)
    task = asyncio.create_task(store.lease().release())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert store.released == 2
    gate.set()


@pytest.mark.parametrize("turns", range(24))
async def test_a_cancellation_is_never_lost_in_a_release(redis: Redis, turns: int) -> None:
    """Whenever it comes, the code after the lock is not reached, and the lock is free."""

    async def work() -> None:
        async with RedisLock(redis, "timeout-in-release", ttl=3600):
            leaving.set()
        reached.append(turns)
        await asyncio.sleep(0)
        raise AssertionError("this task was not told to end")

    reached: list[int] = []
    leaving = asyncio.Event()
    task = asyncio.create_task(work())
    await leaving.wait()
    for _ in range(turns):
        await asyncio.sleep(0)
        if reached:
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    lease = await RedisLock(redis, "timeout-in-release", timeout=20).acquire()
    assert await lease.release()


async def test_a_body_that_ran_past_its_lease_and_can_t_release_raises_lock_lost() -> None:
    """The cause is what the store's client raised; inside the lease it would only be logged."""
    clock = Hands()
    with pytest.raises(LockLost, match="could not be released") as lost:
        async with Store(release=fail).body(ttl=10, clock=clock):
            clock.now += 11
    assert isinstance(lost.value.__cause__, ConnectionError)


# ---- loss beside other cancellations


@pytest.mark.parametrize("loss_first", [True, False])
async def test_a_timeout_inside_the_body_that_expires_with_the_loss_does_not_hide_it(loss_first: bool) -> None:
    """LockLost comes out, and the task is as uncancelled as before."""
    with pytest.raises(LockLost):
        async with Store().body() as lease:
            async with asyncio.timeout(60) as inner:
                calls = [lambda: lease.mark_lost("was lost"), lambda: inner.reschedule(0)]
                soon(*(calls if loss_first else reversed(calls)))
                await for_ever()
    assert cancelling() == 0


async def test_a_timeout_inside_the_body_that_did_not_expire_lets_the_loss_through() -> None:
    """It is no TimeoutError."""
    with pytest.raises(LockLost, match="was lost"):
        async with Store().body() as lease, asyncio.timeout(60):
            soon(lambda: lease.mark_lost("was lost"))
            await for_ever()
    assert cancelling() == 0


@pytest.mark.parametrize(("loss_first", "error"), [(True, LockLost), (False, TimeoutError)])
async def test_a_timeout_around_the_body_that_expires_with_the_loss_is_not_left_over(
    loss_first: bool, error: type[Exception]
) -> None:
    """Whichever came first comes out; the task is as uncancelled as before."""
    with pytest.raises(error):
        async with asyncio.timeout(60) as outer:
            async with Store().body() as lease:
                calls = [lambda: lease.mark_lost("was lost"), lambda: outer.reschedule(0)]
                soon(*(calls if loss_first else reversed(calls)))
                await for_ever()
    assert cancelling() == 0


@pytest.mark.parametrize("loss_first", [True, False])
async def test_a_cancellation_from_outside_with_the_loss_stays_a_cancellation(loss_first: bool) -> None:
    """The loss is a note on it."""

    async def run() -> None:
        async with Store().body() as lease:
            task = asyncio.current_task()
            assert task is not None
            calls = [lambda: lease.mark_lost("was lost"), task.cancel]
            soon(*(calls if loss_first else reversed(calls)))
            await for_ever()

    task = asyncio.create_task(run())
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert "was lost" in cancelled.value.__notes__[0]
    assert task.cancelled()


async def test_a_failing_sibling_in_a_task_group_around_the_body_is_what_the_group_raises() -> None:
    """The loss in the same moment does not take its place."""
    failing = asyncio.Event()

    async def sibling() -> None:
        await failing.wait()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as group:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sibling())
            async with Store().body() as lease:
                soon(failing.set, lambda: soon(lambda: lease.mark_lost("was lost")))
                await for_ever()
    assert [type(error) for error in group.value.exceptions] == [ZeroDivisionError]
    assert cancelling() == 0


async def test_tasks_of_a_group_inside_the_body_end_with_it() -> None:
    """The loss cancels them, and comes out alone."""
    ended = []

    async def child() -> None:
        try:
            await for_ever()
        finally:
            ended.append(True)

    with pytest.raises(LockLost):
        async with Store().body() as lease, asyncio.TaskGroup() as tasks:
            tasks.create_task(child())
            tasks.create_task(child())
            await asyncio.sleep(0)
            lease_lost = asyncio.get_running_loop().call_soon(lease.mark_lost, "was lost")
    assert ended == [True, True]
    assert not lease_lost.cancelled()
    assert cancelling() == 0


async def test_two_nested_leases_lost_at_once_raise_one_lock_lost() -> None:
    """The outer one's; no cancellation is left over."""
    with pytest.raises(LockLost, match="'outer' was lost"):
        async with Store().body(name="outer") as outer, Store().body(name="inner") as inner:
            soon(lambda: outer.mark_lost("was lost"), lambda: inner.mark_lost("was lost"))
            await for_ever()
    assert cancelling() == 0
    await asyncio.sleep(0)


async def test_the_inner_lease_is_released_when_the_outer_one_is_lost() -> None:
    """The outer lease is released too when the inner one is lost; LockLost names the one that was lost."""
    for name in ("outer", "inner"):
        stores = {"outer": Store(), "inner": Store()}
        with pytest.raises(LockLost, match=f"'{name}' was lost"):
            async with stores["outer"].body(name="outer") as outer, stores["inner"].body(name="inner") as inner:
                lease = {"outer": outer, "inner": inner}[name]
                soon(lambda lease=lease: lease.mark_lost("was lost"))  # type: ignore[misc]
                await for_ever()
        assert [store.released for store in stores.values()] == [1, 1]
        assert cancelling() == 0


async def test_the_bodys_own_error_after_the_loss_passes_with_a_note() -> None:
    """A body that turns its cancellation into an error of its own is not corrected."""
    with pytest.raises(ZeroDivisionError) as raised:
        async with Store().body() as lease:
            soon(lambda: lease.mark_lost("was lost"))
            try:
                await for_ever()
            finally:
                raise ZeroDivisionError
    assert "'n' was lost" in raised.value.__notes__[0]
    assert cancelling() == 0


async def test_a_body_that_swallows_the_cancellation_ends_in_lock_lost() -> None:
    """The task is not left half cancelled."""
    with pytest.raises(LockLost):
        async with Store().body() as lease:
            soon(lambda: lease.mark_lost("was lost"))
            with contextlib.suppress(asyncio.CancelledError):
                await for_ever()
    assert cancelling() == 0
    await asyncio.sleep(0)


async def test_a_lease_without_a_body_cancels_no_task() -> None:
    """With on_lost="flag" the body is not cancelled either: it gets LockLost at its end."""
    lease = Store().lease()
    lease.mark_lost("was lost")
    await asyncio.sleep(0)
    assert lease.lost
    assert not await lease.release()
    finished = []
    with pytest.raises(LockLost):
        async with Store().body(on_lost="flag") as flagged:
            flagged.mark_lost("was lost")
            await asyncio.sleep(0)
            finished.append(flagged.lost)
    assert finished == [True]


async def test_a_lost_lease_is_released_in_the_background() -> None:
    """If the store still counts it as ours, other clients need not wait for its TTL."""
    store = Store()
    lease = store.lease()
    lease.mark_lost("was lost")
    lease.mark_lost("twice")
    await asyncio.sleep(0)
    assert store.released == 1
    assert "was lost" in repr(lease)


async def test_a_body_entered_by_a_task_that_has_ended_can_be_lost_and_left() -> None:
    """A fixture is set up in one task and closed in another, which must not be cancelled."""
    context = Store().body()
    lease = await asyncio.create_task(context.__aenter__())
    lease.mark_lost("was lost")
    with pytest.raises(LockLost, match="was lost"):
        await context.__aexit__(None, None, None)
    assert cancelling() == 0


# ---- renewal


async def test_a_renewal_under_way_is_given_up_at_the_deadline() -> None:
    """The store does not answer: the body is told in time, and the request is cancelled."""
    given_up = []

    async def hang() -> bool:
        try:
            return await for_ever()
        finally:
            given_up.append(True)

    store = Store(hang)
    with pytest.raises(LockLost, match="before it could be renewed"):
        async with store.body(ttl=0.05):
            await for_ever()
    await asyncio.sleep(0)
    assert len(given_up) == len(store.asked) > 0


async def test_a_renewal_that_hangs_is_tried_again_before_the_deadline() -> None:
    """A connection that fell silent costs a third of the ttl, and not the lease."""
    store, renewed = Store(for_ever, yes), asyncio.Event()

    async def answer() -> bool:
        renewed.set()
        return True

    store.extends = [for_ever, answer]
    async with store.body(ttl=1.5) as lease:
        await renewed.wait()
        await asyncio.sleep(0)
        assert lease.held
    assert len(store.asked) == 2


async def test_a_renewal_that_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """One that succeeds makes the failure forgotten: a later loss has another cause, or none."""
    store = Store(fail, yes)
    with pytest.raises(LockLost) as lost:
        async with store.body(ttl=1.0) as lease:
            while len(store.asked) < 2:
                await asyncio.sleep(0.001)
            assert lease.held
            soon(lambda: lease.mark_lost("was lost"))
            await for_ever()
    assert "renewal of 'n' failed" in caplog.text
    assert "the store is away" in caplog.text
    assert lost.value.__cause__ is None


async def test_renewals_that_all_fail_are_the_cause_of_the_loss() -> None:
    """Tried again every tenth of the ttl, not more often."""
    store = Store(fail)
    with pytest.raises(LockLost, match="before it could be renewed") as lost:
        async with store.body(ttl=0.2):
            await for_ever()
    assert isinstance(lost.value.__cause__, ConnectionError)
    assert 1 <= len(store.asked) <= 8


async def test_a_renewal_that_finds_the_lease_gone_ends_it_at_once() -> None:
    """Long before the deadline."""
    store = Store(yes, no)
    with pytest.raises(LockLost, match="taken away"):
        async with store.body(ttl=0.3):
            await for_ever()
    assert len(store.asked) == 2


async def test_without_renewal_the_lease_ends_with_its_ttl() -> None:
    """It says why."""
    store = Store()
    with pytest.raises(LockLost, match="it is not renewed"):
        async with store.body(ttl=0.02, renew=False):
            await for_ever()
    assert store.asked == []


async def test_an_extension_beside_a_renewal_never_claims_more_than_was_granted() -> None:
    """extend(60) fails while a renewal of 10 s is under way: the deadline is the renewal's."""
    clock, gate = Hands(), asyncio.Event()

    async def slowly() -> bool:
        return await gate.wait()

    store = Store(slowly, fail)
    lease = store.lease(ttl=10, clock=clock)
    renewal = asyncio.create_task(lease.extend())
    await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await lease.extend(60)
    gate.set()
    await renewal
    assert store.asked == [10, 60]
    assert lease.remaining() == pytest.approx(9.898)
    assert lease.ttl == 10


@kills("the last answer decides the deadline", replaced(Lease, "_start_ttl", start_ttl_even_if_shorter))
async def test_extensions_that_overtake_each_other_keep_the_longer_one() -> None:
    """A renewal of 10 s asked before an extension by 60, and answered after it."""
    gate = asyncio.Event()

    async def slowly() -> bool:
        return await gate.wait()

    lease = Store(slowly, yes).lease(ttl=10, clock=Hands())
    renewal = asyncio.create_task(lease.extend())
    await asyncio.sleep(0)
    await lease.extend(60)
    gate.set()
    await renewal
    assert lease.remaining() == pytest.approx(59.398)


async def test_an_extension_counts_from_when_it_was_asked_for() -> None:
    """The answer took two seconds, which belong to the lease."""
    clock = Hands()

    async def slowly() -> bool:
        clock.now += 2
        return True

    lease = Store(slowly).lease(ttl=10, clock=clock)
    await lease.extend()
    assert lease.remaining() == pytest.approx(7.898)


async def test_an_extension_answered_after_the_release_is_no_extension() -> None:
    """LockLost says that it was released meanwhile."""
    gate = asyncio.Event()

    async def slowly() -> bool:
        return await gate.wait()

    lease = Store(slowly).lease()
    task = asyncio.create_task(lease.extend())
    await asyncio.sleep(0)
    await lease.release()
    gate.set()
    with pytest.raises(LockLost, match="was released"):
        await task


@pytest.mark.parametrize("ttl", [0, -1, "5", 90_000, True])
async def test_an_extension_with_a_bad_ttl_does_not_ask_the_store(ttl: Any) -> None:
    """The lease is as before."""
    store = Store()
    lease = store.lease()
    with pytest.raises((TypeError, ValueError), match="ttl="):
        await lease.extend(ttl)
    assert lease.held
    assert store.asked == []


# ---- other tasks


async def test_another_task_may_extend_and_release_it() -> None:
    """The lease is passed on like any object; its body ends without complaint."""
    store = Store()
    async with store.body() as lease:
        await asyncio.create_task(lease.extend(60))
        assert await asyncio.create_task(lease.release())
    assert (store.asked, store.released) == ([60], 1)


async def test_a_loss_found_by_another_task_ends_the_body() -> None:
    """The child gets LockLost from its call, the body is cancelled and gets it too."""
    found = []

    async def child(lease: Lease) -> None:
        try:
            await lease.extend()
        except LockLost as lost:
            found.append(str(lost))

    with pytest.raises(LockLost, match="taken away"):
        async with Store(no).body() as lease:
            task = asyncio.create_task(child(lease))
            await for_ever()
    await task
    assert "taken away" in found[0]


async def test_a_loss_found_by_the_body_itself_is_raised_and_cancels_nothing() -> None:
    """Its own extend() says so; the end of the body lets that error pass as it is."""
    with pytest.raises(LockLost, match="taken away") as lost:
        async with Store(no).body() as lease:
            await lease.extend()
    assert not hasattr(lost.value, "__notes__")
    assert cancelling() == 0
    await asyncio.sleep(0)


@kills("a released lease is remembered for ever", replaced(LeasedLock, "_add_hold", add_and_keep))
async def test_a_task_whose_leases_are_released_elsewhere_does_not_collect_them() -> None:
    """A producer acquires, consumers release: neither its context nor the lock's memory grows.

    The event loop itself keeps a hundred timers that were cancelled, and with them what they knew.
    """
    lock, before = a_lock(), len(held_leases.get())
    seen = []
    for _ in range(500):
        lease = lock._add_hold(Store().lease())
        seen.append(weakref.ref(lease))
        await asyncio.create_task(lease.release())
        del lease
    gc.collect()
    assert len(held_leases.get()) <= before + 1
    assert sum(ref() is not None for ref in seen) < 250


# ---- several tasks with one lock


async def test_each_task_takes_its_own_lease() -> None:
    """The newest of several; one that has none may take the only one there is, else it is told."""
    lock, entered, leave = a_lock(), asyncio.Event(), asyncio.Event()

    async def other() -> bool:
        lease = lock._add_hold(Store().lease("other"))
        entered.set()
        await leave.wait()
        return lock._pop_hold() is lease

    task = asyncio.create_task(other())
    await entered.wait()
    outer, inner = lock._add_hold(Store().lease("outer")), lock._add_hold(Store().lease("inner"))
    assert (lock._pop_hold(), lock._pop_hold()) == (inner, outer)
    leave.set()
    assert await task
    with pytest.raises(RuntimeError, match="this task does not hold 'n': acquire it first"):
        lock._pop_hold()


async def test_a_task_without_a_lease_may_take_the_only_one() -> None:
    """An exit stack closed elsewhere; of two it could be the wrong one."""
    lock = a_lock()

    async def acquire() -> Lease:
        return lock._add_hold(Store().lease())

    only = await asyncio.create_task(acquire())
    assert lock._pop_hold() is only
    for _ in range(2):
        await asyncio.create_task(acquire())
    with pytest.raises(RuntimeError, match="this task does not hold"):
        lock._pop_hold()


async def test_a_lost_lease_is_left_in_order_when_its_task_acquired_again(redis: Redis) -> None:
    """With on_lost="flag" the body goes on and may enter the same lock anew: each end finds its own lease."""
    lock = RedisLock(redis, "anew", on_lost="flag")
    with pytest.raises(LockLost, match="was lost"):
        async with lock as first:
            first.mark_lost("was lost")
            async with lock as second:
                assert second.held
            assert not second.held


# ---- background work


async def test_background_work_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """No caller is left that could get it."""
    await asyncio.wait({in_background(fail(), "giving back 'n'")})
    assert "giving back 'n' failed: ConnectionError('the store is away')" in caplog.text
    caplog.clear()
    assert await in_background(yes(), "giving back 'n'")
    assert caplog.text == ""


async def test_background_work_may_end_with_the_event_loop_before_it_began() -> None:
    """A program that ends right after the loss of a lease: no complaint about a coroutine that was never awaited."""
    task = in_background(fail(), "giving back 'n'")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()


async def test_background_work_is_kept_until_it_is_done() -> None:
    """It would be collected otherwise: asyncio keeps only weak references to tasks."""
    gate: list[asyncio.Future[None]] = []

    async def wait() -> None:
        gate.append(asyncio.get_running_loop().create_future())
        await gate[0]
        gate.append(gate[0])

    task = weakref.ref(in_background(wait(), "waiting"))
    await asyncio.sleep(0)
    gc.collect()
    assert task() is not None
    gate[0].set_result(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(gate) == 2


def test_an_event_loop_may_end_with_a_lease_in_hand() -> None:
    """Nothing complains, and nothing is left that would keep the program alive."""

    async def main() -> Lease:
        return Store().lease(ttl=0.05)

    lease = asyncio.run(main())
    assert lease.token == 7


# ---- arguments and keys


@given(st.text(), st.text())
def test_a_hash_tag_holds_no_brace_and_no_two_names_share_one(one: str, other: str) -> None:
    """Whatever is in the names."""
    assert not set(hash_tag(one)) & set("{}")
    assert (hash_tag(one) == hash_tag(other)) == (one == other)


@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers())
def test_a_ttl_is_a_number_of_seconds_that_leaves_time_to_work(ttl: float) -> None:
    """Longer than the 2 ms that clocks may drift, at most a day."""
    if local_deadline(0, ttl) > 0 and ttl <= MAX_TTL:
        assert check_ttl(ttl) == ttl
    else:
        with pytest.raises(ValueError, match="ttl="):
            check_ttl(ttl)


@given(st.floats(0.003, MAX_TTL))
def test_milliseconds_are_never_fewer_than_the_seconds(seconds: float) -> None:
    """The store's ttl is rounded up, so the local deadline stays before it."""
    assert seconds * 1000 <= milliseconds(seconds) <= seconds * 1000 + 1
    assert local_deadline(0, seconds) < milliseconds(seconds) / 1000
    assert math.isfinite(milliseconds(seconds))
