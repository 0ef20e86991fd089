"""The network between a candidate's processes and one Redis: every packet of commands is a step that can be disturbed.

A client writes into a pipe and is never blocked; the explorer decides when the packet reaches the server, and whether
the reply comes back. Behind each pipe is a real connection, so pipelines, scripts, MULTI and BLPOP work as they do.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distsys.lab.explore.loop import Process, running_process

HANDSHAKE = {b"HELLO", b"CLIENT", b"AUTH", b"SELECT", b"COMMAND", b"INFO", b"ECHO", b"READONLY"}
BLOCKING = {b"BLPOP", b"BRPOP", b"BLMOVE", b"BRPOPLPUSH", b"BLMPOP", b"BZPOPMIN", b"BZPOPMAX", b"BZMPOP", b"XREAD",
            b"XREADGROUP", b"WAIT", b"SUBSCRIBE", b"PSUBSCRIBE", b"UNSUBSCRIBE", b"PUNSUBSCRIBE"}  # fmt: skip
COMMAND_SECONDS = 0.0002  # of virtual time: each command takes a moment, or two grants fall on one microsecond


@dataclass(eq=False)
class Step:
    """A packet on its way: whose it is, and the commands in it."""

    process: Process
    pipe: Pipe
    data: bytes
    commands: list[list[bytes]] = field(default_factory=list)
    label: str = ""  # "w1#3", or "" for one that came before in the same situation

    @property
    def signature(self) -> tuple[bytes, ...]:
        """What kind of packet it is: command names, and which script; no keys and no values."""
        words = []
        for command in self.commands:
            name = command[0].upper()
            words.append(name + b" " + command[1] if name.startswith(b"EVAL") else name)
        return tuple(words)

    def __str__(self) -> str:
        return ", ".join(_shown(command) for command in self.commands)


class Pipe:
    """One connection of a client: what it writes become steps, what the server answers it reads."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network = network
        self.process = process
        self.reader = asyncio.StreamReader(loop=asyncio.get_running_loop())
        self.socket = network.connect()
        self.closed = False
        self.expected = 0  # replies that are still to come from the server
        self.withheld = b""  # replies that the client is not given yet
        self.silent = False
        self.unsent = 0  # packets that the client has sent and the server has not received
        self._written = b""
        self._reply = b""

    # ---- as redis.asyncio's writer

    def write(self, data: bytes) -> None:
        """Make a step of each whole packet of commands."""
        self._written += data
        commands, rest = _commands(self._written)
        if commands:
            data, self._written = self._written[: len(self._written) - len(rest)], rest
            self.network.send(Step(self.process, self, data, commands))

    def writelines(self, chunks: Any) -> None:
        """Write several chunks as one packet."""
        self.write(b"".join(chunks))

    async def drain(self) -> None:
        """Return at once: the pipe takes everything."""

    async def wait_closed(self) -> None:
        """Return at once: the pipe is closed by `close`."""

    def is_closing(self) -> bool:
        """Return True once the client's end is closed."""
        return self.closed

    def close(self) -> None:
        """Close the client's end. What it has sent still reaches the server, as in a real network."""
        self.closed = True
        if not self.unsent:
            self.socket.close()
            self.network.pipes.discard(self)

    # ---- for the network

    def execute(self, step: Step, *, deliver: bool = True) -> None:
        """Send the packet to the server and take its reply, unless that is one to wait for."""
        self.unsent -= 1
        self.socket.sendall(step.data)
        self.expected += len(step.commands)
        if self.closed:
            self.network.barrier()
            self.close()
        elif any(command[0].upper() in BLOCKING for command in step.commands):
            self.network.barrier()
            self.receive(block=False, deliver=deliver)
        else:
            self.receive(block=True, deliver=deliver)

    def receive(self, *, block: bool, deliver: bool = True) -> None:
        """Take what the server has answered; with `block` until every reply is there."""
        while self.expected > 0 or not block:
            if not block and not select.select([self.socket], [], [], 0)[0]:
                break
            data = self.socket.recv(1 << 20)
            if not data:
                self.reset()
                return
            self._reply += data
            count, rest = _replies(self._reply)
            whole, self._reply = self._reply[: len(self._reply) - len(rest)], rest
            self.expected = max(0, self.expected - count)
            if deliver and whole:
                self.feed(whole)

    def feed(self, data: bytes) -> None:
        """Give the client its reply, unless the network is silent for it."""
        if self.silent:
            self.withheld += data
        elif not self.closed:
            self.reader.feed_data(data)

    def speak(self) -> None:
        """End of a silence: the client is given what was withheld."""
        self.silent = False
        data, self.withheld = self.withheld, b""
        if data:
            self.feed(data)

    def reset(self) -> None:
        """Break the connection: the client reads an error."""
        if not self.closed:
            self.close()
            self.reader.set_exception(ConnectionResetError("Connection reset by peer"))


