"""What every limiter answers, and what it answers when its Redis does not."""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

from distsys.arguments import check_positive, check_timeout
from distsys.errors import RateLimited
from distsys.redis_scripts import unavailable

logger = logging.getLogger("distsys.ratelimit")
Source = Literal["redis", "lease", "open", "closed", "local"]
MICRO = 1_000_000  # tokens are counted in millionths and times in microseconds: whole numbers, so nothing gets lost
MAX_TOKENS = 1_000_000_000  # a billion in millionths is exact in Lua's numbers, which are doubles
ASK_AGAIN = 1.0  # seconds that `closed` asks to wait
LOCAL_KEYS = 10_000  # that the local policy keeps apart; beyond, the one not asked for longest is forgotten


class Decision(NamedTuple):
    """Whether the request may pass; true when it may. Seconds are counted from the decision."""

    allowed: bool
    limit: float  # tokens that a full bucket or an empty window holds
    remaining: int  # whole tokens that are left, for requests that come at once
    retry_after: float  # seconds until the same request can pass if nobody else takes its tokens; 0 when it passed
    reset_after: float  # seconds until everything is back
    source: Source = "redis"  # who decided: redis, a lease of tokens it gave us, or the failure policy

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def tightness(self) -> tuple[float, float]:
        """For max(): the one that refuses longest, or else has the smallest share left."""
        return self.retry_after, -self.remaining / self.limit


class Limit:
    """A capacity in tokens and a refill rate in tokens per second, as the scripts count them: in whole numbers."""

    den: float

    def __init__(self, capacity: float, refill_rate: float) -> None:
        self.full, self.capacity = micro("capacity", capacity), capacity
        self.refill_rate = check_positive("refill_rate", refill_rate, MAX_TOKENS, "tokens per second")
        # The rate as a fraction: 1/3600 and 0.1 exactly, others to 12 digits; the bound keeps products below 2^53.
        most = max(1, min(MICRO, math.isqrt(int(9e15 / max(1.0, refill_rate)))))
        rate = Fraction(refill_rate).limit_denominator(most)
        if rate <= 0:
            raise ValueError(f"refill_rate={refill_rate!r} tokens per second is less than one in eleven days")
        self.num, self.den = rate.numerator, rate.denominator
        self.packed = struct.pack("<ddd", self.full, self.num, self.den)

    def seconds(self, microtokens: int) -> float:
        """How long the refill of so much takes, to the next microsecond."""
        return -(-microtokens * self.den // self.num) / MICRO if microtokens > 0 else 0.0

    def decision(self, used: int, granted: int, wanted: int, source: Source = "redis") -> Decision:
        """On `wanted` microtokens after `used`; `granted` are what other limits leave of them, or 0 to look only."""
        over, wait = used + wanted - self.full, 0.0
        if over > 0:
            wait = self.seconds(over)
        else:
            used += granted
        left = max(0, (self.full - used) // MICRO)
        return Decision(over <= 0, self.capacity, left, wait, self.seconds(used), source)

    def cost(self, cost: float) -> int:
        """In millionths; one that could never pass is refused."""
        wanted = MICRO if type(cost) is int and cost == 1 else micro("cost", cost)
        if wanted > self.full:
            raise never_passes(cost, f"capacity={self.capacity!r}")
        return wanted


class Request(NamedTuple):
    """`cost` microtokens from each of the buckets, together or not at all; `times` such requests in a row."""

    keys: tuple[str, ...]
    limits: tuple[Limit, ...]
    cost: int  # 0 only looks, whether one token would pass; a negative one gives back
    times: int = 1

    def decisions(self, used: Sequence[int], taken: int = 0, source: Source = "redis") -> list[Decision]:
        """Of each limit on the first one, after `used` and `taken` microtokens; all of them have to let it pass."""
        wanted, pairs = self.cost or MICRO, [(limit, one + taken) for limit, one in zip(self.limits, used, strict=True)]
        granted = self.cost if all(before + wanted <= limit.full for limit, before in pairs) else 0
        return [limit.decision(before, granted, wanted, source) for limit, before in pairs]


Answer = tuple[Sequence[int], int]
"""The microtokens used in each bucket before the call, and those taken in it before the request.

Whether it was granted follows from them, as it does in the script."""


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
        self.name, self.on_failure = name, on_failure
        self.timeout = on_failure.timeout if on_failure else None
        self._failing = False
        self._used: dict[str, tuple[float, float]] = {}  # key -> microtokens used, and when

    async def guard(self, asked: Awaitable[Answer], request: Request) -> list[Decision]:
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


class Queues(WeakValueDictionary[str, asyncio.Lock]):
    """Those who wait in acquire(): in this process first come, first served, for each key."""

    def __init__(self, limit: float, left: str) -> None:
        super().__init__()
        self._limit, self._left = limit, left

    async def wait(
        self, key: str, ask: Callable[[], Awaitable[Decision]], timeout: float | None, longest: float
    ) -> Decision:
        """Asks again and again, each time when the answer before said so.

        RateLimited when `timeout` can't be enough; `longest` seconds are said while nobody knows how many.
        """
        now = asyncio.get_running_loop().time
        deadline = math.inf if check_timeout(timeout) is None else now() + (timeout or 0)
        queue = self.setdefault(check_key(key), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout):  # the queue only: a request that was sent may have been granted
                await queue.acquire()
        except TimeoutError:
            raise self._refusal(key, longest) from None
        try:
            while not (decision := await ask()):
                if now() + decision.retry_after > deadline:
                    raise self._refusal(key, decision.retry_after)
                await asyncio.sleep(decision.retry_after)
        finally:
            queue.release()
        return decision

    def _refusal(self, key: str, wait: float) -> RateLimited:
        message = f"{key!r} has no {self._left}; the next try can pass in {wait:.3g} s"
        return RateLimited(message, key=key, limit=self._limit, retry_after=wait)


def micro(name: str, tokens: float) -> int:
    """Tokens in millionths."""
    return max(1, round(check_positive(name, tokens, MAX_TOKENS, "tokens") * MICRO))


def never_passes(cost: float, limit: str) -> ValueError:
    return ValueError(f"cost={cost!r} could never pass {limit}: raise it, or split the request")


def check_key(key: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key={key!r} is a {type(key).__name__}; a key is a str: 'user:42'")
    if not key:
        raise ValueError("key='' is empty: everybody without a key would share one limit; name who is limited")
    return key
