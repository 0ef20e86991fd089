"""Real processes of a lab: servers that it launches and workers that it forks.

    processes = await Processes.start()
    server = await processes.launch(["valkey-server", "--port", "7001"], name="redis")
    worker = await processes.fork("distsys.lab.run.worker:main", payload, name="w1")
    await worker.stopped()            # it has sent itself SIGSTOP
    worker.signal(signal.SIGCONT)
    await worker.exited()
    await processes.aclose()          # the supervisor does the same when this process ends

A `Processes` belongs to the event loop it was started on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from distsys.lab.testbed import run_folder

State = Literal["starting", "running", "stopped", "exited"]
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[4])
from distsys.lab.testbed.supervisor import main
main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


class Process:
    """One process. `stopped`, `continued` and `exited` wait for a report of the kernel and do not poll."""

    def __init__(self, name: str, log: Path, sock: socket.socket | None = None) -> None:
        self.name, self.log = name, log
        self.pid = 0  # known once it is started
        self.sock = sock  # our end of a worker's socket, non-blocking
        self.state: State = "starting"
        self.code: int | None = None  # the exit code, or minus the signal that ended it
        self.error = ""  # the supervisor's message if the start failed
        self._kill_on_start = 0  # the signal that ends it as soon as it has started
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<{self.name}: pid {self.pid}, {self.state}{'' if self.code is None else f' with {self.code}'}>"

    async def end(self, sig: int = signal.SIGKILL) -> int:
        """Send the signal unless the process has exited. Return its exit code."""
        if self.state == "starting":
            self._kill_on_start = sig
        elif self.state != "exited":
            self.signal(sig)
        return await self.exited()

    def signal(self, sig: int) -> None:
        """Send a signal. Raises ProcessLookupError after the exit, because another process may have the pid by then."""
        if self.state == "exited" or not self.pid:
            raise ProcessLookupError(f"{self!r} can't be signalled any more")
        os.kill(self.pid, sig)
        if sig == signal.SIGCONT and self.state == "stopped":
            self._set("running")  # now, because the kernel may merge this report into that of the next stop

    async def started(self) -> None:
        """Wait until the supervisor has started the process, or failed to."""
        while self.state == "starting":
            await self._changed.wait()

    async def stopped(self, timeout: float = 10) -> None:
        """Wait until it is stopped. Raises TimeoutError after so many seconds, ProcessLookupError if it has exited."""
        await self._reached("stopped", timeout)

    async def continued(self, timeout: float = 10) -> None:
        """Wait until it runs. Raises TimeoutError after so many seconds, ProcessLookupError if it has exited."""
        await self._reached("running", timeout)

    async def exited(self, timeout: float = 10) -> int:
        """Wait until it has exited, and return its exit code. Raises TimeoutError after so many seconds."""
        await self._reached("exited", timeout)
        assert self.code is not None
        return self.code

    def tail(self, lines: int = 12) -> str:
        """Return the last lines that it has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def close(self) -> None:
        """Close our end of a worker's socket, once everything has been read from it. Idempotent."""
        if self.sock is not None:
            self.sock.close()

    def _set(self, state: State, pid: int = 0, code: int | None = None, error: str = "") -> None:
        self.state, self.pid = state, pid or self.pid
        self.code, self.error = code, error
        if self._kill_on_start and state == "running":
            with suppress(ProcessLookupError):  # it has exited already
                self.signal(self._kill_on_start)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reached(self, state: State, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while self.state != state:
                    if self.state == "exited":
                        raise ProcessLookupError(f"{self!r} will never be {state}\n{self.tail()}".rstrip())
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"{self!r} was not {state} within {timeout} s\n{self.tail()}".rstrip()) from None


