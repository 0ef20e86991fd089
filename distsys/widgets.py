"""The decision dashboard: three controls and one HTML answer.

An `ipywidgets.HTML` and no `Output`: an error inside an Output passes unseen through papermill. The card brings its
own light background, so it reads the same in a light and a dark theme; the verdict is a word and a sign, never colour
alone.
"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as w

from distsys.decide import DONT, PATTERNS, STAGES, Decision, Recommendation, Word, recommend

AMBER = ("~", "#7a4b00", "#fff3d6")
TONES: dict[Word, tuple[str, str, str]] = {  # sign, ink, paper: at least 4.5 : 1
    "IN-PROCESS": ("○", "#3d4852", "#e8ecf0"),
    "OVERKILL": ("✕", "#9b1c1c", "#fdeaea"),
    **dict.fromkeys(("BORDERLINE", "SIMPLE ONLY", "SELECTIVE", "WHEN JUSTIFIED"), AMBER),
    "APPROPRIATE": ("✓", "#14592b", "#e3f5e8"),
    "REQUIRED": ("!", "#0b4a8f", "#e3effc"),
}
INK, PAPER, QUIET, LINK = "#1f2328", "#ffffff", "#57606a", "#0b57d0"


def answer_html(answer: Recommendation, *, base: str = "../") -> str:
    """The card of one recommendation; links are relative to `base`, the project's folder as seen from the notebook."""
    dont = answer.verdict in DONT
    rows = [f"<b>{'Instead' if dont else 'Simpler, where it is enough'}:</b> {escape(answer.alternative)}"]
    rows += [f"<b>{escape(d.topic)}:</b> {escape(d.claim)}{_caveat(d)}" for d in answer.decisions if not dont]
    links = " · ".join(
        f'<a href="{escape(base + path)}" target="_blank" rel="noopener" style="color:{LINK}">{escape(label)}</a>'
        for label, path in answer.links
    )
    words = zip(STAGES, answer.pattern.cells, strict=True)
    strip = "".join(_chip(word, stage, on=stage == answer.stage and answer.instances > 1) for stage, word in words)
    ours = " The verdicts of this pattern are ours." if answer.pattern.ours else ""
    parts = [("font-size:18px", f"{_badge(answer.verdict)} {escape(answer.pattern.name)}")]
    parts += [("margin:8px 0", escape(answer.reason)), *(("margin:2px 0", row) for row in rows)]
    parts += [("margin-top:8px", f"Next: {links}")] if links else []
    parts += [("display:flex;flex-wrap:wrap;gap:6px;margin-top:12px", strip)]
    parts += [(f"margin-top:6px;color:{QUIET};font-size:12px", f"The row of the matrix, for several instances.{ours}")]
    body = "".join(f'<div style="{style}">{part}</div>' for style, part in parts)
    return (
        f'<div role="status" style="background:{PAPER};color:{INK};border:1px solid #c8ced6;border-radius:6px;'
        f'padding:14px 16px;max-width:760px;font:14px/1.5 system-ui,sans-serif">{body}</div>'
    )


class Dashboard(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Pattern, stage and number of instances, the recommendation below; every control works from the keyboard.

    Where no kernel runs (GitHub, an untrusted notebook) the card alone is shown.
    """

    def __init__(
        self, pattern: str = "Distributed locks", stage: str = "MVP", instances: int = 3, *, base: str = "../"
    ) -> None:
        style: Any = {"description_width": "80px"}
        self.base = base
        self.pattern = w.Dropdown(options=[p.name for p in PATTERNS], value=pattern, description="Pattern", style=style)
        wide = {"button_width": "auto", **style}
        self.stage = w.ToggleButtons(options=STAGES, value=stage, description="Stage", style=wide)
        self.instances = w.BoundedIntText(value=instances, min=1, max=10_000, description="Instances", style=style)
        self.instances.layout.width = "180px"
        self.answer = w.HTML()
        for control in (self.pattern, self.stage, self.instances):
            control.observe(self._show, names="value")
        self._show()
        super().__init__([w.HBox([self.pattern, self.instances]), self.stage, self.answer])

    def _show(self, _: object = None) -> None:
        self.recommendation = recommend(self.pattern.value, self.stage.value, self.instances.value)
        self.answer.value = answer_html(self.recommendation, base=self.base)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/plain": str(self.recommendation), "text/html": self.answer.value}


def _caveat(decision: Decision) -> str:
    style = f"margin-left:16px;color:{QUIET}"
    return f'<div style="{style}">Caveat: {escape(decision.caveat)}.</div>' if decision.caveat else ""


def _badge(word: Word) -> str:
    sign, ink, paper = TONES[word]
    return (
        f'<span style="background:{paper};color:{ink};border:1px solid {ink};border-radius:4px;padding:1px 8px;'
        f'font-weight:700;white-space:nowrap">{sign} {word}</span>'
    )


def _chip(word: Word, stage: str, *, on: bool) -> str:
    _, ink, paper = TONES[word]
    edge = f"2px solid {ink}" if on else "1px solid #c8ced6"
    return (
        f'<span style="background:{paper};color:{ink};border:{edge};border-radius:4px;padding:2px 8px;font-size:12px;'
        f'font-weight:{700 if on else 400}">{"▸ " if on else ""}{stage}: {word.lower()}</span>'
    )
