"""Bring your own: one fault more on each level, up to the first one that your lock or limiter does not survive."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distsys.lab import experiments
from distsys.lab.checks import no_lost_update
from distsys.lab.experiment import Arm, Run
from distsys.lab.experiments.lock_scripts import on_both, own_redis
from distsys.lab.proxy import TcpProxy
from distsys.lab.story import story
from distsys.lab.verdict import Verdict, table

if TYPE_CHECKING:
    from distsys.lab.session import Lab


ACCOUNT = "redis, fenced where it can be"


async def _slow_link(run: Run) -> None:
    """5 ms each way to Redis: a gap between two commands is wide enough for all the others."""
    await on_both(run)
    server = await run.lab.servers.redis()
    link = await run.cleanup.enter_async_context(TcpProxy(server.host, server.port))
    link.delay(0.005)
    run.urls["redis"] = link.through(run.urls["redis"])


async def _forgetful_redis(run: Run) -> None:
    """A Redis of its own for the lock, which restarts empty."""
    await on_both(run)
    run.nodes = [await own_redis(run, "node1")]
    run.urls["redis"] = run.nodes[0].url


@dataclass(frozen=True)
class Level:
    title: str
    experiment: str
    hint: str  # for the level's failure, without giving the answer away
    changes: dict[str, Any] = field(default_factory=lambda: {"prepare": on_both})  # to the experiment


LOCK = (
    Level(
        "no faults but a slow link: workers take turns",
        "contention",
        "Who may enter is decided by one atomic step at the server. Is there a gap between your look and your taking?",
        {"prepare": _slow_link, "params": {"rounds": 3}, "check": no_lost_update},
    ),
    Level(
        "the holder is killed: the next one still gets in",
        "killed-holder",
        "A dead process releases nothing. Who else can end its lock, and when?",
    ),
    Level(
        "the holder is slower than its TTL",
        "slow-holder",
        "The lease has to last as long as the work. Who extends it, how often, and who is told when that fails?",
    ),
    Level(
        "the holder comes back late and releases",
        "late-release",
        "Between your look at the owner and your DEL the lock can change hands. Only the server can do both at once.",
    ),
    Level(
        "the holder's process stands still, wakes up and writes",
        "paused-holder",
        "No client can notice that it is asleep. What could the account compare to refuse a write that comes too late?",
    ),
    Level(
        "the server forgets the lock",
        "node-restarts-empty",
        "The second holder is granted rightly. Does its token still look newer than the first one's, to the account?",
        {"prepare": _forgetful_redis, "check": no_lost_update},
    ),
)

VIRTUAL = {"params": {"clock": "virtual", "window": 1.0}}
LIMITER = (
    Level(
        "four processes share one limit",
        "counter-per-process",
        "Each process has a memory of its own. What do all of them share?",
        VIRTUAL,
    ),
    Level(
        "one looks, and another takes before it counts",
        "count-by-get-then-set",
        "Between reading the count and writing it others come by. Which single command, or script, does both?",
        VIRTUAL,
    ),
    Level(
        "two workers ask within one millisecond",
        "same-millisecond",
        "Two requests must leave two marks. What tells them apart when the time does not?",
        {},
    ),
    Level(
        "an impatient client is refused again and again",
        "refusals-that-count",
        "What does a refused request leave behind in your count?",
        {},
    ),
    Level(
        "a burst on both sides of a boundary",
        "fixed-window-boundary",
        "Ten a second means in any second, not in each one of the clock. When may an admitted request be forgotten?",
        {},
    ),
)
"""For a limiter of ten in any second, which is given redis, limit, window and clock where it names them."""


@dataclass(frozen=True)
class Climb:
    """How far a candidate came: one verdict per level tried, the last of them failed unless all were passed."""

    candidate: str
    verdicts: tuple[Verdict, ...]
    levels: tuple[Level, ...]
    asked: int  # how many of them were to be climbed

    @property
    def passed(self) -> bool:
        return self.level == self.asked

    @property
    def level(self) -> int:
        """How many levels it passed."""
        return sum(verdict.status == "HELD" for verdict in self.verdicts)

    def __str__(self) -> str:
        lines = [f"{self.candidate}: passed {self.level} of {len(self.levels)} levels"]
        for i, (level, mark, said) in enumerate(self._rows(), 1):
            lines.append(f"  {mark} {i}. {level.title}{f' - {said}' if said else ''}")
        if self.verdicts and self.verdicts[-1].status != "HELD":
            last = self.verdicts[-1]
            lines += ["", *(f"  {sentence}" for sentence in story(last.history, last.finding))]
            lines += ["", f"  hint: {self.levels[self.level].hint}"]
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "passed": self.passed,
            "level": self.level,
            "levels": len(self.levels),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
        }

    def _rows(self) -> list[tuple[Level, str, str]]:
        marks = {"HELD": "✓", "VIOLATED": "✗", "INCONCLUSIVE": "?"}
        tried = [(marks[v.status], "" if v.status == "HELD" else v.summary) for v in self.verdicts]
        return [(level, *(tried[i] if i < len(tried) else ("·", ""))) for i, level in enumerate(self.levels)]

    def _repr_html_(self) -> str:
        rows = [(str(i), mark, level.title, said) for i, (level, mark, said) in enumerate(self._rows(), 1)]
        page = f"<p><b>{html.escape(self.candidate)}</b> passed {self.level} of {len(self.levels)} levels</p>"
        page += table(("", "", "level", "what happened"), rows)
        if self.verdicts and self.verdicts[-1].status != "HELD":
            hint = html.escape(self.levels[self.level].hint)
            page += self.verdicts[-1]._repr_html_() + f"<details><summary>a hint</summary><p>{hint}</p></details>"
        return page


async def climb(
    lab: Lab, candidate: Any, levels: tuple[Level, ...], *, upto: int | None, params: Mapping[str, Any]
) -> Climb:
    """Tries level after level. `params` go to the workload."""
    name = getattr(candidate, "__name__", None) or repr(candidate)
    verdicts: list[Verdict] = []
    if upto is not None and not 1 <= upto <= len(levels):
        raise ValueError(f"upto={upto}: the ladder has levels 1 to {len(levels)}")
    for level in levels[:upto]:
        experiment = replace(experiments.load(level.experiment), **level.changes)
        arm = Arm(name=f"{name}: {level.title}", candidate=candidate, expected=None, params=params)
        verdicts.append(await lab.judge(experiment, arm))
        if verdicts[-1].status != "HELD":
            break
    return Climb(name, tuple(verdicts), levels, len(levels[:upto]))
