"""Real servers for a lab: found on this machine, started on free ports in the lab's own folder, and gone with the lab.

Where they come from, in this order:
1. DISTSYS_REDIS_URL / DISTSYS_POSTGRES_URL: a server that runs already, which the lab can't kill or pause
2. the programs inside installed wheels, 3. those of this machine; DISTSYS_BACKEND=system turns these two round
4. containers, only with DISTSYS_BACKEND=docker; DISTSYS_REDIS_IMAGE and DISTSYS_POSTGRES_IMAGE name their images
5. else ServerUnavailable, which names the one command to run.
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
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
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

Argv = Callable[[str, Path, int], Awaitable[list[str]]]  # of a program, its server's folder and port: the start line

_OTHER = "DISTSYS_BACKEND=system takes the one installed on this machine; it said:"
_REDIS = shlex.split("--bind 127.0.0.1 --unixsocketperm 700 --save '' --appendonly no")
# A replica is ready in milliseconds: no wait for others to join, and no disk on either side.
_REDIS += shlex.split("--repl-diskless-sync yes --repl-diskless-sync-delay 0 --repl-diskless-load on-empty-db")
_POSTGRES = ["--listen_addresses=127.0.0.1", "--max_connections=100", "--shared_buffers=32MB", "--timezone=UTC"]
_POSTGRES += ["--jit=off", "--dynamic_shared_memory_type=mmap"]  # a file in the data folder: it goes with it
_POSTGRES += ["--fsync=off", "--full_page_writes=off"]  # a killed server loses nothing by it, only a crashed machine
# One launch copies and starts, so that neither the event loop nor the supervisor waits for the copy.
_COPY_AND_START = 'set -e; if ! test -d "$1"; then cp -R "$0" "$1.$$"; mv "$1.$$" "$1"; fi; shift; exec "$@"'
_IMAGES = {"redis": "redis:7", "postgres": "postgres:15"}


@dataclass(eq=False)
class Server:
    name: str
    kind: Kind
    url: str
    version: str  # "Valkey 9.1.2"
    origin: Origin
    host: str = "127.0.0.1"
    port: int = 0
    process: Process | None = None
    _start: Callable[[], Awaitable[Process]] | None = field(default=None, init=False, repr=False)

    def __str__(self) -> str:
        return f"{self.version}, {self.origin}"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def controllable(self) -> bool:
        """Whether this lab started its process, and so can kill, pause and restart it."""
        return self._start is not None

    async def kill(self) -> None:
        """SIGKILL to the server and all its processes, as when the machine's memory runs out. Idempotent."""
        process = self._mine("killed")
        if process.state == "exited":
            return
        await self.pause()  # or it might fork once more between the look at its children and their end
        parts = self._parts()
        await self._send(signal.SIGKILL, "gone", lambda: parts)
        await process.exited()

    async def pause(self) -> None:
        """SIGSTOP to the server and all its processes: connections stay open and silent, what is sent arrives later."""
        process = self._mine("paused")
        await self._send(signal.SIGSTOP, psutil.STATUS_STOPPED, self._parts)
        await process.stopped()

    async def resume(self) -> None:
        process = self._mine("resumed")
        for part in self._parts():
            run_folder.send(part, signal.SIGCONT)
        process.signal(signal.SIGCONT)
        await process.continued()

    async def restart(self) -> None:
        """Killed if it still runs, then started on its port again: a Redis empty, a Postgres with its data."""
        await self.kill()
        assert self._start is not None
        self.process = await self._start()

    def _mine(self, fault: str) -> Process:
        if self.process is None:
            message = f"{self.name} ({self}) was not started by this lab, so it can't be {fault}; for faults of servers"
            raise ServerUnavailable(f"{message} unset DISTSYS_REDIS_URL, DISTSYS_POSTGRES_URL and DISTSYS_BACKEND")
        return self.process

    def _parts(self) -> list[psutil.Process]:
        """The server and its children, which in Postgres are sessions of their own: no group signal reaches them."""
        process = self._mine("found")
        try:
            return run_folder.tree([psutil.Process(process.pid)]) if process.state != "exited" else []
        except psutil.NoSuchProcess:
            return []

    async def _send(self, sig: int, state: str, parts: Callable[[], list[psutil.Process]]) -> None:
        """To each of these processes, until all are in that state, or gone."""
        for _ in range(1000):
            if not (rest := [part for part in parts() if run_folder.state(part) not in ("", state)]):
                return
            for part in rest:
                run_folder.send(part, sig)
            await asyncio.sleep(0.002)
        raise TimeoutError(f"{self.name} was not {state} after a thousand looks")


