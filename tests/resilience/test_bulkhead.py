"""Bulkhead: no permit is lost or given twice, whatever ends when; in virtual time, at every await, in threads."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from distsys import OnFull, SharedCapacity, Tier, bulkhead
from distsys.errors import BulkheadFull
from distsys.resilience.bulkhead import Bulkhead
from tests.bugs import edited, kills, replaced
from tests.resilience import broken
from tests.resilience.threads import in_threads
from tests.resilience.virtual import Clock, Loop, at_every_await, run


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def untouched(*gates: Bulkhead) -> None:
    """Nobody runs or waits, and all permits can be taken: not one less, not one more."""
    for gate in gates:
        assert (gate.running, gate.depth, gate._capacity.waiting) == (0, 0, 0)
        assert [gate.try_enter() for _ in range(gate.max_concurrent + 1)] == [True] * gate.max_concurrent + [False]
        for _ in range(gate.max_concurrent):
            gate.leave()


# ---- who runs, who waits


@pytest.mark.parametrize(("tier", "runs", "waits", "timeout"), [(tier, *tier.value) for tier in Tier])
def test_a_tier_says_how_many_run_and_wait_and_for_how_long(tier: Tier, runs: int, waits: int, timeout: float) -> None:
    """Critical 5, 10, 300 s; Standard 8, 12, 120 s; Optional 4, 6, 60 s; one more is refused at once."""
    gate = bulkhead(tier, name="db")

    async def main() -> None:
        release = asyncio.Event()
        calls = [asyncio.create_task(gate.call(release.wait)) for _ in range(runs + waits)]
        await turns(1)
        assert (gate.running, gate.depth, gate.utilisation) == (runs, waits, 1.0)
        with pytest.raises(BulkheadFull) as full:
            await gate.call(release.wait)
        assert str(full.value) == f"db: the queue is full ({runs} running, {waits} waiting)"
        assert (full.value.depth, full.value.name, full.value.retry_after, gate.rejected) == (waits, "db", 1.0, 1)
        began = asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert asyncio.get_running_loop().time() - began == timeout
        assert "no permit came free within" in str(done.pop().exception())
        release.set()
        await asyncio.wait(calls)

    run(main())
    assert gate.rejected == 1 + waits
    untouched(gate)


@kills("last come, first served", replaced(Bulkhead, "_queue_up", broken.last_come_first_served))
@kills("a later call overtakes", replaced(Bulkhead, "try_enter", Bulkhead.take))
def test_those_who_wait_are_served_in_order_and_nobody_overtakes() -> None:
    """A call that comes while another waits has to wait, too; even between the two steps of leave(), as in a thread."""
    gate, order = bulkhead(max_concurrent=1, max_waiting=99), []

    async def work(number: int) -> None:
        order.append(number)
        await turns(1)

    async def main() -> None:
        calls = [asyncio.create_task(gate.call(work, number)) for number in range(5)]
        await turns(1)
        gate.permits.append(None)
        assert not gate.try_enter()
        gate.permits.pop()
        late = asyncio.create_task(gate.call(work, 99))
        await asyncio.gather(*calls, late)

    run(main())
    assert order == [0, 1, 2, 3, 4, 99]
    assert gate.running == 0


@kills(
    "the wait is the age of the process", replaced(Bulkhead, "_update_wait_estimate", broken.since_the_process_began)
)
def test_a_waiter_is_told_how_long_it_will_take() -> None:
    """The time between permits handed to this queue, times its length; no idle time, and not another tier's."""
    clock = Clock()
    shared = SharedCapacity(2, {Tier.CRITICAL: 1, Tier.OPTIONAL: 1}, clock=clock)
    gates = [bulkhead(max_concurrent=1, max_waiting=2, clock=clock)]
    gates += [bulkhead(tier, max_concurrent=1, max_waiting=2, capacity=shared) for tier in shared.floors]

    async def main(gate: Bulkhead) -> None:
        release = asyncio.Semaphore(0)
        for _ in range(2):
            clock.now += 1_000
            calls = [asyncio.create_task(gate.call(release.acquire)) for _ in range(3)]
            await turns(1)
            with pytest.raises(BulkheadFull) as full:
                await gate.call(turns)
            await asyncio.sleep(0)
            for _ in calls:
                clock.now += 4
                release.release()
                await turns()
        assert (full.value.expected_wait, full.value.retry_after) == (12.0, 12.0)

    for gate in gates:
        run(main(gate))


