"""`distsys prove`: search for what breaks a class of your own, scene by scene."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from distsys.cli.common import NothingTested, Usage, open_lab, print_json

CODES = {"HELD": 0, "VIOLATED": 1, "INCONCLUSIVE": 3}
GIVEN = """\
what a candidate is given, of what its parameters name, and what it must have (sync code works, too):
  lock      redis, conn or pool, name, ttl             acquire() and release(), or `async with`, or `with`
  limiter   redis, limit and window,                   allow(key), try_acquire(key) or is_allowed(key)
            or capacity and refill_rate
  endpoint  redis, conn or pool, charge                pay(key, amount, user), which returns what charge returned:
            await charge(amount) takes the money at once, await charge(amount, conn) in the transaction of conn;
            it may raise: a TimeoutError if nobody knows whether it was paid, any other error if it was not
  breaker   call, clock, failure_threshold (5),        a decorator, or call(fn, ...); or, if it names `call`,
            recovery_timeout (30 s)                    the guarded call
  retry     call, clock, sleep, max_attempts (3),      the same
            base_delay (0.1 s), max_delay (1 s), idempotent
"""


def prove(options: argparse.Namespace) -> int:
    """Explore the candidate MODULE:NAME. Return 0 if it held, 1 if it broke, 3 if nothing was tested."""
    return asyncio.run(_prove(options, _imported(options.candidate)))


def _imported(candidate: str) -> Any:
    module, _, name = candidate.partition(":")
    if not (module and name):
        raise Usage(f"{candidate!r} is not MODULE:NAME, as in mypkg.locks:MyLock")
    sys.path.insert(0, "")
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as missing:
        raise NothingTested(
            f"cannot import {missing.name!r} from {Path.cwd()}: go to the folder that holds it"
        ) from None
    except SyntaxError as wrong:
        raise NothingTested(f"{wrong.filename}:{wrong.lineno}: {wrong.msg}") from None
    except Exception as error:  # noqa: BLE001  whatever the module raises
        raise NothingTested(f"importing {candidate} raised {_where(error)}{type(error).__name__}: {error}") from None
    return found


def _where(error: BaseException) -> str:
    """Return the reader's own file and line."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        found = f"{file}:{trace.tb_lineno}: " if Path(file).is_relative_to(Path.cwd()) else found
        trace = trace.tb_next
    return found


async def _prove(options: argparse.Namespace, candidate: Any) -> int:
    from distsys.lab.explore.build import WrongShape
    from distsys.lab.testbed.servers import ServerUnavailable

    settings = {"kind": options.kind, "ttl": options.ttl, "window": options.window, "schedule": options.schedule}
    settings |= {"promise": options.promise, "setup": options.setup.read_text("utf-8") if options.setup else ""}
    settings |= {"only": tuple(options.only or ()), "to_the_end": options.all, "heard": _progress()}
    worst: Any = None
    async with await open_lab(options.seed) as lab:
        for seed in range(options.seed, options.seed + options.runs):
            try:
                exploration = await lab.explore(candidate, seed=seed, **settings)
            except (WrongShape, ServerUnavailable, RuntimeError) as wrong:
                raise NothingTested(str(wrong)) from None
            except ValueError as wrong:
                raise Usage(str(wrong)) from None
            if worst is None or CODES[exploration.status] > CODES[worst.status] or exploration.status == "VIOLATED":
                worst = exploration
            if worst.status == "VIOLATED":
                break
    if sys.stderr.isatty():
        print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    print_json(worst.to_dict()) if options.json else print(worst)
    if options.html:
        options.html.write_text(f"<!doctype html><meta charset=utf-8>{worst._repr_html_()}", "utf-8")
    if options.junit:
        _write_junit(options.junit, worst)
    return CODES[worst.status]


def _progress() -> Callable[[Any], None] | None:
    """Return what tells a person at a terminal how far the search has come."""

    def heard(found: Any) -> None:
        print(f"\r  searched: {found.scene:<64.64}", end="", file=sys.stderr, flush=True)

    return heard if sys.stderr.isatty() else None


def _write_junit(path: Path, exploration: Any) -> None:
    """Write a test case for each scene, as a CI reads it."""
    suite = ElementTree.Element("testsuite", name=exploration.candidate, tests=str(len(exploration.verdicts)))
    for found in exploration.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=exploration.candidate, name=found.scene)
        if found.status != "HELD":
            kind = "failure" if found.status == "VIOLATED" else "skipped"
            ElementTree.SubElement(case, kind, message=found.summary).text = "\n".join([found.schedule, *found.story])
    ElementTree.ElementTree(suite).write(path, "utf-8", xml_declaration=True)