class Processes:
    """The processes of one lab and the folder they work in. Both end with `aclose()`, or with this process."""

    def __init__(self, child: subprocess.Popen[bytes], control: socket.socket, folder: Path) -> None:
        self.folder = folder
        self._child, self._control = child, control
        self._supervisor = Process("supervisor", folder / "supervisor.log")
        self._running = {0: self._supervisor}  # request number -> process
        self._numbers = itertools.count(1)
        self._all: weakref.WeakSet[Process] = weakref.WeakSet()
        self._requests = asyncio.Semaphore(32)  # so few requests fit into the socket's buffer: none is sent in part
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control, self._read)

    @classmethod
    async def start(cls) -> Processes:
        """Start the supervisor. If cancelled, nothing of it is left."""
        self = cls(*_spawn())
        try:
            await self._supervisor.started()
            self._check()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def launch(
        self, argv: list[str], *, name: str, env: Mapping[str, str] | None = None, uid: int | None = None
    ) -> Process:
        """Start a server in a session of its own. It works in `folder` and prints to `folder/name.log`.

        env  is added to the environment of this process
        uid  the user that the server runs as, if this process is root
        If cancelled, a server that was started has ended by the time this raises.
        """
        return await self._start(name, None, argv=argv, env=dict(env or {}), uid=uid)

    async def fork(self, target: str, payload: bytes, *, name: str) -> Process:
        """Start a worker that calls `target` ("package.module:function") with the payload and its end of a socket.

        If cancelled, a worker that was started has ended by the time this raises.
        """
        self._check()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, tempfile.TemporaryFile(dir=self.folder) as work:
            pickle.dump((target, _path(), str(Path.cwd()), payload), work)
            work.seek(0)
            try:
                return await self._start(name, ours, theirs.fileno(), work.fileno())
            except BaseException:
                ours.close()
                raise

    async def aclose(self) -> None:
        """End every process and remove the folder. Idempotent."""
        if self._control.fileno() >= 0:
            with suppress(OSError):  # the supervisor has closed its end already
                self._control.shutdown(socket.SHUT_WR)
        try:
            await self._supervisor.exited(5)
        except TimeoutError:
            self._child.kill()  # it hangs, or was stopped; the sweep below removes what it leaves
            await self._supervisor.exited(5)
        self._control.close()
        self._child.wait(5)
        for process in self._all:
            process.close()
        for _ in range(100):
            if not self.folder.exists():
                return
            await asyncio.to_thread(run_folder.sweep, [self.folder])  # needed if the supervisor was killed
            await asyncio.sleep(0.02)  # or another lab that starts now is sweeping this folder

    async def _start(self, name: str, sock: socket.socket | None, *fds: int, **program: Any) -> Process:
        if "/" in name:
            raise ValueError(f"the name {name!r} is also a file name: give one without a slash")
        async with self._requests:
            self._check()
            number = next(self._numbers)
            process = Process(name, self.folder / f"{name}.log", sock)
            request = {"number": number, "fds": len(fds), "name": name, **program}
            with suppress(BrokenPipeError, ConnectionResetError):  # the supervisor has just ended: `_read` reports it
                socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], fds)
            self._running[number] = process
            self._all.add(process)
            try:
                await process.started()
            except asyncio.CancelledError:
                await process.end()
                raise
            if process.error:
                raise OSError(process.error)
            if not process.pid:
                self._check()
            return process

    def _read(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for message in map(json.loads, lines):
            number = message.pop("number")
            self._running[number]._set(**message)
            if message["state"] == "exited":
                del self._running[number]
        if not data:  # the supervisor ended, and with it all processes: at once on Linux, elsewhere in `aclose`
            self._loop.remove_reader(self._control)
            for process in self._running.values():
                process._set("exited", code=-signal.SIGKILL, error=process.error)
            self._running.clear()

    def _check(self) -> None:
        """Raise RuntimeError, with the last lines of the supervisor, if the supervisor has ended."""
        if self._supervisor.state == "exited":
            words = (self._supervisor.error or self._supervisor.tail()).splitlines()[-12:]
            raise RuntimeError("\n".join(["this lab's supervisor has ended; open a new lab", *words]))


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket, Path]:
    """Start the supervisor. Return its process, our end of its socket, and its run folder."""
    folder, lock = run_folder.create()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    fds = (theirs.fileno(), lock)
    try:
        with (folder / "supervisor.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *map(str, fds), str(folder), json.dumps(_path())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", pass_fds=fds, start_new_session=True,
                env=os.environ | {run_folder.MARK: str(folder)},
            )  # fmt: skip
    except BaseException:
        ours.close()
        run_folder.remove(folder)
        raise
    finally:
        theirs.close()
        os.close(lock)
    return child, ours, folder


def _path() -> list[str]:
    """Return sys.path as absolute paths, so that another process imports the same modules."""
    return [entry or str(Path.cwd()) for entry in sys.path]
