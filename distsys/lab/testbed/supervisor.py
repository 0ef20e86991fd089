"""The process that owns every server and worker of a lab, so that nothing outlives the notebook that opened it.

It runs in a session of its own, so the SIGINT of the stop button does not reach it or its children. It holds one end of
a socket. When the notebook ends, in whatever way, the socket reads EOF; then the supervisor ends every process and
removes the run folder. It forks workers from itself with the drivers already imported, which takes milliseconds and
needs a single thread. If the supervisor is killed, Linux ends its children, and the next lab removes what is left.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pickle
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from distsys.lab.testbed import run_folder

PRELOAD = ("asyncio", "redis.asyncio", "psycopg", "psycopg_pool", "cloudpickle", "distsys.lab.run.worker")
IDLE_SECONDS = 0.1  # without a request, before the next module is imported: server starts come first

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_KEPT = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}  # the last two: Python ignores them
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Supervisor:
    """The loop that starts processes on request, reports their states, and ends them all."""

    def __init__(self, control: socket.socket, folder: Path) -> None:
        self.control, self.folder = control, folder
        self.children: dict[int, int] = {}  # pid -> request number, of each that runs
        self.todo = list(PRELOAD)
        self.fds: list[int] = []  # received and not yet used: a socket and a file per worker, in this order
        self.buffer = b""
        self.woken, self.wake = socket.socketpair()
        for end in (self.woken, self.wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the byte on the wakeup descriptor is enough
        self.selector = selectors.DefaultSelector()  # each handler returns whether to go on
        self.selector.register(control, selectors.EVENT_READ, self._read)
        self.selector.register(self.woken, selectors.EVENT_READ, lambda: bool(self.woken.recv(4096)))
        if hasattr(os, "pidfd_open"):  # forks of the notebook keep its end of the socket open: watch its process too
            self.selector.register(os.pidfd_open(os.getppid()), selectors.EVENT_READ, lambda: False)
        if _libc:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process, and end with it

    def serve(self) -> None:
        """Serve requests until the socket reads EOF."""
        self.tell(number=0, state="running")
        going = True
        while going:
            ready = self.selector.select(IDLE_SECONDS if self.todo else None)
            for key, _ in ready:
                going = key.data() and going
            self._reap()
            if not ready and self.todo:
                self._preload(1)

    def close(self) -> None:
        """End every process, then remove the run folder."""
        for sig in _ENDS:
            signal.signal(sig, signal.SIG_IGN)
        me = psutil.Process()

        def alive() -> list[psutil.Process]:
            self._reap()
            return [process for process in run_folder.tree([me]) if process != me]

        run_folder.end(self.folder, alive)
        run_folder.remove(self.folder)

    def tell(self, **message: Any) -> None:
        """Report a change of state; `number` is that of the request, 0 for the supervisor itself."""
        with suppress(BrokenPipeError, ConnectionResetError):  # the notebook has ended; the EOF comes next
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 64)
        except ConnectionResetError:  # the notebook has ended before it read everything
            return False
        self.fds += fds
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for request in map(json.loads, lines):
            self._start(**request)
        return bool(data)

    def _start(self, number: int, fds: int, **request: Any) -> None:
        given = [self.fds.pop(0) for _ in range(fds)]
        try:
            if given:
                self._preload(len(self.todo))
            me = os.getpid()
            # Signals wait until the child has reset our handlers: one of them would swallow a signal to the child.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            pid = os.fork()
            if not pid:
                self._become(me, given, **request)
        except OSError as error:  # too many processes or too little memory: the caller is told
            self.tell(number=number, state="exited", code=1, error=str(error))
        else:
            self.children[pid] = number
            self.tell(number=number, state="running", pid=pid)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
            for descriptor in given:
                os.close(descriptor)

    def _reap(self) -> None:
        """Report every change of state of a child."""
        options = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
        with suppress(ChildProcessError):  # no child is left
            while (found := os.waitpid(-1, options))[0]:
                pid, status = found
                if pid not in self.children:
                    continue  # an orphan of a child
                if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                    self.tell(number=self.children[pid], state="stopped" if os.WIFSTOPPED(status) else "running")
                else:
                    self.tell(number=self.children.pop(pid), state="exited", code=os.waitstatus_to_exitcode(status))

    def _preload(self, count: int) -> None:
        for name in [self.todo.pop(0) for _ in range(count)]:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 (not installed or broken: only a worker that needs it fails)
                traceback.print_exc()
        gc.freeze()  # keep these objects in memory that is shared with the workers

    def _become(self, supervisor: int, given: list[int], name: str, **program: Any) -> NoReturn:
        """Run the server or the worker, in the child. It never returns into the code of the supervisor."""
        code = 1
        try:
            os.setsid()
            if _libc:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the child ends with the supervisor
            if os.getppid() != supervisor:  # the supervisor has ended already
                os._exit(code)
            signal.set_wakeup_fd(-1)
            for sig in signal.valid_signals() - _KEPT:  # a background job of a shell ignores SIGQUIT and SIGINT
                signal.signal(sig, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
            log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            if not given:
                _execute(self.folder, **program)
            _work(*given)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 (an error that escaped would run the supervisor's code a second time)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _execute(folder: Path, argv: list[str], env: dict[str, str], uid: int | None) -> NoReturn:
    for sig in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program would inherit that
        signal.signal(sig, signal.SIG_DFL)
    os.chdir(folder)
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    os.execvpe(argv[0], argv, os.environ | env)


def _work(descriptor: int, file: int) -> None:
    with os.fdopen(file, "rb") as work:
        target, path, cwd, payload = pickle.load(work)  # noqa: S301 (written by Processes.fork)
    os.dup2(descriptor, 3, inheritable=False)
    for other in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 (numbers, not paths)
        if other > 3:
            with suppress(OSError):  # the one the listing itself used
                os.close(other)
    sys.path[:] = path
    importlib.invalidate_caches()
    os.chdir(cwd)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(payload, socket.socket(fileno=3))


def main(control: int, lock: int, folder: str) -> NoReturn:
    """Run a supervisor on these descriptors until the notebook ends."""
    for descriptor in (control, lock):
        os.set_inheritable(descriptor, False)  # a server must not keep the socket or the lock
    for sig in _ENDS:
        signal.signal(sig, lambda *_: sys.exit())
    supervisor = Supervisor(socket.socket(fileno=control), Path(folder))
    try:
        run_folder.sweep()
        supervisor.serve()
    except Exception:  # noqa: BLE001 (reported to the notebook, because the log is removed with the folder)
        supervisor.tell(number=0, state="running", error=traceback.format_exc())
    finally:
        supervisor.close()
        os._exit(0)
