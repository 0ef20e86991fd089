"""What the benchmarks share: contenders in processes of their own, interleaved rounds, ratios, tables, a chart.

How a number is made
- Every contender runs in a child process of its own, forked with the drivers imported. Only one runs at a time; the
  others wait in a read. Client and server share one core (--unpinned: all cores), because on two cores of an idle
  machine a round trip is mostly the wake-up of the other core, which hides what the client costs.
- Rounds are interleaved, A B C A B C, after a warm-up round. A value is the median over the rounds, a ratio the
  median of the ratios to the floor *of the same round*. The floor is the least that a client can do: the raw
  commands through the same client.
- On one core an operation takes the CPU time of the client and the server. The ratio to the floor is the ratio of these
  sums, so that other users of the machine do not count. Where it cannot be measured (not Linux, --unpinned, a server
  that was not started here) it is the ratio of the rates.
- Rates drift by 2x from run to run, and other users of the machine change them. Compare ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import json
import math
import os
import platform
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from distsys.lab.testbed.processes import Process, Processes
from distsys.lab.testbed.servers import Server, Servers, ServerUnavailable

RESULTS = Path(__file__).parent / "results"
ANSWER = 120.0  # seconds within which a child answers, or the run fails


@dataclass(frozen=True)
class Contender:
    """A row. `make` names an async context manager of the script: the child enters it, and measures what it yields."""

    name: str  # with ", ours" in it, the chart shows it in colour
    make: str
    args: Sequence[str]
    floor: str = ""  # the name of the row it is compared with; "" is a floor itself
    goal: float | None = None  # of the ratio, at least
    needs: str = ""  # the package of a peer; missing, the row is skipped and says so


class Round(NamedTuple):
    """What the processes of one contender answered in one round."""

    answers: list[Any]  # of each process of a contender
    server_cpu: float | None  # seconds that all servers together were busy meanwhile, if it can be told


@dataclass
class Table:
    """A table of results, and its bars in the chart."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str  # what the peers leave out
    bars: dict[str, list[float]]  # row -> a value per round, for the chart
    axis: str
    goal: float | None = None
    log: bool = False
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # row -> what each round gave

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        ends = ["---", *["--:"] * (len(widths) - 2), "---"]  # the first and the last are words
        lines = [list(self.columns), [end[0] + "-" * (w - 2) + end[-1] for end, w in zip(ends, widths, strict=True)]]
        pads = [str.ljust, *[str.rjust] * (len(widths) - 2), str.ljust]
        body = [
            "| " + " | ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=True)) + " |"
            for row in [*lines, *self.rows]
        ]
        return "\n".join([f"## {self.title}", "", *body, "", self.note])


