"""The timeline: a lane per process, a bar per hold, the faults as flags on top, zoomed on the first violation.

It stays small whatever the run: LIMIT bars and LANES lanes are shown, and the rest is counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain, product
from typing import TYPE_CHECKING, Any

from distsys.lab.history.history import Fault, Finding, History, Op
from distsys.lab.history.spans import RECOVERIES, conflicts, expired, holds, is_task_of, pauses
from distsys.lab.history.words import FAULT_WORDS, count, refusal_text, fault_text
from distsys.lab.show.story import involved, key_ops
from distsys.lab.show.svg import GREY, HOLD, MARGIN, RED, WIDTH, box, cross, cut, hollow_cross, path, put, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT, LANES, MARKS = 60, 12, 160  # shown of the bars, lanes and marks
ORDER = {"apply": 0, "read": 2}  # of marks: who comes first has room for its words; effects before what asked for them
DECIDED = {"admit": "admitted", "call": "answered", "arrive": "arrived"}
LANE, BAR, FLAG = 40, 17, 15  # heights in px


def timeline(history: History, finding: Finding) -> tuple[str, float]:
    """The body of the picture, from y=0 down, and its height."""
    picture = _Picture(history, finding)
    if not picture.lanes:
        return put(MARGIN, 12, "Nothing was recorded.", "s"), 20
    picture.draw()
    return "".join(picture.out), picture.bottom


class _Picture:
    """What is shown: from t0 to t1, these bars in these lanes. What was left out is counted in `more`.

    Drawn in layers, from the ground up. What a layer uses it also explains in the legend.
    """

    def __init__(self, history: History, finding: Finding) -> None:
        self.history, self.finding, self.out = history, finding, list[str]()
        self.icons: dict[str, tuple[str, float]] = {}  # what it means: (the icon around 0, 0; its width)
        bars = holds(history)
        t0 = min([op.called for op in history] + [f.at for f in history.faults], default=history.started)
        t0, t1 = max(history.started, t0 - 0.02 * (history.end - t0)), history.end
        witness = finding.witness if finding.status == "VIOLATED" else ()
        near = witness and not history.where("call")  # runs of calls are short: the whole is shown
        low, high = _zoom(history, finding, t0, t1) if near else (t0, t1)
        bars = sorted(bars, key=lambda bar: (bar.op not in witness, abs(bar.start - low))) if witness else bars
        shown = [bar for bar in bars if bar.end >= low and bar.start <= high][:LIMIT]
        if not witness and len(bars) > LIMIT:
            high = max(bar.end for bar in shown)
        names = list(dict.fromkeys([op.process for op in witness] + [bar.process for bar in shown] + history.processes))
        self.lanes = sorted(names[:LANES], key=_natural)
        self.bars = sorted((bar for bar in shown if bar.process in self.lanes), key=lambda bar: bar.start)
        more = [f"+{count(len(bars) - len(self.bars), 'more acquisition')}"] if len(bars) > len(self.bars) else []
        more += [f"+{count(len(names) - LANES, 'more process', 'more processes')}"] if len(names) > LANES else []
        if (low, high) != (t0, t1):
            part = f"zoomed on {history.at(low, '')} to" if witness else "the first"
            more.append(f"{part} {history.at(high)} of {history.at(history.end)}")
        self.left = MARGIN + min(140.0, max([24.0, *(width_of(name, bold=True) for name in self.lanes)])) + 12
        self.t0, self.t1, self.more = low, max(high, low + 1e-6), more

    def x(self, t: float) -> float:
        share = (min(max(t, self.t0), self.t1) - self.t0) / (self.t1 - self.t0)
        return self.left + share * (WIDTH - MARGIN - self.left)

    def shows(self, start: float, end: float) -> bool:
        return end >= self.t0 and start <= self.t1

    def draw(self) -> None:
        finding = self.finding
        self.clashes = [(a, b) for a, b in conflicts(self.history) if a in self.bars and b in self.bars]
        flags = self._stagger()
        asked = bool(self.history.where("call"))
        admits = [op for op in finding.witness if (op.name == "admit" or asked) and finding.status == "VIOLATED"]
        self.top = FLAG * len({row for *_, row in flags}) + (20.0 if self.clashes or admits else 6.0)
        self.lane = {name: self.top + LANE * n for n, name in enumerate(self.lanes)}
        self.bottom = self.top + LANE * len(self.lanes)
        self._ground()
        self._waits()
        self._bars()
        self._admissions(admits)
        self._clashes()
        self._tokens()
        self._flags(flags)
        self._marks()
        self._legend()

    def line(self, d: str, css: str) -> None:
        self.out.append(path(d, css))

    def _ground(self) -> None:
        history = self.history
        rough = (self.t1 - self.t0) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = ((t - history.started) / step for t in (self.t0, self.t1))
        for n in range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1):
            x = self.x(history.started + n * step)
            self.line(f"M{x:.1f} {self.top}V{self.bottom + 4}", "g")
            self.out.append(put(x, self.bottom + 16, f"{n * step:.{digits}f} s", "s e" if x > WIDTH - 44 else "s m"))
        for name, y in self.lane.items():
            self.line(f"M{MARGIN} {y + LANE}H{WIDTH - MARGIN}", "g")
            self.out.append(put(MARGIN, y + 18, cut(name, self.left - MARGIN - 8, bold=True), "b"))
        for who, kind, a, b in pauses(history):
            for y in (y for name, y in self.lane.items() if is_task_of(name, who) and self.shows(a, b)):
                self.out.append(box(self.x(a), y + 1, max(2, self.x(b) - self.x(a)), LANE - 2, "p", 0))
                self.icons[FAULT_WORDS[kind]] = box(-9, -6, 18, 12, "p", 0), 18

    def _waits(self) -> None:
        asked = [op for op in self.history if op.name in ("acquire", "call") and op.process in self.lane]
        for op in asked[: 2 * LIMIT]:
            end, y = self.history.until(op), self.lane[op.process] + 4 + BAR / 2
            if self.shows(op.called, end) and self.x(end) - self.x(op.called) > 3:
                self.line(f"M{self.x(op.called):.1f} {y}H{self.x(end):.1f}", "w")
                self.icons["waiting"] = path("M-10 0H10", "w"), 20
            if op.status == "fail" and op.name == "acquire" and self.shows(end, end):
                self.out.append(hollow_cross(self.x(end), y))
                self.icons["refused"] = hollow_cross(0, 0), 10

    def _bars(self) -> None:
        for bar in self.bars:
            x = self.x(bar.start) - (5 if bar.start < self.t0 else 0)
            self.out.append(box(x, self.lane[bar.process] + 4, max(3, self.x(bar.end) - x), BAR, "h"))
            meaning = "holds the lock" if bar.op.token is None else "holds the lock, #token"
            self.icons[meaning] = box(-9, -6, 18, 12, "h"), 18
        for bar in expired(self.history):
            if bar in self.bars and bar.lease_end is not None and self.shows(bar.lease_end, bar.lease_end):
                x, x1, y = self.x(bar.lease_end), self.x(bar.end), self.lane[bar.process]
                self.line(f"M{x:.1f} {y + 1}V{y + BAR + 8}", "d")
                if x > x1:  # the dead hold nothing, but the server does not know yet
                    self.line(f"M{x1:.1f} {y + 4 + BAR / 2}H{x:.1f}", "d")
                self.icons["lease ends"] = path("M0-7V7", "d"), 6

    def _admissions(self, witness: list[Op]) -> None:
        """What was decided: bars for those admitted, below them crosses for those refused, and how many."""
        for (name, y), status, did in product(self.lane.items(), ("ok", "fail", "info"), DECIDED):
            ops = [op for op in self.history.where(did, process=name) if op.status == status]
            if (did, status) == ("admit", "info"):
                continue  # a mark of its own
            times = [op.called if did == "arrive" else self.history.until(op) for op in ops]
            for x0, x1, n in _merged(((self.x(t), self.x(t)) for t in times if self.shows(t, t)), 30.0):
                text = f"{n:,}" if n > 1 else ""
                x, css = (x1 + 6, "i z") if x1 + 6 + width_of(text, 11) < WIDTH - MARGIN else (x0 - 6, "i e z")
                if css == "i e z" and x - width_of(text, 11) < self.left:
                    x, css = (x0 + x1) / 2, "i m n"
                if status == "ok" or did == "arrive":
                    self.out += [box(x0 - 1.5, y + 4, x1 - x0 + 3, BAR, "h"), put(x, y + 17, text, css)]
                    self.icons[f"{DECIDED[did]}, how many"] = box(-3, -6, 6, 12, "h"), 9
                elif status == "info":
                    self.out += [cross(x0, y + 4 + BAR / 2, "k"), put(x, y + 17, text, css)]
                    self.icons["failed"] = cross(0, 0, "k"), 9
                else:
                    self.out += [*(hollow_cross(x, y + 30) for x in dict.fromkeys((x0, x1))), put(x, y + 34, text, css)]
                    self.icons["refused"] = hollow_cross(0, 0), 9
        if witness:
            text = "".join(row[-1] for row in self.finding.violations[:1])
            if refused := [op for op in witness if op.status == "fail"]:
                text, witness = refusal_text(self.finding), refused
            first = min(op.end if op.name == "admit" else op.called for op in witness)
            self._bracket(self.x(first), self.x(max(map(self.history.until, witness))), text, bad=True)

    def _bracket(self, x0: float, x1: float, text: str, *, bad: bool, after: float = 0.0) -> float:
        """Over the lanes, from x0 to x1; with the text if it begins `after`. Where what is written ends."""
        half = (width_of(text, 11, bold=True) + 16) / 2
        x = min(max((x0 + x1) / 2, self.left + half), WIDTH - MARGIN - half)
        self.line(f"M{x0:.1f} {self.top + 2}v-5H{max(x1, x0 + 4):.1f}v5", "v" if bad else "l u")
        if x - half <= after:
            return after
        self.out.append(cross(x - half + 4, self.top - 12, "q") if bad else "")
        self.out.append(put(x + 7, self.top - 8, text, "i m b r z" if bad else "i m z"))
        return x + half

    def _clashes(self) -> None:
        """The stretches with two holders, hatched in both lanes; red where that breaks the promise."""
        written, bad = 0.0, self.finding.status == "VIOLATED"
        both = [(b.start, min(a.end, b.end), {a.process, b.process}) for a, b in self.clashes]
        for process in dict.fromkeys(span.process for pair in self.clashes for span in pair):
            for start, end, _ in _merged((a, b) for a, b, who in both if process in who):
                x, css = self.x(start), "x" if bad else "o"
                self.out.append(box(x, self.lane[process] + 4, max(4, self.x(end) - x), BAR, css))
                self.icons["two hold at once"] = box(-9, -6, 18, 12, css), 18
        for start, end, _ in _merged((a, b) for a, b, _ in both):
            begun = [b.start for _, b in self.clashes if start <= b.start <= end]
            crowd = max(len({s.process for s in self.bars if s.start <= t < s.end}) for t in begun)
            written = self._bracket(self.x(start), self.x(end), f"{max(2, crowd)} holders", bad=bad, after=written)

    def _tokens(self) -> None:
        """In their bar, or beside it if that place is free."""
        clashing = [bar for pair in self.clashes for bar in pair]
        for n, bar in enumerate(self.bars):
            if bar.op.token is None:
                continue
            text, y = self.history.label(bar.op), self.lane[bar.process] + 17
            x0, x1 = self.x(bar.start), self.x(bar.end)
            wide = width_of(text, 11, bold=True)
            later = [self.x(other.start) for other in self.bars[n + 1 :] if other.process == bar.process]
            if x1 - x0 > wide + 4:
                middle = (x0 + x1) / 2
                self.out.append(box(middle - wide / 2 - 3, y - 11, wide + 6, 13, "f") if bar in clashing else "")
                self.out.append(put(middle, y, text, "i m b n"))
            elif any(f.at == bar.end and f.kind == "killed" for f in self.history.faults):
                self.out.append(put(x0 - 3, y, text, "i b n z e") if x0 - wide > self.left else "")
            elif min(later, default=WIDTH - 6) - x1 > wide + 6:
                self.out.append(put(x1 + 3, y, text, "i b n z"))

    def _stagger(self) -> list[tuple[Fault, str, bool, int]]:
        """(fault, text, whether it is left of its pole, row): later ones go lower, so no pole runs through a text."""
        ends, found = list[float](), []
        faults = [f for f in self.history.faults if f.kind not in RECOVERIES and self.shows(f.at, f.at)]
        for fault in sorted(faults, key=lambda f: f.at)[:LIMIT]:
            text = cut(fault_text(fault), 200, 11)
            x, wide = self.x(fault.at), width_of(text, 11) + 12
            at_left = x + wide > WIDTH - MARGIN
            start = x - wide if at_left else x
            row = next((n for n, end in enumerate(ends) if end < start), len(ends))
            if row < 4:
                ends[row : row + 1] = [start + wide + (8 if at_left else 0)]
            found.append((fault, text if row < 4 else "", at_left, min(row, 3)))
        return found

    def _flags(self, flags: list[tuple[Fault, str, bool, int]]) -> None:
        for fault, text, at_left, row in flags:
            mine = [y for name, y in self.lane.items() if is_task_of(name, fault.target)] or list(self.lane.values())
            x, y0, y = self.x(fault.at), FLAG * row + 2, FLAG * row + 11
            self.line(f"M{x:.1f} {y0}V{max(mine) + LANE}", "g")
            for lane in mine:
                self.line(f"M{x:.1f} {y}V{y0}l7 3.5-7 3.5zM{x:.1f} {lane}v{LANE}", "l")
                self.out.append(cross(x, lane + 4 + BAR / 2, "k", 5) if fault.kind == "killed" else "")
            self.out.append(put(x - 4, y, text, "i e z") if at_left else put(x + 10, y, text, "i z"))

    def _marks(self) -> None:
        """What was done inside: a tick and a letter each, with the value if it is part of the counterexample."""
        taken = {name: list[tuple[float, float]]() for name in self.lane}
        told = [*self.finding.witness, *chain(*key_ops(self.history, self.finding))]
        ops = [op for op in self.history if op.process in self.lane and self.shows(op.end, op.end)]
        ops = [op for op in ops if op.name != "acquire" and (op.name != "release" or op in told)]
        ops = [op for op in ops if op.name not in DECIDED or (op.name, op.status) == ("admit", "info")]
        if self.history.where("call"):  # of what goes on inside of a call only the counterexample
            ops = [op for op in ops if op.name in ("apply", "wait") and op in self.finding.witness]
        for op in sorted(ops, key=lambda op: (op.status != "fail" and op not in told, ORDER.get(op.name, 1)))[:MARKS]:
            refused, key = op.status == "fail", op.status == "fail" or op in told
            x, y = self.x(op.end), self.lane[op.process] + 4 + BAR
            in_full = op.name == "release"
            text = op.name if in_full else op.name[0] + ("?" if op.status == "info" else "")
            if key and op.value is not None and not isinstance(op.value, dict):
                text = cut(f"{text} {op.value}", 60, 11)
            self.out.append(hollow_cross(x, y + 8) if refused else path(f"M{x:.1f} {y}v5", "k"))
            shifts = (6.0,) if refused else (-2.0, 1.0, 4.0, -6.0)
            for words, shift in product(dict.fromkeys((text, text if in_full else text.split()[0])), shifts):
                wide = width_of(words, 11, bold=key) + 3
                start = min(x + shift, WIDTH - MARGIN - wide)
                if all(start > b or start + wide < a for a, b in taken[op.process]):
                    taken[op.process].append((start, start + wide))
                    self.out.append(put(start, y + 15, words, "i z b" if key else "i z"))
                    break
            if not in_full:
                self.icons[op.name] = put(-4, 4, op.name[0], "i"), 8
            if op.status != "ok":
                icon = hollow_cross(0, 0) if refused else put(-3, 4, "?", "i")
                self.icons["refused" if refused else "unknown outcome"] = icon, 9

    def _legend(self) -> None:
        x, y = float(MARGIN), self.bottom + 36
        items = sorted(self.icons.items(), key=lambda item: item[0] * item[1][0].startswith("<text"))  # letters last
        for text, (icon, wide) in [*items, *((note, ("", 0.0)) for note in self.more)]:
            needs = wide + 6 + width_of(text, 11, bold=not icon)
            if x + needs > WIDTH - MARGIN:
                x, y = float(MARGIN), y + 18
            self.out.append(f'<g transform="translate({x + wide / 2:.1f} {y - 4})">{icon}</g>' if icon else "")
            self.out.append(put(x + wide + (6 if icon else 0), y, text, "s" if icon else "i b"))
            x += needs + 14
        self.bottom = y + 8


def _merged(parts: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float, int]]:
    """(from, to, how many): those that overlap, or are no farther from each other than the gap, as one."""
    done: list[tuple[float, float, int]] = []
    for start, end in sorted(parts):
        if done and start - done[-1][1] <= gap:
            first, last, n = done[-1]
            done[-1] = first, max(end, last), n + 1
        else:
            done.append((start, end, 1))
    return done


def _zoom(history: History, finding: Finding, t0: float, t1: float) -> tuple[float, float]:
    """From the first act of the counterexample to its last; closer where what matters would be a sliver."""
    spans, acts = involved(history, finding), {op.process for op in finding.witness}
    times = [t for op in finding.witness for t in (op.called, history.until(op))]
    times += [min(a.end, b.end) for a, b in conflicts(history) if a in spans and b in spans and a.op in finding.witness]
    low, high = min(times), max(times)
    for who, _, a, b in pauses(history):
        if any(is_task_of(process, who) for process in acts) and a <= high and b >= low:
            low, high = min(low, a), max(high, b)
    if len(spans) > 1:
        low = min(low, spans[0].start)
        turn = min([spans[1].start, *(s.lease_end for s in expired(history) if s in spans and s.lease_end)])
        if high - turn < 0.15 * (high - low):
            low = turn - (high - turn)
    pad = max(0.15 * (high - low), 1e-3)
    return (max(t0, low - pad), min(t1, high + pad)) if high - low + 2 * pad < 0.8 * (t1 - t0) else (t0, t1)


def _natural(name: str) -> list[Any]:
    """w2 before w10: text and numbers in turn."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", name))]


