"""Real servers for a lab: started on free ports in the lab's own folder, and ended with the lab.

Where a server comes from, in this order:
1. DISTSYS_REDIS_URL / DISTSYS_POSTGRES_URL: a server that runs already; the lab cannot kill or pause it
2. the programs in installed wheels, 3. those installed on this machine; DISTSYS_BACKEND=system tries 3 before 2
4. containers, only with DISTSYS_BACKEND=docker; DISTSYS_REDIS_IMAGE and DISTSYS_POSTGRES_IMAGE name the images
5. otherwise ServerUnavailable, which names the one command to run
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from distsys.lab.testbed import run_folder
from distsys.lab.testbed.binaries import NAMESPACE, NOBODY, Kind, Origin, ServerUnavailable, find, root_becomes
from distsys.lab.testbed.processes import Process, Processes

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["Server", "ServerUnavailable", "Servers"]

Argv = Callable[[str, Path, int], Awaitable[list[str]]]  # (program, home folder, port) -> command line

_REMEDY = "DISTSYS_BACKEND=system uses the one installed on this machine; it printed:"
_REDIS = shlex.split("--bind 127.0.0.1 --unixsocketperm 700 --save '' --appendonly no")
# A replica is ready in milliseconds: it does not wait for other replicas, and uses no disk.
_REDIS += shlex.split("--repl-diskless-sync yes --repl-diskless-sync-delay 0 --repl-diskless-load on-empty-db")
_POSTGRES = ["--listen_addresses=127.0.0.1", "--max_connections=100", "--shared_buffers=32MB", "--timezone=UTC"]
_POSTGRES += ["--jit=off", "--dynamic_shared_memory_type=mmap"]  # a file in the data folder, removed with it
_POSTGRES += ["--fsync=off", "--full_page_writes=off"]  # only a crash of the machine loses data by it
# sh -c _COPY_AND_START template data wal-folder-or-"" program...: neither event loop nor supervisor waits for the copy.
_COPY_AND_START = '''set -e
if ! test -d "$1"; then
    cp -R "$0" "$1.$$"
    if test -n "$2"; then mv "$1.$$/pg_wal" "$2"; ln -s "$2/pg_wal" "$1.$$/pg_wal"; fi
    mv "$1.$$" "$1"
fi
shift 2
exec "$@"'''
_IMAGES = {"redis": "redis:7", "postgres": "postgres:15"}


@dataclass(eq=False)
class Server:
    """A running server, and the faults that a lab can inject if it has started the server."""

    name: str
    kind: Kind
    url: str
    version: str  # "Valkey 9.1.2"
    origin: Origin
    host: str = "127.0.0.1"
    port: int = 0
    process: Process | None = None  # None: this lab did not start the server, and so can't kill or pause it
    _start: Callable[[], Awaitable[Process]] | None = field(default=None, init=False, repr=False)

    def __str__(self) -> str:
        return f"{self.version}, {self.origin}"

    @property
    def address(self) -> str:
        """Host and port: "127.0.0.1:6379"."""
        return f"{self.host}:{self.port}"

    async def kill(self) -> None:
        """Send SIGKILL to all processes of the server, as the kernel does when memory runs out. Idempotent."""
        process = self._require_ours("killed")
        if process.state == "exited":
            return
        await self.pause()  # otherwise it might fork after its children were listed
        parts = self._parts()
        await self._send(signal.SIGKILL, "killed", lambda: parts)
        await process.exited()

    async def pause(self) -> None:
        """Send SIGSTOP to all processes of the server: connections stay open, and data sent arrives after `resume`."""
        process = self._require_ours("paused")
        await self._send(signal.SIGSTOP, psutil.STATUS_STOPPED, self._parts)
        await process.stopped()

    async def resume(self) -> None:
        """Send SIGCONT to all processes of the server."""
        process = self._require_ours("resumed")
        for part in self._parts():
            run_folder.send(part, signal.SIGCONT)
        process.signal(signal.SIGCONT)
        await process.continued()

    async def restart(self) -> None:
        """Kill the server and start it on its port again: a Redis is empty then, a PostgreSQL has its data."""
        await self.kill()
        assert self._start is not None
        self.process = await self._start()

    def _require_ours(self, fault: str) -> Process:
        if self.process is None:
            message = f"{self.name} ({self}) was not started by this lab, so it can't be {fault}; for faults of servers"
            raise ServerUnavailable(f"{message} unset DISTSYS_REDIS_URL, DISTSYS_POSTGRES_URL and DISTSYS_BACKEND")
        return self.process

    def _parts(self) -> list[psutil.Process]:
        """Return the server and its children, which a signal to the process group of a PostgreSQL would not reach."""
        process = self._require_ours("found")
        try:
            return run_folder.tree([psutil.Process(process.pid)]) if process.state != "exited" else []
        except psutil.NoSuchProcess:
            return []

    async def _send(self, sig: int, state: str, parts: Callable[[], list[psutil.Process]]) -> None:
        """Send the signal to these processes until each has reached the state, or has ended."""

        async def reached() -> bool:
            rest = [part for part in parts() if run_folder.state(part) not in ("", state)]
            for part in rest:
                run_folder.send(part, sig)
            return not rest

        await poll(reached, f"{self.name} was not {state}", 10)


class Servers:
    """The servers of one lab by name. Each is started at the first request, and returned again at later ones."""

    def __init__(
        self, processes: Processes, *, redis_url: str = "", pg_dsn: str = "", backend: str | None = None
    ) -> None:
        self._processes = processes
        self.backend = os.environ.get("DISTSYS_BACKEND", "") if backend is None else backend
        if self.backend not in ("", "system", "docker"):
            raise ValueError(f"DISTSYS_BACKEND is '', 'system' or 'docker', not {self.backend!r}")
        given = {"redis": redis_url, "postgres": pg_dsn}
        self._urls = {kind: url or os.environ.get(f"DISTSYS_{kind.upper()}_URL", "") for kind, url in given.items()}
        self.running: dict[str, Server] = {}
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._containers: list[Any] = []

    async def redis(self, name: str = "redis", *, replica_of: Server | None = None, args: Sequence[str] = ()) -> Server:
        """Return an empty Redis or Valkey.

        name        "redis" is the one at the given URL, if there is one; any other is started beside it
        replica_of  its master; returned when the replica has caught up
        args        more options of the command line
        Raises ServerUnavailable.
        """
        master = () if replica_of is None else ("--replicaof", replica_of.host, str(replica_of.port))

        async def argv(program: str, home: Path, port: int) -> list[str]:
            own = ["--dir", str(home), "--unixsocket", str(home / "sock"), "--port", str(port)]
            return [program, *_REDIS, *own, *args, *master]

        url = "redis://127.0.0.1:{port}/0"
        server = await self.serve(name, "redis", url, argv, anywhere=not (args or master))
        if master:
            await linked(server)
        return server

    async def postgres(
        self, name: str = "postgres", *, fsync: bool = False, wal_folder: Path | None = None,
        before: Sequence[str] = (), args: Sequence[str] = (),
    ) -> Server:  # fmt: skip
        """Return a PostgreSQL with an empty database "postgres".

        name        "postgres" is the one at the given URL, if there is one; any other is started beside it
        fsync       commits wait for the disk; by default a crash of the machine may lose them
        wal_folder  where its write-ahead log is kept; by default with its data, in memory if there is room
        before      words of the command line before the program
        args        more options after it
        Raises ServerUnavailable.
        """

        async def argv(program: str, home: Path, port: int) -> list[str]:
            data = str(home / "data")
            copy = ["sh", "-c", _COPY_AND_START, str(await self._template()), data, str(wal_folder or "")]
            own = ["-D", data, "-p", str(port), f"--unix_socket_directories={home}"]
            return [*copy, *before, program, *own, *_POSTGRES, *args, *(["--fsync=on"] if fsync else [])]

        url, anywhere = "postgresql://postgres@127.0.0.1:{port}/postgres", not (fsync or wal_folder or before)
        return await self.serve(name, "postgres", url, argv, anywhere=anywhere)

    async def pgbouncer(self, postgres: Server, *, pool_mode: str = "transaction", pool_size: int = 20) -> Server:
        """Return a pgbouncer in front of a PostgreSQL. Raises ServerUnavailable if it is not installed."""
        target = urlsplit(postgres.url)
        user = target.username or "postgres"
        upstream = f"host={postgres.host} port={postgres.port} user={user}"
        upstream += f" password={target.password}" if target.password else ""

        async def argv(program: str, home: Path, port: int) -> list[str]:
            settings = {"listen_addr": "127.0.0.1", "listen_port": port, "auth_type": "any", "pool_mode": pool_mode}
            settings |= {"default_pool_size": pool_size, "unix_socket_dir": home}
            settings["ignore_startup_parameters"] = "extra_float_digits"
            lines = [f"[databases]\n* = {upstream}", "[pgbouncer]", *(f"{k} = {v}" for k, v in settings.items())]
            return [program, str(configure(home / "pgbouncer.ini", lines))]

        url = f"postgresql://{user}@127.0.0.1:{{port}}{target.path or '/postgres'}"
        return await self.serve(f"pgbouncer-{pool_mode}-{pool_size}", "pgbouncer", url, argv)

    async def promote(self, replica: Server) -> None:
        """Make a replica the master, with the writes that it has received so far: a failover."""
        async with _client(replica.url) as client:
            await client.replicaof("NO", "ONE")

    async def aclose(self) -> None:
        """End the containers. Servers that are processes end with the lab's Processes."""
        containers, self._containers = self._containers, []
        await asyncio.gather(*(asyncio.to_thread(c.stop) for c in containers))

    # ---- a server that this lab does not start as a process

    async def _elsewhere(self, kind: Kind, name: str) -> Server | None:
        """Return the server at a given URL, or one in a container; None if a process has to be started."""
        origin: Origin = "url"
        url, variable = self._urls[kind] if name == kind else "", f"DISTSYS_{kind.upper()}_URL"
        if not url and self.backend == "docker":
            url, origin, variable = await self._container(kind), "docker", "DISTSYS_BACKEND"
        if not url:
            return None
        where, usual = urlsplit(url), 6379 if kind == "redis" else 5432
        server = Server(name, kind, url, "", origin, where.hostname or "127.0.0.1", where.port or usual)
        try:
            server.version = await asyncio.wait_for(_ask_version(server), 10)
        except Exception as error:  # any error that a client can raise
            message = f"no {kind} answers at {server.address} ({error}); start it, or unset {variable}"
            raise ServerUnavailable(message) from error
        return server

    async def _container(self, kind: Kind) -> str:
        """Start a container and return its URL. The reaper of testcontainers ends it even if this process is killed."""
        image = os.environ.get(f"DISTSYS_{kind.upper()}_IMAGE", _IMAGES[kind])
        try:
            container = await asyncio.to_thread(_start_container, kind, image)
        except Exception as error:  # no testcontainers, no engine or no image: each library has errors of its own
            message = f"no container from {image}: start Docker or Podman, name another image, or unset DISTSYS_BACKEND"
            raise ServerUnavailable(f"{message}\n{error}") from error
        self._containers.append(container)
        host = container.get_container_host_ip().replace("localhost", "127.0.0.1")
        if kind == "postgres":
            return str(container.get_connection_url(host=host))
        return f"redis://{host}:{container.get_exposed_port(container.port)}/0"

    # ---- starting a process

    def home(self, name: str) -> Path:
        """Return the folder of a server, with its socket and its data."""
        home = self._processes.folder / name
        home.mkdir(mode=0o700, exist_ok=True)
        if root_becomes() == "nobody":
            os.chown(home, NOBODY, NOBODY)
            self._processes.folder.chmod(0o711)  # so that the user nobody can reach its subfolders
        return home

    async def _template(self) -> Path:
        """Return an initialised data folder to copy. It is made once per version; several labs may make it at once."""
        program, version, _ = find("postgres", self.backend)
        caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        caches = Path(os.environ.get("XDG_CACHE_HOME") or caches) / "distsys"
        cached = caches / re.sub(r"[^\w.]+", "-", f"{version} {platform.machine()}".lower())
        if cached.is_dir() and cached.stat().st_uid == os.geteuid() and root_becomes() != "nobody":
            return cached  # the user of the server can read it
        async with self._starting["initdb"]:
            data = self.home("initdb") / "data"
            if not data.is_dir():
                # Another folder for each try, because initdb may run on for a moment if this is cancelled.
                part = data.with_name(secrets.token_hex(4))
                argv = [str(program.with_name("initdb")), "-D", str(part), "--locale=C", "--encoding=UTF8", "--no-sync"]
                argv += ["--username=postgres", "--auth=trust"]
                process = await self._launch("initdb", "postgres", argv)
                if await process.exited(60):
                    raise ServerUnavailable(f"{version} could not make its data folder; {_REMEDY}\n{process.tail()}")
                part.rename(data)
                if root_becomes() != "nobody":
                    await asyncio.to_thread(_keep, data, cached)
            return data

    async def _launch(self, name: str, kind: Kind, argv: list[str]) -> Process:
        identity = "" if kind == "redis" else root_becomes()
        argv = [*NAMESPACE, *argv] if identity == "namespace" else argv
        uid = NOBODY if identity == "nobody" else None
        return await self._processes.launch(argv, name=name, env={"LC_ALL": "C"}, uid=uid)

    async def serve(self, name: str, kind: Kind, url: str, argv: Argv, *, anywhere: bool = False) -> Server:
        """Return the server of this name, started if it does not run yet.

        url       with "{port}" for its port
        anywhere  the server at a given URL, or one in a container, will do
        """
        async with self._starting[name]:
            if name not in self.running:
                elsewhere = await self._elsewhere(kind, name) if anywhere else None
                self.running[name] = elsewhere or await self._serve(name, kind, url, argv)
            return self.running[name]

    async def _serve(self, name: str, kind: Kind, url: str, argv: Argv) -> Server:
        """Start a server on a free port, or on another one if that was taken meanwhile. A restart keeps the port."""
        program, version, origin = find(kind, self.backend)
        server, home = Server(name, kind, url, version, origin), self.home(name)

        async def start() -> Process:
            printed = ""
            for _ in range(5):
                port = server.port or free_port()
                process = await self._launch(name, kind, await argv(str(program), home, port))
                try:
                    await poll(partial(_is_ready, kind, home, port, process), f"{process!r} was not ready")
                except BaseException as error:  # cancelled or never ready: end it, so that it can be started again
                    printed = process.tail()
                    await process.end(signal.SIGQUIT if kind == "postgres" else signal.SIGKILL)
                    if isinstance(error, ServerUnavailable):
                        raise ServerUnavailable(f"{error}; {_REMEDY}\n{printed}") from None
                    raise
                if process.state != "exited":
                    server.port = port
                    return process
                printed = process.tail()
                if "ddress already in use" not in printed:
                    break
            raise ServerUnavailable(f"{name} ({server}) did not start; {_REMEDY}\n{printed}")

        server.process = await start()
        server._start = start
        server.url = url.replace("{port}", str(server.port))
        return server


