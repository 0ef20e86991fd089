"""What a limiter answers when Redis fails: open, closed, or a local limit."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from distsys._support.arguments import check_positive, check_text
from distsys._support.redis import unavailable
from distsys.rate_limiting.decision import MAX_TOKENS, Decision, Request, logger

CLOSED_RETRY_SECONDS = 1.0  # the policy `closed` asks clients to wait so long
LOCAL_KEYS = 10_000  # that the policy `local` counts; beyond, the least recently used one is forgotten

R = TypeVar("R")
T = TypeVar("T")
Instead = Callable[[list[Decision]], T]


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
    """The failure policy of one limiter: every decision comes through `guard`, from Redis or from the policy."""

    def __init__(self, name: str, on_failure: OnFailure | None) -> None:
        self.name = check_text("name", name, least=0)
        self.on_failure, self.timeout = on_failure, on_failure.timeout if on_failure else None
        self._failing = False
        self._used: dict[str, tuple[float, float]] = {}  # key -> microtokens used, and when

    async def guard(self, asked: Awaitable[R], request: Request, read: Callable[[R], T], instead: Instead[T]) -> T:
        """Return `read` of what Redis answers, or `instead` of the policy's decisions, one for each limit.

        Without a policy the error of Redis passes, and so does an error that no policy may hide: a missing right.
        """
        try:
            reply = await asked
        except Exception as error:  # noqa: BLE001  it passes, unless the policy has an answer
            return instead(self.decide(error, request))
        if self._failing:
            self._failing = False
            logger.warning("limiter %r: Redis decides again", self.name)
        return read(reply)

    def decide(self, error: Exception, request: Request) -> list[Decision]:
        """Return the policy's decision for each of the limits; raise the error if there is no policy for it."""
        if self.on_failure is None or not unavailable(error):
            raise error
        policy = self.on_failure.policy
        if not self._failing:
            self._failing = True
            logger.warning("limiter %r is %s while Redis does not decide: %r", self.name, policy, error)
        if policy == "local":
            return self._decide_here(request, self.on_failure.fraction)
        passes, wait = (True, 0.0) if policy == "open" else (False, CLOSED_RETRY_SECONDS)
        return [Decision(passes, limit.capacity, 0, wait, 0.0, policy) for limit in request.limits]

    def _decide_here(self, request: Request, share: float) -> list[Decision]:
        """Limit to a share: in a bucket of full size each request costs 1 / share times as much."""
        request, now = request._replace(cost=round(request.cost / share)), time.monotonic()
        used = list[float]()
        for key, limit in zip(request.keys, request.limits, strict=True):
            before, at = self._used.pop(key, (0.0, now))
            used.append(limit.refilled(before, now - at))
        rounded = [round(before) for before in used]
        passes = all(request.decisions((0, rounded, 0)))
        decisions = request.decisions((passes, rounded, 0), "local")
        taken = request.cost if passes else 0
        self._used.update((key, (before + taken, now)) for key, before in zip(request.keys, used, strict=True))
        while len(self._used) > LOCAL_KEYS:
            del self._used[next(iter(self._used))]
        return [one._replace(limit=one.limit * share, remaining=int(one.remaining * share)) for one in decisions]