def figure(history: History, finding: Finding) -> Figure:
    """The same as a matplotlib Figure, without pyplot."""
    from matplotlib.figure import Figure

    v, zero = _Picture(history, finding), history.started
    fig = Figure(figsize=(8, 1.2 + 0.5 * len(v.lanes)), layout="constrained")
    axes = fig.subplots()
    row = {name: -n for n, name in enumerate(v.lanes)}
    paused = [(name, a, b) for who, _, a, b in pauses(history) for name in v.lanes if is_task_of(name, who)]
    held = [(span.process, span.start, span.end) for span in v.bars]
    both = [(s.process, b.start, min(a.end, b.end)) for a, b in conflicts(history) for s in (a, b)]
    layers = (
        (paused, 0.9, "#eeeeee", "#aaaaaa", "//"),
        (held, 0.6, HOLD, "#3a6ea5", ""),
        (both, 0.6, "#fbd5d5", RED, "xx"),
    )
    for bars, height, fill, edge, hatch in layers:
        for name, start, end in bars:
            if name in row:
                where = [(start - zero, end - start)], (row[name] - height / 2, height)
                axes.broken_barh(*where, facecolor=fill, edgecolor=edge, hatch=hatch)
    for span in v.bars:
        axes.text(span.start - zero, row[span.process], f" {history.label(span.op)}", va="center", clip_on=True)
    for op in history.where("admit"):
        if op.process in row:
            axes.plot(op.end - zero, row[op.process], "|" if op.status == "ok" else "x", color="#3a6ea5")
    for fault in history.faults:
        axes.axvline(fault.at - zero, color=GREY, lw=0.8, ls=":")
    axes.set(yticks=list(row.values()), yticklabels=list(row), xlabel="seconds", title=finding.summary)
    axes.set_xlim(v.t0 - zero, v.t1 - zero)
    return fig
