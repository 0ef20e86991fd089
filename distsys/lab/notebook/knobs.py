"""The knobs of the notebooks: controls for a lock, an endpoint, two limiters or a retry policy, and the answer."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import Mapping
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Self

import ipywidgets as w

from distsys.lab import experiments
from distsys.lab.simulate.simulation import policy, simulate
from distsys.rate_limiting.sliding_window import SlidingWindowLimiter
from distsys.rate_limiting.token_bucket import TokenBucketLimiter

if TYPE_CHECKING:
    from distsys.lab.session import Lab

FAULTS = ("no-lock", "killed-holder", "slow-holder", "late-release", "paused-holder", "blocked-loop")
ACCOUNTS = {"plain": "redis", "fenced": "redis, fenced where it can be"}
ATTEMPTS = {
    "sent again": ("key-per-attempt", ""),
    "two at once": ("two-attempts-at-once", ""),
    "killed before the effect": ("killed-in-between", "before-effect"),
    "killed after the effect": ("killed-in-between", "after-effect"),
    "declined, then not": ("cached-error", ""),
    "another amount": ("other-payload", ""),
    "another user": ("other-user", ""),
}
SECONDS = 10  # of a demand, in virtual time
START = 1_000_000_000.0  # virtual Unix time
COLOURS = {"asked": "#8c959f", "token bucket": "#0a3d70", "sliding window": "#1a6334"}
FULL_CLIENTS = 10_000  # so many clients use 70 % of the dependency's capacity
NARROW, WIDE = ({"description_width": width} for width in ("70px", "130px"))
whole, part = partial(w.IntSlider, style=WIDE), partial(w.FloatSlider, style=WIDE)


class Knob(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Controls, a Run button and an answer. Without a kernel, only the answer of the last run is shown.

    A subclass has `controls()`, which returns the rows of controls, and `measure()`, which returns the answer as HTML.
    """

    tooltip = ""  # of the Run button

    def __init__(self, lab: Lab, candidates: Mapping[str, Any] | None = None) -> None:
        self._lab, self._candidates = lab, candidates or {}
        self._loop = asyncio.get_running_loop()
        self._running: asyncio.Task[Knob] | None = None
        self.run = w.Button(description="Run", button_style="primary", tooltip=self.tooltip)
        self.answer = w.HTML()
        self.run.on_click(self._clicked)
        super().__init__([*self.controls(), self.answer])

    def _clicked(self, _: object) -> None:
        # The click may come on another thread (ipykernel 7.1-7.3): the lab belongs to the notebook's own loop.
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self.show())

    async def show(self) -> Self:
        """Measure with the values of the controls, and show the answer or the error."""
        self.run.disabled = True
        self.answer.value = "<p><i>running</i></p>"
        try:
            self.answer.value = await self.measure()
        except Exception as error:  # shown in place of the answer
            self.answer.value = f"<p><b>{escape(type(error).__name__)}</b>: {escape(str(error))}</p>"
            raise
        finally:
            self.run.disabled = False
        return self

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "text/html": self.answer.value}


class LockKnob(Knob):
    """A knob for a lock, a fault, an account and a TTL. The answer is the verdict."""

    tooltip = "run this lock under this fault"

    def controls(self) -> list[Any]:
        """Return the rows of controls."""
        self.lock = w.Dropdown(options=list(self._candidates), description="Lock", style=NARROW)
        self.fault = w.Dropdown(options=FAULTS, value="slow-holder", description="Fault", style=NARROW)
        self.account = w.ToggleButtons(options=list(ACCOUNTS), description="Account", style=NARROW)
        self.ttl = w.FloatSlider(value=0.3, min=0.1, max=2.0, step=0.1, description="TTL in s", style=NARROW)
        return [w.HBox([self.lock, self.fault]), self.account, w.HBox([self.ttl, self.run])]

    async def measure(self) -> str:
        """Return the verdict as HTML."""
        account = ACCOUNTS[self.account.value]
        lock, fault = self._candidates[self.lock.value], self.fault.value
        self.answer.value = f"<p><i>running: {escape(experiments.load(fault).claim)}</i></p>"
        return (await self._lab.test(lock, fault, ttl=self.ttl.value, account=account, keep=False))._repr_html_()


