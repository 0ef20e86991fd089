"""The timeline: a lane per process, a bar per hold, the faults as flags on top, zoomed on the first violation.

At most LIMIT bars and LANES lanes are drawn and the rest is counted, so that a long run still makes a small picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from distsys.lab.history import Fault, Finding, History
from distsys.lab.spans import DEATHS, RECOVERIES, Span, at, conflicts, count, expired, holds, is_of, labels, pauses
from distsys.lab.story import WORDS, involved, key_ops, what
from distsys.lab.svg import MARGIN, WIDTH, box, cross, cut, document, hollow_cross, path, put, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT, LANES, MARKS = 60, 12, 160
LANE, BAR, FLAG = 40, 17, 15  # heights in px


@dataclass
class View:
    """What is shown: from t0 to t1, these bars in these lanes. What was left out is counted in `more`."""

    t0: float
    t1: float
    bars: list[Span]
    lanes: list[str]
    more: list[str]
    left: float

    def x(self, t: float) -> float:
        share = (min(max(t, self.t0), self.t1) - self.t0) / (self.t1 - self.t0)
        return self.left + share * (WIDTH - MARGIN - self.left)

    def shows(self, start: float, end: float) -> bool:
        return end >= self.t0 and start <= self.t1


def view(history: History, finding: Finding) -> View:
    bars = holds(history)
    t0 = min([op.called for op in history] + [f.at for f in history.faults], default=history.started)
    t0, t1 = max(history.started, t0 - 0.02 * (history.end - t0)), history.end
    witness = finding.witness if finding.status == "VIOLATED" else ()
    zoomed = _zoom(history, finding, t0, t1) if witness else (t0, t1)
    low, high = zoomed
    bars = sorted(bars, key=lambda bar: (bar.op not in witness, abs(bar.start - low))) if witness else bars
    shown = [bar for bar in bars if bar.end >= low and bar.start <= high][:LIMIT]
    if not witness and len(bars) > LIMIT:
        high = max(bar.end for bar in shown)
    names = list(dict.fromkeys([op.process for op in witness] + [bar.process for bar in shown] + history.processes))
    lanes = sorted(names[:LANES], key=_natural)
    shown = sorted((bar for bar in shown if bar.process in lanes), key=lambda bar: bar.start)
    more = [f"+{count(len(bars) - len(shown), 'more acquisition')}"] if len(bars) > len(shown) else []
    more += [f"+{count(len(names) - LANES, 'more process', 'more processes')}"] if len(names) > LANES else []
    if (low, high) != (t0, t1):
        part = f"{at(history, low, '')} to {at(history, high)} of {at(history, history.end)}"
        more.append(f"zoomed on {part}" if witness else f"the first {at(history, high)} of {at(history, history.end)}")
    left = MARGIN + min(140.0, max([24.0, *(width_of(name, bold=True) for name in lanes)])) + 12
    return View(low, max(high, low + 1e-6), shown, lanes, more, left)


def _zoom(history: History, finding: Finding, t0: float, t1: float) -> tuple[float, float]:
    """From the first act of the counterexample to its last; closer still where what matters would be a sliver of that."""
    spans, acts = involved(history, finding), {op.process for op in finding.witness}
    times = [t for op in finding.witness for t in (op.called, history.end if op.returned is None else op.returned)]
    times += [min(a.end, b.end) for a, b in conflicts(history) if a in spans and b in spans and a.op in finding.witness]
    low, high = min(times), max(times)
    for who, _, a, b in pauses(history):
        if any(is_of(process, who) for process in acts) and a <= high and b >= low:
            low, high = min(low, a), max(high, b)
    if len(spans) > 1:
        low = min(low, spans[0].start)
        turn = min([spans[1].start, *(s.lease_end for s in expired(history) if s in spans and s.lease_end)])
        if high - turn < 0.15 * (high - low):
            low = turn - (high - turn)
    pad = max(0.15 * (high - low), 1e-3)
    return (max(t0, low - pad), min(t1, high + pad)) if high - low + 2 * pad < 0.8 * (t1 - t0) else (t0, t1)


def _natural(name: str) -> list[tuple[int, str]]:
    """w2 before w10."""
    parts = ["".join(part) for _, part in groupby(name, str.isdecimal)]
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def timeline_svg(history: History, finding: Finding) -> str:
    body, height = timeline(history, finding)
    return document(body, height, finding.summary)


def timeline(history: History, finding: Finding) -> tuple[str, float]:
    """The body of the picture, from y=0 down, and its height."""
    v = view(history, finding)
    if not v.lanes:
        return put(MARGIN, 12, "Nothing was recorded.", "s"), 20
    clashes = [(a, b) for a, b in conflicts(history) if a in v.bars and b in v.bars]
    flags = sorted((f for f in history.faults if f.kind not in RECOVERIES and v.shows(f.at, f.at)), key=lambda f: f.at)
    flags = flags[:LIMIT]
    flagged, rows = _flags(v, flags)
    top = FLAG * rows + (20.0 if clashes else 6.0)
    y_of = {name: top + LANE * n for n, name in enumerate(v.lanes)}
    bottom = top + LANE * len(v.lanes)
    legend: dict[str, tuple[str, float]] = {}  # what it means: (its icon around 0, 0; its width)

    out = _axis(v, history, top, bottom)
    for name, y in y_of.items():
        out += [path(f"M{MARGIN} {y + LANE}H{WIDTH - MARGIN}", "g"), put(MARGIN, y + 18, cut(name, v.left - 34), "b")]
    for who, kind, a, b in pauses(history):
        for y in (y for name, y in y_of.items() if is_of(name, who) and v.shows(a, b)):
            out.append(box(v.x(a), y + 1, max(2, v.x(b) - v.x(a)), LANE - 2, "p", 0))
            legend[WORDS[kind]] = box(-9, -6, 18, 12, "p", 0), 18
    for op in [op for op in history.where("acquire") if op.process in y_of][: 2 * LIMIT]:
        end, y = history.end if op.returned is None else op.returned, y_of[op.process] + 4 + BAR / 2
        if v.shows(op.called, end) and v.x(end) - v.x(op.called) > 3:
            out.append(path(f"M{v.x(op.called):.1f} {y}H{v.x(end):.1f}", "w"))
            legend["waiting"] = path("M-10 0H10", "w"), 20
        if op.status == "fail" and v.t0 <= end <= v.t1:
            out.append(hollow_cross(v.x(end), y))
            legend["refused"] = hollow_cross(0, 0), 10
    for bar in v.bars:
        x, y = v.x(bar.start) - (5 if bar.start < v.t0 else 0), y_of[bar.process] + 4
        out.append(box(x, y, max(3, v.x(bar.end) - x), BAR, "h"))
        legend["holds the lock" + (", #token" if bar.op.token is not None else "")] = (
            box(-9, -6, 18, 12, "h"),
            18,
        )
    for bar in (bar for bar in expired(history) if bar in v.bars and v.shows(bar.lease_end or 0, bar.lease_end or 0)):
        x, y = v.x(bar.lease_end or 0), y_of[bar.process]
        out.append(path(f"M{x:.1f} {y + 1}V{y + BAR + 8}", "d"))
        if (gap := x - v.x(bar.end)) > 0:  # the dead hold nothing, but the server does not know yet
            out.append(path(f"M{x - gap:.1f} {y + 4 + BAR / 2}h{gap:.1f}", "d"))
        legend["lease ends"] = path("M0-7V7", "d"), 6
    bad = finding.status == "VIOLATED"
    out += _clashes(v, clashes, y_of, top, bad)
    if clashes:
        legend["two hold at once"] = box(-9, -6, 18, 12, "x" if bad else "o"), 18
    out += _labels(v, history, [bar for pair in clashes for bar in pair], y_of)
    for fault, (x, text, at_left, n) in zip(flags, flagged, strict=True):
        mine = [y for name, y in y_of.items() if is_of(name, fault.target)] or list(y_of.values())
        y0, y = FLAG * n + 2, FLAG * n + 11
        out.append(path(f"M{x:.1f} {y0}V{max(mine, default=top) + LANE}", "g"))
        out += [path(f"M{x:.1f} {y}V{y0}l7 3.5-7 3.5zM{x:.1f} {lane}v{LANE}", "l") for lane in mine]
        out += [cross(x, lane + 4 + BAR / 2, "k", 5) for lane in mine if fault.kind in DEATHS]
        out.append(put(x - 4 if at_left else x + 10, y, text, "i e z" if at_left else "i z") if text else "")
    out += _marks(v, history, finding, y_of, legend)
    height = _legend(out, legend, v.more, bottom + 36)
    return "".join(out), bottom + 24 + height


def _axis(v: View, history: History, top: float, bottom: float) -> list[str]:
    rough = (v.t1 - v.t0) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = ((t - history.started) / step for t in (v.t0, v.t1))
    out = []
    for n in range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1):
        x = v.x(history.started + n * step)
        css = "s e" if x > WIDTH - 44 else "s m"
        out += [path(f"M{x:.1f} {top}V{bottom + 4}", "g"), put(x, bottom + 16, f"{n * step:.{digits}f} s", css)]
    return out


def _flags(v: View, faults: list[Fault]) -> tuple[list[tuple[float, str, bool, int]], int]:
    """(x, text, whether it stands left of its pole, row): later flags go lower, so no pole runs through a text."""
    ends: list[float] = []
    found = []
    for fault in faults:
        text = cut(what(fault), 200, 11)
        x, wide = v.x(fault.at), width_of(text, 11) + 12
        at_left = x + wide > WIDTH - MARGIN
        start = x - wide if at_left else x
        row = next((n for n, end in enumerate(ends) if end < start), len(ends))
        if row < 4:
            ends[row : row + 1] = [start + wide + (8 if at_left else 0)]
        found.append((x, text if row < 4 else "", at_left, min(row, 3)))
    return found, len(ends)


def _clashes(v: View, pairs: list[tuple[Span, Span]], y_of: dict[str, float], top: float, bad: bool) -> list[str]:
    """The stretches with two holders, hatched in both lanes; red where that breaks the promise."""
    out, said_until = [], 0.0
    both = [(b.start, min(a.end, b.end)) for a, b in pairs]
    for process in dict.fromkeys(span.process for pair in pairs for span in pair):
        mine = [part for part, pair in zip(both, pairs, strict=True) if process in (pair[0].process, pair[1].process)]
        for start, end in _union(mine):
            x = v.x(start)
            out.append(box(x, y_of[process] + 4, max(4, v.x(end) - x), BAR, "x" if bad else "o"))
    for start, end in _union(both):
        x0, x1 = v.x(start), v.x(end)
        inside = [span for pair in pairs for span in pair if span.start <= end and span.end >= start]
        crowd = max(len({s.process for s in inside if s.start <= t.start < max(s.end, s.start + 1e-9)}) for t in inside)
        text, x = f"{crowd} holders", (x0 + x1) / 2
        x = min(max(x, v.left + 12), WIDTH - MARGIN - width_of(text, 11, bold=True) / 2 - 8)
        out.append(path(f"M{x0:.1f} {top + 2}v-5H{max(x1, x0 + 4):.1f}v5", "v" if bad else "l u"))
        half = (width_of(text, 11, bold=True) + 16) / 2
        if x - half > said_until:
            out.append(cross(x - half + 4, top - 10, "q") if bad else "")
            out.append(put(x + 7, top - 6, text, "i m b r z" if bad else "i m z"))
            said_until = x + half
    return out


def _union(parts: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    done: list[tuple[float, float]] = []
    for start, end in sorted(parts):
        if done and start <= done[-1][1]:
            done[-1] = done[-1][0], max(end, done[-1][1])
        else:
            done.append((start, end))
    return done


def _labels(v: View, history: History, clashing: list[Span], y_of: dict[str, float]) -> list[str]:
    """The tokens: in their bar, or beside it if that place is free."""
    out, label = [], labels(history)
    for n, bar in enumerate(v.bars):
        if bar.op.token is None:
            continue
        text, x0, x1, y = label[bar.op.token], v.x(bar.start), v.x(bar.end), y_of[bar.process] + 17
        wide = width_of(text, 11, bold=True)
        follows = next((v.x(other.start) for other in v.bars[n + 1 :] if other.process == bar.process), WIDTH - 6)
        if x1 - x0 > wide + 4:
            middle = (x0 + x1) / 2
            out.append(box(middle - wide / 2 - 3, y - 11, wide + 6, 13, "f") if bar in clashing else "")
            out.append(put(middle, y, text, "i m b n"))
        elif any(f.at == bar.end and f.kind in DEATHS for f in history.faults):
            out.append(put(x0 - 3, y, text, "i b n z e") if x0 - wide > v.left else "")
        elif follows - x1 > wide + 6:
            out.append(put(x1 + 3, y, text, "i b n z"))
    return out


def _marks(
    v: View, history: History, finding: Finding, y_of: dict[str, float], legend: dict[str, tuple[str, float]]
) -> list[str]:
    """What was done inside: a tick and a letter each, with the value if it is part of the counterexample."""
    out: list[str] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in y_of}
    ops = [
        op for op in history if op.process in y_of and op.name not in ("acquire", "release") and v.shows(op.end, op.end)
    ]
    told = [*finding.witness, *key_ops(history, finding)]
    for op in sorted(ops, key=lambda op: op.status != "fail" and op not in told)[:MARKS]:
        key = op.status == "fail" or op in told
        x, y = v.x(op.end), y_of[op.process] + 4 + BAR
        text = op.name if op.name == "lost" else op.name[0] + ("?" if op.status == "info" else "")
        if key and op.value is not None and not isinstance(op.value, dict):
            text = cut(f"{text} {op.value}", 60, 11)
        out.append(hollow_cross(x, y + 8) if op.status == "fail" else path(f"M{x:.1f} {y}v5", "k"))
        wide = width_of(text, 11)
        for shift in (6.0,) if op.status == "fail" else (-2.0, 1.0, 4.0, -6.0):
            start = min(x + shift, WIDTH - MARGIN - wide)
            if all(start > b or start + wide < a for a, b in taken[op.process]):
                taken[op.process].append((start, start + wide))
                out.append(put(start, y + 15, text, f"i z{' b' if key else ''}"))
                break
        if op.name != "lost":
            legend[op.name] = put(-4, 4, op.name[0], "i"), 8
        if op.status != "ok":
            refused = op.status == "fail"
            legend["refused" if refused else "unknown outcome"] = (
                hollow_cross(0, 0) if refused else put(-3, 4, "?", "i"),
                9,
            )
    return out


def _legend(out: list[str], legend: dict[str, tuple[str, float]], notes: list[str], y: float) -> float:
    """Only what is in the picture; returns its height."""
    x, first = float(MARGIN), y
    items = sorted(legend.items(), key=lambda item: item[0] * item[1][0].startswith("<text"))  # letters last
    for text, (icon, wide) in [*items, *((note, ("", 0.0)) for note in notes)]:
        needs = wide + 6 + width_of(text, 11, bold=not icon)
        if x + needs > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 18
        out.append(f'<g transform="translate({x + wide / 2:.1f} {y - 4})">{icon}</g>' if icon else "")
        out.append(put(x + wide + (6 if icon else 0), y, text, "s" if icon else "i b"))
        x += needs + 14
    return y - first + 20


def figure(history: History, finding: Finding) -> Figure:
    """The same as a matplotlib Figure, without pyplot."""
    from matplotlib.figure import Figure

    v, label = view(history, finding), labels(history)
    fig = Figure(figsize=(8, 1.2 + 0.5 * len(v.lanes)), layout="constrained")
    axes = fig.subplots()
    row = {name: -n for n, name in enumerate(v.lanes)}
    for who, _, a, b in pauses(history):
        for name in (name for name in v.lanes if is_of(name, who)):
            axes.broken_barh(
                [(a - history.started, b - a)], (row[name] - 0.45, 0.9), fc="#eeeeee", hatch="//", ec="#aaaaaa"
            )
    for bar in v.bars:
        start = bar.start - history.started
        axes.broken_barh([(start, bar.end - bar.start)], (row[bar.process] - 0.3, 0.6), fc="#cfe2f6", ec="#3a6ea5")
        axes.text(start, row[bar.process], f" {label.get(bar.op.token, '')}", va="center", clip_on=True)
    for one, two in conflicts(history):
        for name in {one.process, two.process} & row.keys():
            part = (two.start - history.started, min(one.end, two.end) - two.start)
            axes.broken_barh([part], (row[name] - 0.3, 0.6), fc="#fbd5d5", ec="#b3121d", hatch="xx")
    for fault in history.faults:
        axes.axvline(fault.at - history.started, color="#57606a", lw=0.8, ls=":")
    axes.set(yticks=list(row.values()), yticklabels=list(row), xlabel="seconds", title=finding.summary)
    axes.set_xlim(v.t0 - history.started, v.t1 - history.started)
    return fig
