"""The token bucket as the textbook has it, in exact fractions, schedules to run it on, and a client without expiry."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import redis.asyncio
from hypothesis import strategies as st

MICRO = 1_000_000


class Model:
    """One bucket. A clock that was set back refills nothing until it has caught up."""

    def __init__(self, capacity: float, refill_rate: float) -> None:
        self.capacity, self.rate = Fraction(capacity), Fraction(refill_rate).limit_denominator(MICRO)
        self.used, self.at = Fraction(0), 0

    def ask(self, now: int, cost: Fraction) -> bool:
        """`now` in microseconds. Only what is admitted is remembered."""
        used = self.used_at(now)
        if used + cost > self.capacity:
            return False
        self.used, self.at = used + cost, max(now, self.at)
        return True

    def used_at(self, now: int) -> Fraction:
        return max(Fraction(0), self.used - max(0, now - self.at) * self.rate / MICRO)


class WithoutExpiry(redis.asyncio.Redis):
    """A client that makes the keys of each script persistent, in the same transaction.

    By a test's clock no time passes between two decisions. By the server's clock it does, and on a loaded machine a key
    expired in the middle of a schedule: a bucket that was not full by the test's clock then began anew.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command; after a script, PERSIST its keys."""
        if args[0] not in ("EVALSHA", "EVAL"):
            return await super().execute_command(*args, **options)
        async with self.pipeline(transaction=True) as pipe:
            pipe.execute_command(*args, **options)
            for key in args[3 : 3 + args[2]]:
                pipe.persist(key)
            return (await pipe.execute())[0]


capacities = st.one_of(st.integers(1, 1000), st.decimals("0.5", 100, places=2).map(float))
rates = st.one_of(
    st.integers(1, 10_000), st.integers(1, 100_000).map(lambda n: 1 / n), st.decimals("0.01", 50, places=3).map(float)
)
steps = st.one_of(st.integers(0, 1000), st.integers(0, 10 * MICRO), st.integers(-2 * MICRO, 0))
shares = st.sampled_from([Fraction(1, 1000), Fraction(1, 10), Fraction(1, 3), Fraction(1)])
"""A cost as a share of the capacity, so that some requests fit and some do not."""
schedules = st.lists(st.tuples(steps, shares), min_size=1, max_size=60)