class EndpointKnob(Knob):
    """A knob for an endpoint that pays once, and a fault. The answer is the verdict."""

    tooltip = "pay by this endpoint, under this fault"

    def controls(self) -> list[Any]:
        """Return the rows of controls."""
        self.endpoint = w.Dropdown(options=list(self._candidates), description="Endpoint", style=NARROW)
        faults = {"options": list(ATTEMPTS), "value": "killed after the effect"}
        self.fault = w.Dropdown(**faults, description="Fault", style=NARROW)
        return [w.HBox([self.endpoint, self.fault, self.run])]

    async def measure(self) -> str:
        """Return the verdict as HTML."""
        endpoint, (fault, point) = self._candidates[self.endpoint.value], ATTEMPTS[self.fault.value]
        return (await self._lab.test(endpoint, fault, point=point, keep=False))._repr_html_()


class LimitKnob(Knob):
    """A knob for a rate, a burst and a demand. The answer is what a bucket and a window admit in ten seconds.

    The limiters run on the real server in virtual time, so the picture depends only on the sliders and the seed.
    """

    tooltip = "ten seconds of this demand"
    _runs = 0

    def controls(self) -> list[Any]:
        """Return the rows of controls."""
        self.rate = whole(value=10, min=1, max=50, description="rate per second")
        self.burst = whole(value=20, min=1, max=100, description="burst (capacity)")
        self.workers = whole(value=3, min=1, max=16, description="workers")
        self.demand = whole(value=5, min=1, max=30, description="requests/s of each")
        return [self.rate, self.burst, self.workers, w.HBox([self.demand, self.run])]

    async def measure(self) -> str:
        """Return a picture of the requests, and of those that each limiter admitted."""
        import redis.asyncio

        rng, now = random.Random(self._lab.seed), START
        self._runs += 1
        asked = sorted(at for _ in range(self.workers.value) for at in _arrivals(rng, self.demand.value))
        admitted: dict[str, list[float]] = {"asked": asked, "token bucket": [], "sliding window": []}
        rate, burst = self.rate.value, self.burst.value
        options: Any = {"name": f"{self._lab.prefix}:knob:{self._runs}", "clock": lambda: now}
        async with redis.asyncio.Redis.from_url(await self._lab.redis_url()) as client:
            bucket = TokenBucketLimiter(client, capacity=burst, refill_rate=rate, **options)
            window = SlidingWindowLimiter(client, limit=rate, window=1, **options)
            for at in asked:
                now = START + at
                for name, limiter in ("token bucket", bucket), ("sliding window", window):
                    if await limiter.is_allowed("everybody"):
                        admitted[name].append(at)
        return _picture(admitted, rate, burst)


def _arrivals(rng: random.Random, rate: float) -> list[float]:
    """Return when one worker sends: at random, never between seconds 4 and 6, and twice as often after that."""
    at, times = 0.0, []
    while (at := at + rng.expovariate(2 * rate if at > 6 else rate)) < SECONDS:
        if not 4 < at < 6:
            times.append(at)
    return times


def _picture(admitted: dict[str, list[float]], rate: float, burst: float) -> str:
    """Return an <img> with the running totals, beside the most that the bucket may admit."""
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


class StormKnob(Knob):
    """A knob for clients, an outage and a retry policy. The answer is the simulation, beside one without retries."""

    tooltip = "this storm, in virtual time"

    def controls(self) -> list[Any]:
        """Return the rows of controls."""
        self.clients = whole(value=10_000, min=5_000, max=14_000, step=500, description="clients")
        self.outage = whole(value=5, min=1, max=20, description="outage in s")
        self.share = part(value=1.0, min=0.1, max=1.0, step=0.1, description="share that fails")
        self.attempts = whole(value=4, min=1, max=6, description="attempts")
        jitters = ["none", "equal", "full", "decorrelated"]
        self.jitter = w.ToggleButtons(options=jitters, value="full", description="jitter", style=WIDE)
        self.budget = part(value=0.0, min=0.0, max=1.0, step=0.05, description="budget (0: none)")
        self.breaker = w.Checkbox(value=False, description="circuit breaker")
        return [self.clients, w.HBox([self.outage, self.share]), self.jitter,
                w.HBox([self.attempts, self.budget]), w.HBox([self.breaker, self.run])]  # fmt: skip

    async def measure(self) -> str:
        """Return the verdict as HTML."""
        options = {"jitter": self.jitter.value, "budget": self.budget.value, "breaker": 5 * self.breaker.value}
        arms = {"no retries": policy(1), "yours": policy(self.attempts.value, **options)}
        clients, storm = self.clients.value, {"outage": self.outage.value, "failure_share": self.share.value}
        load = {"clients": clients, "rate": clients / 50, "utilisation": 0.7 * clients / FULL_CLIENTS}
        simulation = await asyncio.to_thread(simulate, arms, seed=self._lab.seed, after=12, **load, **storm)
        return simulation._repr_html_()