class Network:
    """All pipes to one server. `admit` is told of each new step, and decides what becomes of it."""

    def __init__(self, path: str, tell_time: Callable[[float], None]) -> None:
        self.path = path
        self.pipes: set[Pipe] = set()
        self.pending: list[Step] = []
        self.admit: Callable[[Step], None] = self.pending.append
        self.cut: set[Process] = set()
        self.closed = False
        self._tell_time = tell_time
        self._control = self.connect()

    def connect(self) -> socket.socket:
        """Open a real connection to the server."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        found.connect(self.path)
        return found

    def open(self) -> Pipe:
        """Open a connection for the process that runs."""
        process = running_process.get()
        assert process is not None
        if process in self.cut or self.closed:
            raise ConnectionRefusedError(111, "Connection refused")
        pipe = Pipe(self, process)
        self.pipes.add(pipe)
        return pipe

    def send(self, step: Step) -> None:
        """Take a packet from a client: a handshake goes through at once, anything else is a step."""
        if self.closed or step.pipe.closed:
            raise ConnectionResetError(104, "Connection reset by peer")
        step.pipe.unsent += 1
        if step.commands and all(command[0].upper() in HANDSHAKE for command in step.commands):
            step.pipe.execute(step)
        elif not step.process.dead:
            self.admit(step)

    def control(self, *words: str) -> str:
        """Give the server a command of the explorer's own, and return the first line of its reply."""
        self._control.sendall(_packed(words))
        data = b""
        while _replies(data)[0] < 1:
            data += self._control.recv(1 << 16)
        return data[1 : data.index(b"\r\n")].decode()

    def barrier(self) -> None:
        """Wait until the server has answered all that it was sent, and has looked at its clock."""
        self._tell_time(asyncio.get_running_loop().time())
        self.control("PING")
        self.control("PING")

    def poll(self) -> None:
        """Give waiting clients what has come for them: an element for a BLPOP, a message, a timeout."""
        blocked = [pipe for pipe in list(self.pipes) if pipe.expected]
        if blocked:
            self.barrier()
            for pipe in blocked:
                pipe.receive(block=False)

    def end(self) -> None:
        """Close every connection."""
        self.closed = True
        for pipe in list(self.pipes):
            pipe.unsent = 0
            pipe.close()
        self.pending.clear()
        self._control.close()


def _commands(data: bytes) -> tuple[list[list[bytes]], bytes]:
    """Return the whole commands in `data`, and the rest."""
    found, at = list[list[bytes]](), 0
    while at < len(data):
        end = data.find(b"\r\n", at)
        if end < 0:
            break
        words, here = list[bytes](), end + 2
        for _ in range(int(data[at + 1 : end])):
            end = data.find(b"\r\n", here)
            if end < 0:
                return found, data[at:]
            size = int(data[here + 1 : end])
            if len(data) < end + 2 + size + 2:
                return found, data[at:]
            words.append(data[end + 2 : end + 2 + size])
            here = end + 2 + size + 2
        found.append(words)
        at = here
    return found, data[at:]


def _replies(data: bytes) -> tuple[int, bytes]:
    """Return how many whole replies there are in `data`, pushed messages apart, and the rest."""
    count, at = 0, 0
    while at < len(data):
        end = _reply_end(data, at)
        if end < 0:
            break
        count += data[at : at + 1] != b">"
        at = end
    return count, data[at:]


def _reply_end(data: bytes, at: int) -> int:
    line = data.find(b"\r\n", at)
    if line < 0:
        return -1
    kind, here = data[at : at + 1], line + 2
    if kind in b"$=!":
        size = int(data[at + 1 : line])
        here += size + 2 if size >= 0 else 0
        return here if here <= len(data) else -1
    if kind in b"*~>%|":
        for _ in range(max(0, int(data[at + 1 : line])) * (2 if kind in b"%|" else 1)):
            here = _reply_end(data, here)
            if here < 0:
                return -1
    return here


def _packed(words: tuple[str, ...]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)


def _shown(command: list[bytes]) -> str:
    """A command as a reader knows it: scripts by their first characters, long values cut."""
    words = [word.decode(errors="backslashreplace") for word in command]
    name = words[0].upper()
    if name in ("EVAL", "EVALSHA"):
        return f"{name} {' '.join(words[1].split())[:12]}… {' '.join(words[3:4])}"
    return " ".join([name, *(word if len(word) <= 24 else word[:12] + "…" for word in words[1:6])])


def timeout_of(command: list[bytes]) -> float:
    """How long a blocking command may wait, in seconds."""
    name = command[0].upper()
    try:
        if name in (b"BLPOP", b"BRPOP", b"BZPOPMIN", b"BZPOPMAX", b"BLMOVE", b"BRPOPLPUSH"):
            return float(command[-1])
        if name in (b"BLMPOP", b"BZMPOP"):
            return float(command[1])
        if name == b"WAIT":
            return float(command[-1]) / 1000
    except ValueError:
        pass
    return 0.0


def redis_client(network: Network, retries: int) -> Any:
    """Return a redis.asyncio client whose connections are pipes of this network."""
    import redis.asyncio
    from redis.asyncio.retry import Retry
    from redis.backoff import ConstantBackoff

    class PipedConnection(redis.asyncio.Connection):
        async def _connect(self) -> None:
            pipe = network.open()
            self._reader = pipe.reader
            self._writer = pipe  # type: ignore[assignment]

    pool = redis.asyncio.ConnectionPool(connection_class=PipedConnection, retry=Retry(ConstantBackoff(0.01), retries))
    return redis.asyncio.Redis(connection_pool=pool)