class Bench:
    """One topic: its servers, its rounds, its results.

    async with Bench.open("locks") as bench: ...
    """

    def __init__(self, topic: str, options: argparse.Namespace, processes: Processes) -> None:
        self.topic, self.options, self.processes = topic, options, processes
        self.servers = Servers(processes)
        self.tables: list[Table] = []
        self.packages = {"redis", "hiredis", "psycopg"}  # whose versions matter
        self.skipped: list[str] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, topic: str) -> AsyncIterator[Bench]:
        """Read the options, start the lab's processes, and write the results at the end."""
        parser = argparse.ArgumentParser(description=f"Benchmark of {topic}: medians and ratios to the raw commands.")
        parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds that count (default 7)")
        parser.add_argument("--quick", action="store_true", help="a third of the time; keeps no results")
        parser.add_argument("--only", default="", metavar="REGEX", help="of the tables' titles")
        parser.add_argument("--unpinned", action="store_true", help="client and server on all cores")
        parser.add_argument("--out", type=Path, help=f"folder for the results (default {RESULTS.name}, --quick: none)")
        options = parser.parse_args()
        if hasattr(os, "sched_setaffinity") and not options.unpinned:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # every process that is started later inherits it
        else:
            options.unpinned = True
        processes = await Processes.start()
        bench = cls(topic, options, processes)
        try:
            yield bench
            bench.write()
        except ServerUnavailable as error:
            sys.exit(f"{topic}: {error}")
        finally:
            await bench.servers.aclose()
            await processes.aclose()

    @asynccontextmanager
    async def durable_postgres(self) -> AsyncIterator[Server]:
        """Start a PostgreSQL whose commits wait for a disk. Its log is in /var/tmp; that of the lab is in memory."""
        with tempfile.TemporaryDirectory(dir="/var/tmp", ignore_cleanup_errors=True) as disk:
            Path(disk).chmod(0o777)  # noqa: ASYNC240  takes no time; started by root, the server runs as nobody
            yield await self.servers.postgres("durable", fsync=True, wal_folder=Path(disk))

    def wanted(self, title: str) -> bool:
        """Return True if --only selects the table of this title."""
        return bool(re.search(self.options.only, title, re.IGNORECASE))

    def seconds(self, full: float) -> float:
        """Return the duration of a measurement; --quick takes a third."""
        return full / 3 if self.options.quick else full

    async def rounds(
        self,
        title: str,
        contenders: Sequence[Contender],
        do: str,
        *,
        processes: int = 1,
        times: int = 1,
        **request: Any,
    ) -> dict[str, list[Round]]:
        """Return what each contender answers, round by round. `do` names a function of the script."""
        rounds = times * self.options.rounds
        groups: dict[str, list[_Child]] = {}
        try:
            for contender in contenders:
                if contender.needs:
                    self.packages.add(contender.needs)
                    if _version(contender.needs) is None:
                        self.skipped.append(
                            f"{title}: without {contender.name}, for {contender.needs} is not installed"
                        )
                        continue
                starting = (_Child.start(self.processes, contender, number) for number in range(processes))
                groups[contender.name] = await asyncio.gather(*starting)
            answers: dict[str, list[Round]] = {name: [] for name in groups}
            pids: list[int] = []
            for number in range(1 + rounds):
                if number < 2:  # in the second round all are connected
                    pids = self._server_pids()
                for name, children in groups.items():
                    before = _cpu_time(pids)
                    start = time.monotonic() + 0.01 * processes
                    got = await asyncio.gather(*(child.ask(do=do, start=start, **request) for child in children))
                    after = _cpu_time(pids)
                    if number:
                        answers[name].append(Round(got, after - before if after and before else None))
                print(f"\r{title}: round {number} of {rounds} ", end="", file=sys.stderr, flush=True)
            print("\r\033[K", end="", file=sys.stderr)
        finally:
            await asyncio.gather(*(child.close() for children in groups.values() for child in children))
        return answers

    async def speed(
        self,
        title: str,
        unit: str,
        contenders: Sequence[Contender],
        *,
        do: str,
        note: str,
        waits: bool = False,
        **request: Any,
    ) -> None:
        """Show a table of rates: medians, CPU per operation, ratios to the floor, and whether the goal is met.

        waits  an operation waits for a disk, so the ratio is that of the rates, not of the CPU times
        """
        if not self.wanted(title):
            return
        answers = await self.rounds(
            title, contenders, do, times=3 if self.options.quick else 9, seconds=0.05, **request
        )
        found = {name: [_cost(*one) for one in each] for name, each in answers.items()}
        told = all(one["server_us"] is not None for each in found.values() for one in each)
        if told and not self.options.unpinned and not waits:
            took = {name: [one["client_us"] + one["server_us"] for one in each] for name, each in found.items()}
        else:
            took = {name: [1 / one["rate"] for one in each] for name, each in found.items()}
        rows, bars = [], {}
        for contender in (c for c in contenders if c.name in found):
            name = contender.name
            bars[name] = ratios(took[contender.floor or name], took[name])
            ratio = median(bars[name])
            numbers = [f"{median([one[key] for one in found[name]]):,.0f}" for key in ("rate", "client_us")]
            numbers += [f"{median([one['server_us'] for one in found[name]]):,.0f}" if told else "-", f"{ratio:.2f}"]
            goals = [(f"≥ {contender.goal:g}", ratio >= contender.goal)] if contender.goal else []
            rows.append([name, *numbers, judge(*goals)])
        columns = ["", f"{unit}/s", "client CPU µs", "server CPU µs", "to its floor", "goal"]
        goal = next((c.goal for c in contenders if c.goal), None)
        self.show(Table(title, columns, rows, note, bars, f"{unit}, speed to the floor's", goal, samples=found))

    def _server_pids(self) -> list[int]:
        """Return the pids of all servers and their children; none if a server was not started here."""
        started = [server.process for server in self.servers.running.values()]
        if not all(started):
            return []
        roots = [psutil.Process(process.pid) for process in started if process]
        return [part.pid for root in roots for part in (root, *root.children(recursive=True))]

    def show(self, table: Table) -> None:
        """Print a table, and keep it for the results."""
        table.note = table.note.strip()
        self.tables.append(table)
        print(f"\n{table}\n", flush=True)

    # ---- results

    def facts(self) -> dict[str, Any]:
        """Return what the results depend on: machine, versions, options."""
        return {
            "topic": self.topic,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": self.options.rounds,
            "pinned": not self.options.unpinned,
            "quick": self.options.quick,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "packages": {name: found for name in sorted(self.packages) if (found := _version(name))},
            "servers": sorted({str(server) for server in self.servers.running.values()}),
        }

    def write(self) -> None:
        """Write the results as Markdown, JSON and a chart; --quick writes none."""
        out = self.options.out or (None if self.options.quick else RESULTS)
        if out is None or not self.tables:
            return
        out.mkdir(parents=True, exist_ok=True)
        facts = self.facts()
        versions = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
        pinned = "client and server on one core" if facts["pinned"] else "on all cores"
        head = f"""# Benchmark: {self.topic}

{facts["date"]}, {facts["machine"]}, Python {facts["python"]}, {versions}; {"; ".join(facts["servers"])}.
{facts["rounds"]} interleaved rounds, {pinned}; medians. A ratio is to the floor of the same round, and on one
core by the CPU time of client and server, so that neighbours do not count. Rates and milliseconds drift.

![ratios]({self.topic}.svg)
"""
        parts = [head, *self.skipped, *map(str, self.tables)]
        (out / f"{self.topic}.md").write_text("\n\n".join(parts) + "\n")
        tables = [
            {
                "title": table.title,
                "columns": table.columns,
                "rows": table.rows,
                "samples": {
                    name: {key: [one[key] for one in each] for key in each[0]} for name, each in table.samples.items()
                },
            }
            for table in self.tables
        ]
        data = json.loads(
            json.dumps(facts | {"tables": tables}),
            parse_float=lambda text: float(f"{float(text):.4g}"),
            parse_constant=lambda _: None,  # infinite: a waiter that never got the lock
        )
        text = re.sub(
            r"\[\s+([^][{}]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(data, indent=1)
        )
        (out / f"{self.topic}.json").write_text(text + "\n")
        self._chart(out / f"{self.topic}.svg")
        print(f"{out}/{self.topic}.md .json .svg")

    def _chart(self, path: Path) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        heights = [len(table.bars) + 1.8 for table in self.tables]
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.topic, "font.size": 9}):
            figure = Figure(figsize=(9, 0.27 * sum(heights)), layout="constrained")
            axes = figure.subplots(len(self.tables), squeeze=False, height_ratios=heights)[:, 0]
            for ax, table in zip(axes, self.tables, strict=True):
                for y, (name, values) in enumerate(table.bars.items()):
                    ax.barh(y, median(values), height=0.62, color="#2e7d5b" if ", ours" in name else "#b8bec6")
                    middle_half = percentile(values, 25), percentile(values, 75)
                    ax.plot(middle_half, (y, y), color="#30363d", linewidth=1.5)
                if table.goal:
                    ax.axvline(table.goal, color="#b54708", linestyle="--", linewidth=1)
                    ax.text(table.goal, -0.7, f"goal {table.goal:g}", color="#b54708", fontsize=7, ha="center")
                ax.set_yticks(range(len(table.bars)), list(table.bars))
                ax.invert_yaxis()
                ax.set_title(f"{table.title}: {table.axis}", loc="left", fontsize=9, pad=13)
                ax.spines[["top", "right"]].set_visible(False)
                if table.log:
                    ax.set_xscale("log")
                    ax.xaxis.set_major_formatter("{x:g}")
            figure.supxlabel("bar: the median of the rounds, line: their middle half", fontsize=8)
            figure.savefig(path, metadata={"Date": None})


