"""What of a history is shown: LIMIT bars and LANES lanes, zoomed on the first violation. The rest is counted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from distsys.lab.history import Finding, History
from distsys.lab.spans import Span, conflicts, count, expired, holds, is_of, pauses
from distsys.lab.story import involved
from distsys.lab.svg import MARGIN, WIDTH, width_of

LIMIT, LANES = 60, 12


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
    near = witness and not history.where("call")  # runs of calls are short: the whole is shown
    low, high = _zoom(history, finding, t0, t1) if near else (t0, t1)
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
        part = f"{history.at(low, '')} to {history.at(high)} of {history.at(history.end)}"
        more.append(f"zoomed on {part}" if witness else f"the first {history.at(high)} of {history.at(history.end)}")
    left = MARGIN + min(140.0, max([24.0, *(width_of(name, bold=True) for name in lanes)])) + 12
    return View(low, max(high, low + 1e-6), shown, lanes, more, left)


def _zoom(history: History, finding: Finding, t0: float, t1: float) -> tuple[float, float]:
    """From the first act of the counterexample to its last; closer where what matters would be a sliver."""
    spans, acts = involved(history, finding), {op.process for op in finding.witness}
    times = [t for op in finding.witness for t in (op.called, history.until(op))]
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
