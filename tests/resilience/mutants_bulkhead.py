"""Bugs planted in the bulkhead, hyx's lost permit among them, each with the test that has to die of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from distsys.errors import BulkheadFull
from distsys.resilience import composed
from distsys.resilience.bulkhead import Bulkhead, OnFull, SharedCapacity
from tests.resilience import test_bulkhead as promises
from tests.resilience import test_composed as whole
from tests.survival import lives

queue_up, withdraw, leave, make_room = Bulkhead._queue_up, Bulkhead._withdraw, Bulkhead.leave, SharedCapacity.make_room
borrow, init, init_shared = Bulkhead._borrow, Bulkhead.__init__, SharedCapacity.__init__
ENDED = promises.test_ended_at_every_await_a_call_leaves_all_as_it_was
RANDOM = promises.test_ten_thousand_random_schedules_lose_no_permit
IN_ORDER = promises.test_those_who_wait_are_served_in_order_and_nobody_overtakes
TIERS = promises.test_tiers_share_one_capacity_as_the_model_does


def keeps_it_when_cancelled(self: Any, fn: Any) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        if not self.try_enter():
            await self.wait()
        result = await fn(*args, **kwargs)
        self.leave()
        return result

    return call


def grant_lost(self: Any, waiter: Any, timed_out: bool = False) -> None:
    if not waiter.granted:
        withdraw(self, waiter, timed_out)


def stays_in_the_queue(self: Any, waiter: Any, timed_out: bool = False) -> None:
    if waiter.granted and not timed_out:
        self.leave()


def passed_on_when_timed_out(self: Any, waiter: Any, timed_out: bool = False) -> None:
    if waiter.granted and timed_out:
        waiter.granted = False
        self.leave()
    else:
        withdraw(self, waiter, timed_out)


def last_come_first_served(self: Any, waiter: Any) -> None:
    queue_up(self, waiter)
    if self.queue and self.queue[-1] is waiter:
        self.queue.rotate(1)


def overtakes(self: Any) -> bool:
    return bool(self.take())


def twice(self: Any) -> None:
    with self.lock:
        for lane in self.lanes:
            while lane.queue and lane.take():
                waiter = lane.next_waiter()
                lane._time_the_queue()
                waiter.granted = True
                if not waiter.wake():
                    lane.permits.append(None)


def no_bound(self: Any, lane: Any) -> bool:
    return True


def sheds_nobody(self: Any, lane: Any) -> bool:
    return len(lane.queue) < lane.max_waiting and (self.max_waiting is None or self.waiting < self.max_waiting)


def sheds_the_newest(self: Any, lane: Any) -> bool:
    for each in self.lanes:
        each.queue.reverse()
    try:
        return make_room(self, lane)
    finally:
        for each in self.lanes:
            each.queue.reverse()


def no_floor(self: Any, capacity: int, floors: Any, **options: Any) -> None:
    init_shared(self, capacity, floors, **options)
    self.spare = capacity


def nothing_lent(self: Any, anyway: bool = False) -> bool:
    return anyway and borrow(self, anyway)


def lowest_first(self: Any, lane: Any) -> None:
    with self.lock:
        self.lanes.append(lane)
        self.lanes.sort(key=lambda each: -list(promises.Tier).index(each.tier))


def pays_nothing_back(self: Any) -> None:
    self.permits.append(None)
    if self._capacity.waiting:
        self._capacity.hand_on()


def since_the_process_began(self: Any) -> None:
    self._interval = self._capacity.clock()


def always(policy: OnFull) -> Callable[..., None]:
    return lambda self, *args, **options: init(self, *args, **{**options, "policy": policy})


def half_a_policy(policy: str, expected: Any) -> Callable[[], object]:
    return partial(promises.test_a_call_without_a_permit_is_treated_by_the_policy, policy, expected, 1)


def discards_what_the_call_raised(self: Any, fn: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with self:
                return fn(*args, **kwargs)
        except BulkheadFull:
            return None

    return call


def merged_without_a_ticket(self: Any, breaker: Any, gate: Any, stacked: Any) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        if breaker.closed is None or not gate.try_enter():
            return await stacked(*args, **kwargs)
        try:
            result = await stacked.__wrapped__.__wrapped__(*args, **kwargs)
        except Exception as error:
            breaker.failed(breaker.closed, error)
            raise
        finally:
            gate.leave()
        breaker.succeeded(breaker.closed)
        return result

    return call


MUTANTS: list[tuple[str, Any, str, Any, Callable[[], object]]] = [
    ("hyx: a cancelled holder keeps its permit", Bulkhead, "for_async", keeps_it_when_cancelled, ENDED),
    ("hyx: a permit granted to a cancelled waiter is lost", Bulkhead, "_withdraw", grant_lost, RANDOM),
    ("a cancelled waiter stays in the queue", Bulkhead, "_withdraw", stays_in_the_queue, ENDED),
    (
        "granted and timed out at once, the permit is lost to the call",
        Bulkhead,
        "_withdraw",
        passed_on_when_timed_out,
        partial(promises.test_a_permit_that_comes_at_the_moment_of_the_end_is_kept_or_passed_on, 1, 1, False),
    ),
    (
        "last come, first served",
        Bulkhead,
        "_queue_up",
        last_come_first_served,
        IN_ORDER,
    ),
    ("who comes later overtakes", Bulkhead, "try_enter", overtakes, IN_ORDER),
    (
        "a waiter whose loop is gone gives back what it never had",
        SharedCapacity,
        "hand_on",
        twice,
        promises.test_permits_come_back_from_a_loop_that_is_gone_but_only_once,
    ),
    ("any number may wait", SharedCapacity, "make_room", no_bound, RANDOM),
    (
        "nobody is shed",
        SharedCapacity,
        "make_room",
        sheds_nobody,
        promises.test_a_shed_call_says_so_and_with_caller_runs_it_runs,
    ),
    (
        "the newest is shed",
        SharedCapacity,
        "make_room",
        sheds_the_newest,
        TIERS,
    ),
    (
        "floors are not kept free",
        SharedCapacity,
        "__init__",
        no_floor,
        promises.test_a_floor_is_kept_free_before_its_bulkhead_is_made,
    ),
    ("nothing is lent", Bulkhead, "_borrow", nothing_lent, TIERS),
    (
        "the lowest tier is served first",
        SharedCapacity,
        "add",
        lowest_first,
        TIERS,
    ),
    (
        "calls beyond the limit leave permits behind",
        Bulkhead,
        "leave",
        pays_nothing_back,
        promises.test_calls_beyond_the_limit_are_paid_back_before_anybody_else_runs,
    ),
    (
        "the wait is the age of the process",
        Bulkhead,
        "_time_the_queue",
        since_the_process_began,
        promises.test_a_waiter_is_told_how_long_it_will_take,
    ),
    ("ABORT waits", Bulkhead, "__init__", always(OnFull.QUEUE), half_a_policy("abort", BulkheadFull)),
    ("DISCARD raises", Bulkhead, "__init__", always(OnFull.QUEUE), half_a_policy("discard", None)),
    ("CALLER_RUNS is refused", Bulkhead, "__init__", always(OnFull.QUEUE), half_a_policy("caller_runs", "ran")),
    ("QUEUE does not wait", Bulkhead, "__init__", always(OnFull.ABORT), half_a_policy("queue", BulkheadFull)),
    (
        "DISCARD hides the refusal of another bulkhead",
        Bulkhead,
        "for_sync",
        discards_what_the_call_raised,
        promises.test_discard_hides_only_its_own_refusal,
    ),
    (
        "the merged path asks for its ticket at the end",
        composed.Resilient,
        "_merged",
        merged_without_a_ticket,
        whole.test_composed_is_as_stacked_in_every_state,
    ),
]


@pytest.mark.parametrize(("name", "home", "attribute", "broken", "killer"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_bug_in_the_bulkhead_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, home: Any, attribute: str, broken: Any, killer: Callable[[], object]
) -> None:
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    assert killer is RANDOM or lives(killer)  # ten thousand schedules are run once, in the test itself
    monkeypatch.setattr(home, attribute, broken)
    assert not lives(killer)
