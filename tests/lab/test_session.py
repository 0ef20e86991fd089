"""The lab as a notebook uses it: opened, asked, closed; with servers of its own or with yours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import psutil
import psycopg
import pytest
import redis.asyncio

from distsys.lab import Lab, experiments
from distsys.lab.experiments.idempotency import candidates as endpoints
from distsys.lab.experiments.locks import candidates
from distsys.lab.experiments.rate_limiting import candidates as limiters
from distsys.lab.experiments.resilience import candidates as guards
from distsys.lab.explore.exploration import Exploration
from distsys.lab.notebook.knobs import EndpointKnob, LimitKnob, LockKnob
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


# ---- candidates of the reader


async def test_a_candidate_is_explored_up_to_the_first_scene_that_breaks_it(lab: Lab) -> None:
    """With a hint, a schedule that shows it again, and the picture of that run."""
    found = await lab.try_lock(candidates.SetNxWithoutTtl)
    assert (found.level, found.passed) == (4, False)
    assert found.verdicts[-1].hint in str(found)
    assert "not tried" in str(found)
    assert "<details><summary>a hint" in found._repr_html_()
    assert "data:image/svg+xml" in found._repr_html_()
    assert found.to_dict()["level"] == 4


async def test_the_scenes_can_end_at_a_number(lab: Lab) -> None:
    """Then passing means passing that far."""
    found = await lab.try_lock(candidates.TtlNoRenewal, upto=1)
    assert found.passed
    with pytest.raises(ValueError, match="scenes 1 to 12"):
        await lab.try_lock(candidates.TtlNoRenewal, upto=13)


async def test_every_kind_has_a_door(lab: Lab) -> None:
    """Each stops where its candidate breaks."""
    assert (await lab.try_limiter(limiters.FixedWindow)).level == 1
    assert (await lab.try_breaker(guards.Textbook)).level == 4
    assert (await lab.try_retry(guards.RetryEverything)).level == 3
    assert (await lab.try_endpoint(endpoints.mark_after)).level == 1


class Mute:
    """Pays nobody, and so nobody twice."""

    async def pay(self, key: str, amount: int, user: str) -> str:
        raise KeyError("card")


async def test_an_endpoint_that_answers_nobody_is_told_why(lab: Lab) -> None:
    """It shows nothing, so it is neither held nor violated."""
    found = await lab.try_endpoint(Mute)
    assert found.status == "INCONCLUSIVE"
    assert "nobody was answered: KeyError" in str(found)


async def test_a_simulation_joins_the_summary(lab: Lab) -> None:
    """Simulated arms stand beside those that ran live; in processes of their own, to the same last bit."""
    simulation = await lab.simulate(["no retries", "full jitter"], clients=2_000)
    assert simulation.seed == lab.seed
    again = simulate(["no retries", "full jitter"], clients=2_000)
    assert [arm.digest for arm in simulation.arms] == [arm.digest for arm in again.arms]
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


def test_the_pytest_fixtures_explore_in_a_sync_test(
    prove_lock: Callable[..., Exploration], prove_breaker: Callable[..., Exploration]
) -> None:
    """They need no event loop and no server of their own."""
    assert prove_lock(candidates.NoLock, only=[1]).status == "VIOLATED"
    assert prove_breaker(circuit_breaker).passed


async def test_and_in_an_async_test(
    prove_limiter: Callable[..., Exploration],
    prove_retry: Callable[..., Exploration],
    prove_endpoint: Callable[..., Exploration],
) -> None:
    """Beside a loop that runs."""
    assert prove_limiter(SlidingWindowLimiter, only=[1]).passed
    assert prove_retry(retry).passed
    assert prove_endpoint(endpoints.in_one_transaction, only=[2]).passed


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
