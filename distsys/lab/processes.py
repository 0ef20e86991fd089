"""Real processes for a lab: servers to launch and workers to fork, each of them running, stopped or exited.

    processes = await Processes.start()
    server = await processes.launch(["valkey-server", "--port", "7001"], name="redis")
    worker = await processes.fork("distsys.lab.worker:main", payload, name="w1")
    await worker.stopped()            # it has sent itself SIGSTOP
    worker.signal(signal.SIGCONT)
    await worker.exited()
    await processes.aclose()          # if nobody calls it, the supervisor does the same when this process ends

A `Processes` belongs to the event loop it was started on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from distsys.lab import run_folder
from distsys.lab.supervisor import FRAME

State = Literal["running", "stopped", "exited"]
Pair = tuple[socket.socket | None, socket.socket | None]  # of a worker: our end and its own
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[4])
from distsys.lab.supervisor import main
main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


class Process:
    """One process. `stopped`, `continued` and `exited` wait for the kernel's own report: none of them polls."""

    def __init__(self, name: str, log: Path, sock: socket.socket | None) -> None:
        self.pid, self.name, self.log = 0, name, log  # a pid only once it is started
        self.sock = sock  # of a worker: our end, non-blocking
        self.state: State = "running"
        self.code: int | None = None  # its exit code, or minus the signal that ended it
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<{self.name}: pid {self.pid}, {self.state}{'' if self.code is None else f' with {self.code}'}>"

    async def end(self, sig: int = signal.SIGKILL) -> int:
        """Sends the signal, unless it has exited, and waits until it has."""
        if self.state != "exited":
            self.signal(sig)
        return await self.exited()

    def signal(self, sig: int) -> None:
        """Sends a signal; a process that has exited is refused, for its number may belong to a stranger by now."""
        if self.state == "exited" or not self.pid:
            raise ProcessLookupError(f"{self!r} can't be signalled any more")
        os.kill(self.pid, sig)
        if sig == signal.SIGCONT and self.state == "stopped":
            self._set("running")  # so it is when kill() returns; the report may be merged into that of the next stop

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

    def _set(self, state: State, code: int | None = None) -> None:
        self.state, self.code = state, code
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
        self._running: dict[int, Process] = {}
        self._all: weakref.WeakSet[Process] = weakref.WeakSet()
        self._requests: deque[tuple[Process, asyncio.Future[None]]] = deque()  # answered in their order
        self._turns = asyncio.Semaphore(32)  # requests under way: so few fit the socket's buffer, and none is ever cut
        self._buffer = b""
        self._crash = ""
        self._gone = asyncio.Event()  # the supervisor has exited
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control, self._read)

    @classmethod
    async def start(cls) -> Processes:
        """Starts the supervisor. Cancelled half-way, it leaves nothing behind."""
        self = cls(*_spawn())
        try:
            await self._request("hello")
        except BaseException:
            await self.aclose()
            raise
        return self

    async def launch(
        self, argv: list[str], *, name: str, env: Mapping[str, str] | None = None, ending: int = signal.SIGKILL,
        uid: int | None = None,
    ) -> Process:  # fmt: skip
        """Starts a server in a session of its own; it works in `folder` and prints to `folder/name.log`.

        Cancelled, it leaves no server: by the time it raises, one that was started has ended.
        `ending` is the signal that ends it with the lab; `env` adds to this process's own; `uid`,
        for root only, is the user it runs as.
        """
        return await self._request("launch", name, argv=argv, env=dict(env or {}), ending=ending, uid=uid)

    async def fork(self, target: str, payload: bytes, *, name: str) -> Process:
        """Starts a worker: it calls `target` ("package.module:function") with the payload and its end of a socket.

        Cancelled, it leaves no worker either. One that is killed before it has read its work is returned all the same.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        header = json.dumps({"target": target, "path": _path(), "cwd": str(Path.cwd())}).encode()
        process = None
        try:
            process = await self._request("fork", name, (ours, theirs), ending=signal.SIGKILL)
            with suppress(BrokenPipeError, ConnectionResetError):  # killed meanwhile: its exit says so
                await self._loop.sock_sendall(ours, FRAME.pack(len(header), len(payload)) + header + payload)
        except BaseException:
            ours.close()
            if process is not None:
                await process.end()
            raise
        finally:
            theirs.close()
        return process

    async def aclose(self) -> None:
        """Ends every process and removes the folder. Idempotent; when it returns, nothing is left."""
        if self._control.fileno() >= 0:
            with suppress(OSError):  # the supervisor has closed its own end already
                self._control.shutdown(socket.SHUT_WR)
        try:
            await asyncio.wait_for(self._gone.wait(), 5)
        except TimeoutError:
            self._child.kill()  # it is stuck, or was stopped; what it leaves is swept below
            await asyncio.wait_for(self._gone.wait(), 5)
        self._control.close()
        self._child.wait(5)
        for process in self._all:
            process.close()
        for _ in range(100):
            if not self.folder.exists():
                return
            await asyncio.to_thread(run_folder.sweep, [self.folder])  # it was killed
            await asyncio.sleep(0.02)  # or another lab, just starting, has come before us and is at it

    async def _request(self, op: str, name: str = "", pair: Pair = (None, None), **more: Any) -> Process:
        ours, theirs = pair
        if "/" in name:
            raise ValueError(f"a process's name is its log's too, so it can't hold a slash: {name!r}")
        async with self._turns:
            if self._gone.is_set():
                raise self._ended()
            process, future = Process(name, self.folder / f"{name}.log", ours), self._loop.create_future()
            message = json.dumps({"op": op, "name": name, **more}).encode() + b"\n"
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died just now: `_lost` says so to the future
                socket.send_fds(self._control, [message], [theirs.fileno()] if theirs else [])
            self._requests.append((process, future))
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                with suppress(OSError, RuntimeError):  # it was refused, or the supervisor has ended: nothing to end
                    await future
                    if process.pid:
                        await process.end(more["ending"])
                raise
            return process

    def _read(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for message in map(json.loads, lines):
            self._hear(message)
        if not data:
            self._lost()

    def _hear(self, message: dict[str, Any]) -> None:
        if "crash" in message:
            self._crash = message["crash"]
        elif "state" in message:
            process = self._running[message["pid"]]
            process._set(message["state"], message.get("code"))
            if process.state == "exited":
                del self._running[process.pid]
        else:
            process, future = self._requests.popleft()
            if "pid" in message:  # known from here on, for its first report may be right behind
                process.pid = message["pid"]
                self._running[process.pid] = process
                self._all.add(process)
            if not future.done():
                future.set_exception(OSError(message["error"])) if "error" in message else future.set_result(None)
            elif process.pid:  # whoever asked was cancelled, and again while waiting for this
                process.signal(signal.SIGKILL)

    def _lost(self) -> None:
        """The supervisor is gone, and with it all it had: at once on Linux, elsewhere by `aclose`."""
        self._loop.remove_reader(self._control)
        self._gone.set()
        for _, future in self._requests:
            if not future.done():
                future.set_exception(self._ended())
        self._requests.clear()
        for process in self._running.values():
            process._set("exited", -signal.SIGKILL)
        self._running.clear()

    def _ended(self) -> RuntimeError:
        log = self.folder / "supervisor.log"
        words = self._crash or (log.read_text() if log.exists() else "")
        return RuntimeError("\n".join(["this lab's supervisor has ended; open a new lab", *words.splitlines()[-12:]]))


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
