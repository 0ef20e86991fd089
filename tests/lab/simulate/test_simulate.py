"""The virtual loop against asyncio's own; storms, their verdicts, and policies that break them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from distsys.lab.notebook.knobs import StormKnob
from distsys.lab.simulate.advise import advise
from distsys.lab.simulate.side_by_side import line_to, serve, side_by_side
from distsys.lab.simulate.simulation import ARMS, Simulation, policy, simulate
from distsys.lab.simulate.storm import Process, Storm, simulate_arm
from distsys.lab.simulate.virtual_loop import Stuck, run
from distsys.resilience.retry import Retry

Program = Callable[[list[Any]], Coroutine[Any, Any, None]]
SMALL: dict[str, Any] = {"clients": 2_000, "recover_within": 8, "after": 11}


# ---- the loop


async def _turns(log: list[Any]) -> None:
    """Callbacks, tasks, a queue and an event take turns; a cancelled handle never runs."""
    loop, queue, event = asyncio.get_running_loop(), asyncio.Queue[int](1), asyncio.Event()

    async def put() -> None:
        for n in range(3):
            await queue.put(n)
            log.append(f"put {n}")
        event.set()

    async def wait(name: str) -> None:
        await event.wait()
        log.append(name)

    loop.call_soon(lambda: (log.append("soon"), loop.call_soon(log.append, "soon after")))
    loop.call_later(0, log.append, "at once")
    loop.call_soon(log.append, "never").cancel()
    waiting = asyncio.gather(wait("a"), wait("b"), put())
    for _ in range(3):
        log.append(f"got {await queue.get()}")  # noqa: PERF401  one at a time
    await waiting


async def _timers(log: list[Any]) -> None:
    """Timers go off by their time, not in the order in which they were set; a moment in the past is now."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    for at in (0.03, 0.01, 0.02, -5):
        loop.call_at(start + at, log.append, at)
    cancelled = loop.call_at(start + 0.015, log.append, "never")
    cancelled.cancel()
    log.append(cancelled.cancelled())
    await asyncio.sleep(0.04)


async def _timeouts(log: list[Any]) -> None:
    """The inner timeout expires, the outer one does not; wait_for cancels what it waits for."""

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            log.append("hang ended")

    async with asyncio.timeout(5) as outer:
        try:
            async with asyncio.timeout(0.01):
                await hang()
        except TimeoutError:
            log.append("inner")
        try:
            await asyncio.wait_for(hang(), 0.01)
        except TimeoutError:
            log.append("wait_for")
    log.append(outer.expired())
    done, pending = await asyncio.wait([asyncio.ensure_future(hang())], timeout=0.01)
    log.append((len(done), len(pending)))
    for task in pending:
        task.cancel()
        log.append(await asyncio.gather(task, return_exceptions=True))


async def _cancellation(log: list[Any]) -> None:
    """A group cancels the others when one fails; what was cancelled before its first step never starts."""

    async def work(name: str, fails: bool = False) -> None:
        log.append(f"{name} starts")
        try:
            await asyncio.sleep(0 if fails else 60)
            raise ValueError(name)
        except asyncio.CancelledError:
            log.append(f"{name} cancelled")
            raise

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(work("a"))
            group.create_task(work("b", fails=True))
            group.create_task(work("c")).cancel()
    except* ValueError as errors:
        log.append([str(error) for error in errors.exceptions])
    log.append(asyncio.current_task() is not None)


@pytest.mark.parametrize("program", [_turns, _timers, _timeouts, _cancellation])
def test_a_program_goes_as_on_asyncios_own_loop(program: Program) -> None:
    """What happens, and in what order; with timers a hundredth of a second apart, so a slow machine changes nothing."""
    real, virtual = list[Any](), list[Any]()
    asyncio.run(program(real))
    run(program(virtual))
    assert [str(entry) for entry in virtual] == [str(entry) for entry in real]


def test_a_year_passes_at_once_and_timers_of_one_moment_keep_their_order() -> None:
    """Time is a number, exact to the bit."""

    async def main() -> tuple[float, list[int]]:
        loop, order = asyncio.get_running_loop(), list[int]()
        for n in range(100):
            loop.call_at(1.0, order.append, n)
        await asyncio.sleep(366 * 86_400)
        return loop.time(), order

    assert run(main()) == (366 * 86_400.0, list(range(100)))


async def test_it_runs_where_a_loop_runs_already_and_leaves_that_loop_alone() -> None:
    """As in a notebook cell: in a thread of its own."""
    mine = asyncio.get_running_loop()
    assert run(asyncio.sleep(1e6, "done")) == "done"
    assert asyncio.get_running_loop() is mine


