"""distsys lab | run | prove | decide.

Exit codes: 0 as expected, 1 a verdict is not as expected, 2 usage or something missing, 130 interrupted.
What a command started ends with it, Ctrl-C and kill -9 included: the lab's supervisor sees to that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distsys import __version__
from distsys.decide import PATTERNS, RULE_OF_THUMB, STAGES, recommend

ABOUT = """\
Sixteen rules for distributed systems, each shown breaking and holding on real Redis and PostgreSQL.

  distsys lab                                  open the notebooks in JupyterLab
  distsys run --list                           the experiments and their claims
  distsys run slow-holder --runs 20            run one; every arm gets a verdict: HELD, VIOLATED or INCONCLUSIVE
  distsys prove mypkg.locks:MyLock --as lock   put your own lock under the same faults and the same checker
  distsys decide locks --stage MVP --instances 3

Servers are started for you and end with the command. To use your own, set DISTSYS_REDIS_URL and DISTSYS_POSTGRES_URL.
"""
CODES = "exit codes: 0 as expected · 1 a verdict is not as expected · 2 usage or something missing · 130 interrupted"


class Usage(Exception):
    """What the caller can do about it, in one line: the whole answer of the program."""


def parser() -> argparse.ArgumentParser:
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

    add = command("lab", _lab, "open the notebooks in JupyterLab, on this machine only", "--port 8889")
    add("notebook", nargs="?", default="00_start_here", help="which one to open (default: %(default)s)")
    add("--port", type=int, help="exactly this port (default: 8888, or the next free one)")
    add("--no-browser", action="store_true", help="print the address instead of opening it")

    run = command("run", _run, "run experiments and print a verdict per arm", "slow-holder --runs 20 --seed 7")
    run("experiments", nargs="*", metavar="EXPERIMENT", help="names; none lists them")
    run("--list", action="store_true", help="list names and claims, run nothing")
    run("--story", action="store_true", help="tell what happened in the run that decided")
    run("--runs", type=int, default=3, metavar="N", help="runs of each arm (default: %(default)s)")

    text = "put your own class under the lab's faults, level by level, until one breaks it"
    prove = command("prove", _prove, text, "mypkg.locks:MyLock --as lock")
    prove("candidate", metavar="MODULE:NAME", help="importable from the current folder")
    kinds = ["lock", "limiter", "breaker", "retry", "endpoint"]
    prove("--as", dest="kind", choices=kinds, required=True, help="what it promises to be")
    prove("--level", type=int, metavar="N", help="stop after level N (default: all)")
    ttl = "of a lock, seconds: what it is given or has built in (default: %(default)s)"
    prove("--ttl", type=float, default=0.3, metavar="S", help=ttl)

    text = "whether a pattern pays at your stage, and what is simpler"
    decide = command("decide", _decide, text, "'rate limiting' --stage Growth --instances 4")
    decide("pattern", nargs="?", metavar="PATTERN", help="any part of its name; none shows them all")
    decide("--stage", required=True, metavar="STAGE", help=" | ".join(STAGES))
    decide("--instances", type=int, required=True, metavar="N", help="server processes that run at the same time")

    for add in (run, prove):
        add("--seed", type=int, default=7, metavar="N", help="the same seed replays the same run")
    for add in (run, prove, decide):
        add("--json", action="store_true", help="one JSON document on stdout")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command answered, as an exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.call(options)
    except Usage as problem:
        print(f"distsys: {problem}", file=sys.stderr)
        return 2
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


def _decide(options: argparse.Namespace) -> int:
    names = [options.pattern] if options.pattern else [p.name for p in PATTERNS]
    try:
        answers = [recommend(name, options.stage, options.instances) for name in names]
    except ValueError as problem:
        raise Usage(str(problem)) from None
    if options.json:
        ours = [{"pattern": a.pattern.name, "ours": a.pattern.ours, "links": dict(a.links)} for a in answers]
        _print_json([vars(a) | facts for a, facts in zip(answers, ours, strict=True)])
    elif options.pattern:
        print(answers[0])
    else:
        for a in answers:
            print(f"{a.verdict:<15} {a.pattern.name + (' (ours)' if a.pattern.ours else ''):<25} {a.alternative}")
        print(f"\n{RULE_OF_THUMB}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from distsys.lab import experiments

    known = experiments.every()
    if options.list or not options.experiments:
        for experiment in known.values():
            print(f"{experiment.name:<30} {experiment.claim}")
        return 0
    if options.runs < 1:
        raise Usage(f"--runs {options.runs}: at least 1")
    if unknown := [name for name in options.experiments if name not in known]:
        raise Usage(f"no experiment {unknown[0]!r}: run  distsys run --list")
    return asyncio.run(_verdicts(options, [known[name] for name in options.experiments]))


async def _verdicts(options: argparse.Namespace, chosen: list[Any]) -> int:
    from distsys.lab.verdict import Verdicts

    found, say = Verdicts(), (lambda *_, **__: None) if options.json else print
    async with await _open(options.seed) as lab:
        for experiment in chosen:
            say(f"{experiment.name}: {experiment.claim}", flush=True)
            for verdict in await lab.run(experiment, runs=options.runs):
                found.append(verdict)
                say("\n      ".join([f"  {verdict}", *(verdict.story() if options.story else ())]), flush=True)
    wrong = [verdict for verdict in found if verdict.was_run and not verdict.as_expected]
    say(f"{len(found) - len(wrong)} of {len(found)} verdicts as expected")
    if options.json:
        _print_json(found.to_dict())
    return 1 if wrong else 0


async def _open(seed: int) -> Any:
    from distsys.lab.servers import ServerUnavailable
    from distsys.lab.session import Lab

    try:
        return await Lab.open(seed=seed)
    except ServerUnavailable as missing:
        raise Usage(str(missing)) from missing


def _prove(options: argparse.Namespace) -> int:
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
    async with await _open(options.seed) as lab:
        try:
            ttl = {"ttl": options.ttl} if options.kind == "lock" else {}
            ladder = await getattr(lab, f"try_{options.kind}")(candidate, upto=options.level, **ttl)
        except ValueError as problem:
            raise Usage(str(problem)) from None
    if options.json:
        _print_json(ladder.to_dict())
    else:
        print(ladder)
    return 0 if ladder.passed else 1


def _lab(options: argparse.Namespace) -> int:
    import_module("jupyterlab")
    from jupyter_core.paths import jupyter_runtime_dir

    from distsys.lab.servers import is_free

    roots = (Path.cwd(), Path(__file__).parents[1])
    root = next((path for path in roots if (path / "notebooks/00_start_here.ipynb").exists()), None)
    if root is None:
        raise Usage("no notebooks here: run it in the project's folder")
    path = root / "notebooks" / f"{options.notebook.removesuffix('.ipynb')}.ipynb"
    if not path.exists():
        raise Usage(f"no {path.name}: there are {', '.join(p.stem for p in sorted(path.parent.glob('[0-9]*.ipynb')))}")
    if options.port and not is_free(options.port):
        other = next((p for p in range(options.port + 1, options.port + 100) if is_free(p)), 0)
        raise Usage(f"port {options.port} is taken: run  PORT={other} make lab  or  distsys lab --port {other}")
    try:
        Path(jupyter_runtime_dir()).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Usage(f"Jupyter cannot write to {problem.filename}: say  HOME=/a/folder/of/yours make lab") from problem
    if not os.access(path.parent, os.W_OK):
        print(f"distsys: {path.parent} is read-only: to keep your changes, copy the project's folder", file=sys.stderr)
    print("JupyterLab starts in a few seconds; Ctrl-C here stops it and all it started", flush=True)
    settings = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": str(root),
        "LabApp.default_url": f"/lab/tree/notebooks/{path.name}",
        "ServerApp.open_browser": not options.no_browser,
        "ServerApp.allow_root": not os.geteuid(),
        "ServerApp.answer_yes": True,  # Ctrl-C means it
        "Application.log_level": "WARN",
    }
    if options.port:
        settings |= {"ServerApp.port": options.port, "ServerApp.port_retries": 0}
    arguments = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in settings.items())]
    quiet = Path(__file__).parent / "lab/jupyter"  # no news, and checklists open as pages
    config = os.pathsep.join(filter(None, (os.environ.get("JUPYTER_CONFIG_PATH"), str(quiet))))
    os.execve(sys.executable, arguments, {**os.environ, "JUPYTER_CONFIG_PATH": config})  # Ctrl-C goes to the server


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
