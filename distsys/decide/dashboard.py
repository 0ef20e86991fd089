"""The decision dashboard: three controls and an answer in HTML.

The answer is an `ipywidgets.HTML`, because papermill does not see an error inside an `Output`. The card has a light
background of its own, so that it looks the same in light and dark themes. A verdict is a word and a sign, not only a
colour.
"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as w

from distsys.decide.matrix import DONT, PATTERNS, STAGES, Recommendation, Word, recommend

AMBER = ("~", "#7a4b00", "#fff3d6")
TONES: dict[Word, tuple[str, str, str]] = {  # (sign, ink, paper) with a contrast of at least 4.5 : 1
    "IN-PROCESS": ("○", "#3d4852", "#e8ecf0"),
    "OVERKILL": ("✕", "#9b1c1c", "#fdeaea"),
    **dict.fromkeys(("BORDERLINE", "SIMPLE ONLY", "SELECTIVE", "WHEN JUSTIFIED"), AMBER),
    "APPROPRIATE": ("✓", "#14592b", "#e3f5e8"),
    "REQUIRED": ("!", "#0b4a8f", "#e3effc"),
}
BADGE = "border:1px solid;padding:1px 8px;font-weight:700;white-space:nowrap"
CURRENT_STAGE = "border:2px solid;padding:2px 8px;font-size:12px;font-weight:700"
OTHER_STAGE = "border:1px solid #c8ced6;padding:2px 8px;font-size:12px"
INK, PAPER, QUIET, LINK = "#1f2328", "#ffffff", "#57606a", "#0b57d0"


def answer_html(answer: Recommendation, *, base: str = "../") -> str:
    """Return the card of one recommendation.

    base  the project's folder, relative to the notebook
    """
    badge = f"{TONES[answer.verdict][0]} {answer.verdict}"
    parts = [("font-size:18px", f"{_chip(answer.verdict, badge, BADGE)} {escape(answer.pattern.name)}")]
    parts += [("margin:8px 0", escape(answer.reason))]
    instead = "Instead" if answer.verdict in DONT else "Simpler, where it is enough"
    parts += [("margin:2px 0", f"<b>{instead}:</b> {escape(answer.alternative)}")]
    for choice in answer.decisions:
        parts += [("margin:2px 0", f"<b>{escape(choice.topic)}:</b> {escape(choice.claim)}")]
        parts += [(f"margin-left:16px;color:{QUIET}", f"Caveat: {escape(choice.caveat)}.")] if choice.caveat else []
    link = f'<a href="{{}}" target="_blank" rel="noopener" style="color:{LINK}">{{}}</a>'
    links = " · ".join(link.format(escape(base + path), escape(label)) for label, path in answer.links)
    parts += [("margin-top:8px", f"Next: {links}")] if links else []
    strip = ""
    for stage, word in zip(STAGES, answer.pattern.cells, strict=True):
        current = stage == answer.stage and answer.instances > 1
        style = CURRENT_STAGE if current else OTHER_STAGE
        strip += _chip(word, f"{'▸ ' if current else ''}{stage}: {word.lower()}", style)
    parts += [("display:flex;flex-wrap:wrap;gap:6px;margin-top:12px", strip)]
    ours = " The verdicts of this pattern are ours." if answer.pattern.ours else ""
    parts += [(f"margin-top:6px;color:{QUIET};font-size:12px", f"The row of the matrix, for several instances.{ours}")]
    body = "".join(f'<div style="{style}">{part}</div>' for style, part in parts)
    return (
        f'<div role="status" style="background:{PAPER};color:{INK};border:1px solid #c8ced6;border-radius:6px;'
        f'padding:14px 16px;max-width:760px;font:14px/1.5 system-ui,sans-serif">{body}</div>'
    )


class Dashboard(w.VBox):  # type: ignore[misc]  # ipywidgets ships no types
    """Controls for pattern, stage and number of instances, with the recommendation below.

    Every control works from the keyboard. Without a kernel (GitHub, an untrusted notebook) only the card is shown.
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


def _chip(word: Word, text: str, style: str) -> str:
    _, ink, paper = TONES[word]
    return f'<span style="background:{paper};color:{ink};border-radius:4px;{style}">{text}</span>'
