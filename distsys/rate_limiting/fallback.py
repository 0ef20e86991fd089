"""What a limiter answers when Redis fails: open, closed, or a local limit."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal

from distsys._support.arguments import check_positive, check_text
from distsys._support.redis import unavailable
from distsys.rate_limiting.decision import MAX_TOKENS, MICRO, BucketReply, Decision, Request, logger

ASK_AGAIN = 1.0  # seconds that `closed` asks to wait


LOCAL_KEYS = 10_000  # that the local policy keeps apart; beyond, the one not asked for longest is forgotten


@dataclass(frozen=True, kw_only=True)
class OnFailure:
    """What to answer when Redis fails, or is silent for `timeout` seconds.

    `open` lets pass, `closed` refuses. `local` limits each process by itself, to `fraction` of capacity and rate: with
    1 / processes all of them together keep the limit.
    """

    policy: Literal["open", "closed", "local"]
    timeout: float = 0.05
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in ("open", "closed", "local"):
            raise ValueError(f"policy={self.policy!r}: 'open', 'closed' or 'local'")
        check_positive("timeout", self.timeout, MAX_TOKENS, "seconds")
        check_positive("fraction", self.fraction, 1, "a share of the limit")


class Fallback:
    """Applies a failure policy: what a limiter answers in the place of Redis."""

    def __init__(self, name: str, on_failure: OnFailure | None) -> None:
        self.name = check_text("name", name, least=0)
        self.on_failure = on_failure
        self.timeout = on_failure.timeout if on_failure else None
        self._failing = False
        self._used: dict[str, tuple[float, float]] = {}  # key -> microtokens used, and when

    async def guard(self, asked: Awaitable[BucketReply], request: Request) -> list[Decision]:
        """One decision for each of the limits: by what Redis answers, or by the policy."""
        try:
            used, taken = await asked
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return self.decide(error, request)
        self.worked()
        return request.decisions(used, taken)

    def worked(self) -> None:
        if self._failing:
            self._failing = False
            logger.warning("limiter %r: Redis decides again", self.name)

    def decide(self, error: Exception, request: Request) -> list[Decision]:
        """One decision for each of the limits, all alike; without a policy for such an error, the error."""
        if self.on_failure is None or not unavailable(error):
            raise error
        policy = self.on_failure.policy
        if not self._failing:
            self._failing = True
            logger.warning("limiter %r is %s while Redis does not decide: %r", self.name, policy, error)
        if policy == "local":
            return self._decide_here(request, self.on_failure.fraction)
        passes = policy == "open"
        wait = 0.0 if passes else ASK_AGAIN
        return [Decision(passes, limit.capacity, 0, wait, 0.0, policy) for limit in request.limits]

    def _decide_here(self, request: Request, share: float) -> list[Decision]:
        """To a share of a limit: in a bucket of full size each request costs as many times more."""
        request, now, used = request._replace(cost=round(request.cost / share)), time.monotonic(), []
        for key, limit in zip(request.keys, request.limits, strict=True):
            before, at = self._used.pop(key, (0.0, now))
            used.append(max(0.0, before - (now - at) * MICRO * limit.num / limit.den))
        answers = request.decisions([round(before) for before in used], source="local")
        taken = request.cost if all(answers) else 0
        self._used.update((key, (before + taken, now)) for key, before in zip(request.keys, used, strict=True))
        while len(self._used) > LOCAL_KEYS:
            del self._used[next(iter(self._used))]
        return [one._replace(limit=one.limit * share, remaining=int(one.remaining * share)) for one in answers]
