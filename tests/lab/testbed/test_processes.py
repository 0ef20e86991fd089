"""Real processes, really killed: what a lab starts is gone when it is, and only then."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

from distsys.lab.testbed import run_folder
from distsys.lab.testbed.processes import Processes

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")


@pytest.fixture(autouse=True)
def _jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import what the client can: `jobs` is a module of tests/lab."""
    monkeypatch.syspath_prepend(HERE.parent)


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    processes = await Processes.start()
    yield processes
    await processes.aclose()
    assert not processes.folder.exists()


async def become(true: Callable[[], bool], what: str, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not {what} within {seconds} s"
        await asyncio.sleep(0.01)


async def test_a_worker_gets_its_payload_and_a_socket(processes: Processes) -> None:
    """A payload far larger than the buffer of a socket arrives complete."""
    payload = os.urandom(3_000_000)
    worker = await processes.fork("jobs:echo", payload, name="w1")
    loop = asyncio.get_running_loop()
    assert worker.sock is not None
    received = bytearray()
    while len(received) < len(payload):
        chunk = await loop.sock_recv(worker.sock, 1 << 20)
        assert chunk, worker.tail()
        received += chunk
    assert received == payload
    assert await loop.sock_recv(worker.sock, 1) == b""
    assert await worker.exited() == 0
    worker.close()


@linux
async def test_a_worker_inherits_imports_and_nothing_else(processes: Processes) -> None:
    """One descriptor, its own session, no handlers, no blocked signals, the client's folder, drivers imported."""
    worker = await processes.fork("jobs:report", b"", name="w1")
    assert await worker.exited() == 0
    assert worker.sock is not None
    found = json.loads(worker.sock.recv(1 << 16))
    assert found == {
        "descriptors": [0, 1, 2, 3],
        "cwd": str(Path.cwd()),
        "leads": True,
        "blocked": [],
        "handled": [],
        "threads": 1,
        "preloaded": ["cloudpickle", "psycopg", "psycopg_pool", "redis.asyncio"],
    }
    assert worker.tail() == "to the log"
    worker.close()


async def test_states_are_reported_as_they_happen(processes: Processes) -> None:
    """A worker that stops again right after it was continued is waited for all the same."""
    worker = await processes.fork("jobs:stop_three_times", b"", name="w1")
    for step in range(3):
        await worker.stopped()
        assert worker.sock is not None
        assert worker.sock.recv(1) == bytes([step])
        worker.signal(signal.SIGCONT)
    assert await worker.exited() == 0
    worker.close()


async def test_a_stop_from_outside_and_its_end_are_both_seen(processes: Processes) -> None:
    """`stopped` and `continued` tell them apart, again and again."""
    process = await processes.launch(["sleep", "60"], name="sleep")
    for _ in range(20):
        process.signal(signal.SIGSTOP)
        await process.stopped()
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        process.signal(signal.SIGCONT)
        await process.continued()
    process.signal(signal.SIGTERM)
    assert await process.exited() == -signal.SIGTERM


async def test_signals_a_program_ignores_are_not_ignored_by_what_it_starts() -> None:
    """A shell's background jobs ignore SIGQUIT and SIGINT; a server must not inherit that, or it could not be ended."""
    ignored = {sig: signal.signal(sig, signal.SIG_IGN) for sig in (signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1)}
    try:
        processes = await Processes.start()
    finally:
        for sig, handler in ignored.items():
            signal.signal(sig, handler)
    for sig in ignored:
        process = await processes.launch(["sleep", "60"], name="sleep")
        assert await process.end(sig) == -sig
    await processes.aclose()


async def test_a_process_that_has_exited_is_not_signalled(processes: Processes) -> None:
    """Another process may have its pid by now. The error names the process."""
    process = await processes.launch(["true"], name="brief")
    await process.exited()
    with pytest.raises(ProcessLookupError, match="brief"):
        process.signal(signal.SIGTERM)
    with pytest.raises(ProcessLookupError, match=r"brief: .* exited with 0> will never be stopped"):
        await process.stopped()


async def test_a_wait_that_times_out_names_the_process_and_its_last_output(processes: Processes) -> None:
    """TimeoutError names the process, the expected state, and what the process had printed."""
    process = await processes.launch(["sh", "-c", "echo last words; exec sleep 60"], name="idler")
    await become(lambda: process.tail() == "last words", "printed")
    with pytest.raises(TimeoutError, match=r"idler: .* was not exited within 0.1 s\nlast words"):
        await process.exited(0.1)


@pytest.mark.parametrize(("target", "code", "words"), [("fail", 1, "ValueError: worker's own error"), ("leave", 5, "")])
async def test_a_worker_that_fails_says_why_in_its_log(
    processes: Processes, target: str, code: int, words: str
) -> None:
    """An exception is exit code 1 and a traceback; a SystemExit is its own code. The lab goes on."""
    worker = await processes.fork(f"jobs:{target}", b"", name="w1")
    assert await worker.exited() == code
    assert words in worker.tail()
    worker.close()
    assert await (await processes.launch(["true"], name="next")).exited() == 0


async def test_a_program_that_does_not_exist_says_so_in_its_log(processes: Processes) -> None:
    """It exits with 1, and the log names it."""
    process = await processes.launch(["no-such-program"], name="none")
    assert await process.exited() == 1
    assert "FileNotFoundError" in process.tail()
    assert "no-such-program" in process.tail(100) or "No such file" in process.tail(100)


async def test_a_cancelled_fork_leaves_no_worker(processes: Processes) -> None:
    """At whatever moment it is cancelled: before, while or after the supervisor gets the request."""
    warm = await processes.fork("jobs:echo", b"", name="warm")
    await warm.end()
    warm.close()
    supervisor = psutil.Process(processes._child.pid)
    cancelled = 0
    for step in range(30):
        fork = asyncio.create_task(processes.fork("jobs:stop", b"x" * 3_000_000, name="w1"))
        await asyncio.sleep(step * 0.0005)
        fork.cancel()
        await asyncio.wait([fork])
        cancelled += fork.cancelled()
        if not fork.cancelled():
            await fork.result().end()
            fork.result().close()
        assert not run_folder.tree(supervisor.children())
    assert cancelled > 1


async def test_many_forks_at_once_are_each_answered(processes: Processes) -> None:
    """More requests than a socket's buffer holds wait for their turn."""
    workers = await asyncio.gather(*(processes.fork("jobs:echo", b"", name=f"w{i}") for i in range(100)))
    assert [worker.name for worker in workers] == [f"w{i}" for i in range(100)]
    assert len({worker.pid for worker in workers}) == 100
    assert {await worker.exited() for worker in workers} == {0}
    for worker in workers:
        worker.close()


async def test_a_name_that_is_no_file_name_is_refused(processes: Processes) -> None:
    """The name is also that of the log."""
    with pytest.raises(ValueError, match="'a/b'"):
        await processes.launch(["true"], name="a/b")


async def test_closing_twice_and_asking_afterwards() -> None:
    """The second close does nothing; a request after it is an error that says what to do."""
    processes = await Processes.start()
    sleeper = await processes.launch(["sleep", "60"], name="sleep")
    await asyncio.gather(processes.aclose(), processes.aclose())
    await processes.aclose()
    assert sleeper.state == "exited"
    assert not processes.folder.exists()
    with pytest.raises(RuntimeError, match="open a new lab"):
        await processes.launch(["true"], name="late")


async def test_a_start_that_fails_says_why_and_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter's own words are in the error."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$5" > {tmp_path}/folder\necho the disk is on fire >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        await Processes.start()
    folder = noted(tmp_path / "folder")
    assert folder.name.startswith("distsys-")
    assert not folder.exists()


def noted(note: Path) -> Path:
    return Path(note.read_text().strip())


async def test_a_supervisor_that_is_stuck_is_killed_by_close() -> None:
    """A supervisor that was stopped can't obey: what it had is ended in its place."""
    processes = await Processes.start()
    sleeper = await processes.launch(["sleep", "60"], name="sleep")
    parts = psutil.Process(processes._child.pid).children()
    os.kill(processes._child.pid, signal.SIGSTOP)
    await processes.aclose()
    assert not any(map(run_folder.state, parts))
    assert sleeper.state == "exited"
    assert not processes.folder.exists()


# ---- programs that open a lab and end


@dataclass
class Program:
    process: asyncio.subprocess.Process
    folder: Path
    servers: list[str]
    supervisor: psutil.Process
    parts: list[psutil.Process]

    def gone(self) -> bool:
        return not any(map(run_folder.state, self.parts)) and not self.folder.exists()

    def alive(self) -> bool:
        return all(map(run_folder.state, self.parts)) and self.folder.exists()


@asynccontextmanager
async def program(how: str) -> AsyncIterator[Program]:
    """A program with two Valkeys, two PostgreSQLs and two workers, one of each paused, and a worker's own child."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "program.py"),
        how,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        words = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
        [supervisor] = [c for c in psutil.Process(process.pid).children() if os.getpgid(c.pid) == c.pid]
        parts = [supervisor, *supervisor.children(recursive=True)]
        assert len(parts) > 20
        assert sys.platform != "linux" or "sleep" in {part.name() for part in parts}  # an orphan, adopted
        process.stdin.write(b"\n")
        yield Program(process, Path(words["folder"]), words["servers"], supervisor, parts)
    finally:
        with suppress(ProcessLookupError):  # the group is empty, unless the program has forked
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


@pytest.mark.parametrize("how", ["is killed", "is terminated", "returns", "raises", "closes"])
async def test_however_a_program_ends_nothing_is_left(how: str) -> None:
    """Within two seconds all its processes are gone, the paused ones too, and so is its folder."""
    async with program(how) as one:
        if how == "is killed":
            one.process.kill()
        elif how == "is terminated":
            one.process.terminate()
        await become(one.gone, "gone")


async def test_an_interrupt_leaves_everything_alive() -> None:
    """SIGINT to the program's process group, as the stop button sends it, reaches no server and no worker."""
    async with program("is interrupted") as one:
        os.killpg(one.process.pid, signal.SIGINT)
        assert one.process.stdout
        assert await asyncio.wait_for(one.process.stdout.readline(), 10) == b"interrupted\n"
        alive = [part for part in one.parts if run_folder.state(part)]
        assert len(alive) >= len(one.parts) - 1  # one Valkey was restarted by the program, to show that it still can
        os.killpg(one.process.pid, signal.SIGKILL)
        await become(one.gone, "gone")


async def test_of_two_programs_the_other_lives_on() -> None:
    """Two programs at the same time share nothing."""
    async with program("is killed") as one, program("is killed") as other:
        assert one.folder != other.folder
        one.process.kill()
        await become(one.gone, "gone")
        assert other.alive()


@linux
async def test_a_fork_of_the_program_does_not_keep_the_lab_alive() -> None:
    """The program's own children inherit its end of the supervisor's socket; its end counts all the same."""
    async with program("forks") as one:
        one.process.kill()
        await become(one.gone, "gone")


@linux
async def test_what_a_killed_supervisor_leaves_the_next_one_ends() -> None:
    """A paused PostgreSQL and a worker's own child outlive their supervisor, until the next lab starts."""
    async with program("is killed") as one:
        children = [child for child in one.supervisor.children() if child.status() != psutil.STATUS_STOPPED]
        children = [child for child in children if child.name() != "sleep"]
        one.supervisor.kill()
        one.process.kill()
        await become(lambda: not any(map(run_folder.state, children)), "gone with the supervisor")
        processes = await Processes.start()
        await become(one.gone, "gone")  # at once, unless a lab elsewhere on this machine has begun to
        await processes.aclose()


@linux
async def test_a_program_learns_that_its_supervisor_was_killed() -> None:
    """Its processes are gone, requests say so, and closing cleans up."""
    processes = await Processes.start()
    sleeper = await processes.launch(["sleep", "60"], name="sleep")
    part = psutil.Process(sleeper.pid)
    os.kill(processes._child.pid, signal.SIGKILL)
    assert await sleeper.exited() == -signal.SIGKILL
    await become(lambda: not run_folder.state(part), "gone")
    with pytest.raises(RuntimeError, match="supervisor has ended"):
        await processes.launch(["true"], name="late")
    await processes.aclose()
    assert not processes.folder.exists()


async def test_a_folder_that_is_just_being_made_is_left_alone() -> None:
    """No lab removes it between its creation and its lock. A minute later it counts as left behind."""
    folder, lock = run_folder.create()
    run_folder.sweep([folder])
    assert folder.exists()
    os.close(lock)
    new = folder.rename(folder.with_suffix(".new"))
    run_folder.sweep([new])
    assert new.exists()
    os.utime(new, (0, 0))
    run_folder.sweep()
    assert not new.exists()


async def test_a_pid_that_belongs_to_another_process_by_now_is_not_killed() -> None:
    """The pid file of an abandoned folder counts only if that process works in the folder."""
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    folder, lock = run_folder.create()
    os.close(lock)
    (folder / "postgres/data").mkdir(parents=True)
    (folder / "postgres/data/postmaster.pid").write_text(f"{stranger.pid}\n")
    worker = await asyncio.create_subprocess_exec("sleep", "60", cwd=folder / "postgres", start_new_session=True)
    run_folder.sweep([folder])
    assert not folder.exists()
    assert run_folder.state(psutil.Process(stranger.pid))
    assert await worker.wait() == -signal.SIGKILL
    stranger.kill()
    await stranger.wait()


@pytest.mark.parametrize("ending", ["restart", "shutdown"])
async def test_a_kernel_interrupted_and_then_ended(ending: str) -> None:
    """The stop button leaves the lab of a real kernel alive; a restart or a shutdown leaves nothing of it."""
    manager = AsyncKernelManager()
    await manager.start_kernel(env=ENVIRONMENT)
    try:
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        words = await run(client, OPEN)
        folder, supervisor = Path(words.split()[0]), psutil.Process(int(words.split()[1]))
        parts = [supervisor, *supervisor.children(recursive=True)]
        sleeps = asyncio.Event()
        sleeping = asyncio.create_task(run(client, SLEEP, sleeps))
        await asyncio.wait_for(sleeps.wait(), 10)
        await manager.interrupt_kernel()
        await sleeping
        assert all(map(run_folder.state, parts))
        assert await run(client, "await server.restart(); print(server.process.state)") == "running\n"
        client.stop_channels()
        await (manager.restart_kernel(now=True) if ending == "restart" else manager.shutdown_kernel())
        await become(lambda: not any(map(run_folder.state, parts)) and not folder.exists(), "gone")
    finally:
        if await manager.is_alive():
            await manager.shutdown_kernel(now=True)


OPEN = """
from distsys.lab.testbed.processes import Processes
from distsys.lab.testbed.servers import Servers
processes = await Processes.start()
server = await Servers(processes).postgres()
print(processes.folder, processes._child.pid)
"""


SLEEP = """
import asyncio
print("sleeps", flush=True)
for _ in range(600):
    await asyncio.sleep(0.1)  # in pieces: ipykernel interrupts a cell when its loop wakes up, not before
"""


async def run(client: AsyncKernelClient, code: str, printed: asyncio.Event | None = None) -> str:
    """Executes a cell and returns what it printed."""
    words = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            words.append(message["content"]["text"])
            if printed:
                printed.set()

    await client.execute_interactive(code, timeout=30, output_hook=hear)
    return "".join(words)
