"""The lab as a notebook uses it: opened, asked, closed; with servers of its own or with yours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import broken_guards
import psutil
import psycopg
import pytest
import redis.asyncio

from distsys.lab import Lab, experiments
from distsys.lab.experiments.idempotency import candidates as endpoints
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.rate_limiting import candidates as limiters
from distsys.lab.experiments.resilience import candidates as guards
from distsys.lab.notebook.knobs import EndpointKnob, LimitKnob, LockKnob
from distsys.lab.prove import ladder
from distsys.lab.run.experiment import Run
from distsys.lab.simulate.simulation import simulate
from distsys.lab.testbed.servers import Server
from distsys.locks.redis_lock import RedisLock
from distsys.rate_limiting.sliding_window import SlidingWindowLimiter
from distsys.resilience.circuit_breaker import circuit_breaker
from distsys.resilience.retry import retry


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with await Lab.open() as lab:
        yield lab


def alive(pid: int) -> bool:
    """A zombie, which init has yet to reap, is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_a_closed_lab_has_ended_all_it_started_and_says_so() -> None:
    """Its processes are gone and its folder too; closing again does nothing; asking again names the remedy."""
    lab = await Lab.open()
    folder = lab.testbed.processes.folder
    pids = [server.process.pid for server in lab.testbed.servers.running.values() if server.process]
    await lab.close()
    await lab.close()
    assert not folder.exists()
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="open another"):
        await lab.run("no-lock")


async def test_the_lab_shows_its_servers_with_versions_and_where_they_come_from(lab: Lab) -> None:
    """As text and as a table."""
    assert "redis: " in str(lab)
    assert "postgres: PostgreSQL" in str(lab)
    assert ">redis</td>" in lab._repr_html_()
    assert "started for this lab" in lab._repr_html_()


async def test_your_own_servers_are_used_and_left_as_they_were(redis_server: Server, postgres: Server) -> None:
    """The lab works under a prefix and in a schema of its own, and removes both; the card says whose server it is."""
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        await client.flushall()
        await client.set("yours", "untouched")
        async with await Lab.open(redis_url=redis_server.url, pg_dsn=postgres.url) as lab:
            assert "your URL" in lab._repr_html_()
            (await lab.run("no-lock")).assert_expected()
            (await lab.run("select-for-update")).assert_expected()
            assert len(await client.keys("*")) > 1
        assert await client.keys("*") == [b"yours"]
    async with await psycopg.AsyncConnection.connect(postgres.url) as conn:
        cursor = await conn.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'lab%'")
        assert await cursor.fetchall() == []


async def test_two_labs_at_once_do_not_disturb_each_other(lab: Lab) -> None:
    """Two notebooks of one reader, or two readers of one machine."""
    async with await Lab.open() as other:
        both = await asyncio.gather(lab.run("slow-holder"), other.run("slow-holder"))
        for verdicts in both:
            verdicts.assert_expected()


async def test_a_candidate_of_yours_gets_a_verdict_with_a_line_that_replays_it(lab: Lab) -> None:
    """Nothing is expected of it unless you say so; the summary has a line for it, in words only."""
    before = len(lab.verdicts)
    verdict = await lab.test(candidates.NoLock, "no-lock")
    assert verdict.status == "VIOLATED"
    assert verdict.expected is None
    assert verdict.replay == "distsys run no-lock --seed 7 --runs 1"
    assert lab.summary().splitlines()[before:] == ["NoLock: VIOLATED"]
    await lab.test(candidates.NoLock, "no-lock", keep=False)
    assert len(lab.verdicts) == before + 1


async def test_a_candidate_with_a_bug_is_inconclusive_and_the_bug_is_shown(lab: Lab) -> None:
    """It is no verdict on its idea."""

    class Misspelt:
        def __init__(self, redis: object) -> None:
            self.redis = redis

        async def __aenter__(self) -> None:
            await self.rediss.ping()  # type: ignore[attr-defined]

        async def __aexit__(self, *_: object) -> None: ...

    verdict = await lab.test(Misspelt, "no-lock")
    assert verdict.status == "INCONCLUSIVE"
    assert "AttributeError: 'Misspelt' object has no attribute 'rediss'" in verdict.summary