class Servers:
    """The servers of one lab: each is started when first asked for, and handed out again when asked for by its name."""

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
        """A Redis or Valkey with nothing in it. A given URL is the one named "redis"; others are started beside it."""
        master = () if replica_of is None else ("--replicaof", replica_of.host, str(replica_of.port))

        async def argv(program: str, home: Path, port: int) -> list[str]:
            own = ["--dir", str(home), "--unixsocket", str(home / "sock"), "--port", str(port)]
            return [program, *_REDIS, *own, *args, *master]

        anywhere = not (args or master)
        server = await self.serve(name, "redis", "redis://127.0.0.1:{port}/0", argv, anywhere=anywhere)
        if master:
            await _info(server, "replication", {"master_link_status": "up"})
        return server

    async def postgres(self, name: str = "postgres") -> Server:
        """A PostgreSQL with an empty database "postgres". A given URL is the one named "postgres"."""

        async def argv(program: str, home: Path, port: int) -> list[str]:
            data = str(home / "data")
            copy = ["sh", "-c", _COPY_AND_START, str(await self._template()), data]
            return [*copy, program, "-D", data, "-p", str(port), f"--unix_socket_directories={home}", *_POSTGRES]

        return await self.serve(
            name, "postgres", "postgresql://postgres@127.0.0.1:{port}/postgres", argv, anywhere=True
        )

    async def pgbouncer(self, postgres: Server, *, pool_mode: str = "transaction", pool_size: int = 20) -> Server:
        """A connection pooler in front of a PostgreSQL; ServerUnavailable when pgbouncer is not installed."""
        target = urlsplit(postgres.url)
        user = target.username or "postgres"
        upstream = f"host={postgres.host} port={postgres.port} user={user}"
        upstream += f" password={target.password}" if target.password else ""

        async def argv(program: str, home: Path, port: int) -> list[str]:
            settings = {"listen_addr": "127.0.0.1", "listen_port": port, "auth_type": "any", "pool_mode": pool_mode}
            settings |= {"default_pool_size": pool_size, "unix_socket_dir": home}
            settings |= {"ignore_startup_parameters": "extra_float_digits"}
            lines = [f"[databases]\n* = {upstream}", "[pgbouncer]", *(f"{k} = {v}" for k, v in settings.items())]
            return [program, str(configure(home / "pgbouncer.ini", lines))]

        url = f"postgresql://{user}@127.0.0.1:{{port}}{target.path or '/postgres'}"
        return await self.serve(f"pgbouncer-{pool_mode}-{pool_size}", "pgbouncer", url, argv)

    async def promote(self, replica: Server) -> None:
        """Makes a replica a master, with what it has received so far: a failover."""
        async with _client(replica.url) as client:
            await client.replicaof("NO", "ONE")

    async def cluster(self, masters: int = 3, *, replicas: int = 0, name: str = "cluster") -> list[Server]:
        """A Redis Cluster of so many masters, formed through the client alone (2-3 s), then `replicas` of each."""
        if masters < 3:
            raise ValueError(f"a cluster has at least 3 masters, not {masters}")
        size = masters * (1 + replicas)
        bus = [free_port() for _ in range(size)]
        args = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port"]
        servers = await asyncio.gather(*(self.redis(f"{name}{i}", args=[*args, str(bus[i])]) for i in range(size)))
        async with AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(_client(server.url)) for server in servers]
            for i, node in enumerate(nodes):
                await _command(node, "CLUSTER SET-CONFIG-EPOCH", i + 1)
                if i < masters:
                    slots = 16384 * i // masters, 16384 * (i + 1) // masters - 1
                    await _command(node, "CLUSTER ADDSLOTSRANGE", *slots)
                if i:
                    await _command(node, "CLUSTER MEET", "127.0.0.1", servers[0].port, bus[0])
            for server in servers:
                await _info(server, "cluster", {"cluster_state": "ok", "cluster_known_nodes": str(size)})
            for i in range(masters, size):
                await _command(nodes[i], "CLUSTER REPLICATE", await _command(nodes[i % masters], "CLUSTER MYID"))
                await _info(servers[i], "replication", {"master_link_status": "up"})
        return servers

    async def aclose(self) -> None:
        """Ends the containers; servers that are processes end with the lab's Processes."""
        containers, self._containers = self._containers, []
        await asyncio.gather(*(asyncio.to_thread(c.stop) for c in containers))

    # ---- one of no process of ours

    async def _elsewhere(self, kind: Kind, name: str) -> Server | None:
        """One that is no process of this lab: a server that runs already, somewhere, or a container."""
        origin: Origin = "url"
        url, variable = self._urls[kind] if name == kind else "", f"DISTSYS_{kind.upper()}_URL"
        if not url and self.backend == "docker":
            url, origin, variable = await self._container(kind), "docker", "DISTSYS_BACKEND"
        if not url:
            return None
        where = urlsplit(url)
        host, port = where.hostname or "127.0.0.1", where.port or (6379 if kind == "redis" else 5432)
        server = Server(name, kind, url, "", origin, host, port)
        try:
            server.version = await asyncio.wait_for(_ask_version(server), 10)
        except Exception as error:  # whatever a client can meet at an address it was given
            message = f"no {kind} answers at {server.address} ({error}); start it, or unset {variable}"
            raise ServerUnavailable(message) from error
        return server

    async def _container(self, kind: Kind) -> str:
        """The URL of a new one, which testcontainers' reaper ends even when this process is killed."""
        image = os.environ.get(f"DISTSYS_{kind.upper()}_IMAGE", _IMAGES[kind])
        try:
            container = await asyncio.to_thread(_start_container, kind, image)
        except Exception as error:  # no testcontainers, no engine, no image: each with an error of its own library
            message = f"no container from {image}: start Docker or Podman, name another image, or unset DISTSYS_BACKEND"
            raise ServerUnavailable(f"{message}\n{error}") from error
        self._containers.append(container)
        host = container.get_container_host_ip().replace("localhost", "127.0.0.1")
        if kind == "postgres":
            return str(container.get_connection_url(host=host))
        return f"redis://{host}:{container.get_exposed_port(container.port)}/0"

    # ---- starting a process

    def home(self, name: str) -> Path:
        """A server's own folder: its socket and its data."""
        home = self._processes.folder / name
        home.mkdir(mode=0o700, exist_ok=True)
        if root_becomes() == "nobody":
            os.chown(home, NOBODY, NOBODY)
            self._processes.folder.chmod(0o711)  # enough to pass through
        return home

    async def _template(self) -> Path:
        """A data folder to copy, made once per version; two labs may make it at once, and the first one's stays."""
        program, version, _ = find("postgres", self.backend)
        caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        caches = Path(os.environ.get("XDG_CACHE_HOME") or caches) / "distsys"
        cached = caches / re.sub(r"[^\w.]+", "-", f"{version} {platform.machine()}".lower())
        if cached.is_dir() and cached.stat().st_uid == os.geteuid() and root_becomes() != "nobody":
            return cached  # readable for the server that is to copy it
        async with self._starting["initdb"]:
            data = self.home("initdb") / "data"
            if not data.is_dir():
                part = data.with_name(secrets.token_hex(4))  # made elsewhere: cancelled, it may go on for a moment
                argv = [str(program.with_name("initdb")), "-D", str(part), "--locale=C", "--encoding=UTF8", "--no-sync"]
                argv += ["--username=postgres", "--auth=trust"]
                process = await self._launch("initdb", "postgres", argv)
                if await process.exited(60):
                    raise ServerUnavailable(f"{version} could not make its data folder; {_OTHER}\n{process.tail()}")
                part.rename(data)
                if root_becomes() != "nobody":
                    await asyncio.to_thread(_keep, data, cached)
            return data

    async def _launch(self, name: str, kind: Kind, argv: list[str]) -> Process:
        how = "" if kind == "redis" else root_becomes()
        argv = [*NAMESPACE, *argv] if how == "namespace" else argv
        uid = NOBODY if how == "nobody" else None
        return await self._processes.launch(argv, name=name, env={"LC_ALL": "C"}, uid=uid)

    async def serve(self, name: str, kind: Kind, url: str, argv: Argv, *, anywhere: bool = False) -> Server:
        """The server of this name, started if it is not there yet; `anywhere` means that one elsewhere will do."""
        async with self._starting[name]:
            if name not in self.running:
                elsewhere = await self._elsewhere(kind, name) if anywhere else None
                self.running[name] = elsewhere or await self._serve(name, kind, url, argv)
            return self.running[name]

    async def _serve(self, name: str, kind: Kind, url: str, argv: Argv) -> Server:
        """Starts it on a free port, or on another one when that was taken meanwhile; from then on it keeps its port."""
        program, version, origin = find(kind, self.backend)
        server, home = Server(name, kind, url, version, origin), self.home(name)

        async def start() -> Process:
            said = ""
            for _ in range(5):
                port = server.port or free_port()
                process = await self._launch(name, kind, await argv(str(program), home, port))
                try:
                    async with asyncio.timeout(30):
                        while process.state != "exited":
                            if await _is_ready(kind, home, port, process):
                                server.port = port
                                return process
                            await asyncio.sleep(0.003)
                except BaseException as error:  # cancelled, or never ready: the next start finds the place free
                    words = f"{process!r} was not ready within 30 s; {_OTHER}\n{process.tail()}"
                    await process.end(signal.SIGQUIT if kind == "postgres" else signal.SIGKILL)
                    if isinstance(error, TimeoutError):
                        raise ServerUnavailable(words) from None
                    raise
                said = process.tail()
                if "ddress already in use" not in said:
                    break
            raise ServerUnavailable(f"{name} ({server}) did not start; {_OTHER}\n{said}")

        server.process = await start()
        server._start = start
        server.url = url.replace("{port}", str(server.port))
        return server


