"""A TCP proxy for one link, so that a network can be slow, cut in two, or lose just the one reply that matters.

async with TcpProxy(server.host, server.port) as link:
    client = Redis.from_url(link.through(server.url))
    link.drop()             # a partition: both sides fall silent, nothing is refused
    link.heal()
    link.cut_reply()        # the next request is carried out, but its answer never arrives
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 1 << 16
UNDER_WAY = 64  # chunks in each direction of a connection; what is more waits in the kernel


class TcpProxy:
    """Forwards 127.0.0.1:`port` to a server. Its faults concern all connections, those still to come included."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0  # known once it is entered
        self.accepted = 0  # connections so far
        self.seconds = 0.0
        self.losing = {"requests": False, "replies": False}
        self._replies_left = 0  # until one is cut; at 0 it is, below none is any more
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [link.task for link in self._links]
        self.reset_all()
        await asyncio.gather(*tasks)

    def through(self, url: str) -> str:
        """The same URL by way of this proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    def delay(self, seconds: float) -> None:
        """From now on each way takes so long; order is kept."""
        if seconds < 0:
            raise ValueError(f"a delay is at least 0 seconds, not {seconds}")
        self.seconds = seconds

    def drop(self) -> None:
        """A partition: from now on every byte is lost, both ways, and neither side is told."""
        self.losing = {"requests": True, "replies": True}

    def drop_replies(self) -> None:
        """Half a partition: the server hears and obeys, and every answer is lost."""
        self.losing = {"requests": False, "replies": True}

    def heal(self) -> None:
        """Ends a partition. Connections that lost bytes are reset, as they can't go on with a gap; the others go on."""
        self.losing = {"requests": False, "replies": False}
        for link in self._links:
            if link.lost:
                link.reset()

    def cut_reply(self, n: int = 1) -> None:
        """Resets a connection in place of the n-th reply from now: its request has been carried out all the same.

        A reply is what the server sends in one go, a client's handshake included: connect first, then cut.
        """
        if n < 1:
            raise ValueError(f"replies are counted from 1, not {n}")
        self._replies_left = n

    def reset_all(self) -> None:
        """Resets every connection, on both sides. New ones are served."""
        for link in self._links:
            link.reset()

    def _cuts_this(self) -> bool:
        self._replies_left -= 1
        return self._replies_left == 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, writer)
        self._links.add(link)
        try:
            await link.run(reader)
        finally:
            self._links.remove(link)


class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.proxy, self.task, self.lost = proxy, task, False
        self.writers = [client]

    async def run(self, requests: asyncio.StreamReader) -> None:
        try:
            replies, server = await asyncio.open_connection(*self.proxy.target)
            self.writers.append(server)
            async with asyncio.TaskGroup() as group:
                for kind, reader, writer in (("requests", requests, server), ("replies", replies, self.writers[0])):
                    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY)
                    group.create_task(self._take(reader, queue))
                    group.create_task(self._give(kind, queue, writer))
            for writer in self.writers:
                writer.close()
        except* (OSError, asyncio.CancelledError):  # one side has reset, or a fault or the end of the proxy came
            self._abort()

    def reset(self) -> None:
        self._abort()
        self.task.cancel()

    def _abort(self) -> None:
        for writer in self.writers:
            if not writer.is_closing():  # lingering for no time at all makes the kernel send a reset
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        clock = asyncio.get_running_loop().time
        while data := await reader.read(CHUNK):
            await queue.put((clock() + self.proxy.seconds, data))
        await queue.put((clock() + self.proxy.seconds, b""))

    async def _give(self, kind: str, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        data = b"\0"
        while data:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if self.proxy.losing[kind]:
                self.lost = True
            elif kind == "replies" and data and self.proxy._cuts_this():
                raise ConnectionResetError("cut")
            elif data:
                writer.write(data)
                await writer.drain()
            else:
                writer.write_eof()