# ---- numbers


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratios(values: Sequence[float], floor: Sequence[float]) -> list[float]:
    """Return each value divided by the floor of the same round."""
    return [value / least if least else math.inf for value, least in zip(values, floor, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by nearest rank: always a value that was measured."""
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))]


def judge(*goals: tuple[str, bool]) -> str:
    """Return the cell of a table that says which goals are met."""
    return " · ".join(f"{goal} {'met' if met else '**not met**'}" for goal, met in goals)


def _cost(answers: list[Any], server_cpu: float | None) -> dict[str, Any]:
    """Return the cost of one operation, from the answer of `repeat`."""
    (one,) = answers
    per = 1e6 / one["count"]
    server = None if server_cpu is None else per * server_cpu
    return {"rate": one["count"] / one["seconds"], "client_us": per * one["cpu"], "server_us": server}


def _cpu_time(pids: Sequence[int]) -> float | None:
    """Return the CPU seconds of these processes, to the nanosecond. Those of psutil have a resolution of 10 ms."""
    try:
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9 if pids else None
    except FileNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- a child: enters `make` once, then answers each line of JSON with a line, until the socket is closed


class _Child:
    def __init__(self, name: str, process: Process, reader: Any, writer: asyncio.StreamWriter) -> None:
        self.name, self.process, self.reader, self.writer = name, process, reader, writer

    @classmethod
    async def start(cls, processes: Processes, contender: Contender, number: int) -> _Child:
        job = {"script": Path(sys.argv[0]).stem, "make": contender.make, "args": list(contender.args)}
        label = re.sub(r"\W+", "-", contender.name)
        process = await processes.fork("common:child", json.dumps(job).encode(), name=f"{label}-{number}")
        self = cls(contender.name, process, *await asyncio.open_connection(sock=process.sock, limit=1 << 24))
        await self._answer()
        return self

    async def ask(self, **request: Any) -> Any:
        self.writer.write(json.dumps(request).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> Any:
        async with asyncio.timeout(ANSWER):
            line = await self.reader.readline()
        if not line:
            await self.process.exited()
            raise RuntimeError(f"{self.name} failed:\n{self.process.tail(30)}")
        return json.loads(line)

    async def close(self) -> None:
        self.writer.close()
        if self.process.state != "exited":
            await self.process.exited()


def child(payload: bytes, sock: socket.socket) -> None:
    """Run one contender, in a worker process of the lab."""
    asyncio.run(_serve(sock, **json.loads(payload)))


async def _serve(sock: socket.socket, script: str, make: str, args: list[str]) -> None:
    module = importlib.import_module(script)
    with sock.makefile("rw") as wire:
        async with getattr(module, make)(*args) as subject:
            wire.write("null\n")
            wire.flush()
            for line in wire:  # blocks the loop on purpose: nothing runs here while others are measured
                request = json.loads(line)
                answer = await getattr(module, request.pop("do"))(subject, **request)
                wire.write(json.dumps(answer) + "\n")
                wire.flush()


async def repeat(once: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Call a function, or await a coroutine function, again and again. Return count, seconds and CPU seconds."""
    count, awaited = 0, inspect.iscoroutinefunction(once)
    cpu, begin = time.process_time(), time.perf_counter()
    now = begin
    while now < begin + seconds:
        if awaited:
            await once()
        else:
            once()
        count += 1
        now = time.perf_counter()
    return {"count": count, "seconds": now - begin, "cpu": time.process_time() - cpu}
