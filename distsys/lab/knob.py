"""The knob of the lock notebook: any lock of the reader's, under any fault, with or without a fence, at any TTL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from distsys.lab import experiments

if TYPE_CHECKING:
    from distsys.lab.session import Lab

FAULTS = ("no-lock", "killed-holder", "slow-holder", "late-release", "paused-holder", "blocked-loop")
ACCOUNTS = {"plain": "redis", "fenced": "redis, fenced where it can be"}


class LockKnob(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Choose, press Run, read the verdict. Where no kernel runs, the verdict of the last run is shown alone."""

    def __init__(self, lab: Lab, locks: Mapping[str, Any]) -> None:
        style: Any = {"description_width": "70px"}
        self._lab, self._locks, self._loop = lab, dict(locks), asyncio.get_running_loop()
        self._running: asyncio.Task[LockKnob] | None = None
        self.lock = w.Dropdown(options=list(self._locks), description="Lock", style=style)
        self.fault = w.Dropdown(options=FAULTS, value="slow-holder", description="Fault", style=style)
        self.account = w.ToggleButtons(options=list(ACCOUNTS), description="Account", style=style)
        self.ttl = w.FloatSlider(value=0.3, min=0.1, max=2.0, step=0.1, description="TTL in s", style=style)
        self.run = w.Button(description="Run", button_style="primary", tooltip="run this lock under this fault")
        self.answer = w.HTML()
        self.run.on_click(self._clicked)
        super().__init__([w.HBox([self.lock, self.fault]), self.account, w.HBox([self.ttl, self.run]), self.answer])

    def _clicked(self, _: object) -> None:
        # The click may come on another thread (ipykernel 7.1-7.3): the lab belongs to the notebook's own loop.
        self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self.show())

    async def show(self) -> LockKnob:
        """Runs what the controls say, and shows the verdict or the error."""
        self.run.disabled = True
        self.answer.value = f"<p><i>running: {escape(experiments.load(self.fault.value).claim)}</i></p>"
        try:
            verdict = await self._lab.test(
                self._locks[self.lock.value],
                self.fault.value,
                ttl=self.ttl.value,
                account=ACCOUNTS[self.account.value],
                keep=False,
            )
            self.answer.value = verdict._repr_html_()
        except Exception as error:  # shown where the reader looks
            self.answer.value = f"<p><b>{escape(type(error).__name__)}</b>: {escape(str(error))}</p>"
            raise
        finally:
            self.run.disabled = False
        return self

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.answer.value}