# ---- policies


def fill(policy: OnFull | str, **options: Any) -> Bulkhead:
    """One runs, as many as may wait."""
    gate = bulkhead(**{"max_concurrent": 1, "max_waiting": 0, "timeout": 5, "policy": policy, **options})
    assert gate.try_enter()
    return gate


@kills("ABORT waits", replaced(Bulkhead, "__init__", broken.always(OnFull.QUEUE)), policy="abort", waiting=1)
@kills("DISCARD raises", replaced(Bulkhead, "__init__", broken.always(OnFull.QUEUE)), policy="discard", waiting=1)
@kills(
    "CALLER_RUNS is refused",
    replaced(Bulkhead, "__init__", broken.always(OnFull.QUEUE)),
    policy="caller_runs",
    waiting=1,
)
@kills("QUEUE does not wait", replaced(Bulkhead, "__init__", broken.always(OnFull.ABORT)), policy="queue", waiting=1)
@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [("abort", BulkheadFull), ("queue", BulkheadFull), ("caller_runs", "ran"), ("discard", None)],
)
def test_a_call_without_a_permit_is_treated_by_the_policy(policy: str, expected: Any, waiting: int) -> None:
    """Sync and async alike: the queue is full, or the timeout over; ABORT waits for nothing."""
    gate = fill(policy, max_waiting=waiting, timeout=2**-7)
    ran: list[int] = []

    async def work() -> str:
        ran.append(gate.running)
        return "ran"

    async def main() -> Any:
        began = asyncio.get_running_loop().time()
        try:
            return await gate.call(work)
        finally:
            assert asyncio.get_running_loop().time() - began == (2**-7 if waiting and policy != "abort" else 0)

    def sync() -> str:
        ran.append(gate.running)
        return "ran"

    for call in (lambda: run(main()), gate(sync)):
        if expected is BulkheadFull:
            with pytest.raises(BulkheadFull):
                call()
        else:
            assert call() == expected
    assert ran == ([2, 2] if expected == "ran" else [])
    if policy == "discard":
        with pytest.raises(BulkheadFull), gate:
            pass
    assert (gate.running, gate.depth, gate.utilisation) == (1, 0, 1.0)
    gate.leave()
    untouched(gate)


@kills(
    "DISCARD hides the refusal of another bulkhead",
    replaced(Bulkhead, "for_sync", broken.discards_what_the_call_raised),
)
def test_discard_hides_only_its_own_refusal() -> None:
    """A BulkheadFull from further in passes."""
    gate = bulkhead(policy=OnFull.DISCARD)

    @gate
    def inner() -> None:
        raise BulkheadFull("not mine")

    with pytest.raises(BulkheadFull, match="not mine"):
        inner()


@kills("calls beyond the limit leave permits behind", replaced(Bulkhead, "leave", broken.repays_nothing))
def test_calls_beyond_the_limit_are_paid_back_before_anybody_else_runs() -> None:
    """CALLER_RUNS: three run in the place of one, who waits has to wait until one is left."""
    gate = bulkhead(max_concurrent=1, max_waiting=1, policy="caller_runs", timeout=1_000)

    async def main() -> None:
        events = [asyncio.Event() for _ in range(4)]
        calls = []
        for number in (0, 3, 1, 2):
            calls.append(asyncio.create_task(gate.call(events[number].wait)))
            await turns(1)
        assert (gate.running, gate.depth, gate.utilisation) == (3, 1, 3.0)
        for number, after in ((1, (2, 1)), (0, (1, 1)), (2, (1, 0)), (3, (0, 0))):
            events[number].set()
            await turns()
            assert (gate.running, gate.depth) == after
        await asyncio.gather(*calls)

    run(main())
    untouched(gate)


# ---- nothing is lost


