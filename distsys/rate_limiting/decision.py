"""What every limiter answers, and the arithmetic of a token bucket in Python, as token_bucket.lua has it in Redis."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from distsys._support.arguments import check_positive

logger = logging.getLogger("distsys.rate_limiting")
Source = Literal["redis", "lease", "open", "closed", "local"]
MICRO = 1_000_000  # tokens are counted in millionths and times in microseconds: whole numbers lose nothing
MAX_TOKENS = 1_000_000_000  # a billion in millionths is exact in Lua's numbers, which are doubles

BucketReply = tuple[int, Sequence[int], int]
"""Redis's answer to a request: how many of its `times` were granted, the microtokens used in each bucket before the
call, and those that earlier requests of the same call have taken from each since."""


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
        """Return a key for max(), which finds the decision that refuses longest or else has the smallest share left."""
        return self.retry_after, -self.remaining / self.limit


class Limit:
    """A capacity in tokens and a refill rate in tokens per second, held in whole numbers as the script counts them."""

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

    def cost(self, cost: float) -> int:
        """Return the cost in microtokens; ValueError for one that could never pass."""
        wanted = MICRO if type(cost) is int and cost == 1 else micro("cost", cost)
        if wanted > self.full:
            raise never_passes(cost, f"capacity={self.capacity!r}")
        return wanted

    def refilled(self, used: float, elapsed: float) -> float:
        """Return the microtokens still used after `elapsed` seconds of refill."""
        return max(0.0, used - elapsed * MICRO * self.num / self.den)

    def seconds(self, microtokens: int) -> float:
        """Return how many seconds the refill of so many microtokens takes, rounded up to the microsecond."""
        return -(-microtokens * self.den // self.num) / MICRO if microtokens > 0 else 0.0

    def decision(self, used: int, wanted: int, taken: int, source: Source = "redis") -> Decision:
        """Return the decision on `wanted` microtokens after `used`.

        taken  what the request takes if it passes here: 0 if it only looks or another limit refuses it
        """
        over = used + wanted - self.full
        used, wait = (used, self.seconds(over)) if over > 0 else (used + taken, 0.0)
        left = max(0, (self.full - used) // MICRO)
        return Decision(over <= 0, self.capacity, left, wait, self.seconds(used), source)


class Request(NamedTuple):
    """`cost` microtokens from each of the buckets, together or not at all; `times` such requests in a row."""

    keys: tuple[str, ...]
    limits: tuple[Limit, ...]
    cost: int  # 0 only looks, whether one token would pass; a negative one gives back
    times: int = 1

    def decision(self, reply: BucketReply) -> Decision:
        """Return the decision on the first of these requests, which ask one bucket."""
        _, (used,), taken = reply
        return self.limits[0].decision(used + taken, self.cost or MICRO, self.cost)

    def decisions(self, reply: BucketReply, source: Source = "redis") -> list[Decision]:
        """Return the decision of each limit on the first of these requests; it passes if all of them allow it."""
        granted, used, taken = reply
        wanted, takes = self.cost or MICRO, self.cost if granted else 0
        pairs = zip(self.limits, used, strict=True)
        return [limit.decision(before + taken, wanted, takes, source) for limit, before in pairs]


def micro(name: str, tokens: float) -> int:
    """Return tokens in millionths; ValueError or TypeError names the argument."""
    return max(1, round(check_positive(name, tokens, MAX_TOKENS, "tokens") * MICRO))


def never_passes(cost: float, limit: str) -> ValueError:
    """Return the error for a cost above the limit."""
    return ValueError(f"cost={cost!r} could never pass {limit}: raise it, or split the request")