async def _is_ready(kind: Kind, home: Path, port: int, process: Process) -> bool:
    """By its unix socket, in our own folder: behind a TCP port there might be a stranger."""
    if kind == "postgres":  # which answers before it is ready
        started = [lines for lines in run_folder.postmasters(home.parent) if lines[0] == str(process.pid)]
        return any(word.strip() == "ready" for lines in started for word in lines[7:8])
    try:
        _, writer = await asyncio.open_unix_connection(home / (f".s.PGSQL.{port}" if kind == "pgbouncer" else "sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    writer.close()
    return True


def free_port() -> int:
    """From below the range systems take outgoing connections' ports from, so that a restart finds it free again."""
    # Not from `random`, which a notebook may have seeded.
    ports = (20000 + secrets.randbelow(12000) for _ in range(100))
    if port := next(filter(is_free, ports), None):
        return port
    raise ServerUnavailable("no free port between 20000 and 32000 on 127.0.0.1: end what listens there")


def is_free(port: int) -> bool:
    """Whether a server could listen there, on 127.0.0.1."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def configure(config: Path, lines: list[str]) -> Path:
    config.write_text("\n".join(lines) + "\n")
    config.chmod(0o644)  # the server may run as nobody; the folder keeps all others out
    return config


def _keep(data: Path, cached: Path) -> None:
    """Copies a fresh data folder into the cache, where under its name it is complete or not there."""
    with suppress(OSError):  # read-only, full, or another lab was faster: this one has its own
        cached.parent.mkdir(parents=True, exist_ok=True)
        for old in cached.parent.glob("part-*"):
            if time.time() - old.stat().st_mtime > 3600:  # whoever was copying it was killed
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="part-", dir=cached.parent) as part:
            shutil.copytree(data, Path(part) / "data").rename(cached)


def _client(url: str) -> redis.asyncio.Redis:
    import redis.asyncio  # takes 0.5 s: not before a server is on its way
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    return redis.asyncio.Redis.from_url(url, decode_responses=True, retry=Retry(NoBackoff(), 0))


async def _command(client: redis.asyncio.Redis, *words: str | int) -> Any:
    return await client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's own gap


async def _info(server: Server, section: str, wanted: dict[str, str]) -> None:
    """Waits until a Redis says these words of itself."""
    words: Any = None
    async with _client(server.url) as client:
        for _ in range(1500):
            words = await (_command(client, "CLUSTER INFO") if section == "cluster" else client.info(section))
            if wanted.items() <= words.items():
                return
            await asyncio.sleep(0.01)
    raise ServerUnavailable(f"{server.name} ({server}) was not ready within 15 s: {words}")


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
