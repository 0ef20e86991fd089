"""The verdict on one arm: as a line of text, an HTML card, a dict for JSON, and an assertion."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from distsys.lab.history.history import Expected, Finding, History, Status
from distsys.lab.history.words import count
from distsys.lab.show import svg as draw
from distsys.lab.show.html import escape, number_text, table
from distsys.lab.show.story import story
from distsys.lab.show.svg import MARGIN, STATUS_COLOUR, WIDTH, box, put, width_of
from distsys.lab.show.timeline import timeline

MARK = {"HELD": "✓", "VIOLATED": "✗", "INCONCLUSIVE": "?"}
ICON = {"HELD": "M0 5l4 4 8-9", "VIOLATED": "M1 0l9 9m0-9l-9 9", "INCONCLUSIVE": ""}
MAX_ROWS = 12  # of the table of violations; the rest is counted


@dataclass(frozen=True)
class Verdict:
    """What one arm of an experiment showed. HELD means only that no violation was found in so many runs."""

    title: str  # the arm: "SET NX with a TTL, no renewal"
    claim: str  # the experiment's
    status: Status
    expected: Expected | None  # None for the reader's own candidate
    summary: str
    history: History  # of the run that decided
    finding: Finding
    runs: int = 1
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    servers: dict[str, str] = field(default_factory=dict)  # name -> "Valkey 9.1.2, embedded"
    replay: str = ""  # the line that runs it again
    stats: dict[str, Any] = field(default_factory=dict)  # p50, p99 in seconds; violated_runs, ...

    @classmethod
    def of(cls, results: Sequence[tuple[History, Finding]], *, expected: Any = None, **more: Any) -> Verdict:
        """Return the verdict on several runs. One VIOLATED decides; without one, an INCONCLUSIVE leaves it open."""
        if not results:
            raise ValueError("a verdict needs the result of at least one run")
        order = ("VIOLATED", "INCONCLUSIVE", "HELD")
        history, finding = min(results, key=lambda result: order.index(result[1].status))
        counted = {"violated_runs": sum(found.status == "VIOLATED" for _, found in results)}
        more = {"claim": "", **more, "stats": {**counted, **more.get("stats", {})}, "runs": len(results)}
        status, summary = finding.status, finding.summary
        return cls(status=status, summary=summary, expected=expected, history=history, finding=finding, **more)

    @property
    def was_run(self) -> bool:
        """False if a server that the experiment needs was not available; the summary says which and why."""
        return not self.summary.startswith("not run: ")

    @property
    def as_expected(self) -> bool:
        """Whether the status is the expected one; True if nothing was expected."""
        return self.expected in (None, self.status)

    @property
    def badge(self) -> str:
        """The status with its sign and headline: "✓ HELD - no violation found in 20 runs"."""
        return f"{MARK[self.status]} {self.status} - {self.headline}"

    @property
    def headline(self) -> str:
        """The summary, with the number of runs. HELD never says more than "no violation found in so many runs"."""
        if self.status == "HELD":
            return f"no violation found in {count(self.runs, 'run')}"
        seen = self.stats.get("violated_runs", 0) if self.runs > 1 and self.status == "VIOLATED" else 0
        return self.summary + (f", in {seen:,} of {count(self.runs, 'run')}" if seen else "")

    def __str__(self) -> str:
        note = f" (expected: {self.expected.lower()})" if self.expected else ""
        return f"{self.title}: {self.badge}{note if self.as_expected else note.upper()}"

    __repr__ = __str__

    def story(self) -> list[str]:
        """Return what happened, in up to five sentences."""
        return story(self.history, self.finding)

    def assert_expected(self) -> Verdict:
        """Return this verdict; raise AssertionError with story and replay line if it is not as expected."""
        if not self.as_expected:
            raise AssertionError("\n".join([str(self), *self.story(), self.replay]).rstrip())
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON types; any other type becomes its repr."""
        return dict(json.loads(json.dumps(self, default=_fields_or_repr), parse_constant=str))

    def svg(self) -> str:
        """Return the card as SVG: badge, timeline and story in one picture."""
        out, y, colour = list[str](), 14.0, STATUS_COLOUR[self.status]

        def flow(text: str, step: float, css: str, *, x: float = MARGIN, size: float = 13, lines: int = 2,
                 lift: float = 0.0, style: str = "") -> None:  # fmt: skip
            """Write a text from `x` to the margin, each line a `step` below the last one."""
            nonlocal y
            for line in draw.wrap(text, WIDTH - MARGIN - x, size, lines=lines, bold=css == "bold"):
                y += step
                out.append(put(x, y - lift, line, css, style))

        if not self.as_expected:
            out += [f'<path d="M0 0H{WIDTH}V32H0Z" fill="{draw.ALARM}"/>', put(MARGIN, 21, self._warning(), "bold")]
            y += 32
        flow(self.title, 20, "bold", size=16, lift=4, style="font-size:16px")
        flow(self.claim, 18, "caption", lift=2, style="font-size:13px")
        y += 12
        pill = width_of(self.status, 14, bold=True) + 40
        out.append(f'<g fill="{colour}">{box(MARGIN, y, pill, 28, "", 5)}</g>')
        sign = f'<path d="{ICON[self.status]}" fill="none" stroke="{draw.PAPER}" stroke-width="2.5"/>'
        out.append(f'<g transform="translate({MARGIN + 11} {y + 9.5})">{sign}</g>' if ICON[self.status] else "")
        for x, text in ((11, "" if ICON[self.status] else "?"), (30, self.status)):
            out.append(put(MARGIN + x, y + 19, text, "bold", f"font-size:14px;fill:{draw.PAPER}"))
        right = MARGIN + pill + 10
        flow(self.headline, 20, "bold", x=right, size=14, lines=3, lift=1, style=f"font-size:14px;fill:{colour}")
        small = [f"expected: {self.expected.lower()}"] if self.expected and self.as_expected else []
        small += [self.summary] if self.status == "HELD" else []
        flow(" · ".join(small), 15, "caption", x=right, size=11)
        y += 24
        body, height = timeline(self.history, self.finding)
        out.append(f'<g transform="translate(0 {y:.0f})">{body}</g>')
        y += height + 6
        for sentence in self.story():
            out.append(f'<circle cx="{MARGIN + 3}" cy="{y + 14.5}" r="2.5" fill="{colour}"/>')
            flow(sentence, 19, "", x=MARGIN + 14)
        facts = [count(self.runs, "run"), f"seed {self.seed}", *dict.fromkeys(self.servers.values())]
        flow(" · ".join(facts), 20, "caption", size=11, lift=-4)
        y += 18
        edge = f'stroke="{draw.LINE}"' if self.as_expected else f'stroke="{draw.RED}" stroke-width="5"'
        frame = f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{y - 1:.0f}" fill="none" {edge}/>'
        return draw.document("".join(out) + frame, y, str(self))

    def _warning(self) -> str:
        return f"NOT AS EXPECTED: this arm should be {self.expected}, and it is {self.status}"

    def _repr_html_(self) -> str:
        warning = "" if self.as_expected else f"{self._warning()}. "
        alt = escape(f"{warning}{self.title}: {self.badge}. {' '.join(self.story())}")
        source = f"data:image/svg+xml;base64,{base64.b64encode(self.svg().encode()).decode()}"
        page = f'<div><img width="{WIDTH}" style="max-width:100%" alt="{alt}" src="{source}">'
        if rows := self.finding.violations:
            page += table(("when", "who", "what") if all(len(row) == 3 for row in rows) else (), rows[:MAX_ROWS])
            page += f"<p>+{len(rows) - MAX_ROWS:,} more</p>" if len(rows) > MAX_ROWS else ""
        facts = [("runs", self.runs), ("seed", self.seed), *self.servers.items(), *self.params.items()]
        details = [(str(key), str(value)) for key, value in facts]
        details += [(key.replace("_", " "), number_text(key, value)) for key, value in self.stats.items()]
        replay = f"<p>Run it again:</p><pre>{escape(self.replay)}</pre>" if self.replay else ""
        more = f"<summary>seed, versions, parameters</summary>{table((), details)}{replay}"
        return f"{page}<details>{more}</details></div>"