@kills("hyx: a cancelled holder keeps its permit", replaced(Bulkhead, "for_async", broken.keeps_it_when_cancelled))
@kills("a cancelled waiter stays in the queue", replaced(Bulkhead, "_withdraw", broken.stays_in_the_queue))
def test_ended_at_every_await_a_call_leaves_all_as_it_was() -> None:
    """Cancelled or closed, waiting or running, as a block or a call: permits, queue and who is behind."""

    async def block(gate: Bulkhead) -> None:
        async with gate:
            await turns(2)

    for way in (block, lambda gate: gate.call(turns, 2)):

        async def scene(end: Any, way: Any = way) -> None:
            gate = bulkhead(max_concurrent=1)
            before, behind = asyncio.create_task(gate.call(turns, 3)), None
            await turns(1)

            async def queue_behind() -> None:
                nonlocal behind
                behind = asyncio.create_task(gate.call(turns, 1))

            following = asyncio.create_task(queue_behind())
            with suppress(asyncio.CancelledError):
                await end(way(gate))
            await asyncio.gather(before, following)
            await behind  # type: ignore[misc]
            untouched(gate)

        assert at_every_await(scene) == 3  # the queue, and two of the work


@kills(
    "granted and timed out at once, the permit is lost to the call",
    replaced(Bulkhead, "_withdraw", broken.passed_on_when_timed_out),
    leaves=1,
    cancels=1,
    cancelled=False,
)
@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("leaves", [-1, 0, 1])
@pytest.mark.parametrize("cancels", [-1, 1])
def test_a_permit_that_comes_at_the_moment_of_the_end_is_kept_or_passed_on(
    leaves: int, cancels: int, cancelled: bool
) -> None:
    """In one turn of the loop, in any order: granted and timed out, it runs; granted and cancelled, the next runs."""
    gate, ran = bulkhead(max_concurrent=1, timeout=5), []

    async def work(number: int) -> None:
        ran.append(number)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert gate.try_enter()
        calls = [asyncio.create_task(gate.call(work, 0))]
        at = loop.time() + 5
        loop.call_at(at - 1, lambda: calls.append(asyncio.create_task(gate.call(work, 1))))
        await turns(1)
        loop.call_at(at + leaves * 1e-10, gate.leave)  # within what a turn takes for the same moment
        if cancelled:
            loop.call_at(at + cancels * 1e-10, calls[0].cancel)
        with suppress(asyncio.CancelledError, BulkheadFull):
            await calls[0]
        await calls[1]

    run(main())
    assert ran == ([1] if cancelled else [0, 1])
    untouched(gate)


async def schedule(seed: int) -> None:
    """Six calls that come, run, give up and are cancelled at random whole seconds: many at the same moment."""
    chance = random.Random(seed)
    most, waiting = chance.randint(1, 3), chance.randint(0, 4)
    policy = chance.choice(["queue", "queue", "queue", "caller_runs", "discard", "abort"])
    gate = bulkhead(max_concurrent=most, max_waiting=waiting, timeout=chance.randint(0, 4), policy=policy)
    queue: deque[int] = deque()
    running: set[int] = set()
    began: dict[int, float] = {}

    async def work(number: int, seconds: int, fails: bool) -> None:
        running.add(number)
        if policy != "caller_runs":
            assert len(running) <= most
        try:
            began[number] = asyncio.get_running_loop().time()
            await asyncio.sleep(seconds)
            if fails:
                raise ConnectionResetError
        finally:
            running.discard(number)

    async def call(number: int) -> None:
        await asyncio.sleep(chance.randint(0, 4))
        queue.append(number)
        await gate.call(work, number, chance.randint(0, 3), chance.random() < 0.2)

    loop = asyncio.get_running_loop()
    calls = [asyncio.create_task(call(number)) for number in range(6)]
    for task in calls:
        if chance.random() < 0.4:
            loop.call_later(chance.randint(0, 6), task.cancel)
    while not all(task.done() for task in calls):
        assert gate.depth <= waiting
        assert gate.depth == 0 or gate.running >= most  # nobody waits for nothing
        await asyncio.sleep(1)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, BulkheadFull | ConnectionResetError | asyncio.CancelledError | None)
    if policy == "queue":
        times = [began[number] for number in queue if number in began]
        assert times == sorted(times), "first come, first served"
    untouched(gate)


@kills("hyx: a permit granted to a cancelled waiter is lost", replaced(Bulkhead, "_withdraw", broken.grant_lost))
@kills("any number may wait", replaced(SharedCapacity, "make_room", lambda self, lane: True))
def test_ten_thousand_random_schedules_lose_no_permit() -> None:
    """The limit, the bound of the queue and the order of arrival hold, too."""

    async def main() -> None:
        for seed in range(10_000):
            try:
                await schedule(seed)
            except BaseException as error:
                error.add_note(f"schedule({seed})")
                raise

    run(main())


