"""Every arm of every experiment: the bad ones break, the rules hold, on real servers and processes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from distsys.lab import Lab, experiments
from distsys.lab.run.experiment import Arm, Experiment

RUNS = int(os.environ.get("DISTSYS_RUNS", "2"))  # 20 by hand, before a release
ARMS = [(experiment, arm) for experiment in experiments.every().values() for arm in experiment.arms]


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with await Lab.open() as lab:
        yield lab


@pytest.mark.parametrize(("experiment", "arm"), ARMS, ids=[f"{e.name}: {a.name}" for e, a in ARMS])
async def test_the_arm_gets_the_verdict_expected_of_it(lab: Lab, experiment: Experiment, arm: Arm) -> None:
    """In every single run: a bad arm that broke by luck would pass here only once in a while."""
    verdict = await lab.judge.verdict_on(experiment, arm, runs=RUNS)
    if not verdict.was_run and any(optional in verdict.summary for optional in ("pgbouncer", "nginx")):
        pytest.skip(verdict.summary)
    verdict.assert_expected()
    if arm.expected == "VIOLATED":
        assert verdict.stats["violated_runs"] == RUNS


@pytest.mark.parametrize("experiment", experiments.every().values(), ids=lambda e: e.name)
def test_an_experiment_has_an_arm_that_breaks(experiment: Experiment) -> None:
    """A control that passes proves nothing; plain contention alone is a workload, not an argument."""
    expected = {arm.expected for arm in experiment.arms}
    assert expected == {"HELD", "VIOLATED"} or experiment.name == "contention"
    assert experiment.claim.endswith(".")


def test_an_unknown_experiment_is_refused_with_the_names_there_are() -> None:
    """LookupError says what could have been meant."""
    with pytest.raises(LookupError, match=r"'nolock'; there are: contention, no-lock"):
        experiments.load("nolock")
