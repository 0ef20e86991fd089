"""Drawing in SVG for timeline and verdict: a palette whose contrasts a test computes, and text that is measured.

JupyterLab, an untrusted notebook and GitHub all show an <img> with a data URL, and no other form. So a picture has no
script, no link, no font of its own, and a light ground in any theme. Classes instead of attributes keep it small.
"""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape

WIDTH, MARGIN = 720, 18  # px
PAPER, INK, GREY, LINE, PLATE, ALARM = "#ffffff", "#1f2328", "#57606a", "#d8dee4", "#f3f4f6", "#ffd33d"
RED, GREEN, AMBER, BLUE, HOLD = "#b3121d", "#1a6334", "#7d4e00", "#0a3d70", "#cfe2f6"
STATUS_COLOUR = {"HELD": GREEN, "VIOLATED": RED, "INCONCLUSIVE": AMBER}
TEXT_ON = [  # every pair of text colour and ground in use
    *((ink, PAPER) for ink in (INK, GREY, RED, GREEN, AMBER, BLUE)), (BLUE, HOLD), (GREY, PLATE), (INK, PLATE),
    (INK, ALARM), *((PAPER, ground) for ground in (RED, GREEN, AMBER)),
]  # fmt: skip
STYLE = f"""text{{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:{INK}}}
.caption{{font-size:11px;fill:{GREY}}}.small{{font-size:11px}}.middle{{text-anchor:middle}}.end{{text-anchor:end}}
.bold{{font-weight:600}}.halo{{stroke:{PAPER};stroke-width:3;paint-order:stroke}}.blue{{fill:{BLUE}}}.red{{fill:{RED}}}
.hold{{fill:{HOLD};stroke:#3a6ea5}}.violation{{fill:url(#red);stroke:{RED};stroke-width:1.5}}.label{{fill:{HOLD}}}
.overlap{{fill:url(#both);stroke:{GREY}}}.pause{{fill:url(#grey)}}.grid{{stroke:{LINE};fill:none}}
.pole{{stroke:{GREY};fill:{GREY}}}.tick{{stroke:{INK};stroke-width:1.5;fill:none}}
.wait{{stroke:{GREY};stroke-dasharray:1 3;stroke-width:2}}.lease{{stroke:{BLUE};stroke-width:2;stroke-dasharray:2 2}}
.refusal{{fill:{PAPER};stroke:{INK}}}.alarm{{stroke:{RED};stroke-width:2.4;fill:none}}
.bracket{{stroke:{GREY};fill:none}}.redbracket{{stroke:{RED};stroke-width:1.5;fill:none}}"""
DEFS = "".join(
    f'<pattern id="{name}" width="{n}" height="{n}" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<path d="M0 0H{n}V{n}H0Z" fill="{ground}"/><path d="M0 0V{n}" stroke="{ink}" stroke-width="{width}"/></pattern>'
    for name, n, ground, ink, width in (
        ("red", 6, "#fbd5d5", RED, 3), ("both", 6, HOLD, "#8796a5", 2), ("grey", 5, PLATE, "#bcc4cc", 2))
)  # fmt: skip


def width_of(text: str, size: float = 13, bold: bool = False) -> float:
    """Return about how wide a common sans-serif font sets the text, in px. A wider font must break nothing."""

    def em(c: str) -> float:
        if unicodedata.combining(c):
            return 0.0
        if unicodedata.east_asian_width(c) in "WF":
            return 1.0
        return 0.35 if c in "iljtfrI.,:;'|!()[] -" else 0.9 if c in "mwMW@%✗✓—" else 0.72 if c.isupper() else 0.61

    return sum(em(c) for c in text) * size * (1.13 if bold else 1.0)


def cut(text: str, width: float, size: float = 13, bold: bool = False) -> str:
    """Return the text, shortened with an ellipsis if it is wider than `width` px."""
    if width_of(text, size, bold) <= width:
        return text
    while text and width_of(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float, size: float = 13, *, lines: int = 3, bold: bool = False) -> list[str]:
    """Return the text in at most so many lines of `width` px; the last one is cut if the text is longer."""
    done, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and width_of(longer, size, bold) > width:
            done.append(line)
            longer = word
        line = longer
    done.append(line)
    return [cut(part, width, size, bold) for part in [*done[: lines - 1], " ".join(done[lines - 1 :])] if part]


def put(x: float, y: float, text: str, css: str = "", style: str = "") -> str:
    """Return a text whose baseline begins at x, y, or ends there with the class "end"."""
    style = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{style}>{clean(text)}</text>'


def clean(text: str) -> str:
    """Return the text escaped, and without the control characters and lone surrogates that no XML may hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def box(x: float, y: float, w: float, h: float, css: str, r: float = 2) -> str:
    """Return a rectangle with its corner at x, y and corners of radius r."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}" class="{css}"/>'


def path(d: str, css: str) -> str:
    """Return a path; `d` is in the notation of SVG."""
    return f'<path d="{d}" class="{css}"/>'


def cross(x: float, y: float, css: str, r: float = 4) -> str:
    """Return a diagonal cross around x, y."""
    return path(f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}", css)


def hollow_cross(x: float, y: float) -> str:
    """Return the outline of a cross around x, y: the sign of a refusal."""
    return path(f"M{x:.1f} {y - 1.5:.1f}l3-3 1.5 1.5-3 3 3 3-1.5 1.5-3-3-3 3-1.5-1.5 3-3-3-3 1.5-1.5z", "refusal")


def document(body: str, height: float, title: str) -> str:
    """Return a whole SVG document, WIDTH px wide, with `title` for screen readers."""
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{clean(title)}</title><style>{STYLE}</style>'
        f'<defs>{DEFS}</defs><rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>{body}</svg>'
    )
