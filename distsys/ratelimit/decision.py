"""What every limiter answers, and what it answers when its Redis does not."""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

from redis import exceptions
from redis.exceptions import AuthenticationError, AuthorizationError, RedisClusterException

from distsys.clock import check_timeout
from distsys.errors import RateLimited

logger = logging.getLogger("distsys.ratelimit")
Source = Literal["redis", "lease", "open", "closed", "local"]
MICRO = 1_000_000  # tokens are counted in millionths and times in microseconds: whole numbers, so nothing gets lost
MAX_TOKENS = 1_000_000_000  # a billion in millionths is exact in Lua's numbers, which are doubles
ASK_AGAIN = 1.0  # seconds that `closed` asks to wait
LOCAL_KEYS = 10_000  # that the local policy keeps apart; beyond, the one not asked for longest is forgotten

UNAVAILABLE = (
    OSError,
    TimeoutError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a primary that became a replica
    exceptions.OutOfMemoryError,
    exceptions.ClusterError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
)


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

    def decision(self, allowed: bool, used: int, cost: int, source: Source = "redis") -> Decision:
        """`used` microtokens after the decision on `cost` microtokens."""
        wait = 0.0 if allowed else self.seconds(used + cost - self.full)
        return Decision(allowed, self.capacity, max(0, (self.full - used) // MICRO), wait, self.seconds(used), source)

    def cost(self, cost: float) -> int:
        """In millionths; one that could never pass is refused."""
        wanted = MICRO if type(cost) is int and cost == 1 else micro("cost", cost)
        if wanted > self.full:
            raise ValueError(
                f"cost={cost!r} could never pass capacity={self.capacity!r}: raise it, or split the request"
            )
        return wanted


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
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout={self.timeout!r}: seconds above 0")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction!r} of the limit: above 0, at most 1")


class Fallback:
    """Applies a failure policy: what a limiter answers in the place of Redis."""

    def __init__(self, name: str, on_failure: OnFailure | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.on_failure, self._clock = name, on_failure, clock
        self.timeout = on_failure.timeout if on_failure else None
        self.failing = False
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> microtokens used, and when

    def worked(self) -> None:
        if self.failing:
            self.failing = False
            logger.warning("limiter %r: Redis decides again", self.name)

    def decide(self, error: Exception, keys: Sequence[str], limits: Sequence[Limit], cost: int) -> list[Decision]:
        """One decision for each of the limits, all alike; without a policy for such an error, the error."""
        if self.on_failure is None or not unavailable(error):
            raise error
        policy = self.on_failure.policy
        if not self.failing:
            self.failing = True
            logger.warning("limiter %r is %s while Redis does not decide: %r", self.name, policy, error)
        if policy == "local":
            return self._decide_here(keys, limits, cost)
        passes = policy == "open"
        return [Decision(passes, limit.capacity, 0, 0.0 if passes else ASK_AGAIN, 0.0, policy) for limit in limits]

    def _decide_here(self, keys: Sequence[str], limits: Sequence[Limit], cost: int) -> list[Decision]:
        assert self.on_failure is not None
        now, share = self._clock(), self.on_failure.fraction
        used = []
        for key, limit in zip(keys, limits, strict=True):
            before, at = self._buckets.get(key, (0.0, now))
            used.append(max(0.0, before - (now - at) * limit.refill_rate * share * MICRO))
        fits = [before + cost <= limit.full * share for before, limit in zip(used, limits, strict=True)]
        answers = []
        for key, limit, before, passes in zip(keys, limits, used, fits, strict=True):
            after = before + cost if all(fits) else before
            self._buckets[key] = after, now
            self._buckets.move_to_end(key)
            full, rate = limit.full * share, limit.refill_rate * share * MICRO
            wait = 0.0 if passes else (before + cost - full) / rate
            left = max(0, math.floor((full - after) / MICRO))
            answers.append(Decision(passes, limit.capacity * share, left, wait, after / rate, "local"))
        while len(self._buckets) > LOCAL_KEYS:
            self._buckets.popitem(last=False)
        return answers


Queues = WeakValueDictionary[str, asyncio.Lock]
"""One for each key that somebody waits for."""


async def wait_in_turn(
    queues: Queues,
    key: str,
    ask: Callable[[], Awaitable[Decision]],
    timeout: float | None,
    refusal: Callable[[float | None], RateLimited],
) -> Decision:
    """Asks again and again, each time when the answer before said so: in this process first come, first served.

    Raises the refusal, which is told the seconds to wait if they are known, when `timeout` can't be enough.
    """
    now = asyncio.get_running_loop().time
    deadline = math.inf if check_timeout(timeout) is None else now() + (timeout or 0)
    queue = queues.setdefault(check_key(key), asyncio.Lock())
    try:
        async with asyncio.timeout(timeout):  # the queue only: a request that was sent may have been granted
            await queue.acquire()
    except TimeoutError:
        raise refusal(None) from None
    try:
        while not (decision := await ask()):
            if now() + decision.retry_after > deadline:
                raise refusal(decision.retry_after)
            await asyncio.sleep(decision.retry_after)
    finally:
        queue.release()
    return decision


def unavailable(error: Exception) -> bool:
    """Whether Redis could not be asked. A wrong password or a missing right is a mistake, and no policy may hide it.

    The client of a cluster that can't say where the slots are names, as the cause, what the last node answered.
    """
    cause = error.__cause__
    if isinstance(error, RedisClusterException) and not isinstance(cause, RedisClusterException):
        return cause is None or (isinstance(cause, Exception) and unavailable(cause))
    return isinstance(error, UNAVAILABLE) and not isinstance(error, (AuthenticationError, AuthorizationError))


def check_positive(name: str, value: float, most: float, unit: str) -> float:
    """A number above 0, and within what the scripts can count."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give {unit} as a number")
    if not 0 < value <= most:
        raise ValueError(f"{name}={value!r}: {unit}, above 0 and at most {most:,.0f}")
    return value


def micro(name: str, tokens: float) -> int:
    """Tokens in millionths."""
    return max(1, round(check_positive(name, tokens, MAX_TOKENS, "tokens") * MICRO))


def check_key(key: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key={key!r} is a {type(key).__name__}; a key is a str: 'user:42'")
    if not key:
        raise ValueError("key='' is empty: everybody without a key would share one limit; name who is limited")
    return key
