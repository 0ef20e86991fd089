"""What every limiter answers, and what it answers when its Redis does not."""

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
MICRO = 1_000_000  # tokens are counted in millionths and times in microseconds: whole numbers, so nothing gets lost
MAX_TOKENS = 1_000_000_000  # a billion in millionths is exact in Lua's numbers, which are doubles


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


BucketReply = tuple[Sequence[int], int]
"""The microtokens used in each bucket before the call, and those taken in it before the request.

Whether it was granted follows from them, as it does in the script."""


def micro(name: str, tokens: float) -> int:
    """Tokens in millionths."""
    return max(1, round(check_positive(name, tokens, MAX_TOKENS, "tokens") * MICRO))


def never_passes(cost: float, limit: str) -> ValueError:
    return ValueError(f"cost={cost!r} could never pass {limit}: raise it, or split the request")
