"""`distsys lab`: open the notebooks in JupyterLab, on this machine only."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from distsys.cli.common import Usage


def lab(options: argparse.Namespace) -> int:
    """Replace this process by a JupyterLab on the notebooks of this folder, or of the project."""
    import_module("jupyterlab")
    from jupyter_core.paths import jupyter_runtime_dir

    from distsys.lab.testbed.servers import is_free

    roots = (Path.cwd(), Path(__file__).parents[2])
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
        raise Usage(f"Jupyter cannot write to {problem.filename}: run  HOME=/a/folder/of/yours make lab") from problem
    if not os.access(path.parent, os.W_OK):
        print(f"distsys: {path.parent} is read-only: to keep your changes, copy the project's folder", file=sys.stderr)
    print("JupyterLab starts in a few seconds. Ctrl-C here stops it and everything it started.", flush=True)
    settings = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": str(root),
        "LabApp.default_url": f"/lab/tree/notebooks/{path.name}",
        "ServerApp.open_browser": not options.no_browser,
        "ServerApp.allow_root": not os.geteuid(),
        "ServerApp.answer_yes": True,  # Ctrl-C stops without a question
        "Application.log_level": "WARN",
    }
    if options.port:
        settings |= {"ServerApp.port": options.port, "ServerApp.port_retries": 0}
    arguments = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in settings.items())]
    quiet = Path(__file__).parent / "jupyter"  # settings: no news, and Markdown files open as pages
    config = os.pathsep.join(filter(None, (os.environ.get("JUPYTER_CONFIG_PATH"), str(quiet))))
    os.execve(sys.executable, arguments, {**os.environ, "JUPYTER_CONFIG_PATH": config})  # Ctrl-C goes to the server
