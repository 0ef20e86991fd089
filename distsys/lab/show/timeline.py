"""The timeline: a lane per process, a bar per hold, the faults as flags on top, zoomed on the first violation.

The picture stays small however long the run was: it shows LIMIT bars and LANES lanes, and counts the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from itertools import chain, product
from typing import Any

from distsys.lab.history.history import Fault, Finding, History, Op, Outcome
from distsys.lab.history.spans import RECOVERIES, conflicts, expired, holds, is_task_of, pauses
from distsys.lab.history.words import FAULT_WORDS, count, fault_text, refusal_text
from distsys.lab.show.story import involved, key_ops
from distsys.lab.show.svg import MARGIN, WIDTH, box, cross, cut, hollow_cross, path, put, width_of

LIMIT, LANES, MARKS = 60, 12, 160  # the most bars, lanes and marks that are drawn
ORDER = {"apply": 0, "read": 2}  # in which marks get room for their labels: effects before requests
DECIDED = {"admit": "admitted", "call": "answered", "arrive": "arrived"}
UNSURE = ("admit", "info")  # drawn as a mark
LANE, BAR, FLAG = 40, 17, 15  # heights in px


def timeline(history: History, finding: Finding) -> tuple[str, float]:
    """Return the body of the picture, from y=0 down, and its height in px."""
    picture = _Picture(history, finding)
    if not picture.lanes:
        return put(MARGIN, 12, "Nothing was recorded.", "caption"), 20
    picture.draw()
    return "".join(picture.out), picture.bottom


class _Picture:
    """The picture of one history: the bars and lanes between t0 and t1. Notes in `more` count what was left out.

    It is drawn in layers, from the background up. Each layer adds the signs that it uses to the legend.
    """

    def __init__(self, history: History, finding: Finding) -> None:
        self.history, self.finding, self.out = history, finding, list[str]()
        self.icons: dict[str, tuple[str, float]] = {}  # legend: text -> (icon drawn around 0, 0; its width)
        bars = holds(history)
        t0 = min([op.called for op in history] + [f.at for f in history.faults], default=history.started)
        t0, t1 = max(history.started, t0 - 0.02 * (history.end - t0)), history.end
        witness = finding.witness if finding.status == "VIOLATED" else ()
        near = witness and not history.where("call")  # runs of calls are short: all of it is shown
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
        """Return where a moment is in px, at the edge if it lies outside of t0 to t1."""
        share = (min(max(t, self.t0), self.t1) - self.t0) / (self.t1 - self.t0)
        return self.left + share * (WIDTH - MARGIN - self.left)

    def shows(self, start: float, end: float) -> bool:
        """Return True if any part of this interval is in the picture."""
        return end >= self.t0 and start <= self.t1

    def draw(self) -> None:
        """Draw all layers into `out`, and set `bottom`."""
        finding = self.finding
        self.overlaps = [(a, b) for a, b in conflicts(self.history) if a in self.bars and b in self.bars]
        flags = self._place_flags()
        asked = bool(self.history.where("call"))
        admits = [op for op in finding.witness if (op.name == "admit" or asked) and finding.status == "VIOLATED"]
        self.top = FLAG * len({row for *_, row in flags}) + (20.0 if self.overlaps or admits else 6.0)
        self.lane = {name: self.top + LANE * n for n, name in enumerate(self.lanes)}
        self.bottom = self.top + LANE * len(self.lanes)
        for layer in (self._background, self._waits, self._bars, partial(self._decisions, admits), self._overlaps,
                      self._tokens, partial(self._flags, flags), self._marks, self._legend):  # fmt: skip
            layer()

    def line(self, d: str, css: str) -> None:
        """Draw a path."""
        self.out.append(path(d, css))

    def _background(self) -> None:
        """Draw the time axis, the lanes, and where a worker was paused."""
        history = self.history
        rough = (self.t1 - self.t0) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = ((t - history.started) / step for t in (self.t0, self.t1))
        for n in range(math.ceil(first - 1e-6), math.floor(last + 1e-6) + 1):
            x = self.x(history.started + n * step)
            self.line(f"M{x:.1f} {self.top}V{self.bottom + 4}", "grid")
            anchor = "end" if x > WIDTH - 44 else "middle"
            self.out.append(put(x, self.bottom + 16, f"{n * step:.{digits}f} s", f"caption {anchor}"))
        for name, y in self.lane.items():
            self.line(f"M{MARGIN} {y + LANE}H{WIDTH - MARGIN}", "grid")
            self.out.append(put(MARGIN, y + 18, cut(name, self.left - MARGIN - 8, bold=True), "bold"))
        for target, kind, a, b in pauses(history):
            for y in (y for name, y in self.lane.items() if is_task_of(name, target) and self.shows(a, b)):
                self.out.append(box(self.x(a), y + 1, max(2, self.x(b) - self.x(a)), LANE - 2, "pause", 0))
                self.icons[FAULT_WORDS[kind]] = box(-9, -6, 18, 12, "pause", 0), 18

    def _waits(self) -> None:
        """Draw a dotted line from each acquire or call to its answer."""
        asked = [op for op in self.history if op.name in ("acquire", "call") and op.process in self.lane]
        for op in asked[: 2 * LIMIT]:
            end, y = self.history.until(op), self.lane[op.process] + 4 + BAR / 2
            if self.shows(op.called, end) and self.x(end) - self.x(op.called) > 3:
                self.line(f"M{self.x(op.called):.1f} {y}H{self.x(end):.1f}", "wait")
                self.icons["waiting"] = path("M-10 0H10", "wait"), 20
            if op.status == "fail" and op.name == "acquire" and self.shows(end, end):
                self.out.append(hollow_cross(self.x(end), y))
                self.icons["refused"] = hollow_cross(0, 0), 10

    def _bars(self) -> None:
        """Draw each hold, and where its lease ended."""
        for bar in self.bars:
            x = self.x(bar.start) - (5 if bar.start < self.t0 else 0)
            self.out.append(box(x, self.lane[bar.process] + 4, max(3, self.x(bar.end) - x), BAR, "hold"))
            meaning = "holds the lock" if bar.op.token is None else "holds the lock, #token"
            self.icons[meaning] = box(-9, -6, 18, 12, "hold"), 18
        for bar in expired(self.history):
            if bar in self.bars and bar.lease_end is not None and self.shows(bar.lease_end, bar.lease_end):
                x, x1, y = self.x(bar.lease_end), self.x(bar.end), self.lane[bar.process]
                self.line(f"M{x:.1f} {y + 1}V{y + BAR + 8}", "lease")
                if x > x1:  # its holder is dead, and the server does not know yet
                    self.line(f"M{x1:.1f} {y + 4 + BAR / 2}H{x:.1f}", "lease")
                self.icons["lease ends"] = path("M0-7V7", "lease"), 6

    def _decisions(self, witness: list[Op]) -> None:
        """Draw how many requests were admitted (bars) and how many refused (crosses below)."""
        statuses: tuple[Outcome, ...] = ("ok", "fail", "info")
        for (name, y), status, kind in product(self.lane.items(), statuses, DECIDED):
            ops = self.history.where(kind, process=name, status=status) if (kind, status) != UNSURE else []
            times = [op.called if kind == "arrive" else self.history.until(op) for op in ops]
            for x0, x1, n in _merged(((self.x(t), self.x(t)) for t in times if self.shows(t, t)), 30.0):
                text = f"{n:,}" if n > 1 else ""
                wide = width_of(text, 11)
                x, css = (x0 + x1) / 2, "small middle blue"
                if x1 + 6 + wide < WIDTH - MARGIN:
                    x, css = x1 + 6, "small halo"
                elif x0 - 6 - wide >= self.left:
                    x, css = x0 - 6, "small end halo"
                if status == "ok" or kind == "arrive":
                    self.out += [box(x0 - 1.5, y + 4, x1 - x0 + 3, BAR, "hold"), put(x, y + 17, text, css)]
                    self.icons[f"{DECIDED[kind]}, how many"] = box(-3, -6, 6, 12, "hold"), 9
                elif status == "info":
                    self.out += [cross(x0, y + 4 + BAR / 2, "tick"), put(x, y + 17, text, css)]
                    self.icons["failed"] = cross(0, 0, "tick"), 9
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
        """Draw a bracket over the lanes, with its text if that begins right of `after`. Return the last text's end."""
        half = (width_of(text, 11, bold=True) + 16) / 2
        x = min(max((x0 + x1) / 2, self.left + half), WIDTH - MARGIN - half)
        self.line(f"M{x0:.1f} {self.top + 2}v-5H{max(x1, x0 + 4):.1f}v5", "redbracket" if bad else "bracket")
        if x - half <= after:
            return after
        self.out.append(cross(x - half + 4, self.top - 12, "alarm") if bad else "")
        self.out.append(put(x + 7, self.top - 8, text, "small middle bold red halo" if bad else "small middle halo"))
        return x + half

    def _overlaps(self) -> None:
        """Draw the intervals with two holders, hatched in both lanes; red where that breaks the promise."""
        written, bad = 0.0, self.finding.status == "VIOLATED"
        both = [(b.start, min(a.end, b.end), {a.process, b.process}) for a, b in self.overlaps]
        for process in dict.fromkeys(span.process for pair in self.overlaps for span in pair):
            for start, end, _ in _merged((a, b) for a, b, holders in both if process in holders):
                x, css = self.x(start), "violation" if bad else "overlap"
                self.out.append(box(x, self.lane[process] + 4, max(4, self.x(end) - x), BAR, css))
                self.icons["two hold at once"] = box(-9, -6, 18, 12, css), 18
        for start, end, _ in _merged((a, b) for a, b, _ in both):
            begun = [b.start for _, b in self.overlaps if start <= b.start <= end]
            crowd = max(len({s.process for s in self.bars if s.start <= t < s.end}) for t in begun)
            written = self._bracket(self.x(start), self.x(end), f"{max(2, crowd)} holders", bad=bad, after=written)

    def _tokens(self) -> None:
        """Draw each fencing token in its bar, or beside it if there is room."""
        overlapping = [bar for pair in self.overlaps for bar in pair]
        for n, bar in ((n, bar) for n, bar in enumerate(self.bars) if bar.op.token is not None):
            text, y = self.history.label(bar.op), self.lane[bar.process] + 17
            x0, x1 = self.x(bar.start), self.x(bar.end)
            wide = width_of(text, 11, bold=True)
            later = [self.x(other.start) for other in self.bars[n + 1 :] if other.process == bar.process]
            if x1 - x0 > wide + 4:
                middle = (x0 + x1) / 2
                self.out.append(box(middle - wide / 2 - 3, y - 11, wide + 6, 13, "label") if bar in overlapping else "")
                self.out.append(put(middle, y, text, "small middle bold blue"))
            elif any(f.at == bar.end and f.kind == "killed" for f in self.history.faults):
                self.out.append(put(x0 - 3, y, text, "small bold blue halo end") if x0 - wide > self.left else "")
            elif min(later, default=WIDTH - 6) - x1 > wide + 6:
                self.out.append(put(x1 + 3, y, text, "small bold blue halo"))

    def _place_flags(self) -> list[tuple[Fault, str, bool, int]]:
        """Return (fault, text, whether it is left of its pole, row). A later flag goes lower, off its poles."""
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
        """Draw each fault as a flag whose pole runs through the lanes that it hit."""
        for fault, text, at_left, row in flags:
            lanes = [y for name, y in self.lane.items() if is_task_of(name, fault.target)] or list(self.lane.values())
            x, y0, y = self.x(fault.at), FLAG * row + 2, FLAG * row + 11
            self.line(f"M{x:.1f} {y0}V{max(lanes) + LANE}", "grid")
            for lane in lanes:
                self.line(f"M{x:.1f} {y}V{y0}l7 3.5-7 3.5zM{x:.1f} {lane}v{LANE}", "pole")
                self.out.append(cross(x, lane + 4 + BAR / 2, "tick", 5) if fault.kind == "killed" else "")
            self.out.append(put(x - 4, y, text, "small end halo") if at_left else put(x + 10, y, text, "small halo"))

    def _marks(self) -> None:
        """Draw a tick and a letter for each operation, with its value if it belongs to the counterexample."""
        taken = {name: list[tuple[float, float]]() for name in self.lane}
        named = [*self.finding.witness, *chain(*key_ops(self.history, self.finding))]
        ops = [op for op in self.history if op.process in self.lane and self.shows(op.end, op.end)]
        ops = [op for op in ops if op.name != "acquire" and (op.name != "release" or op in named)]
        ops = [op for op in ops if op.name not in DECIDED or (op.name, op.status) == UNSURE]
        if self.history.where("call"):  # inside of a call only the counterexample is shown
            ops = [op for op in ops if op.name in ("apply", "wait") and op in self.finding.witness]
        for op in sorted(ops, key=lambda op: (op.status != "fail" and op not in named, ORDER.get(op.name, 1)))[:MARKS]:
            refused, key = op.status == "fail", op.status == "fail" or op in named
            x, y = self.x(op.end), self.lane[op.process] + 4 + BAR
            in_full = op.name == "release"
            text = op.name if in_full else op.name[0] + ("?" if op.status == "info" else "")
            if key and op.value is not None and not isinstance(op.value, dict):
                text = cut(f"{text} {op.value}", 60, 11)
            self.out.append(hollow_cross(x, y + 8) if refused else path(f"M{x:.1f} {y}v5", "tick"))
            shifts = (6.0,) if refused else (-2.0, 1.0, 4.0, -6.0)
            for words, shift in product(dict.fromkeys((text, text if in_full else text.split()[0])), shifts):
                wide = width_of(words, 11, bold=key) + 3
                start = min(x + shift, WIDTH - MARGIN - wide)
                if all(start > b or start + wide < a for a, b in taken[op.process]):
                    taken[op.process].append((start, start + wide))
                    self.out.append(put(start, y + 15, words, "small halo bold" if key else "small halo"))
                    break
            if not in_full:
                self.icons[op.name] = put(-4, 4, op.name[0], "small"), 8
            if op.status != "ok":
                icon = hollow_cross(0, 0) if refused else put(-3, 4, "?", "small")
                self.icons["refused" if refused else "unknown outcome"] = icon, 9

    def _legend(self) -> None:
        """Draw the signs in use with their meanings, then the notes about what was left out."""
        x, y = float(MARGIN), self.bottom + 36
        items = sorted(self.icons.items(), key=lambda item: item[0] * item[1][0].startswith("<text"))  # letters last
        for text, (icon, wide) in [*items, *((note, ("", 0.0)) for note in self.more)]:
            needs = wide + 6 + width_of(text, 11, bold=not icon)
            if x + needs > WIDTH - MARGIN:
                x, y = float(MARGIN), y + 18
            self.out.append(f'<g transform="translate({x + wide / 2:.1f} {y - 4})">{icon}</g>' if icon else "")
            self.out.append(put(x + wide + (6 if icon else 0), y, text, "caption" if icon else "small bold"))
            x += needs + 14
        self.bottom = y + 8


