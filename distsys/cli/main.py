"""distsys lab | run | prove | decide.

Exit codes: 0 as expected or held, 1 not as expected or violated, 2 usage or something missing, 3 `prove` tested nothing
or found out nothing, 130 interrupted.
What a command started ends with it, also after Ctrl-C and kill -9: the lab's supervisor does that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distsys import __version__
from distsys.cli.common import NothingTested, Usage
from distsys.cli.decide import decide
from distsys.cli.lab import lab
from distsys.cli.prove import GIVEN, prove
from distsys.cli.run import run
from distsys.decide.matrix import STAGES

ABOUT = """\
Sixteen rules for distributed systems, each shown failing and then holding up on real Redis and PostgreSQL.

  distsys lab                                  open the notebooks in JupyterLab
  distsys run --list                           the experiments and their claims
  distsys run slow-holder --runs 20            run one; every arm gets a verdict: HELD, VIOLATED or INCONCLUSIVE
  distsys prove mypkg.locks:MyLock --as lock   test your own lock under the same faults and checker
  distsys decide locks --stage MVP --instances 3

Servers are started for you and end with the command. To use your own, set DISTSYS_REDIS_URL and DISTSYS_POSTGRES_URL.
"""
CODES = "exit codes: 0 as expected · 1 not as expected · 2 usage · 3 nothing could be tested · 130 interrupted"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    as_written: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(prog="distsys", description=ABOUT, epilog=CODES, **as_written)
    top.add_argument("--version", action="version", version=f"distsys {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="{lab,run,prove,decide}")

    def command(name: str, call: Callable[[argparse.Namespace], int], text: str, example: str) -> Callable[..., Any]:
        about = f"{text[0].upper()}{text[1:]}."
        epilog = f"example: distsys {name} {example}\n{CODES}"
        sub = commands.add_parser(name, help=text, description=about, epilog=epilog, **as_written)
        sub.set_defaults(call=call)
        return sub.add_argument

    add = command("lab", lab, "open the notebooks in JupyterLab, on this machine only", "--port 8889")
    add("notebook", nargs="?", default="00_start_here", help="which one to open (default: %(default)s)")
    add("--port", type=int, help="exactly this port (default: 8888, or the next free one)")
    add("--no-browser", action="store_true", help="print the address instead of opening it")

    add_run = command("run", run, "run experiments and print a verdict per arm", "slow-holder --runs 20 --seed 7")
    add_run("experiments", nargs="*", metavar="EXPERIMENT", help="names; without one, they are listed")
    add_run("--list", action="store_true", help="list names and claims, run nothing")
    add_run("--story", action="store_true", help="print what happened in the run that decided the verdict")
    add_run("--runs", type=int, default=3, metavar="N", help="runs of each arm (default: %(default)s)")

    text = "search for what breaks a class of your own, scene by scene"
    add_prove = command("prove", prove, text, f"mypkg.locks:MyLock --as lock\n\n{GIVEN}")
    add_prove("candidate", metavar="MODULE:NAME", help="importable from the current folder")
    kinds = ["lock", "limiter", "breaker", "retry", "endpoint"]
    add_prove("--as", dest="kind", choices=kinds, required=True, help="what kind of rule it is")
    add_prove("--all", action="store_true", help="go on after the first scene that breaks it")
    add_prove("--only", type=int, nargs="+", metavar="N", help="only these scenes, by their numbers")
    add_prove(
        "--schedule", metavar="S", help='run this schedule of the scene --only N alone, in real time, as in "w1#4 hold"'
    )
    add_prove("--ttl", type=float, default=0.3, metavar="S", help="TTL of a lock, or what it has built in: seconds")
    add_prove("--window", type=float, default=1.0, metavar="S", help="window of a limiter: seconds")
    promises = ["window", "bucket", "approximate"]
    add_prove("--promise", choices=promises, help="of a limiter (default: by the parameters that it names)")
    add_prove("--setup", type=Path, metavar="FILE", help="SQL that makes the tables that the candidate needs")
    add_prove("--runs", type=int, default=1, metavar="N", help="search so often, each time with another seed")
    add_prove("--html", type=Path, metavar="FILE", help="write the verdicts with pictures into this file")
    add_prove("--junit", type=Path, metavar="FILE", help="write a test report for a CI into this file")

    text = "whether a pattern pays off at your stage, and a simpler alternative"
    add_decide = command("decide", decide, text, "'rate limiting' --stage Growth --instances 4")
    add_decide("pattern", nargs="?", metavar="PATTERN", help="any part of its name; without one, all are shown")
    add_decide("--stage", required=True, metavar="STAGE", help=" | ".join(STAGES))
    add_decide("--instances", type=int, required=True, metavar="N", help="server processes that run at the same time")

    for add in (add_run, add_prove):
        add("--seed", type=int, default=7, metavar="N", help="the same seed repeats the same run")
    for add in (add_run, add_prove, add_decide):
        add("--json", action="store_true", help="one JSON document on stdout")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.call(options)
    except (Usage, NothingTested) as problem:
        print(f"distsys: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, Usage) else 3
    except KeyboardInterrupt:
        print("distsys: interrupted; everything it started has ended", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `distsys run --list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("distsys", ""):
            raise
        print(f"distsys: no {missing.name} here: run  pip install 'distsys[lab]'", file=sys.stderr)
        return 2
    return code