async def test_an_error_of_an_experiment_passes_as_it_is_and_ends_its_other_arms(lab: Lab) -> None:
    """Arms run two at a time, which must not show: no ExceptionGroup, and nothing of them goes on."""
    before = asyncio.all_tasks()

    async def prepare(run: Run) -> None:
        raise ValueError("no such server")

    with pytest.raises(ValueError, match="no such server"):
        await lab.run(replace(experiments.load("no-lock"), prepare=prepare))
    assert asyncio.all_tasks() == before


async def test_a_candidate_that_asks_for_what_the_lab_has_not_is_told_what_it_has(lab: Lab) -> None:
    """The names that a candidate's parameters may have stand in the message."""

    def lock(zookeeper: object) -> None: ...

    verdict = await lab.test(lock, "no-lock")
    assert verdict.status == "INCONCLUSIVE"
    assert "asks for 'zookeeper'; the lab can give redis, redis_sync" in verdict.summary


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"profile": "fast"}, "'quick' runs each arm once"),
        ({"workers": 1}, "give 2 to 64"),
        ({"workers": 65}, "give 2 to 64"),
    ],
)
async def test_bad_input_is_refused_before_anything_starts(wrong: dict[str, object], message: str) -> None:
    """With the value and what there is instead."""
    with pytest.raises(ValueError, match=message):
        await Lab.open(**wrong)  # type: ignore[arg-type]


# ---- the ladder


class Blocking:
    """A blocking lock, as most code bases have it."""

    def __init__(self, redis: redis.Redis, name: str, ttl: float) -> None:
        self.lock = redis.lock(name, timeout=ttl)

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Unfenced(RedisLock):
    """RedisLock that keeps its token to itself."""

    async def __aenter__(self) -> None:  # type: ignore[override]
        await super().__aenter__()


LEVELS = [
    (candidates.NoLock, 0),
    (candidates.SetNxWithoutTtl, 1),
    (candidates.TtlNoRenewal, 2),
    (Blocking, 2),
    (Unfenced, 4),
    (candidates.IncrToken, 2),
    (RedisLock, 6),
    (candidates.select_for_update, 6),
]


@pytest.mark.parametrize(("candidate", "level"), LEVELS, ids=[c.__name__ for c, _ in LEVELS])
async def test_a_lock_climbs_as_far_as_it_is_right(lab: Lab, candidate: object, level: int) -> None:
    """And stops at the first level that it fails, with a counterexample."""
    climb = await lab.try_lock(candidate)
    assert climb.level == level, str(climb)
    assert climb.passed == (level == len(ladder.LOCK))
    if not climb.passed:
        assert climb.verdicts[-1].status == "VIOLATED"
        assert ladder.LOCK[level].hint in str(climb)
        assert "<details><summary>a hint" in climb._repr_html_()
    assert climb.to_dict()["level"] == level


async def test_the_climb_can_end_at_a_level(lab: Lab) -> None:
    """Then passing means passing that far."""
    climb = await lab.try_lock(candidates.TtlNoRenewal, upto=2)
    assert climb.passed
    with pytest.raises(ValueError, match="levels 1 to 6"):
        await lab.try_lock(candidates.TtlNoRenewal, upto=7)


LIMITERS = [
    (limiters.CounterInMemory, 0),
    (limiters.GetThenSet, 1),
    (limiters.LogByMillisecond, 0),  # four processes under one virtual clock share its moments
    (limiters.RefusalsCount, 3),
    (limiters.FixedWindow, 4),
    (limiters.Log, 5),
    (SlidingWindowLimiter, 5),
]


