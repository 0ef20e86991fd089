"""Real processes for a lab: servers to launch and workers to fork, each of them running, stopped or exited.

    processes = await Processes.start()
    server = await processes.launch(["valkey-server", "--port", "7001"], name="redis")
    worker = await processes.fork("distsys.lab.run.worker:main", payload, name="w1")
    await worker.stopped()            # it has sent itself SIGSTOP
    worker.signal(signal.SIGCONT)
    await worker.exited()
    await processes.aclose()          # if nobody calls it, the supervisor does the same when this process ends

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
    """One process. `stopped`, `continued` and `exited` wait for the kernel's own report: none of them polls."""

    def __init__(self, name: str, log: Path, sock: socket.socket | None = None) -> None:
        self.pid, self.name, self.log = 0, name, log  # a pid only once it is started
        self.sock = sock  # of a worker: our end, non-blocking
        self.state: State = "starting"
        self.code: int | None = None  # its exit code, or minus the signal that ended it
        self.error = ""  # the supervisor's words, when it could not be started
        self._unwanted = 0  # the signal that ends it as soon as it has started
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<{self.name}: pid {self.pid}, {self.state}{'' if self.code is None else f' with {self.code}'}>"

    async def end(self, sig: int = signal.SIGKILL) -> int:
        """Sends the signal, unless it has exited, and waits until it has."""
        if self.state == "starting":
            self._unwanted = sig
        elif self.state != "exited":
            self.signal(sig)
        return await self.exited()

    def signal(self, sig: int) -> None:
        """Sends a signal; a process that has exited is refused, for its number may belong to a stranger by now."""
        if self.state == "exited" or not self.pid:
            raise ProcessLookupError(f"{self!r} can't be signalled any more")
        os.kill(self.pid, sig)
        if sig == signal.SIGCONT and self.state == "stopped":
            self._set("running")  # so it is when kill() returns; the report may be merged into that of the next stop

    async def started(self) -> None:
        while self.state == "starting":
            await self._changed.wait()

    async def stopped(self, timeout: float = 10) -> None:
        await self._until("stopped", timeout)

    async def continued(self, timeout: float = 10) -> None:
        await self._until("running", timeout)

    async def exited(self, timeout: float = 10) -> int:
        await self._until("exited", timeout)
        assert self.code is not None
        return self.code

    def tail(self, lines: int = 12) -> str:
        """The end of what it has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def close(self) -> None:
        """Closes our end of a worker's socket, when its last word has been read. Idempotent."""
        if self.sock is not None:
            self.sock.close()

    def _set(self, state: State, pid: int = 0, code: int | None = None, error: str = "") -> None:
        self.state, self.pid, self.code, self.error = state, pid or self.pid, code, error
        if self._unwanted and state == "running":
            with suppress(ProcessLookupError):  # gone already
                self.signal(self._unwanted)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, state: State, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                while self.state != state:
                    if self.state == "exited":
                        raise ProcessLookupError(f"{self!r} will never be {state}\n{self.tail()}".rstrip())
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"{self!r} was not {state} within {timeout} s\n{self.tail()}".rstrip()) from None


class Processes:
    """The processes of one lab and the folder they work in; both are gone when it is closed, or this process ends."""

    def __init__(self, child: subprocess.Popen[bytes], control: socket.socket, folder: Path) -> None:
        self.folder = folder
        self._child, self._control = child, control
        self._supervisor = Process("supervisor", folder / "supervisor.log")
        self._running = {0: self._supervisor}  # by the number it was asked for under
        self._numbers = itertools.count(1)
        self._all: weakref.WeakSet[Process] = weakref.WeakSet()
        self._turns = asyncio.Semaphore(32)  # requests under way: so few fit the socket's buffer, and none is ever cut
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control, self._read)

    @classmethod
    async def start(cls) -> Processes:
        """Starts the supervisor. Cancelled half-way, it leaves nothing behind."""
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
        """Starts a server in a session of its own; it works in `folder` and prints to `folder/name.log`.

        Cancelled, it leaves no server: by the time it raises, one that was started has ended.
        `env` adds to this process's own; `uid`, for root only, is the user it runs as.
        """
        return await self._start(name, None, argv=argv, env=dict(env or {}), uid=uid)

    async def fork(self, target: str, payload: bytes, *, name: str) -> Process:
        """Starts a worker: it calls `target` ("package.module:function") with the payload and its end of a socket.

        Cancelled, it leaves no worker either.
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
        """Ends every process and removes the folder. Idempotent; when it returns, nothing is left."""
        if self._control.fileno() >= 0:
            with suppress(OSError):  # the supervisor has closed its own end already
                self._control.shutdown(socket.SHUT_WR)
        try:
            await self._supervisor.exited(5)
        except TimeoutError:
            self._child.kill()  # it is stuck, or was stopped; what it leaves is swept below
            await self._supervisor.exited(5)
        self._control.close()
        self._child.wait(5)
        for process in self._all:
            process.close()
        for _ in range(100):
            if not self.folder.exists():
                return
            await asyncio.to_thread(run_folder.sweep, [self.folder])  # it was killed
            await asyncio.sleep(0.02)  # or another lab, just starting, has come before us and is at it

    async def _start(self, name: str, sock: socket.socket | None, *fds: int, **program: Any) -> Process:
        if "/" in name:
            raise ValueError(f"a process's name is its log's too, so it can't hold a slash: {name!r}")
        async with self._turns:
            self._check()
            number, process = next(self._numbers), Process(name, self.folder / f"{name}.log", sock)
            request = {"number": number, "fds": len(fds), "name": name, **program}
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died just now: `_read` says so
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
        if not data:  # the supervisor is gone, and with it all it had: at once on Linux, elsewhere by `aclose`
            self._loop.remove_reader(self._control)
            for process in self._running.values():
                process._set("exited", code=-signal.SIGKILL, error=process.error)
            self._running.clear()

    def _check(self) -> None:
        """Raises RuntimeError if the supervisor is gone: with its last words, or what it has printed."""
        if self._supervisor.state == "exited":
            words = (self._supervisor.error or self._supervisor.tail()).splitlines()[-12:]
            raise RuntimeError("\n".join(["this lab's supervisor has ended; open a new lab", *words]))


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket, Path]:
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
    """So that the other process imports what this one would."""
    return [entry or str(Path.cwd()) for entry in sys.path]
