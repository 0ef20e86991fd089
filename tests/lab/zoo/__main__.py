"""`make zoo`: explore every candidate of the zoo, and write references/truth.md from what was found."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from distsys.lab import Lab
from tests.lab.zoo import limiters, locks

TRUTH = Path(__file__).parents[3] / "references/truth.md"
HEAD = """# What the explorer finds

Written by `make zoo`: every candidate of [`tests/lab/zoo/`](../tests/lab/zoo/locks.py) is explored, and this table
says what was found. A mistake is found for the right reason when the scene that is about it shows it, with a schedule
that was seen again in real time on an unmodified server. A false alarm is a right candidate that does not hold in
every scene.

The zoo was written by the authors of the explorer, so it is a rehearsal. Candidates that they have not seen do worse.

"""


async def main() -> int:
    """Explore both zoos; 1 if a mistake was missed or a right one accused."""
    rows, missed = list[tuple[str, ...]](), list[str]()
    async with await Lab.open() as lab:
        for kind, zoo in (("lock", locks), ("limiter", limiters)):
            wrong: dict[Any, Any] = zoo.WRONG
            caught, right_reason, alarms, seconds, schedules = 0, 0, 0, list[float](), list[int]()
            for candidate in (*wrong, *zoo.RIGHT):
                began = time.monotonic()
                exploration = await lab.explore(candidate, kind=kind)
                seconds.append(time.monotonic() - began)
                schedules.append(exploration.schedules)
                if candidate in wrong:
                    expected = wrong[candidate]
                    scene = expected[0] if isinstance(expected, tuple) else expected
                    caught += exploration.status == "VIOLATED"
                    found = exploration.found[scene].status == "VIOLATED"
                    right_reason += found
                    missed += [] if found else [candidate.__name__]
                elif not exploration.passed:
                    alarms += 1
                    missed.append(candidate.__name__)
                print(f"{exploration.status:<13} {candidate.__name__}", flush=True)
            n = len(wrong)
            cells = f"{caught} of {n}", f"{right_reason} of {n}", f"{alarms} of {len(zoo.RIGHT)}"
            rows.append((kind, *cells, f"{statistics.median(schedules):g}", f"{statistics.median(seconds):.1f}"))
    titles = "kind", "VIOLATED", "for the right reason", "false alarms", "schedules (median)", "seconds (median)"
    table = [titles, ("---",) * len(titles), *rows]
    TRUTH.write_text(HEAD + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n", "utf-8")
    print(f"missed or accused: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