def _merged(parts: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float, int]]:
    """Merge the intervals that overlap or lie at most `gap` apart. Return (start, end, how many) of each."""
    done: list[tuple[float, float, int]] = []
    for start, end in sorted(parts):
        n = 0
        if done and start - done[-1][1] <= gap:
            start, last, n = done.pop()
            end = max(end, last)
        done.append((start, end, n + 1))
    return done


def _zoom(history: History, finding: Finding, t0: float, t1: float) -> tuple[float, float]:
    """Return the interval of the counterexample, narrowed if the overlap would be too thin to see."""
    spans, acts = involved(history, finding), {op.process for op in finding.witness}
    times = [t for op in finding.witness for t in (op.called, history.until(op))]
    times += [min(a.end, b.end) for a, b in conflicts(history) if a in spans and b in spans and a.op in finding.witness]
    low, high = min(times), max(times)
    for target, _, a, b in pauses(history):
        if any(is_task_of(process, target) for process in acts) and a <= high and b >= low:
            low, high = min(low, a), max(high, b)
    if len(spans) > 1:
        low = min(low, spans[0].start)
        turn = min([spans[1].start, *(s.lease_end for s in expired(history) if s in spans and s.lease_end)])
        if high - turn < 0.15 * (high - low):
            low = turn - (high - turn)
    pad = max(0.15 * (high - low), 1e-3)
    return (max(t0, low - pad), min(t1, high + pad)) if high - low + 2 * pad < 0.8 * (t1 - t0) else (t0, t1)


def _natural(name: str) -> list[Any]:
    """Return a sort key that puts w2 before w10."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", name))]
