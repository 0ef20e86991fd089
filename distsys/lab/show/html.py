"""HTML helpers that verdicts, simulations and ladders share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as _escape
from typing import Any

from distsys.lab.history.words import duration_text


def escape(text: str) -> str:
    """Return the text for an HTML page, without the lone surrogates that no UTF-8 page can hold."""
    return _escape(text.encode("utf-8", "replace").decode())


def number_text(key: str, value: Any) -> str:
    """Return a statistic as text: a duration for p50, p99 and seconds, else a number with separators."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key in ("p50", "p99", "seconds"):
        return duration_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table with every column flush left, because JupyterLab sets columns flush right."""

    def cells(row: Sequence[str], tag: str) -> str:
        plain = f'<{tag} align="left" style="text-align:left;padding:2px 12px 2px 0'
        return "".join(f'{plain}{";white-space:nowrap" * (len(c) < 18)}">{escape(c)}</{tag}>' for c in row)

    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"