@pytest.mark.parametrize(("candidate", "level"), LIMITERS, ids=[c.__name__ for c, _ in LIMITERS])
async def test_a_limiter_climbs_as_far_as_it_is_right(lab: Lab, candidate: object, level: int) -> None:
    """The same ladder, with the traps of a shared count: ten in any second."""
    climb = await lab.try_limiter(candidate)
    assert climb.level == level, str(climb)
    assert climb.passed == (level == len(ladder.LIMITER))
    assert climb.passed or ladder.LIMITER[level].hint in str(climb)


BREAKERS = [
    (guards.nothing, 0),
    (guards.Textbook, 1),
    (guards.CountedProbes, 1),
    (broken_guards.Windowed, 2),
    (broken_guards.DeafWhileOpen, 3),
    (broken_guards.LeaksProbes, 4),
    (circuit_breaker, 5),
]


@pytest.mark.parametrize(("candidate", "level"), BREAKERS, ids=[c.__name__ for c, _ in BREAKERS])
async def test_a_breaker_climbs_as_far_as_it_is_right(lab: Lab, candidate: object, level: int) -> None:
    """One mistake less, one level more."""
    climb = await lab.try_breaker(candidate)
    assert climb.level == level, str(climb)
    assert climb.passed == (level == len(ladder.BREAKER))
    assert climb.passed or climb.verdicts[-1].status == "VIOLATED"
    assert climb.passed or ladder.BREAKER[level].hint in str(climb)


RETRIES = [
    (guards.nothing, 0),
    (broken_guards.three_more, 1),
    (guards.RetryEverything, 2),
    (broken_guards.does_not_know_what_is_lost, 3),
    (retry, 4),
]


@pytest.mark.parametrize(("candidate", "level"), RETRIES, ids=[c.__name__ for c, _ in RETRIES])
async def test_a_retry_climbs_as_far_as_it_is_right(lab: Lab, candidate: object, level: int) -> None:
    """From one that never tries again to one that knows when not to."""
    climb = await lab.try_retry(candidate)
    assert climb.level == level, str(climb)
    assert climb.passed == (level == len(ladder.RETRY))
    assert climb.passed or ladder.RETRY[level].hint in str(climb)


ENDPOINTS = [
    (endpoints.no_key, 0),
    (partial(endpoints.mark_after, scoped=False), 1),
    (partial(endpoints.mark_after, checked=False), 2),
    (endpoints.mark_after, 3),
    (endpoints.claimed, 5),
    (endpoints.in_one_transaction, 6),
]


@pytest.mark.parametrize(("candidate", "level"), ENDPOINTS, ids=[str(level) for _, level in ENDPOINTS])
async def test_an_endpoint_climbs_as_far_as_it_is_right(lab: Lab, candidate: object, level: int) -> None:
    """From one that knows no key to one whose effect and mark are one commit."""
    climb = await lab.try_endpoint(candidate)
    assert climb.level == level, str(climb)
    assert climb.passed == (level == len(ladder.ENDPOINT))
    assert climb.passed or ladder.ENDPOINT[level].hint in str(climb)


class Mute:
    """Pays nobody, and so nobody twice."""

    async def pay(self, key: str, amount: int, user: str) -> str:
        raise KeyError("card")


class Blocked:
    """Not async, as a beginner writes it."""

    def pay(self, key: str, amount: int, user: str) -> str:
        return "paid"


@pytest.mark.parametrize(("candidate", "why"), [(Mute, "KeyError"), (Blocked, "TypeError")])
async def test_an_endpoint_that_answers_nobody_climbs_nowhere_and_is_told_why(
    lab: Lab, candidate: object, why: str
) -> None:
    climb = await lab.try_endpoint(candidate)
    assert (climb.level, climb.verdicts[0].status) == (0, "INCONCLUSIVE")
    assert f"nobody was answered: {why}" in str(climb)


