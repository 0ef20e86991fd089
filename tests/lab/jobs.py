"""What the tests' workers do. It imports little, for each worker imports it anew."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


def echo(payload: bytes, sock: socket.socket) -> None:
    sock.sendall(payload)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the one by which they were listed
        return False
    return True


def report(payload: bytes, sock: socket.socket) -> None:
    """What a worker finds around itself."""
    found = {
        "descriptors": [fd for fd in map(int, os.listdir("/dev/fd")) if is_open(fd)],  # noqa: PTH208 (numbers)
        "cwd": str(Path.cwd()),
        "leads": os.getsid(0) == os.getpgrp() == os.getpid(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "handled": sorted(s for s in signal.valid_signals() if callable(signal.getsignal(s))),
        "threads": psutil.Process(os.getppid()).num_threads(),
        "preloaded": sorted({"redis.asyncio", "psycopg", "psycopg_pool", "cloudpickle"} & sys.modules.keys()),
    }
    print("to the log")
    sock.sendall(json.dumps(found).encode())


def stop_three_times(payload: bytes, sock: socket.socket) -> None:
    for step in range(3):
        sock.sendall(bytes([step]))
        os.kill(os.getpid(), signal.SIGSTOP)


def fail(payload: bytes, sock: socket.socket) -> None:
    raise ValueError("worker's own error")


def leave(payload: bytes, sock: socket.socket) -> None:
    raise SystemExit(5)


def sleep(payload: bytes, sock: socket.socket) -> None:
    """A worker that never ends, and leaves behind a process in a session of its own, whose parent is gone."""
    orphan = subprocess.Popen(["sh", "-c", "sleep 600 &"], start_new_session=True)
    orphan.wait()
    sock.sendall(payload)
    time.sleep(600)


def stop(payload: bytes, sock: socket.socket) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