def test_a_run_that_can_never_end_raises_stuck() -> None:
    """The main task waits for what can't come; or something spins and time does not pass."""

    async def forgotten() -> None:
        await asyncio.get_running_loop().create_future()

    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match=r"nothing is left that could happen, but .*forgotten"):
        run(forgotten())
    with pytest.raises(Stuck, match="something spins"):
        run(spins(), limit=1_000)


def test_no_error_is_lost() -> None:
    """The error of the main task, of a callback, of a task that nobody awaits."""

    async def raises() -> None:
        raise LookupError("main")

    async def calls() -> None:
        asyncio.get_running_loop().call_soon(int, "no number")
        await asyncio.sleep(1)

    async def forgets() -> None:
        task = asyncio.ensure_future(raises())
        await asyncio.sleep(1)
        del task

    with pytest.raises(LookupError):
        run(raises())
    with pytest.raises(ValueError, match="no number"):
        run(calls())
    with pytest.raises(LookupError):
        run(forgets())


def test_what_depends_on_the_machine_is_refused() -> None:
    """Sockets and threads would bring real time with them."""

    async def connects() -> None:
        with socket.socket() as sock:
            await asyncio.get_running_loop().sock_recv(sock, 1)

    for main in (connects(), asyncio.to_thread(time.monotonic)):
        with pytest.raises(NotImplementedError):
            run(main)


# ---- the storm


@pytest.fixture(scope="module")
def storm() -> Simulation:
    return simulate(**SMALL)


def test_every_arm_is_as_expected_and_some_stay_down_for_ever(storm: Simulation) -> None:
    """Retries alone keep the dependency busy with requests whose clients have left; jitter does not change that."""
    storm.verdicts.assert_expected()
    down = {arm.name for arm in storm.arms if arm.metastable}
    assert down == {"fixed retries", "exponential, no jitter", "full jitter"}
    for name in down:
        arm = storm[name]
        assert arm.recovery is None
        assert sum(arm.requests[-5:]) > 2 * 5 * storm.storm.capacity
        assert sum(arm.wasted[-5:]) > 0.9 * 5 * storm.storm.capacity
        assert "metastable" in str(arm)
    for name in (
        "no retries",
        "full jitter + budget",
        "full jitter + breaker",
        "full jitter + bulkhead",
        "all of them",
    ):
        assert sum(storm[name].wasted[-5:]) == 0


def test_the_seed_changes_the_trace_and_no_verdict(storm: Simulation) -> None:
    """By construction, not by luck: the settings are far from the point where a verdict would change."""
    other = simulate(seed=8, **SMALL)
    other.verdicts.assert_expected()
    assert not {arm.digest for arm in other.arms} & {arm.digest for arm in storm.arms}


async def test_the_same_seed_gives_the_same_trace(storm: Simulation) -> None:
    """To the last bit, in a thread or not, whatever ran before; and every arm meets the same demand."""
    again = await asyncio.to_thread(simulate, ("all of them", "full jitter"), **SMALL)
    assert [arm.digest for arm in again.arms] == [storm["all of them"].digest, storm["full jitter"].digest]
    assert len({sum(arm.calls[:4]) for arm in storm.arms}) == 1


def test_a_trigger_that_does_no_harm_proves_nothing() -> None:
    """One server of ten is gone, and there was room for that."""
    (arm,) = simulate(["no retries"], failure_share=0.1, utilisation=0.5, **SMALL).arms
    assert arm.verdict.status == "INCONCLUSIVE"
    assert "no harm" in str(arm)


def _forever(process: Process) -> Any:
    """A retry loop written by hand, of the usual kind."""

    def decorate(request: Any) -> Any:
        async def call() -> None:
            while True:
                try:
                    return await request()
                except OSError:
                    await asyncio.sleep(0.1)

        return call

    return decorate


def _never_closes(process: Process) -> Any:
    """A breaker on the machine's clock: in virtual time its recovery time is never over."""
    return process.resilient(circuit_breaker=process.breaker(5, 2.0, clock=lambda: 0.0))


def _loses_permits(process: Process) -> Any:
    """A bulkhead that gives its permit back only after a success."""
    gate = process.bulkhead(max_concurrent=10, timeout=1.0)

    def decorate(request: Any) -> Any:
        async def call() -> None:
            if not gate.try_enter():
                await gate.wait()
            await request()
            gate.leave()

        return call

    return decorate


