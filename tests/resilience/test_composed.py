"""Resilient: bulkhead, breaker, retry and timeout as one, in every state as they are stacked."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distsys import bulkhead, circuit_breaker, resilient, retry
from distsys.errors import BulkheadFull, CircuitOpen, RateLimited
from distsys.resilience.composed import Resilient
from tests.bugs import kills, replaced
from tests.resilience import broken
from tests.resilience.virtual import Clock, at_every_await, run


class Pause:
    """An await point: the call rests here until the test goes on with it."""

    def __await__(self) -> Generator[None, Any, Any]:
        return (yield)


async def work(number: int) -> Any:
    return number, await Pause()


ENDS = {"resets": ConnectionResetError, "4xx": ValueError, "refused": RateLimited, "cancelled": asyncio.CancelledError}
STEPS = ["begin", "begin", "returns", *ENDS, "close", "time", "force_open", "isolate", "reset"]


async def no_time(seconds: float) -> None: ...


class Call:
    """A call in a context of its own, as a task has one."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.coroutine, self.context = coroutine, copy_context()

    def goes_on(self, how: str = "returns") -> tuple[str, Any]:
        """Up to its next rest or its end."""
        try:
            if how == "close":
                self.context.run(self.coroutine.close)
            elif how == "returns":
                self.context.run(self.coroutine.send, None)
            else:
                self.context.run(self.coroutine.throw, ENDS[how](how))
        except StopIteration as done:
            return "returned", done.value
        except BaseException as raised:  # noqa: BLE001
            return type(raised).__name__, str(raised)
        return ("closed", None) if how == "close" else ("rests", None)


class Way:
    """One of three ways to put the same policies around the same function."""

    def __init__(self, way: str, clock: Clock, policy: str, permits: int, threshold: int, slow: float | None) -> None:
        self.gate = bulkhead(max_concurrent=permits, max_waiting=0, policy=policy, name="g")
        options: dict[str, Any] = {"window": 4, "success_threshold": 1, "slow_call_threshold": slow, "name": "b"}
        self.breaker = circuit_breaker(threshold, 10, **options, clock=clock, rng=lambda: 0.0)
        attempts = retry(2, name="r", sleep=no_time)
        if way == "stacked":
            self.call = self.gate(self.breaker(attempts(work)))
        else:
            whole = resilient(bulkhead=self.gate, circuit_breaker=self.breaker, retry=attempts)
            self.call = whole(work) if way == "merged" else partial(whole.call, work)

    def seen(self) -> tuple[Any, ...]:
        gate, breaker = self.gate, self.breaker
        return gate.running, gate.rejected, breaker.state, breaker.rejected, breaker.snapshot, breaker.last_change


@kills("the merged path asks for its ticket at the end", replaced(Resilient, "_merged", broken.merged_without_a_ticket))
@settings(max_examples=150)
@given(
    policy=st.sampled_from(["queue", "abort", "discard", "caller_runs"]),
    permits=st.integers(1, 3),
    threshold=st.integers(1, 3),
    slow=st.sampled_from([None, 5.0]),
    steps=st.lists(st.sampled_from(STEPS), max_size=50),
)
@example(policy="queue", permits=1, threshold=1, slow=None, steps=["begin", "reset", *["resets"] * 2])  # it comes late
def test_composed_is_as_stacked_in_every_state(
    policy: str, permits: int, threshold: int, slow: float | None, steps: list[str]
) -> None:
    """The merged path, policy.call() and three decorators: same answers, errors, permits, states and windows."""
    clock = Clock()
    ways = [Way(way, clock, policy, permits, threshold, slow) for way in ("stacked", "merged", "called")]

    async def main() -> None:
        under_way: list[list[Call]] = []
        for number, what in enumerate(steps):
            if what == "begin":
                under_way.append([Call(way.call(number)) for way in ways])
                answers = [call.goes_on() for call in under_way[-1]]
                if answers[0][0] != "rests":
                    under_way.pop()
            elif what == "time":
                clock.now += 5.0
                answers = []
            elif what in ("force_open", "isolate", "reset"):
                answers = [getattr(way.breaker, what)() for way in ways]
            elif not under_way:
                continue
            else:
                answers = [call.goes_on(what) for call in under_way[0]]
                if answers[0][0] != "rests":
                    under_way.pop(0)
            assert answers == answers[:1] * len(answers)
            assert [way.seen() for way in ways] == [ways[0].seen()] * 3
        for calls in under_way:
            for call in calls:
                call.goes_on("close")
        assert [way.gate.running for way in ways] == [0] * 3

    run(main())


