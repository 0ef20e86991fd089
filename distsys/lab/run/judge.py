"""From an arm to its verdict: run it, check the history it leaves, and say how far that can be trusted."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from distsys.lab.history.history import Finding, History
from distsys.lab.run.experiment import Arm, Experiment, Run, Stalled
from distsys.lab.show.verdict import Verdict
from distsys.lab.testbed.servers import ServerUnavailable
from distsys.lab.testbed.testbed import Testbed

Profile = Literal["quick", "full"]
RUNS = {"quick": 1, "full": 5}  # of each arm: the script fixes the interleaving, so more runs look for luck
MANY_ACQUISITIONS = 20  # fewer say nothing about percentiles


@dataclass
class Judge:
    """Runs the arms of experiments on one testbed, and gives each its verdict."""

    testbed: Testbed
    profile: Profile = "quick"
    seed: int = 7
    workers: int = 4

    def __post_init__(self) -> None:
        if self.profile not in RUNS:
            raise ValueError(f"profile={self.profile!r}: 'quick' runs each arm once, 'full' five times")
        if not 2 <= self.workers <= 64:
            raise ValueError(f"workers={self.workers}: give 2 to 64; one worker alone has nobody to race with")
        self._numbers = count(1)

    async def verdict_on(
        self, experiment: Experiment, arm: Arm, runs: int | None = None, seed: int | None = None
    ) -> Verdict:
        """Run one arm `runs` times, with the seeds from `seed` on; one violation is enough for VIOLATED."""
        if self.testbed.closed:
            raise RuntimeError("this lab is closed: open another with `await Lab.open()`")
        seed = self.seed if seed is None else seed
        runs = runs or RUNS[self.profile]
        began = time.monotonic()
        found = [await self._run_once(experiment, arm, seed + i) for i in range(runs)]
        seconds = round(time.monotonic() - began, 2)
        return Verdict.of(
            found,
            title=arm.name,
            claim=experiment.claim,
            expected=arm.expected,
            seed=seed,
            params={"experiment": experiment.name, "ttl": experiment.ttl, **experiment.params, **arm.params},
            servers={s.name: str(s) for s in self.testbed.servers.running.values()},
            replay=f"distsys run {experiment.name} --seed {seed} --runs {runs}",
            stats={"seconds": seconds, **_latencies([history for history, _ in found])},
        )

    async def _run_once(self, experiment: Experiment, arm: Arm, seed: int) -> tuple[History, Finding]:
        async with Run(self.testbed, experiment, arm, seed, next(self._numbers), self.workers) as run:
            try:
                await (arm.prepare or experiment.prepare)(run)
                await experiment.script(run)
                stuck = await run.finish()
            except ServerUnavailable as error:
                return run.history(), Finding("INCONCLUSIVE", f"not run: {error}")
            except Stalled as error:
                return run.history(), Finding("INCONCLUSIVE", "; ".join([str(error), *run.crashes()]))
            if missed := run.point_missed():
                raise ValueError(missed)
            facts = await experiment.final(run) if experiment.final else {}
            history = run.history(**facts)
            finding = experiment.check(history)
            crashes = run.crashes()
            if finding.status == "INCONCLUSIVE":
                reasons = [finding.summary, *crashes, *(f"{name} never ended" for name in stuck)]
                finding = replace(finding, summary="; ".join(reasons))
            elif finding.status == "HELD" and crashes and not any(f.kind == "server" for f in history.faults):
                finding = Finding("INCONCLUSIVE", f"{crashes[0]} (else: {finding.summary})")
            return history, finding


def _latencies(histories: list[History]) -> dict[str, Any]:
    """Return the percentiles of the successful acquisitions, in seconds, when there were many."""
    granted = (op for history in histories for op in history.where("acquire", status="ok"))
    took = sorted(op.returned - op.called for op in granted if op.returned is not None)
    if len(took) < MANY_ACQUISITIONS:
        return {}
    return {"acquires": len(took), "p50": statistics.median(took), "p99": took[int(0.99 * len(took))]}
