"""The knob of the rate limiting notebook: a demand of yours against a bucket and a window, on the real server.

The time of its run is virtual, ten seconds in a moment, so the picture depends on the sliders and the seed only.
"""

from __future__ import annotations

import base64
import io
import random
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from distsys.lab.knob import Knob
from distsys.ratelimit.sliding_window import SlidingWindowLimiter
from distsys.ratelimit.token_bucket import TokenBucketLimiter

if TYPE_CHECKING:
    from distsys.lab.session import Lab

SECONDS = 10
START = 1_000_000_000.0
COLOURS = {"asked": "#8c959f", "token bucket": "#0a3d70", "sliding window": "#1a6334"}


class LimitKnob(Knob):
    """A rate, a burst and a demand; the answer is a picture of what was asked and what was admitted."""

    def __init__(self, lab: Lab) -> None:
        self._runs = 0
        super().__init__(lab, "ten seconds of this demand")

    def controls(self) -> list[Any]:
        style: Any = {"description_width": "130px"}
        self.rate = w.IntSlider(value=10, min=1, max=50, description="rate per second", style=style)
        self.burst = w.IntSlider(value=20, min=1, max=100, description="burst (capacity)", style=style)
        self.workers = w.IntSlider(value=3, min=1, max=16, description="workers", style=style)
        self.demand = w.IntSlider(value=5, min=1, max=30, description="requests/s of each", style=style)
        return [self.rate, self.burst, self.workers, w.HBox([self.demand, self.run])]

    async def measure(self) -> str:
        """A picture of when each request was made, and of when those were that a limiter admitted."""
        import redis.asyncio

        rng, now = random.Random(self._lab.seed), START
        self._runs += 1
        asked = sorted(at for _ in range(self.workers.value) for at in _arrivals(rng, self.demand.value))
        admitted: dict[str, list[float]] = {"asked": asked, "token bucket": [], "sliding window": []}
        rate, burst, name = self.rate.value, self.burst.value, f"{self._lab.prefix}:knob:{self._runs}"
        async with redis.asyncio.Redis.from_url(await self._lab.redis_url()) as client:
            limiters: dict[str, Any] = {
                "token bucket": TokenBucketLimiter(
                    client, capacity=burst, refill_rate=rate, name=name, clock=lambda: now
                ),
                "sliding window": SlidingWindowLimiter(client, limit=rate, window=1, name=name, clock=lambda: now),
            }
            for at in asked:
                now = START + at
                for which, limiter in limiters.items():
                    if await limiter.is_allowed("everybody"):
                        admitted[which].append(at)
        return _picture(admitted, rate, burst)


def _arrivals(rng: random.Random, rate: float) -> list[float]:
    """A worker's requests: at random, none between the fourth and the sixth second, and twice as many after it."""
    at, times = 0.0, []
    while (at := at + rng.expovariate(2 * rate if at > 6 else rate)) < SECONDS:
        if not 4 < at < 6:
            times.append(at)
    return times


def _picture(admitted: dict[str, list[float]], rate: float, burst: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, times in admitted.items():
        axes.step([0, *times, SECONDS], [0, *range(1, len(times) + 1), len(times)], where="post", color=COLOURS[name],
                  label=f"{name}: {len(times)}", linestyle=":" if name == "asked" else "-")  # fmt: skip
    axes.plot([0, SECONDS], [burst, burst + rate * SECONDS], color="#b3121d", linestyle="--", linewidth=1,
              label=f"what the bucket may admit: {burst} + {rate} t")  # fmt: skip
    axes.set(xlabel="seconds", ylabel="requests, added up", xlim=(0, SECONDS))
    axes.set_ylim(0, 1.15 * max(len(admitted["asked"]) * 0.6, burst + rate * SECONDS))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "knob"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    told = ", ".join(f"{name} {len(times)}" for name, times in admitted.items())
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="Requests added up over {SECONDS} s: {escape(told)}" src="data:image/svg+xml;base64,{source}">'
