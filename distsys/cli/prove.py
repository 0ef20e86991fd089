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
    async with await open_lab(options.seed) as lab:
        try:
            ttl = {"ttl": options.ttl} if options.kind == "lock" else {}
            ladder = await getattr(lab, f"try_{options.kind}")(candidate, upto=options.level, **ttl)
        except ValueError as problem:
            raise Usage(str(problem)) from None
    if options.json:
        print_json(ladder.to_dict())
    else:
        print(ladder)
    return 0 if ladder.passed else 1
