"""A TCP proxy for one link: it makes a network slow, partitions it, or loses exactly one reply.

async with TcpProxy(server.host, server.port) as link:
    client = Redis.from_url(link.through(server.url))
    link.drop()             # a partition: nothing arrives on either side, and nothing is refused
    link.heal()
    link.cut_reply()        # the next request is carried out, but its answer never arrives
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK_BYTES = 1 << 16
MAX_CHUNKS = 64  # buffered in each direction of a connection; the kernel holds the rest

Chunks = asyncio.Queue[tuple[float, bytes]]  # when each is due, by the clock of the loop


class TcpProxy:
    """A proxy from 127.0.0.1:`port` to a server. A fault applies to every connection, also to later ones."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0  # known once the proxy is entered
        self.delay_seconds = 0.0
        self.losing = False
        self._replies_left = 0  # until one is cut; 0 or less: none will be
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset_all()
        await asyncio.gather(*(link.task for link in self._links))

    def through(self, url: str) -> str:
        """Return the URL with the address of this proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    def delay(self, seconds: float) -> None:
        """Delay each direction by so many seconds from now on. The order is kept."""
        if seconds < 0:
            raise ValueError(f"delay(seconds={seconds}): give at least 0")
        self.delay_seconds = seconds

    def drop(self) -> None:
        """Start a partition: every byte in both directions is lost, and neither side gets an error."""
        self.losing = True

    def heal(self) -> None:
        """End a partition. Connections that lost bytes are reset; the others continue."""
        self.losing = False
        for link in self._links:
            if link.lost:
                link.reset()

    def cut_reply(self, n: int = 1) -> None:
        """Reset a connection in place of the n-th reply from now. The server has carried out the request.

        A reply is what the server sends in one piece. The handshake of a client counts, so connect first.
        """
        if n < 1:
            raise ValueError(f"cut_reply({n}): give at least 1, replies are counted from 1")
        self._replies_left = n

    def reset_all(self) -> None:
        """Reset every connection, on both sides. New connections are served."""
        for link in self._links:
            link.reset()

    def _is_reply_to_cut(self) -> bool:
        self._replies_left -= 1
        return self._replies_left == 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, writer)
        self._links.add(link)
        try:
            await link.run(reader)
        finally:
            self._links.remove(link)


class _Link:
    """A connection of a client together with its connection to the server."""

    def __init__(self, proxy: TcpProxy, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.proxy, self.task = proxy, task
        self.lost = False  # whether bytes were lost
        self.writers = [client]

    async def run(self, requests: asyncio.StreamReader) -> None:
        """Forward both directions until both sides have closed, or one has reset."""
        try:
            replies, server = await asyncio.open_connection(*self.proxy.target)
            self.writers.append(server)
            async with asyncio.TaskGroup() as group:
                for kind, reader, writer in (("requests", requests, server), ("replies", replies, self.writers[0])):
                    queue: Chunks = asyncio.Queue(MAX_CHUNKS)
                    group.create_task(self._receive(reader, queue))
                    group.create_task(self._forward(kind, queue, writer))
            for writer in self.writers:
                writer.close()
        except* (OSError, asyncio.CancelledError):  # one side has reset, or the proxy resets this link
            self._abort()

    def reset(self) -> None:
        """Reset both connections."""
        self._abort()
        self.task.cancel()

    def _abort(self) -> None:
        for writer in self.writers:
            if not writer.is_closing():  # with a linger time of 0 the kernel sends a reset
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    async def _receive(self, reader: asyncio.StreamReader, queue: Chunks) -> None:
        clock = asyncio.get_running_loop().time
        while data := await reader.read(CHUNK_BYTES):
            await queue.put((clock() + self.proxy.delay_seconds, data))
        await queue.put((clock() + self.proxy.delay_seconds, b""))

    async def _forward(self, kind: str, queue: Chunks, writer: asyncio.StreamWriter) -> None:
        data = b"\0"
        while data:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if self.proxy.losing:
                self.lost = True
            elif kind == "replies" and data and self.proxy._is_reply_to_cut():
                raise ConnectionResetError("cut")
            elif data:
                writer.write(data)
                await writer.drain()
            else:
                writer.write_eof()