async def test_a_simulation_joins_the_summary(lab: Lab) -> None:
    """Simulated arms stand beside those that ran live; in processes of their own, to the same last bit."""
    simulation = await lab.simulate(["no retries", "full jitter"], clients=2_000)
    assert simulation.seed == lab.seed
    assert simulation == simulate(["no retries", "full jitter"], clients=2_000)
    assert lab.summary().endswith("no retries: HELD (as expected)\nfull jitter: VIOLATED (as expected)")


# ---- the knobs


async def test_the_knob_of_limits_draws_what_its_sliders_say(lab: Lab) -> None:
    """A bucket of one and a window of one, asked much: both admit about one a second, and the picture says so."""
    knob = LimitKnob(lab)
    knob.rate.value, knob.burst.value, knob.demand.value = 1, 1, 20
    await knob.show()
    told = {name: int(n) for name, n in re.findall(r"(asked|token bucket|sliding window) (\d+)", knob.answer.value)}
    assert told["asked"] > 300
    assert told["token bucket"] == told["sliding window"]
    assert 7 <= told["token bucket"] <= 10
    assert 'src="data:image/svg+xml;base64,' in knob._repr_mimebundle_()["text/html"]


async def test_the_knob_runs_what_its_controls_say(lab: Lab) -> None:
    """And leaves the summary alone; a click runs it again."""
    knob = await LockKnob(lab, {"none": candidates.NoLock, "RedisLock": RedisLock}).show()
    assert "VIOLATED" in knob.answer.value
    knob.lock.value, knob.fault.value, knob.account.value = "RedisLock", "paused-holder", "fenced"
    knob.run.click()
    async with asyncio.timeout(20):
        while "HELD" not in knob.answer.value:
            await asyncio.sleep(0.01)
    assert "HELD" in knob._repr_mimebundle_()["text/html"]


async def test_the_knob_of_endpoints_pays_under_the_fault_that_is_chosen(lab: Lab) -> None:
    """The same endpoint survives one fault and not another."""
    knob = EndpointKnob(lab, {"look, pay, mark": endpoints.mark_after})
    await knob.show()
    assert "VIOLATED" in knob.answer.value
    knob.fault.value = "sent again"
    await knob.show()
    assert "HELD" in knob.answer.value


# ---- in your own tests


def test_the_pytest_fixture_climbs_the_same_ladder(prove_lock: Callable[..., ladder.Climb]) -> None:
    """It needs no event loop and no server of its own."""
    climb = prove_lock(candidates.SetNxWithoutTtl)
    assert not climb.passed
    assert climb.level == 1


def test_the_pytest_fixture_for_limiters_climbs_theirs(prove_limiter: Callable[..., ladder.Climb]) -> None:
    assert prove_limiter(limiters.Log, upto=2).passed


def test_the_pytest_fixtures_for_guards_climb_theirs(
    prove_breaker: Callable[..., ladder.Climb], prove_retry: Callable[..., ladder.Climb]
) -> None:
    assert prove_breaker(guards.Textbook).level == 1
    assert prove_retry(retry, upto=1).passed


def test_the_pytest_fixture_for_endpoints_climbs_theirs(prove_endpoint: Callable[..., ladder.Climb]) -> None:
    assert prove_endpoint(endpoints.in_one_transaction, upto=1).passed


async def test_a_point_that_has_no_effect_is_refused(lab: Lab) -> None:
    """Not a verdict about another moment: the experiment strikes elsewhere, or no worker came there."""
    with pytest.raises(ValueError, match="point='in-between': 'killed-holder' strikes at points of its own"):
        await lab.test(candidates.SetNxWithoutTtl, "killed-holder", point="in-between")
    with pytest.raises(ValueError, match="point='no-such-point': no worker came to a checkpoint of this name"):
        await lab.test(RedisLock, "late-release", point="no-such-point")


async def test_an_experiment_can_be_left_out_of_the_summary(lab: Lab) -> None:
    """As one that needs a server which not every machine has: the summary is the same everywhere."""
    before = lab.summary()
    assert (await lab.run("no-lock", keep=False)).summary()
    assert lab.summary() == before