BROKEN = {
    "retries for ever": _forever,
    "never closes": _never_closes,
    "loses permits": _loses_permits,
    "a budget of all calls": policy(budget=1.0),
    "decorrelated jitter alone": policy(jitter="decorrelated"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_policy_is_caught(broken: str) -> None:
    """Each of them keeps the system down after the trigger, or refuses calls for ever."""
    (arm,) = simulate({broken: BROKEN[broken]}, **SMALL).arms
    assert arm.verdict.status == "VIOLATED", str(arm)
    assert arm.verdict.as_expected  # for a policy of the reader's no verdict is expected


def test_a_mistake_in_a_policy_is_not_taken_for_a_failed_call() -> None:
    """It comes out of the cell."""

    def mistaken(process: Process) -> Any:
        return lambda request: process.retry(3).for_async(lambda: request(1))

    with pytest.raises(TypeError, match="positional argument"):
        simulate({"mistaken": mistaken}, **SMALL)


def test_a_policy_that_never_ends_is_given_up() -> None:
    """One that never waits between its attempts, so that time stands still; and one that can't be cancelled."""

    def spins(process: Process) -> Any:
        return Retry(10**9, 0.0, on=lambda error: True)

    def clings(process: Process) -> Any:
        def decorate(request: Any) -> Any:
            async def call() -> None:
                while True:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(1)

            return call

        return decorate

    with pytest.raises(Stuck, match="something spins"):
        simulate({"spins": spins}, **SMALL)
    with pytest.raises(Stuck, match="it does not end"):
        simulate({"clings": clings}, **SMALL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 1}, "rate=1: .*100"),
        ({"utilisation": 1.5}, "utilisation=1.5: .*0.99"),
        ({"after": 3}, "after=3: .*12"),
    ],
)
def test_a_storm_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    """With the value and its bound."""
    with pytest.raises(ValueError, match=message):
        simulate(**wrong)


def test_an_error_in_another_process_is_raised_here() -> None:
    """A storm that is given up there raises here; a process that is killed answers nothing."""
    spins = policy(10**9, 0.0, deadline=False, on=lambda error: True)
    spinning = partial(simulate_arm, "spins", spins, Storm(clients=2_000), 7)
    ours, theirs = socket.socketpair()
    helper = threading.Thread(target=serve, args=(b"", theirs))
    helper.start()
    with line_to(ours) as line:
        with pytest.raises(Stuck, match="something spins"):
            side_by_side([line])([spinning])
    helper.join()
    with line_to(socket.socketpair()[0]) as dead, pytest.raises(RuntimeError, match="'spins' was killed"):
        side_by_side([dead])([spinning])


def test_it_shows_itself_in_words_numbers_and_a_picture(storm: Simulation) -> None:
    """A line per arm, and a light card that is small enough for a notebook and says in words what it draws."""
    lines = str(storm).splitlines()
    assert lines[0].startswith("2,000 clients, 100 calls/s")
    assert [line.split("  ")[0] for line in lines[2:]] == list(ARMS)
    assert storm.verdicts.summary().count("(as expected)") == len(ARMS)
    drawn = set(ElementTree.fromstring(storm.svg()).itertext())
    assert {"✓ no retries", "✗ full jitter", "143"} <= drawn
    html = storm._repr_html_()
    assert len(html) < 40_000
    assert "full jitter: ✗ VIOLATED - metastable" in html.split('src="')[0]


def test_the_advice_is_a_setting_that_holds() -> None:
    """The naive policy stays down; and retries pay, for some requests are always lost."""
    advice = advise(outage_seconds=3, rate=400, clients=8_000, deadline_seconds=2)
    assert advice.confirmed
    none, naive, recommended = (arm.verdict.status for arm in advice.simulation.arms)
    assert (none, naive, recommended) == ("HELD", "VIOLATED", "HELD")
    assert advice.settings["max_attempts"] > 1
    assert advice.settings["budget"] or advice.settings["breaker"]
    assert advice.code.startswith("resilient(")
    assert advice.code in str(advice)
    assert ">resilient(" in advice._repr_html_()


async def test_the_knob_simulates_what_its_controls_say() -> None:
    """Naive at first; a budget cures it."""
    knob = StormKnob(SimpleNamespace(seed=7))  # type: ignore[arg-type]
    await knob.show()
    assert "yours: ✗ VIOLATED - metastable" in knob.answer.value
    knob.budget.value = 0.1
    await knob.show()
    assert "yours: ✓ HELD" in knob.answer.value
