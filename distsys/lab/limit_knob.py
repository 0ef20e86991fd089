"""The knob of the rate limiting notebook: a demand of yours against a bucket and a window, on the real server.

The time of its run is virtual, ten seconds in a moment, so the picture depends on the sliders and the seed only.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from distsys.ratelimit.sliding_window import SlidingWindowLimiter
from distsys.ratelimit.token_bucket import TokenBucketLimiter

if TYPE_CHECKING:
    from distsys.lab.session import Lab

SECONDS = 10
START = 1_000_000_000.0
COLOURS = {"asked": "#8c959f", "token bucket": "#0a3d70", "sliding window": "#1a6334"}


class LimitKnob(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Move, press Run, compare the curves. Where no kernel runs, those of the last run are shown alone."""

    def __init__(self, lab: Lab) -> None:
        style: Any = {"description_width": "130px"}
        self._lab, self._loop = lab, asyncio.get_running_loop()
        self._running: asyncio.Task[LimitKnob] | None = None
        self._runs = 0
        self.rate = w.IntSlider(value=10, min=1, max=50, description="rate per second", style=style)
        self.burst = w.IntSlider(value=20, min=1, max=100, description="burst (capacity)", style=style)
        self.workers = w.IntSlider(value=3, min=1, max=16, description="workers", style=style)
        self.demand = w.IntSlider(value=5, min=1, max=30, description="requests/s of each", style=style)
        self.run = w.Button(description="Run", button_style="primary", tooltip="ten seconds of this demand")
        self.answer = w.HTML()
        self.run.on_click(self._clicked)
        super().__init__([self.rate, self.burst, self.workers, w.HBox([self.demand, self.run]), self.answer])

    def _clicked(self, _: object) -> None:
        # The click may come on another thread (ipykernel 7.1-7.3): the lab belongs to the notebook's own loop.
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self.show())

    async def show(self) -> LimitKnob:
        """Runs what the sliders say, and shows the curves or the error."""
        self.run.disabled = True
        try:
            self.answer.value = _picture(await self._measure(), self.rate.value, self.burst.value)
        except Exception as error:  # shown where the reader looks
            self.answer.value = f"<p><b>{escape(type(error).__name__)}</b>: {escape(str(error))}</p>"
            raise
        finally:
            self.run.disabled = False
        return self

    async def _measure(self) -> dict[str, list[float]]:
        """When each request was made, and when each one was that a limiter admitted: seconds from the start."""
        import redis.asyncio

        def clock() -> float:
            return now

        rng, now = random.Random(self._lab.seed), START
        self._runs += 1
        asked = sorted(at for _ in range(self.workers.value) for at in _arrivals(rng, self.demand.value))
        admitted: dict[str, list[float]] = {"asked": asked, "token bucket": [], "sliding window": []}
        rate, burst, name = self.rate.value, self.burst.value, f"{self._lab.prefix}:knob:{self._runs}"
        async with redis.asyncio.Redis.from_url(await self._lab.redis_url()) as client:
            limiters: dict[str, Any] = {
                "token bucket": TokenBucketLimiter(client, capacity=burst, refill_rate=rate, name=name, clock=clock),
                "sliding window": SlidingWindowLimiter(client, limit=rate, window=1, name=name, clock=clock),
            }
            for at in asked:
                now = START + at
                for which, limiter in limiters.items():
                    if await limiter.is_allowed("everybody"):
                        admitted[which].append(at)
        return admitted

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.answer.value}


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
