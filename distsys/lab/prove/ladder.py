"""Ladders for a reader's own candidate: each level adds a fault, and the climb ends at the first one that breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from distsys.lab import experiments
from distsys.lab.check.calls import answered
from distsys.lab.check.combine import all_of
from distsys.lab.check.effects import exactly_once, somebody_answered
from distsys.lab.check.updates import no_lost_update
from distsys.lab.experiments.resilience.experiments import RETRY as TRIES
from distsys.lab.experiments.servers import on_both, own_redis
from distsys.lab.run.experiment import Arm, Run, name_of
from distsys.lab.show.html import escape, table
from distsys.lab.show.verdict import MARK, Verdict
from distsys.lab.testbed.proxy import TcpProxy

if TYPE_CHECKING:
    from distsys.lab.run.judge import Judge

ACCOUNT = "redis, fenced where it can be"


async def _slow_link(run: Run) -> None:
    """Delay each way to Redis by 5 ms: a gap between two commands is then wide enough for all other workers."""
    await on_both(run)
    server = await run.testbed.servers.redis()
    link = await run.cleanup.enter_async_context(TcpProxy(server.host, server.port))
    link.delay(0.005)
    run.urls["redis"] = link.through(run.urls["redis"])


async def _forgetful_redis(run: Run) -> None:
    """Give the lock a Redis of its own, which restarts empty."""
    await on_both(run)
    run.nodes = [await own_redis(run, "node1")]
    run.urls["redis"] = run.nodes[0].url


@dataclass(frozen=True)
class Level:
    """A level of a ladder: an experiment, changed for the candidate, and a hint for those who fail it."""

    title: str
    experiment: str
    hint: str  # for the level's failure, without giving the answer away
    changes: dict[str, Any] = field(default_factory=lambda: {"prepare": on_both})  # to the experiment


LOCK = (
    Level("only a slow link, no other fault: workers take turns", "contention",
        "Who may enter is decided by one atomic step at the server. Is there a gap between your look and your taking?",
        {"prepare": _slow_link, "params": {"rounds": 3}, "check": no_lost_update}),
    Level("the holder is killed: the next one still gets in", "killed-holder",
        "A dead process releases nothing. Who else can end its lock, and when?"),
    Level("the holder is slower than its TTL", "slow-holder",
        "The lease has to last as long as the work. Who extends it, how often, and who is told when that fails?"),
    Level("the holder comes back late and releases", "late-release",
        "Between your look at the owner and your DEL the lock can change hands. Only the server can do both at once."),
    Level("the holder's process stands still, wakes up and writes", "paused-holder",
        "No client can notice that it is asleep. What could the account compare to refuse a late write?"),
    Level("the server forgets the lock", "node-restarts-empty",
        "The second holder is granted rightly. Does its token still look newer than the first one's, to the account?",
        {"prepare": _forgetful_redis, "check": no_lost_update}),
)  # fmt: skip

VIRTUAL = {"params": {"clock": "virtual", "window": 1.0}}
LIMITER = (
    Level("four processes share one limit", "counter-per-process",
        "Each process has a memory of its own. What do all of them share?", VIRTUAL),
    Level("one looks, and another takes before it counts", "count-by-get-then-set",
        "Between reading the count and writing it others come by. Which one command, or script, does both?", VIRTUAL),
    Level("two workers ask within one millisecond", "same-millisecond",
        "Two requests must leave two marks. What tells them apart when the time does not?", {}),
    Level("an impatient client is refused again and again", "refusals-that-count",
        "What does a refused request leave behind in your count?", {}),
    Level("a burst on both sides of a boundary", "fixed-window-boundary",
        "Ten a second means in any second, not in each of the clock. When may an admitted request be forgotten?", {}),
)  # fmt: skip
"""For a limiter of ten in any second, which is given redis, limit, window and clock where it names them."""

BREAKER = (
    Level("the dependency is down, and comes back", "dependency-down",
        "Who counts the failures, who is refused once there were five, and who asks again when the time is over?", {}),
    Level("three of ten calls fail, never two in a row", "counter-or-window",
        "A success says little about the nine calls before it. What would have to be remembered of them?", {}),
    Level("a success comes late, from before the opening", "late-success",
        "When a call returns, was it this breaker, in this state, that let it go? What could it carry to tell?", {}),
    Level("50 callers when the recovery time is over", "half-open-stampede",
        "All of them look before the first has its answer. What is there to count, and when?", {}),
    Level("the probe is cancelled", "cancelled-probe",
        "A task can end without a result and without an Exception. Who gives its place back then?", {}),
)  # fmt: skip
"""For a breaker of five failures (three on the second level) and 30 seconds, by the clock that it is given."""

RETRY = (
    Level("two failures, then an answer", "passing-failure",
        "How often is a call tried before its error is final?", {}),
    Level("it fails for good: at most three requests for each call", "retry-layers",
        "Does max_attempts include the first?", {}),
    Level("the password is wrong", "retry-of-401",
        "Which errors would be the same a second later? The status says so.", {}),
    Level("the reply to a charge is lost", "lost-reply",
        "What does the caller know when the connection breaks after sending? You may name the parameter idempotent.",
        {"params": {**TRIES, "idempotent": False}}),
)  # fmt: skip
"""For a retry of three attempts; it is given max_attempts, base_delay and sleep where it names them."""

ENDPOINT = (
    Level("the client sends it again", "key-per-attempt",
        "What of the first attempt is remembered, under which name, and does the second one look there?",
        {"check": all_of(exactly_once, somebody_answered)}),
    Level("another user has chosen the same key", "other-user",
        "Keys are made by clients. What besides the key tells whose it is? (What charge answered, pay answers.)", {}),
    Level("the key comes back with another amount", "other-payload",
        "An answer to another request is wrong. What has to be kept beside the answer, to be compared?", {}),
    Level("two attempts at once", "two-attempts-at-once",
        "Between your look and your mark the other one looks. Which one command or statement does both?", {}),
    Level("the card is declined, and then it is not", "cached-error",
        "What is left under the key when the payment failed?", {}),
    Level("the process is killed after the effect", "killed-in-between",
        "The mark was not written yet. What would make effect and mark happen together, or not at all?",
        {"check": all_of(exactly_once, partial(answered, name="request"))}),
)  # fmt: skip
"""For an endpoint that pays once: it is given charge, and redis, conn or pool, and has pay(key, amount, user)."""


@dataclass(frozen=True)
class Climb:
    """How far a candidate came: one verdict for each level tried. The last one failed, unless all were passed."""

    candidate: str
    verdicts: tuple[Verdict, ...]
    levels: tuple[Level, ...]
    asked: int  # how many of them were to be climbed

    @property
    def passed(self) -> bool:
        """Whether it passed every level that was asked for."""
        return self.level == self.asked

    @property
    def level(self) -> int:
        """The number of levels it passed."""
        return sum(verdict.status == "HELD" for verdict in self.verdicts)

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for n, (level, verdict) in enumerate(zip_longest(self.levels, self.verdicts), 1):
            happened = "not tried" if verdict is None else verdict.summary if verdict.status != "HELD" else ""
            yield str(n), MARK[verdict.status] if verdict else "·", level.title, happened

    def _failed(self) -> list[tuple[Verdict, str]]:
        """Return the verdict it failed with, and a hint; nothing when it passed all it tried."""
        return [(verdict, self.levels[self.level].hint) for verdict in self.verdicts if verdict.status != "HELD"]

    def __str__(self) -> str:
        lines = [f"{self.candidate}: passed {self.level} of {len(self.levels)} levels"]
        for n, mark, title, happened in self._rows():
            lines.append(f"  {mark} {n}. {title}{f' - {happened}' if happened else ''}")
        for verdict, hint in self._failed():
            lines += ["", *(f"  {sentence}" for sentence in verdict.story()), "", f"  hint: {hint}"]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        page = f"<p><b>{escape(self.candidate)}</b> passed {self.level} of {len(self.levels)} levels</p>"
        page += table(("", "", "level", "what happened"), [*self._rows()])
        for verdict, hint in self._failed():
            page += f"{verdict._repr_html_()}<details><summary>a hint</summary><p>{escape(hint)}</p></details>"
        return page

    def to_dict(self) -> dict[str, Any]:
        """Return the climb as JSON knows it."""
        verdicts = [verdict.to_dict() for verdict in self.verdicts]
        facts = {"candidate": self.candidate, "passed": self.passed, "level": self.level, "levels": len(self.levels)}
        return {**facts, "verdicts": verdicts}


async def climb(judge: Judge, candidate: Any, levels: tuple[Level, ...], upto: int | None, **params: Any) -> Climb:
    """Try level after level, up to the first that fails. `params` go to the workload."""
    if upto is not None and not 1 <= upto <= len(levels):
        raise ValueError(f"upto={upto}: the ladder has levels 1 to {len(levels)}")
    name, verdicts = name_of(candidate), list[Verdict]()
    for level in levels[:upto]:
        experiment = replace(experiments.load(level.experiment), **level.changes)
        arm = Arm(name=f"{name}: {level.title}", candidate=candidate, expected=None, params=params)
        verdicts.append(await judge.verdict_on(experiment, arm))
        if verdicts[-1].status != "HELD":
            break
    return Climb(name, tuple(verdicts), levels, len(levels[:upto]))