async def _is_ready(kind: Kind, home: Path, port: int, process: Process) -> bool:
    """Return True if a server can be used, or has exited. Its TCP port may belong to another server: ask its socket."""
    if process.state == "exited":
        return True
    if kind == "postgres":  # its socket answers before it is ready
        started = [lines for lines in run_folder.postmasters(home.parent) if lines[0] == str(process.pid)]
        return any(word.strip() == "ready" for lines in started for word in lines[7:8])
    try:
        _, writer = await asyncio.open_unix_connection(home / (f".s.PGSQL.{port}" if kind == "pgbouncer" else "sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    writer.close()
    return True


async def poll(done: Callable[[], Awaitable[bool]], failure: str, seconds: float = 30) -> None:
    """Wait until `done()` is true. Raises ServerUnavailable with the text of `failure` after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                if await done():
                    return
                await asyncio.sleep(0.003)
    except TimeoutError:
        raise ServerUnavailable(f"{failure} (waited {seconds} s)") from None


def free_port() -> int:
    """Return a port below the range of outgoing connections, so that it is still free at a restart."""
    # `random` would not do: a notebook may have seeded it.
    ports = (20000 + secrets.randbelow(12000) for _ in range(100))
    if port := next(filter(is_free, ports), None):
        return port
    raise ServerUnavailable("no free port between 20000 and 32000 on 127.0.0.1: end what listens there")


def is_free(port: int) -> bool:
    """Return True if a server could listen on this port of 127.0.0.1."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def configure(config: Path, lines: list[str]) -> Path:
    """Write a configuration file, and return its path."""
    config.write_text("\n".join(lines) + "\n")
    config.chmod(0o644)  # the server may run as nobody; the folder is closed to all others
    return config


def _keep(data: Path, cached: Path) -> None:
    """Copy a fresh data folder into the cache, all of it or nothing."""
    with suppress(OSError):  # read-only, full, or another lab was faster: this lab uses its own
        cached.parent.mkdir(parents=True, exist_ok=True)
        for old in cached.parent.glob("part-*"):
            if time.time() - old.stat().st_mtime > 3600:  # left by a lab that was killed
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="part-", dir=cached.parent) as part:
            shutil.copytree(data, Path(part) / "data").rename(cached)


def _client(url: str) -> redis.asyncio.Redis:
    import redis.asyncio  # takes 0.5 s, so it is imported while a server starts
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    return redis.asyncio.Redis.from_url(url, decode_responses=True, retry=Retry(NoBackoff(), 0))


async def linked(replica: Server) -> None:
    """Wait until a replica has caught up with its master."""
    async with _client(replica.url) as client:

        async def up() -> bool:
            return bool((await client.info("replication")).get("master_link_status") == "up")

        await poll(up, f"{replica.name} ({replica}) did not catch up with its master")


def _start_container(kind: Kind, image: str) -> Any:
    if kind == "redis":
        from testcontainers.community.redis import RedisContainer

        return RedisContainer(image).start()
    from testcontainers.community.postgres import PostgresContainer

    return PostgresContainer(image, username="postgres", dbname="postgres", driver=None).start()


async def _ask_version(server: Server) -> str:
    if server.kind == "redis":
        async with _client(server.url) as client:
            info = await client.info("server")
        return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    import psycopg

    async with await psycopg.AsyncConnection.connect(server.url, connect_timeout=5) as connection:
        server.host, server.port = connection.info.host, connection.info.port  # a DSN need not be a URL
        major, minor = divmod(connection.info.server_version, 10000)
    return f"PostgreSQL {major}.{minor}"
