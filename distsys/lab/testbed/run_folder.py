"""The folder a lab works in, and how it ends: every process that belongs to it, then the folder itself.

A folder is alive while somebody holds the lock on it. A supervisor that was killed leaves its folder behind, and maybe
processes, with the lock free; by that the next lab to start finds them.
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

MARK = "DISTSYS_RUN"  # an environment variable that holds the folder: workers and what they start work elsewhere
PATIENCE, FORCE = 0.7, 1.0  # seconds for an orderly end, then for SIGKILL: together under the two a lab promises
IPC_RMID = 0


def create() -> tuple[Path, int]:
    """A new folder and the descriptor of its lock, held: whoever inherits the descriptor keeps the folder alive."""
    # Memory first; and short, because the path of a unix socket has at most 104 characters.
    fits = [b for b in _bases() if len(str(b)) < 32 and (b.name != "shm" or shutil.disk_usage(b).free > 1 << 30)]
    new = Path(tempfile.mkdtemp(".new", _prefix(), fits[0] if fits else None))
    lock = os.open(new, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return new.rename(new.with_suffix("")), lock  # under this name only once it is held


def sweep(folders: Iterable[Path] | None = None) -> None:
    """Ends and removes what killed supervisors of this user have left behind (or what is left in these folders)."""
    for folder in folders or [f for base in _bases() for f in base.glob(_prefix() + "*")]:
        with suppress(FileNotFoundError, BlockingIOError):  # removed meanwhile by another sweeper; or it is alive
            if folder.suffix == ".new" and time.time() - folder.stat().st_mtime < 60:
                continue  # its maker has not come as far as the lock
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end(folder, partial(tree, _left_in(folder)))
                remove(folder)
            finally:
                os.close(lock)


def remove(folder: Path) -> None:
    """Removes a folder, and first the shared memory of a Postgres that was killed too hard to do so itself."""
    for lines in postmasters(folder):
        for segment in [line.split()[1] for line in lines[6:7] if line.strip()]:
            ctypes.CDLL(None).shmctl(int(segment), IPC_RMID, None)
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)  # a process on its way out may still be writing: look again
        if not folder.exists():
            return
        time.sleep(0.01)


def end(folder: Path, find: Callable[[], list[psutil.Process]]) -> None:
    """Ends these processes, paused or not: the folder's Postgres by SIGQUIT, which frees its memory, or by SIGKILL."""
    masters = {lines[0] for lines in postmasters(folder)}
    found: set[psutil.Process] = set()
    began = time.monotonic()
    while (waited := time.monotonic() - began) < PATIENCE + FORCE:
        found.update(find())  # kept, because below a process that has ended its children are not found any more
        if not (left := [process for process in found if state(process)]):
            return
        orderly = [process for process in left if waited < PATIENCE and str(process.pid) in masters]
        spared = tree(orderly)
        for process in orderly:
            send(process, signal.SIGQUIT)
        for process in left:
            send(process, signal.SIGCONT if process in spared else signal.SIGKILL)  # a paused one must run to obey
        time.sleep(0.005)


def tree(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These processes and all below them, parents first; without those that are gone, as zombies are."""
    found: dict[psutil.Process, None] = {}
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found |= dict.fromkeys([root, *root.children(recursive=True)])
    return [process for process in found if state(process)]


def state(process: psutil.Process) -> str:
    """psutil's word for it; empty when it is gone."""
    try:
        word = str(process.status()) if process.is_running() else ""
    except psutil.NoSuchProcess:
        return ""
    return "" if word == psutil.STATUS_ZOMBIE else word


def send(process: psutil.Process, sig: int) -> None:
    with suppress(psutil.NoSuchProcess):  # gone already, which is what is wanted
        process.send_signal(sig)


def postmasters(folder: Path) -> Iterator[list[str]]:
    """The pid file of each Postgres: line 1 is its pid, 7 the key and the id of its System V segment, 8 its state."""
    for pid_file in folder.glob("*/data/postmaster.pid"):
        with suppress(FileNotFoundError):  # it has just ended
            yield pid_file.read_text().split("\n")


def _left_in(folder: Path) -> list[psutil.Process]:
    """Whoever works in the folder or bears its mark (servers write their title over their environment).

    None of them has a terminal: a shell that stands in the folder is somebody's who looks into it.
    """
    found, real = [], folder.resolve()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or not ours to look into
            marked = process.environ().get(MARK) == str(folder) or Path(process.cwd()).is_relative_to(real)
            if marked and not process.terminal():
                found.append(process)
    return found


def _prefix() -> str:
    return f"distsys-u{os.getuid()}-"  # not "distsys-0-...": older checkouts call theirs so, and lock a file in it


def _bases() -> list[Path]:
    bases = dict.fromkeys(map(Path, ("/dev/shm", tempfile.gettempdir(), "/tmp")))  # noqa: S108 (mkdtemp's own folder in it)
    return [base for base in bases if os.access(base, os.W_OK | os.X_OK)]
