"""The folder a lab works in, and how it is removed: first every process that belongs to it, then the folder itself.

A folder is in use while a process holds the lock on it. A supervisor that was killed may leave its folder and processes
behind; the lock is free then, and the next lab that starts removes them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

MARK = "DISTSYS_RUN"  # environment variable with the folder: finds workers, which work in other folders
QUIT_SECONDS, KILL_SECONDS = 0.7, 1.0  # for an orderly end, then for SIGKILL: a lab promises two in all
IPC_RMID = 0


def create() -> tuple[Path, int]:
    """Return a new folder and the descriptor of its lock; a process that inherits it keeps the folder in use."""
    # A short path, because that of a unix socket has at most 104 characters; in memory if there is room.
    fits = [b for b in _bases() if len(str(b)) < 32 and (b.name != "shm" or shutil.disk_usage(b).free > 1 << 30)]
    new = Path(tempfile.mkdtemp(".new", _prefix(), fits[0] if fits else None))
    lock = os.open(new, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return new.rename(new.with_suffix("")), lock  # renamed only once it is locked


def sweep(folders: Iterable[Path] | None = None) -> None:
    """End and remove what killed supervisors of this user left behind, or what is left in these folders."""
    for folder in folders or [f for base in _bases() for f in base.glob(_prefix() + "*")]:
        with suppress(FileNotFoundError, BlockingIOError):  # removed meanwhile by another lab, or in use
            if folder.suffix == ".new" and time.time() - folder.stat().st_mtime < 60:
                continue  # just created, not yet locked
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end(folder, partial(tree, _left_in(folder)))
                remove(folder)
            finally:
                os.close(lock)


def remove(folder: Path) -> None:
    """Remove a folder, and first the shared memory that a PostgreSQL leaves behind when it gets SIGKILL."""
    for lines in postmasters(folder):
        for segment in [line.split()[1] for line in lines[6:7] if line.strip()]:
            ctypes.CDLL(None).shmctl(int(segment), IPC_RMID, None)
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)  # a process that is ending may still write: try again
        if not folder.exists():
            return
        time.sleep(0.01)


def end(folder: Path, find: Callable[[], list[psutil.Process]]) -> None:
    """End these processes, paused or not. PostgreSQL gets SIGQUIT first, by which it frees its shared memory."""
    masters = {lines[0] for lines in postmasters(folder)}
    found: set[psutil.Process] = set()
    began = time.monotonic()
    while (waited := time.monotonic() - began) < QUIT_SECONDS + KILL_SECONDS:
        found.update(find())  # collected, because the children of an ended process are not found any more
        if not (left := [process for process in found if state(process)]):
            return
        orderly = [process for process in left if waited < QUIT_SECONDS and str(process.pid) in masters]
        spared = tree(orderly)
        for process in orderly:
            send(process, signal.SIGQUIT)
        for process in left:
            # A paused process must run to obey SIGQUIT.
            send(process, signal.SIGCONT if process in spared else signal.SIGKILL)
        time.sleep(0.005)


def tree(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return these processes and all their descendants, parents first, without those that have ended (zombies)."""
    found: dict[psutil.Process, None] = {}
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found |= dict.fromkeys([root, *root.children(recursive=True)])
    return [process for process in found if state(process)]


def state(process: psutil.Process) -> str:
    """Return psutil's status of a process; empty if it has ended."""
    try:
        status = str(process.status()) if process.is_running() else ""
    except psutil.NoSuchProcess:
        return ""
    return "" if status == psutil.STATUS_ZOMBIE else status


def send(process: psutil.Process, sig: int) -> None:
    """Send a signal; do nothing if the process has ended."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(sig)


def postmasters(folder: Path) -> Iterator[list[str]]:
    """Yield the lines of each PostgreSQL's pid file: 1 is the pid, 7 the System V segment (key, id), 8 the state."""
    for pid_file in folder.glob("*/data/postmaster.pid"):
        with suppress(FileNotFoundError):  # the server has just ended
            yield pid_file.read_text().split("\n")


def _left_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in the folder or have its mark (servers overwrite their environment).

    A process with a terminal is left alone: it is the shell of a user who looks into the folder.
    """
    found, real = [], folder.resolve()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            marked = process.environ().get(MARK) == str(folder) or Path(process.cwd()).is_relative_to(real)
            if marked and not process.terminal():
                found.append(process)
    return found


def _prefix() -> str:
    return f"distsys-u{os.getuid()}-"  # not "distsys-0-...": older checkouts call theirs so, and lock a file in it


def _bases() -> list[Path]:
    bases = dict.fromkeys(map(Path, ("/dev/shm", tempfile.gettempdir(), "/tmp")))  # noqa: S108 (mkdtemp's own folder in it)
    return [base for base in bases if os.access(base, os.W_OK | os.X_OK)]