@kills(
    "a waiter whose loop is gone gives back what it never had",
    replaced(SharedCapacity, "grant_waiters", broken.granted_to_nobody),
)
def test_permits_come_back_from_a_loop_that_is_gone_but_only_once() -> None:
    """A waiter whose loop was closed is passed over; when its coroutine is collected, it gives back nothing."""
    gate = bulkhead(max_concurrent=1)
    loop = Loop()
    assert gate.try_enter()
    waiter = loop.create_task(gate.call(turns))
    loop.run_until_complete(turns(1))
    assert gate.depth == 1
    loop.close()
    gate.leave()
    assert (gate.depth, gate.running) == (0, 0)
    waiter._log_destroy_pending = False
    del waiter
    gc.collect()
    untouched(gate)


def test_a_waiter_that_got_its_permit_and_was_then_forgotten_gives_it_back() -> None:
    """Its loop was closed between the grant and its turn."""
    gate = bulkhead(max_concurrent=1)
    loop = Loop()
    assert gate.try_enter()
    waiter = loop.create_task(gate.call(turns))
    loop.run_until_complete(turns(1))
    gate.leave()
    assert gate.running == 1
    loop.close()
    waiter._log_destroy_pending = False
    del waiter
    gc.collect()
    untouched(gate)


def test_threads_and_loops_share_one_bulkhead_and_lose_no_permit() -> None:
    """Six threads and two event loops, 10,000 calls that run, give up, fail: never more than three at a time."""
    gate = bulkhead(max_concurrent=3, max_waiting=4, timeout=0.001)
    guard, running, most, done = threading.Lock(), [], [], []
    seeds = iter(range(99))

    def enter(chance: random.Random) -> None:
        with guard:
            running.append(1)
            most.append(len(running))
        sum(range(chance.randint(0, 300)))
        with guard:
            running.pop()
        if chance.random() < 0.2:
            raise ConnectionResetError

    async def enter_async(chance: random.Random) -> None:
        await turns(chance.randint(0, 2))
        enter(chance)

    def task() -> None:
        chance = random.Random(next(seeds))
        for _ in range(1_250):
            with suppress(BulkheadFull, ConnectionResetError):
                gate(enter)(chance)
            done.append(1)

    async def crowd() -> None:
        chance = random.Random(next(seeds))
        for _ in range(125):
            calls = [asyncio.create_task(gate.call(enter_async, chance)) for _ in range(10)]
            await turns(1)
            for running_call in calls:
                if chance.random() < 0.3:
                    running_call.cancel()
            await asyncio.wait(calls)
            for ended in calls:
                assert ended.cancelled() or isinstance(ended.exception(), BulkheadFull | ConnectionResetError | None)
            done.extend(calls)

    kinds = iter([task] * 6 + [lambda: asyncio.run(crowd())] * 2)
    in_threads(8, lambda: next(kinds)())
    assert len(done) == 10_000
    assert max(most) <= 3
    untouched(gate)


def test_a_thread_waits_its_turn_and_any_time_it_likes() -> None:
    """timeout=inf is for ever; the permit comes from an event loop or a thread."""
    gate = bulkhead(max_concurrent=1, timeout=math.inf)
    with gate:
        waits = threading.Thread(target=gate(int))
        waits.start()
        while not gate.depth:
            pass
    waits.join(10)
    assert not waits.is_alive()
    untouched(gate)


