"""The few SVG primitives behind timeline and verdict: a palette whose contrasts a test computes, text that is measured.

An <img> with a data URL is the one form that JupyterLab, an untrusted notebook and GitHub all show. So: no script, no
link, no font of our own, an opaque light ground in any theme, and classes, not repeated attributes, to keep it small.
"""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape

WIDTH, MARGIN = 720, 18
PAPER, INK, GREY, LINE, PLATE, ALARM = "#ffffff", "#1f2328", "#57606a", "#d8dee4", "#f3f4f6", "#ffd33d"
RED, GREEN, AMBER, BLUE, HOLD = "#b3121d", "#1a6334", "#7d4e00", "#0a3d70", "#cfe2f6"
TEXT_ON = [  # every pair of text colour and ground in use
    *((ink, PAPER) for ink in (INK, GREY, RED, GREEN, AMBER, BLUE)), (BLUE, HOLD), (GREY, PLATE), (INK, PLATE),
    (INK, ALARM), *((PAPER, ground) for ground in (RED, GREEN, AMBER)),
]  # fmt: skip
STYLE = f"""text{{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:{INK}}}
.s{{font-size:11px;fill:{GREY}}}.i{{font-size:11px}}.m{{text-anchor:middle}}.e{{text-anchor:end}}.b{{font-weight:600}}
.z{{stroke:{PAPER};stroke-width:3;paint-order:stroke}}.n{{fill:{BLUE}}}.r{{fill:{RED}}}.h{{fill:{HOLD};stroke:#3a6ea5}}
.x{{fill:url(#red);stroke:{RED};stroke-width:1.5}}.o{{fill:url(#both);stroke:{GREY}}}.p{{fill:url(#grey)}}.f{{fill:{HOLD}}}
.g{{stroke:{LINE};fill:none}}.l{{stroke:{GREY};fill:{GREY}}}.k{{stroke:{INK};stroke-width:1.5;fill:none}}
.w{{stroke:{GREY};stroke-dasharray:1 3;stroke-width:2}}.d{{stroke:{BLUE};stroke-width:2;stroke-dasharray:2 2}}
.c{{fill:{PAPER};stroke:{INK}}}.q{{stroke:{RED};stroke-width:2.4;fill:none}}.v{{stroke:{RED};stroke-width:1.5;fill:none}}.u{{fill:none}}"""
DEFS = "".join(
    f'<pattern id="{name}" width="{n}" height="{n}" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<path d="M0 0H{n}V{n}H0Z" fill="{ground}"/><path d="M0 0V{n}" stroke="{ink}" stroke-width="{width}"/></pattern>'
    for name, n, ground, ink, width in (
        ("red", 6, "#fbd5d5", RED, 3), ("both", 6, HOLD, "#8796a5", 2), ("grey", 5, PLATE, "#bcc4cc", 2))
)  # fmt: skip


def width_of(text: str, size: float = 13, bold: bool = False) -> float:
    """About how wide a common sans-serif sets it. Nothing may break where a font is a little wider."""

    def em(c: str) -> float:
        if unicodedata.combining(c):
            return 0.0
        if unicodedata.east_asian_width(c) in "WF":
            return 1.0
        return 0.35 if c in "iljtfrI.,:;'|!()[] -" else 0.9 if c in "mwMW@%✗✓—" else 0.72 if c.isupper() else 0.61

    return sum(em(c) for c in text) * size * (1.13 if bold else 1.0)


def cut(text: str, width: float, size: float = 13, bold: bool = False) -> str:
    if width_of(text, size, bold) <= width:
        return text
    while text and width_of(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float, size: float = 13, *, lines: int = 3, bold: bool = False) -> list[str]:
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
    style = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{style}>{clean(text)}</text>'


def clean(text: str) -> str:
    """Escaped, and without the control characters and lone surrogates that no XML may hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def box(x: float, y: float, w: float, h: float, css: str, r: float = 2) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}" class="{css}"/>'


def path(d: str, css: str) -> str:
    return f'<path d="{d}" class="{css}"/>'


def cross(x: float, y: float, css: str, r: float = 4) -> str:
    return path(f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}", css)


def hollow_cross(x: float, y: float) -> str:
    return path(f"M{x:.1f} {y - 1.5:.1f}l3-3 1.5 1.5-3 3 3 3-1.5 1.5-3-3-3 3-1.5-1.5 3-3-3-3 1.5-1.5z", "c")


def document(body: str, height: float, label: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{clean(label)}</title><style>{STYLE}</style>'
        f'<defs>{DEFS}</defs><rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>{body}</svg>'
    )
