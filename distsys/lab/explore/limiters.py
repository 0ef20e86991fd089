"""What a limiter promises, asked of one run: how much was admitted when, and who was refused while there was room."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distsys.lab.check.combine import all_of
from distsys.lab.check.limits import Allowance, at_most, no_needless_refusal
from distsys.lab.explore.blocking import in_greenlet
from distsys.lab.explore.build import WrongShape, build, method_of
from distsys.lab.explore.run import BOTH, ExploredRun, Outcome, Scene, Worker
from distsys.lab.explore.worlds import SKEWED_CLOCKS, WORLDS

LIMIT = 10
Plan = tuple[tuple[Any, ...], ...]
"""What the workers ask for: (worker, when in windows, how many requests one after the other, for which client)."""

BURST: Plan = (("w1", 0.0, 6), ("w2", 0.0, 6), ("w3", 0.0, 6), ("w1", 2.5, 6), ("w2", 2.5, 6))
BOUNDARY: Plan = (("w1", 0.9, 10), ("w2", 1.05, 10), ("w3", 3.5, 2))
FIRST: Plan = (("w3", 0.0, 1), ("w1", 0.9, 9), ("w2", 1.05, 10), ("w3", 3.5, 2))
STEADY: Plan = tuple((f"w{1 + n % 3}", 0.25 * n, 1) for n in range(24))
CLIENTS: Plan = (("w1", 0.0, 12, "ann"), ("w2", 0.1, 12, "bob"), ("w3", 2.5, 2, "ann"), ("w1", 2.5, 2, "bob"))
PAUSE: Plan = (("w1", 0.0, 3), ("w2", 4.0, 15), ("w3", 4.0, 15), ("w1", 6.5, 2))
IMPATIENT: Plan = (("w1", 0.0, 10), *(("w2", 0.08 * n, 1) for n in range(1, 20)))
RACE: Plan = (("w1", 0.0, 4), ("w2", 0.0, 4), ("w3", 0.0, 4), ("w2", 3.5, 3), ("w3", 3.6, 3))
SKEWED: Plan = (("w1", 0.0, 10), ("w2", 0.2, 10), ("w3", 0.4, 10), ("w1", 2.5, 2))
HOUR: Plan = (("w1", 0.0, 4), ("w2", 0.0, 4), ("w3", 0.0, 4))

LEFT_FOR_EVER = """
local left = 0
for _, key in ipairs(redis.call('KEYS', '*')) do if redis.call('PTTL', key) == -1 then left = left + 1 end end
return left
"""


@dataclass(eq=False)
class LimiterRun(ExploredRun):
    """Three workers ask a limiter as planned; `span` is its window in seconds.

    promise  "window": so many in any window; "bucket": so many at once and so many a second; "approximate": half as
             many again in any window, and no refusal below a half
    """

    plan: Plan = BURST
    promise: str = "window"
    aligned: bool = True
    keys: bool = False  # look for keys that are left behind for ever

    def __post_init__(self) -> None:
        self.left_behind = 0
        self.asked_for: dict[str, str] = {}  # client, by worker

    def build(self, candidate: Any, **clients: Any) -> Any:
        """Call the candidate with what its parameters name: limit and window, or capacity and refill_rate."""
        facts = {"limit": LIMIT, "window": self.span, "capacity": LIMIT, "refill_rate": LIMIT / self.span}
        return build(candidate, **clients, **facts, name="explored", clock=self.common_time)

    async def work(self, worker: Worker, made: Any) -> None:
        """Make the requests that the plan has for this worker."""
        ask = asks(made)
        for _, at, times, *client in (part for part in self.plan if part[0] == worker.name):
            await asyncio.sleep(max(0.0, at * self.span - self.loop.now))
            for _ in range(times):
                await self._request(worker, ask, (client or ["explored"])[0])
        worker.phase = "done"

    async def _request(self, worker: Worker, ask: Callable[..., Any], client: str) -> None:
        self.asked_for[worker.name] = client
        number = self.begin(worker, "admit", {"key": client})
        try:
            answer = await in_greenlet(ask, client)
            answer = bool(await answer if inspect.isawaitable(answer) else answer)
        except Exception as error:  # noqa: BLE001  whatever the candidate raises is no answer
            self.end(number, "info", f"{type(error).__name__}: {error}")
            self.tell(worker, f"got no answer: {type(error).__name__}")
            return
        self.end(number, "ok" if answer else "fail")
        self.tell(worker, "was admitted" if answer else "was refused")
        if answer:
            self.progressed(worker)

    def repeated(self, worker: Worker) -> None:
        """Count the lost request as one more that may have been admitted."""
        self.begin(worker, "admit", {"key": self.asked_for[worker.name]})

    async def over(self) -> None:
        """Count the keys that no TTL will ever remove."""
        if self.keys:
            self.left_behind = int(self.network.control("EVAL", LEFT_FOR_EVER, "0"))

    def starved(self) -> Outcome:
        """Return what was decided so far: a request that never ends is no violation of a limit."""
        return self.ended()

    def ended(self) -> Outcome:
        """Check the admissions and the refusals against the model."""
        if self.left_behind:
            return self.outcome("VIOLATED", f"{self.left_behind} keys are left behind that no TTL will ever remove")
        if not any(op.status == "ok" for op in self.ops):
            return self.outcome("INCONCLUSIVE", (self.crashes() or ["nobody was admitted"])[0])
        most = least = Allowance(LIMIT, self.span)
        if self.promise == "bucket":
            most = least = Allowance(LIMIT, refill_rate=LIMIT / self.span)
        elif self.promise == "approximate":
            most, least = Allowance(1.5 * LIMIT, self.span), Allowance(0.5 * LIMIT, self.span)
        finding = all_of(at_most(most), no_needless_refusal(least))(self.history())
        if finding.status == "VIOLATED":
            return self.found(finding)
        admitted = sum(op.status == "ok" for op in self.ops)
        return self.outcome("HELD", f"{admitted} of {len(self.ops)} admitted")


def asks(limiter: Any) -> Callable[..., Any]:
    """Return the method that decides: allow, try_acquire or is_allowed, or the limiter itself if it is a function."""
    found = method_of(limiter, "allow", "try_acquire", "is_allowed", "__call__")
    if found is None:
        raise WrongShape(
            f"{type(limiter).__name__} is no limiter: it needs allow(key), try_acquire(key) or is_allowed(key)"
        )
    return found


LIMITER_SCENES = (
    Scene("three workers ask at once, and come again later", worlds=WORLDS[:2], options={"plan": BURST},
          hint="Each process has a memory of its own. What do all of them share, and which one step decides?"),
    Scene("a burst on both sides of a second", options={"plan": BOUNDARY},
          hint="Ten a second means in any second, not in each of the clock. When may a request be forgotten?"),
    Scene("a burst on both sides of a second after the first request", options={"plan": FIRST},
          hint="Does a window begin with its first request? Then where does the next one begin?"),
    Scene("steady requests, fewer than the limit", options={"plan": STEADY},
          hint="What makes the count go down while requests keep coming?"),
    Scene("two clients", options={"plan": CLIENTS}, hint="What is in the name of the key that is counted?"),
    Scene("a burst after a long pause", options={"plan": PAUSE},
          hint="How much may be saved up while nobody asks?"),
    Scene("an impatient client is refused again and again", options={"plan": IMPATIENT},
          hint="What does a refused request leave behind in your count?"),
    Scene("the clocks of three hosts are 30 s apart", worlds=(SKEWED_CLOCKS,), options={"plan": SKEWED},
          hint="Whose clock says when a second is over?"),
    Scene("a command is held back until another request is admitted", (("hold", False),), options={"plan": RACE},
          hint="Between reading the count and writing it others come by. Which one command, or script, does both?"),
    Scene("a process is killed", tuple(("kill", after) for after in BOTH), options={"plan": RACE},
          hint="What is half done when a process dies between two commands, and for how long does it stay so?"),
    Scene("a process stands still until another is admitted", tuple(("freeze", after) for after in BOTH),
          options={"plan": RACE},
          hint="It wakes up and goes on with what it had read. What has changed since?"),
    Scene("a connection breaks", (("reset", False), ("lost", True), ("cut", True)), options={"plan": RACE},
          hint="A reply that is lost is not a command that is lost. What does a second try count?"),
    Scene("what is left behind", options={"plan": HOUR, "keys": True},
          hint="A key that nobody asks for any more: who removes it?"),
)  # fmt: skip
