"""`distsys run`: run experiments, and print a verdict for each arm."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from distsys.cli.common import Usage, open_lab, print_json


def run(options: argparse.Namespace) -> int:
    """List the experiments, or run those named. Return 1 if a verdict is not the expected one."""
    from distsys.lab import experiments

    known = experiments.every()
    if options.list or not options.experiments:
        for experiment in known.values():
            print(f"{experiment.name:<30} {experiment.claim}")
        return 0
    if options.runs < 1:
        raise Usage(f"--runs must be at least 1 (got {options.runs})")
    if unknown := [name for name in options.experiments if name not in known]:
        raise Usage(f"no experiment {unknown[0]!r}: run  distsys run --list")
    return asyncio.run(_verdicts(options, [known[name] for name in options.experiments]))


async def _verdicts(options: argparse.Namespace, chosen: list[Any]) -> int:
    from distsys.lab.show.verdict import Verdicts

    verdicts, say = Verdicts(), (lambda *_, **__: None) if options.json else print
    async with await open_lab(options.seed) as lab:
        for experiment in chosen:
            say(f"{experiment.name}: {experiment.claim}", flush=True)
            for verdict in await lab.run(experiment, runs=options.runs):
                verdicts.append(verdict)
                say("\n      ".join([f"  {verdict}", *(verdict.story() if options.story else ())]), flush=True)
    wrong = [verdict for verdict in verdicts if verdict.was_run and not verdict.as_expected]
    say(f"{len(verdicts) - len(wrong)} of {len(verdicts)} verdicts as expected")
    if options.json:
        print_json(verdicts.to_dict())
    return 1 if wrong else 0
