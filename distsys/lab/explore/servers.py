"""Servers whose clock is a number: a real Valkey and PostgreSQL that read the time of day from a shared page."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from distsys.lab.explore.worlds import EPOCH
from distsys.lab.testbed.servers import Server, Servers, ServerUnavailable


@dataclass(frozen=True)
class Sockets:
    """Where the explorer finds its servers: those in virtual time, and those unmodified."""

    virtual: str
    virtual_dsn: str
    page: str
    real: str
    real_dsn: str
    version: str


class VirtualClock:
    """The page that the virtual server reads its time from."""

    def __init__(self, page: str) -> None:
        with Path(page).open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    def set(self, now: float) -> None:
        """Set the server's time of day: `now` seconds after the start of the run."""
        self._page[:8] = struct.pack("<q", int((EPOCH + now) * 1e6))


async def start_servers(servers: Servers, *, postgres: bool = False) -> Sockets:
    """Start the servers, once per lab. Raises ServerUnavailable where a virtual clock can't be had."""
    library = await asyncio.to_thread(_clock_library)
    page = servers.home("explored") / "clock"
    if not page.exists():
        page.write_bytes(struct.pack("<q", int(EPOCH * 1e6)))
        page.chmod(0o644)  # PostgreSQL may run as another user
    patched = ["env", f"LD_PRELOAD={library}", f"DISTSYS_VIRTUAL_CLOCK={page}"]

    async def start(name: str, before: list[str]) -> tuple[Server, str]:
        path = servers.home(name) / "sock"

        async def argv(program: str, home: Path, port: int) -> list[str]:
            own = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path), "--unixsocketperm", "700"]
            return [*before, program, *own, "--save", "", "--dir", str(home)]

        return await servers.serve(name, "redis", "redis://127.0.0.1:{port}/0", argv), str(path)

    _, virtual = await start("explored", patched)
    server, real = await start("confirming", [])
    if not postgres:
        return Sockets(virtual, "", str(page), real, "", server.version)
    one = await servers.postgres("explored-pg", before=patched, args=["--autovacuum=off", "--deadlock_timeout=2ms"])
    other = await servers.postgres("confirming-pg")
    return Sockets(virtual, one.url, str(page), real, other.url, f"{server.version} and {other.version}")


def _clock_library() -> Path:
    """Return the preloaded library, compiled on first use into the user's cache."""
    if sys.platform != "linux":
        raise ServerUnavailable("exploring needs Linux: it preloads a clock into the server")
    source = files(__package__).joinpath("virtual_clock.c").read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distsys"
    library = folder / f"virtual-clock-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise ServerUnavailable("exploring compiles 20 lines of C: install a compiler, on Debian  apt install gcc")
        folder.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(part)]
        done = subprocess.run(command, input=source, capture_output=True, check=False)
        if done.returncode:
            raise ServerUnavailable(f"{compiler} could not compile the clock: {done.stderr.decode()[-300:]}")
        part.rename(library)
    return library