def everything(**options: Any) -> tuple[Any, Any, Any]:
    gate = bulkhead(max_concurrent=1, max_waiting=5)
    breaker = circuit_breaker(2, 30, window=2)
    policy = resilient(
        bulkhead=gate, circuit_breaker=breaker, retry=retry(3, rng=lambda: 1.0), timeout=options.get("timeout", 10)
    )
    return policy, gate, breaker


def test_the_order_is_permit_ticket_attempts_timeout() -> None:
    """The permit is held while it waits to try again; the breaker counts calls; each attempt has its time."""
    policy, gate, breaker = everything()
    seen = []

    @policy
    async def hangs() -> None:
        seen.append((asyncio.get_running_loop().time(), gate.running, breaker.snapshot.calls))
        await asyncio.sleep(1_000)

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError) as error:
                await hangs()
            assert "attempt 3: no attempts left" in error.value.__notes__[0]
        with pytest.raises(CircuitOpen):
            await hangs()

    run(main())
    begin = seen[0][0]
    assert [(at - begin, *rest) for at, *rest in seen[:3]] == [(0, 1, 0), (11, 1, 0), (23, 1, 0)]
    assert [rest for _, *rest in seen[3:]] == [[1, 1]] * 3
    assert (gate.running, breaker.state) == (0, "open")
    assert hangs.__distsys__ == ("bulkhead", "circuit_breaker", "retry")


def test_what_waits_in_the_bulkhead_meets_the_breaker_of_its_turn() -> None:
    """It was closed when the call came, and open when its permit did."""
    policy, gate, breaker = everything()

    async def main() -> None:
        with gate:
            call = asyncio.create_task(policy(asyncio.sleep)(0))
            await asyncio.sleep(0)
            breaker.isolate()
        with pytest.raises(CircuitOpen):
            await call

    run(main())
    assert gate.running == 0


def test_ended_at_every_await_permits_and_places_are_as_before() -> None:
    """Half open, in the queue, in an attempt and between two: the next call gets through at once."""
    for way in ("decorated", "called"):

        async def scene(end: Any, way: str = way) -> None:
            policy, gate, breaker = everything()
            failures = [TimeoutError(), TimeoutError()]
            breaker.force_open()
            breaker.period.until = 0.0

            async def fails() -> None:
                await asyncio.sleep(0)
                if failures:
                    raise failures.pop()

            assert gate.try_enter()
            asyncio.get_running_loop().call_later(1, gate.leave)
            with suppress(asyncio.CancelledError):
                await end(policy(fails)() if way == "decorated" else policy.call(fails))
            await asyncio.sleep(1)
            failures.clear()
            assert (gate.running, gate.depth) == (0, 0)
            await policy.call(fails)
            assert breaker.state in ("half_open", "closed")

        assert at_every_await(scene) == 6  # the queue, three attempts, two waits between them


def test_parts_may_be_left_out_and_sync_functions_are_wrapped_as_well() -> None:
    """A timeout can't end them, and says so."""
    breaker = circuit_breaker(1)
    policy = resilient(circuit_breaker=breaker, retry=retry(2, sleep=lambda _: None), bulkhead=bulkhead())
    calls = []

    @policy
    def fails() -> None:
        calls.append(1)
        raise ConnectionResetError

    for error in (ConnectionResetError, CircuitOpen):
        with pytest.raises(error):
            fails()
    assert len(calls) == 2
    assert resilient(retry=retry())(len)("ab") == 2
    with pytest.raises(TypeError, match=r"timeout=1 can't end len, which is not async: use its own"):
        resilient(timeout=1)(len)
    with pytest.raises(TypeError, match="timeout=1 can't end functools"):
        resilient(timeout=1)(partial(len))


def test_discarded_is_none_and_what_runs_goes_on() -> None:
    """The bulkhead's policy holds for the whole; the breaker hears nothing of it."""
    gate, breaker = bulkhead(max_concurrent=1, policy="discard", max_waiting=0), circuit_breaker(1)
    policy = resilient(bulkhead=gate, circuit_breaker=breaker)

    async def main() -> None:
        with gate:
            assert await policy(work)(1) is None
            assert await policy.call(work, 1) is None

    run(main())
    assert (gate.rejected, gate.running, breaker.snapshot.calls) == (2, 0, 0)
    with pytest.raises(BulkheadFull), gate, gate:
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bulkhead": 5}, TypeError, "bulkhead=5: what bulkhead(...) returns, or None"),
        ({"circuit_breaker": circuit_breaker}, TypeError, "what circuit_breaker(...) returns"),
        ({"retry": 3}, TypeError, "retry=3: what retry(...) returns"),
        ({"timeout": 0}, ValueError, "timeout=0: give seconds for one attempt from 1e-06"),
        ({"timeout": "1"}, TypeError, "timeout='1' is a str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_are_none_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error comes when the parts are composed."""
    with pytest.raises(error) as raised:
        resilient(**options)
    assert message in str(raised.value)
