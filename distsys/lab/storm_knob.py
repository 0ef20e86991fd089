"""The knob of the resilience notebook: a storm and a policy of yours, beside no retries at all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from distsys.lab.knob import Knob
from distsys.lab.simulate import policy, simulate

if TYPE_CHECKING:
    from distsys.lab.session import Lab

BUILT_FOR = 10_000  # clients, at seventy percent of what the dependency can do


class StormKnob(Knob):
    """How many clients, what fails and for how long, and how they retry: two panels and their verdicts."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, "such a storm, in virtual time")

    def controls(self) -> list[Any]:
        style: Any = {"description_width": "130px"}
        self.clients = w.IntSlider(value=10_000, min=5_000, max=14_000, step=500, description="clients", style=style)
        self.outage = w.IntSlider(value=5, min=1, max=20, description="outage in s", style=style)
        self.share = w.FloatSlider(value=1.0, min=0.1, max=1.0, step=0.1, description="share that fails", style=style)
        self.attempts = w.IntSlider(value=4, min=1, max=6, description="attempts", style=style)
        self.jitter = w.ToggleButtons(
            options=["none", "equal", "full", "decorrelated"], value="full", description="jitter", style=style
        )
        self.budget = w.FloatSlider(value=0.0, min=0.0, max=1.0, step=0.05, description="budget (0: none)", style=style)
        self.breaker = w.Checkbox(value=False, description="circuit breaker")
        return [self.clients, w.HBox([self.outage, self.share]), self.jitter,
                w.HBox([self.attempts, self.budget]), w.HBox([self.breaker, self.run])]  # fmt: skip

    async def measure(self) -> str:
        yours = policy(
            self.attempts.value, jitter=self.jitter.value, budget=self.budget.value, breaker=5 * self.breaker.value
        )
        clients, storm = self.clients.value, {"outage": self.outage.value, "failure_share": self.share.value}
        simulation = await asyncio.to_thread(
            simulate, {"no retries": policy(1), "yours": yours}, seed=self._lab.seed, clients=clients,
            rate=clients / 50, utilisation=0.7 * clients / BUILT_FOR, after=12, **storm,
        )  # fmt: skip
        return simulation._repr_html_()
