"""The token bucket as the textbook has it, in exact fractions, and schedules to run it on."""

from __future__ import annotations

from fractions import Fraction

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


capacities = st.one_of(st.integers(1, 1000), st.decimals("0.5", 100, places=2).map(float))
rates = st.one_of(
    st.integers(1, 10_000), st.integers(1, 100_000).map(lambda n: 1 / n), st.decimals("0.01", 50, places=3).map(float)
)
steps = st.one_of(st.integers(0, 1000), st.integers(0, 10 * MICRO), st.integers(-2 * MICRO, 0))
shares = st.sampled_from([Fraction(1, 1000), Fraction(1, 10), Fraction(1, 3), Fraction(1)])
"""A cost as a share of the capacity, so that some requests fit and some do not."""
schedules = st.lists(st.tuples(steps, shares), min_size=1, max_size=60)