def test_a_permit_that_comes_back_while_a_call_queues_up_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who leaves has looked for waiters before there was one, the one who waits for a permit before it came."""
    gate = bulkhead(max_concurrent=1)
    assert gate.try_enter()
    make_room = gate._capacity.make_room

    def meanwhile(lane: Bulkhead) -> bool:
        gate.leave()
        return make_room(lane)

    monkeypatch.setattr(gate._capacity, "make_room", meanwhile)
    assert run(gate.wait())
    gate.leave()
    untouched(gate)


def test_threads_that_borrow_from_each_other_leave_all_floors_and_spares_as_they_were() -> None:
    """Two tiers, one that runs beyond its limit: what was lent and owed is back."""
    shared = SharedCapacity(3, {Tier.CRITICAL: 1, Tier.OPTIONAL: 1}, max_waiting=2)
    gates = [bulkhead(Tier.CRITICAL, capacity=shared), bulkhead(Tier.OPTIONAL, capacity=shared, policy="caller_runs")]
    turn = iter(range(6))

    def task() -> None:
        gate = gates[next(turn) % 2]
        for _ in range(500):
            with suppress(BulkheadFull):
                gate(sum)(range(100))

    in_threads(6, task)
    assert [gate.running for gate in gates] + [shared.waiting, shared.spare] == [0, 0, 0, 1]
    assert [len(gate.permits) for gate in gates] == [1, 1]


# ---- tiers that share a capacity


class Model:
    """A model of three tiers: the calls that run and the calls that wait, the longest waiting first."""

    def __init__(self, capacity: int, floors: list[int], most_waiting: int) -> None:
        self.capacity, self.floors, self.most_waiting = capacity, floors, most_waiting
        self.running: list[list[int]] = [[], [], []]
        self.waiting: list[list[int]] = [[], [], []]
        self.refused: list[int] = []

    def free(self, tier: int) -> bool:
        taken = sum(max(len(running), floor) for running, floor in zip(self.running, self.floors, strict=True))
        return len(self.running[tier]) < self.floors[tier] or taken < self.capacity

    def comes(self, tier: int, number: int) -> None:
        if not self.waiting[tier] and self.free(tier):
            self.running[tier].append(number)
            return
        if len(self.waiting[tier]) >= 3:
            self.refused.append(number)
            return
        if sum(map(len, self.waiting)) >= self.most_waiting:
            lowest = max((other for other in range(3) if self.waiting[other]), default=-1)
            if lowest <= tier:
                self.refused.append(number)
                return
            self.refused.append(self.waiting[lowest].pop(0))
        self.waiting[tier].append(number)

    def goes(self, tier: int) -> int | None:
        if not self.running[tier]:
            return None
        gone = self.running[tier].pop(0)
        for other in range(3):
            while self.waiting[other] and self.free(other):
                self.running[other].append(self.waiting[other].pop(0))
        return gone


@kills("the newest is shed", replaced(SharedCapacity, "make_room", broken.sheds_the_newest))
@kills("nothing is lent", replaced(Bulkhead, "_borrow", broken.nothing_lent))
@kills("the lowest tier is served first", replaced(SharedCapacity, "add", broken.lowest_first))
def test_tiers_share_one_capacity_as_the_model_does() -> None:
    """Floors kept free, the rest lent, Critical served first, Optional shed first, the longest waiting of them."""
    for seed in range(400):
        run(share(random.Random(seed)))


async def share(chance: random.Random) -> None:
    """Let thirty calls come or go; three come for one that goes."""
    capacity, most_waiting = chance.randint(3, 5), chance.randint(0, 5)
    floors = [chance.randint(0, 1) for _ in Tier]
    steps = [(chance.random() < 0.75, chance.randrange(3)) for _ in range(30)]
    shared = SharedCapacity(capacity, dict(zip(Tier, floors, strict=True)), max_waiting=most_waiting)
    gates = [bulkhead(tier, max_waiting=3, capacity=shared) for tier in reversed(Tier)][::-1]
    model = Model(capacity, floors, most_waiting)

    events: dict[int, asyncio.Event] = {}
    calls: dict[int, asyncio.Task[Any]] = {}
    for number, (comes, tier) in enumerate(steps):
        if comes:
            events[number] = asyncio.Event()
            calls[number] = asyncio.create_task(gates[tier].call(events[number].wait))
            model.comes(tier, number)
        elif (gone := model.goes(tier)) is not None:
            events[gone].set()
        await turns()
        assert [gate.running for gate in gates] == list(map(len, model.running))
        assert [gate.depth for gate in gates] == list(map(len, model.waiting))
        assert sorted(n for n, call in calls.items() if call.done() and call.exception()) == sorted(model.refused)
    for event in events.values():
        event.set()
    await asyncio.gather(*calls.values(), return_exceptions=True)

    assert sum(gate.rejected for gate in gates) == len(model.refused)
    for gate in gates:
        assert (gate.running, gate.depth, shared.waiting) == (0, 0, 0)


@kills("floors are not kept free", edited(SharedCapacity, "spare", " - sum(self.floors.values())", ""))
def test_a_floor_is_kept_free_before_its_bulkhead_is_made() -> None:
    """The tier that borrows first does not take it, in whatever order the modules are imported."""
    shared = SharedCapacity(4, {Tier.CRITICAL: 3, Tier.OPTIONAL: 0})
    optional = bulkhead(Tier.OPTIONAL, capacity=shared)
    assert [optional.try_enter() for _ in range(2)] == [True, False]
    critical = bulkhead(Tier.CRITICAL, capacity=shared)
    assert [critical.try_enter() for _ in range(4)] == [True, True, True, False]


@kills("nobody is shed", replaced(SharedCapacity, "make_room", broken.sheds_nobody))
def test_a_shed_call_says_so_and_with_caller_runs_it_runs() -> None:
    """The higher tier took its place; shed and rejected count it."""
    for policy, outcome in (("queue", BulkheadFull), ("caller_runs", "ran"), ("discard", None)):
        shared = SharedCapacity(1, {Tier.CRITICAL: 1, Tier.OPTIONAL: 0}, max_waiting=1)
        critical = bulkhead(Tier.CRITICAL, capacity=shared)
        optional = bulkhead(Tier.OPTIONAL, capacity=shared, policy=policy)

        async def work() -> str:
            return "ran"

        async def main(critical: Bulkhead = critical, optional: Bulkhead = optional) -> Any:
            async with critical:
                low = asyncio.create_task(optional.call(work))
                await turns(1)
                high = asyncio.create_task(critical.call(work))
                (answer,) = await asyncio.gather(low, return_exceptions=True)
                assert critical.depth == 1
            assert await high == "ran"
            return answer

        answer = run(main())
        if outcome is BulkheadFull:
            assert "a call of a higher tier took its place" in str(answer)
        else:
            assert answer == outcome
        assert (optional.shed, optional.rejected) == (1, policy != "caller_runs")
        assert (critical.running, optional.running, shared.spare) == (0, 0, 0)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(bulkhead, "standard"), TypeError, "tier='standard': Tier.CRITICAL, Tier.STANDARD or Tier.OPTIONAL"),
        (partial(bulkhead, max_concurrent=0), ValueError, "max_concurrent=0: give calls, 1 or more"),
        (partial(bulkhead, max_concurrent=1.5), TypeError, "max_concurrent=1.5 is a float"),
        (partial(bulkhead, max_waiting=-1), ValueError, "max_waiting=-1: give calls, 0 or more"),
        (partial(bulkhead, timeout=-1), ValueError, "timeout=-1 is negative"),
        (partial(bulkhead, timeout="1"), TypeError, "timeout='1' is a str"),
        (partial(bulkhead, policy="wait"), ValueError, "policy='wait': one of abort, queue, caller_runs, discard"),
        (partial(bulkhead, capacity=5), TypeError, "capacity=5 is a int; give a SharedCapacity"),
        (partial(bulkhead, capacity=SharedCapacity(1, {})), ValueError, "has no floor in this capacity"),
        (
            partial(bulkhead, max_concurrent=1, capacity=SharedCapacity(2, {Tier.STANDARD: 2})),
            ValueError,
            "max_concurrent=1 is below the floor, 2",
        ),
        (partial(SharedCapacity, 0, {}), ValueError, "capacity=0: give calls at a time, 1 or more"),
        (partial(SharedCapacity, 1, {Tier.CRITICAL: -1}), ValueError, "floor of CRITICAL=-1: give calls, 0 or more"),
        (partial(SharedCapacity, 1, {"critical": 1}), TypeError, "floors={'critical': 1}: the permits of each Tier"),
        (partial(SharedCapacity, 1, {Tier.CRITICAL: 2}), ValueError, "add up to more than capacity=1"),
        (partial(SharedCapacity, 1, {}, max_waiting=-1), ValueError, "max_waiting=-1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_that_mean_nothing_are_refused(make: Any, error: type[Exception], message: str) -> None:
    """The error comes when the bulkhead is made, and names the value and its bound."""
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_a_tier_has_one_bulkhead_in_a_capacity() -> None:
    """A second one would not know of the first one's queue."""
    shared = SharedCapacity(1, {Tier.CRITICAL: 1})
    bulkhead(Tier.CRITICAL, capacity=shared)
    with pytest.raises(ValueError, match="has a bulkhead: use that one"):
        bulkhead(Tier.CRITICAL, capacity=shared)
