"""The folder a lab works in, and how it ends: every process recorded in it, then the folder itself.

A folder is alive while somebody holds the lock in it. A supervisor that was killed leaves its folder behind, and maybe
processes, with the lock free; by that the next lab to start finds them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DISTSYS_RUN"  # an environment variable that holds the folder, for the descendants nobody recorded
PATIENCE, FORCE = 0.7, 1.0  # seconds for an orderly end, then for SIGKILL: together under the two a lab promises


def create() -> tuple[Path, int]:
    """A new folder and the descriptor of its lock, held: whoever inherits the descriptor keeps the folder alive."""
    # Memory first; and short, because the path of a unix socket has at most 104 characters.
    fits = [b for b in _bases() if len(str(b)) < 32 and (b.name != "shm" or shutil.disk_usage(b).free > 1 << 30)]
    folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=fits[0] if fits else None))
    lock = os.open(folder / "lock.new", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "lock.new").rename(folder / "lock")  # under this name only once it is held
    return folder, lock


def record(folder: Path, pid: int, ending: int) -> None:
    """Notes a process and the signal that ends it, for whoever has to end it in our place."""
    with (folder / "pids").open("a") as pids:
        pids.write(json.dumps({"pid": pid, "ending": ending, "started": psutil.Process(pid).create_time()}) + "\n")


def sweep(folders: Iterable[Path] | None = None) -> None:
    """Ends and removes what killed supervisors of this user have left behind (or what is left in these folders)."""
    for folder in folders or [f for base in _bases() for f in base.glob(_prefix() + "*")]:
        with suppress(FileNotFoundError):  # another sweeper, or its own supervisor, has removed it meanwhile
            lock = _orphaned(folder)
            if lock is None:
                continue
            try:
                _end_recorded(folder)
                remove(folder)
            finally:
                os.close(lock)


def remove(folder: Path) -> None:
    """Removes a folder, and first the shared memory of a Postgres that was killed too hard to do so itself."""
    for pid_file in folder.glob("*/data/postmaster.pid"):
        words = "".join(pid_file.read_text().split("\n")[6:7]).split()  # line 7: key and id of its System V segment
        if len(words) == 2 and shutil.which("ipcrm"):
            subprocess.run(["ipcrm", "-m", words[1]], check=False, stderr=subprocess.DEVNULL)
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)  # a process on its way out may still be writing: look again
        if not folder.exists():
            return
        time.sleep(0.01)


def end(find: Callable[[], list[psutil.Process]], endings: dict[int, int]) -> None:
    """Ends these processes, paused or not: by its own ending (Postgres frees its memory on SIGQUIT) or by SIGKILL."""
    found: set[psutil.Process] = set()

    def left() -> list[psutil.Process]:
        found.update(find())  # kept, because below a process that has ended its children are not found any more
        return [process for process in found if state(process)]

    orderly = [process for process in left() if endings.get(process.pid, signal.SIGKILL) != signal.SIGKILL]
    spared = tree(orderly)
    for process in left():
        if process not in spared:
            send(process, signal.SIGKILL)
    for process in orderly:
        send(process, endings[process.pid])
    for process in spared:
        send(process, signal.SIGCONT)  # a paused one must run to obey
    started = time.monotonic()
    while (rest := left()) and (waited := time.monotonic() - started) < PATIENCE + FORCE:
        for process in rest if waited > PATIENCE else []:
            send(process, signal.SIGKILL)
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


def _prefix() -> str:
    return f"distsys-{os.getuid()}-"


def _bases() -> list[Path]:
    bases = dict.fromkeys(map(Path, ("/dev/shm", tempfile.gettempdir(), "/tmp")))  # noqa: S108 (mkdtemp's own folder in it)
    return [base for base in bases if os.access(base, os.W_OK | os.X_OK)]


def _orphaned(folder: Path) -> int | None:
    """The folder's lock if nobody held it: this process does now, so that no other sweeps it. None when it lives."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:  # its maker has not come as far as the lock, or died just there
        return os.open(folder, os.O_RDONLY) if time.time() - folder.stat().st_mtime > 60 else None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _end_recorded(folder: Path) -> None:
    lines = (folder / "pids").read_text().splitlines() if (folder / "pids").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may have been cut short
    roots = []
    for row in rows:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(row["pid"])
            if abs(process.create_time() - row["started"]) < 2:  # else the number belongs to a stranger by now
                roots.append(process)
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or not ours to look into
            if process.environ().get(MARK) == str(folder):
                roots.append(process)
    end(lambda: tree(roots), {row["pid"]: row["ending"] for row in rows})