class Verdicts(list[Verdict]):
    """The verdicts on several arms, side by side."""

    def summary(self) -> str:
        """Return a line for each verdict, without counts and times, so that every run gives the same text."""
        words = {True: " (as expected)", False: " (NOT as expected: {})"}
        notes = ["" if v.expected is None else words[v.as_expected].format(v.expected) for v in self]
        return "\n".join(f"{v.title}: {v.status}{note}" for v, note in zip(self, notes, strict=True))

    def assert_expected(self) -> Verdicts:
        """Return these verdicts; raise AssertionError for the first that is not as expected."""
        for verdict in self:
            verdict.assert_expected()
        return self

    def to_dict(self) -> list[dict[str, Any]]:
        """Return each verdict as JSON types."""
        return [verdict.to_dict() for verdict in self]

    def __str__(self) -> str:
        return "\n".join(str(verdict) for verdict in self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        keys = [key for key in ("p50", "p99") if any(key in v.stats for v in self)]
        head = ("arm", "verdict", "expected", "runs", *keys, "violations")
        rows = []
        for v in self:
            verdict = f"{MARK[v.status]} {v.status}{'' if v.as_expected else ', NOT AS EXPECTED'}"
            stats = [number_text(key, v.stats.get(key, "")) for key in keys]
            violations = f"{len(v.finding.violations):,}"
            rows.append((v.title, verdict, (v.expected or "").lower(), str(v.runs), *stats, violations))
        # One picture for each status; the other arms tell their story in words, so that a notebook stays small.
        first_of = [next((v for v in self if v.status == status), None) for status in STATUS_COLOUR]
        cards = []
        for v in self:
            line = f"<summary>{escape(v.title)}: {escape(v.badge)}</summary>"
            words = "".join(f"<li>{escape(sentence)}</li>" for sentence in v.story())
            picture = not v.as_expected or any(v is first for first in first_of)
            unfold = " open" if not v.as_expected or (picture and v.status == "VIOLATED") else ""
            cards.append(f"<details{unfold}>{line}{v._repr_html_() if picture else f'<ul>{words}</ul>'}</details>")
        return f"<div>{table(head, rows)}{''.join(cards)}</div>"


def _fields_or_repr(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return repr(value)
