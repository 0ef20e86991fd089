"""`distsys prove`: test your own class under the lab's faults, level by level, until one breaks it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from distsys.cli.common import Usage, open_lab, print_json


def prove(options: argparse.Namespace) -> int:
    """Test the candidate MODULE:NAME level by level. Return 1 if it fails one."""
    module, _, name = options.candidate.partition(":")
    if not (module and name):
        raise Usage(f"{options.candidate!r} is not MODULE:NAME, as in mypkg.locks:MyLock")
    sys.path.insert(0, "")
    try:
        candidate = import_module(module)
        for part in name.split("."):
            candidate = getattr(candidate, part)
    except ModuleNotFoundError as missing:
        raise Usage(f"cannot import {missing.name!r} from {Path.cwd()}: go to the folder that holds it") from missing
    except AttributeError as missing:
        raise Usage(f"{missing}") from missing
    return asyncio.run(_climb(options, candidate))


async def _climb(options: argparse.Namespace, candidate: Any) -> int:
    lock, exploration = options.kind == "lock", None
    if options.schedule is not None and not lock:
        raise Usage(f"--schedule {options.schedule!r}: only a lock has schedules, use it with --as lock")
    async with await open_lab(options.seed) as lab:
        try:
            if options.schedule is not None:
                exploration = await lab.explore(candidate, ttl=options.ttl, schedule=options.schedule)
                print_json(exploration.to_dict()) if options.json else print(exploration)
                return 0 if exploration.passed else 1
            ttl = {"ttl": options.ttl} if lock else {}
            ladder = await getattr(lab, f"try_{options.kind}")(candidate, upto=options.level, **ttl)
        except ValueError as problem:
            raise Usage(str(problem)) from None
        if not options.json:
            print(ladder, flush=True)
        if lock and ladder.level and options.level is None:
            exploration = await _explore(lab, candidate, options.ttl)
    if options.json:
        print_json(ladder.to_dict() | {"exploration": exploration and exploration.to_dict()})
    elif exploration:
        print(f"\n{exploration}")
    return 0 if ladder.passed and (exploration is None or exploration.status != "VIOLATED") else 1


async def _explore(lab: Any, candidate: Any, ttl: float) -> Any:
    """Search the schedules of a lock that passed a level; on a terminal, say how far the search has come."""
    from distsys.lab.testbed.servers import ServerUnavailable

    def heard(found: Any) -> None:
        if sys.stderr.isatty():
            print(f"\r  searched: {found.scene:<64}", end="", file=sys.stderr, flush=True)

    try:
        exploration = await lab.explore(candidate, ttl=ttl, heard=heard)
    except ServerUnavailable as missing:
        print(f"distsys: the schedules were not searched: {missing}", file=sys.stderr)
        return None
    if sys.stderr.isatty():
        print("\r" + " " * 76 + "\r", end="", file=sys.stderr, flush=True)
    return exploration
