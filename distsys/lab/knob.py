"""The knobs of the notebooks: what they share; and that of locks: any lock, any fault, with or without a fence."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Self

import ipywidgets as w

from distsys.lab import experiments

if TYPE_CHECKING:
    from distsys.lab.session import Lab

FAULTS = ("no-lock", "killed-holder", "slow-holder", "late-release", "paused-holder", "blocked-loop")
ACCOUNTS = {"plain": "redis", "fenced": "redis, fenced where it can be"}


class Knob(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Controls, a Run button, an answer. Where no kernel runs, the answer of the last run is shown alone."""

    def __init__(self, lab: Lab, what: str) -> None:
        self._lab, self._loop = lab, asyncio.get_running_loop()
        self._running: asyncio.Task[Knob] | None = None
        self.run = w.Button(description="Run", button_style="primary", tooltip=what)
        self.answer = w.HTML()
        self.run.on_click(self._clicked)
        super().__init__([*self.controls(), self.answer])

    def controls(self) -> list[Any]:
        """Makes them, and says how they stand."""
        raise NotImplementedError

    async def measure(self) -> str:
        """Runs what the controls say: HTML."""
        raise NotImplementedError

    def _clicked(self, _: object) -> None:
        # The click may come on another thread (ipykernel 7.1-7.3): the lab belongs to the notebook's own loop.
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self.show())

    async def show(self) -> Self:
        """Runs what the controls say, and shows the answer or the error."""
        self.run.disabled = True
        self.answer.value = "<p><i>running</i></p>"
        try:
            self.answer.value = await self.measure()
        except Exception as error:  # shown where the reader looks
            self.answer.value = f"<p><b>{escape(type(error).__name__)}</b>: {escape(str(error))}</p>"
            raise
        finally:
            self.run.disabled = False
        return self

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "text/html": self.answer.value}


class LockKnob(Knob):
    """A lock, a fault, an account and a TTL; the answer is the verdict."""

    def __init__(self, lab: Lab, locks: Mapping[str, Any]) -> None:
        self._locks = locks
        super().__init__(lab, "run this lock under this fault")

    def controls(self) -> list[Any]:
        style: Any = {"description_width": "70px"}
        self.lock = w.Dropdown(options=list(self._locks), description="Lock", style=style)
        self.fault = w.Dropdown(options=FAULTS, value="slow-holder", description="Fault", style=style)
        self.account = w.ToggleButtons(options=list(ACCOUNTS), description="Account", style=style)
        self.ttl = w.FloatSlider(value=0.3, min=0.1, max=2.0, step=0.1, description="TTL in s", style=style)
        return [w.HBox([self.lock, self.fault]), self.account, w.HBox([self.ttl, self.run])]

    async def measure(self) -> str:
        account = ACCOUNTS[self.account.value]
        lock, fault = self._locks[self.lock.value], self.fault.value
        self.answer.value = f"<p><i>running: {escape(experiments.load(fault).claim)}</i></p>"
        return (await self._lab.test(lock, fault, ttl=self.ttl.value, account=account, keep=False))._repr_html_()
