"""A TCP proxy on loopback: what passes is counted, and goes wrong as a test says.

    async with tcp_proxy(port) as proxy:
        ... dial proxy.port ...
        proxy.to_server.delay(0.05)         # each direction by itself
        proxy.to_client.stall()             # one-way loss; `proxy.stall()` is a partition
        proxy.reset()                       # RST on both sides of every connection

The rules hold for all connections, those that exist and those that come. A stalled direction loses
nothing: the bytes wait, as they would for a retransmission, and pass once the direction heals.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.common.periodic import wait_for

CHUNK_BYTES = 65536
# Per connection and direction: what a delayed or slow direction holds before it stops reading.
MAX_HELD_BYTES = 1 << 20
# A limited direction writes so much of a second at once.
PACE_S = 0.02
# SO_LINGER on, 0 s: close sends RST and drops what is not sent.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Direction:
    """What happens to the bytes that go one way; changed by a test at any time."""

    def __init__(self, proxy: "TcpProxy") -> None:
        self.num_bytes = 0
        self._proxy = proxy
        self._latency_s = 0.0
        self._bytes_per_s: float | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        # Offsets into `num_bytes`.
        self._cut_at: int | None = None
        self._flips: dict[int, int] = {}

    def delay(self, seconds: float) -> None:
        """Each byte passes so much later, in order; throughput stays."""
        self._latency_s = seconds

    def limit(self, bytes_per_s: float | None) -> None:
        """The link is no faster than that; None: as fast as it is."""
        self._bytes_per_s = bytes_per_s

    def stall(self) -> None:
        """Nothing passes until `heal`; neither side is told."""
        self._flows.clear()

    def cut_after(self, num_bytes: int) -> None:
        """So many more bytes pass, then every connection is reset."""
        self._cut_at = self.num_bytes + num_bytes

    def flip(self, offset: int, mask: int = 1) -> None:
        """The byte after `offset` more bytes arrives changed in the bits of `mask`."""
        assert 0 < mask < 256, mask
        self._flips[self.num_bytes + offset] = mask

    def heal(self) -> None:
        """Everything passes as it is; what waited passes now."""
        self._latency_s, self._bytes_per_s, self._cut_at = 0.0, None, None
        self._flips.clear()
        self._flows.set()

    # --- for connections ---

    @property
    def latency_s(self) -> float:
        return self._latency_s

    async def admit(self, data: bytes) -> bytes:
        """The part of `data` that may pass now, changed as told; empty: the line was cut."""
        await self._flows.wait()
        if self._bytes_per_s is not None:
            data = data[: max(1, int(self._bytes_per_s * PACE_S))]
            await wait_for(asyncio.Event(), len(data) / self._bytes_per_s)
            await self._flows.wait()
        if self._cut_at is not None:
            data = data[: self._cut_at - self.num_bytes]
        if data:
            data = self._flipped(data)
        return data

    def has_passed(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self._cut_at is not None and self.num_bytes >= self._cut_at:
            self._cut_at = None
            self._proxy.reset()

    def _flipped(self, data: bytes) -> bytes:
        here = range(self.num_bytes, self.num_bytes + len(data))
        changed = bytearray(data)
        for offset in [offset for offset in self._flips if offset in here]:
            changed[offset - self.num_bytes] ^= self._flips.pop(offset)
        return bytes(changed)


class _Connection:
    """Two sockets and a pump each way."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._client = client
        self._server = server
        self._pumps: list[asyncio.Task[None]] = []
        self._is_half_open = False

    async def run(
        self, to_server: "_Pump", to_client: "_Pump", from_client: asyncio.StreamReader
    ) -> None:
        """Returns when both directions have ended, or either was reset."""
        pumps = self._pumps = [asyncio.create_task(pump.run()) for pump in (to_server, to_client)]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            if self._is_half_open:
                # The client's bytes are taken and lead nowhere, until it gives up.
                await _swallow(from_client)
        finally:
            self.reset()
            for pump in pumps:
                pump.cancel()
            for ended in await asyncio.gather(*pumps, return_exceptions=True):
                if ended is not None and not isinstance(
                    ended, ConnectionError | asyncio.CancelledError
                ):
                    raise ended

    def reset(self) -> None:
        _reset(self._client)
        _reset(self._server)

    def leave_half_open(self) -> None:
        self._is_half_open = True
        for pump in self._pumps:
            pump.cancel()
        _reset(self._server)


class _Pump:
    """Carries one direction of one connection, until either side ends it."""

    def __init__(
        self, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        self._direction = direction
        self._source = source
        self._sink = sink
        # What was read and has not passed: (when it may, bytes).
        self._held: deque[tuple[float, bytes]] = deque()
        self._num_held = 0
        self._changed = asyncio.Event()
        self._has_ended = False

    async def run(self) -> None:
        """Returns at the end of the source, ConnectionError when either side was reset."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write()
            await reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        try:
            self._sink.write_eof()
        except OSError as error:
            # Closed both ways meanwhile: there is no end left to announce.
            raise ConnectionResetError("the other side has gone") from error

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await self._source.read(CHUNK_BYTES):
                self._held.append((loop.time() + self._direction.latency_s, data))
                self._num_held += len(data)
                self._changed.set()
                while self._num_held > MAX_HELD_BYTES:
                    await self._wait_for_change()
        finally:
            self._has_ended = True
            self._changed.set()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._held or not self._has_ended:
            if not self._held:
                await self._wait_for_change()
                continue
            due, data = self._held.popleft()
            if (early_s := due - loop.time()) > 0:
                await wait_for(asyncio.Event(), early_s)
            passing = await self._direction.admit(data)
            if len(passing) < len(data):
                self._held.appendleft((due, data[len(passing) :]))
            self._sink.write(passing)
            await self._sink.drain()
            self._num_held -= len(passing)
            self._changed.set()
            self._direction.has_passed(len(passing))

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class TcpProxy:
    """Forwards `port` to `target`, both of loopback."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.num_connections = 0
        self.to_server = Direction(self)
        self.to_client = Direction(self)
        self._connections: set[_Connection] = set()
        self._connected = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def num_bytes(self) -> int:
        """That passed, both ways."""
        return self.to_server.num_bytes + self.to_client.num_bytes

    async def open(self) -> None:
        """Listen, at the same port as before after a `refuse`."""
        assert self._server is None, "open already"
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def wait_for_connections(self, count: int) -> None:
        """Until so many have been connected to the target, ended ones included."""
        async with self._connected:
            await self._connected.wait_for(lambda: self.num_connections >= count)

    def refuse(self) -> None:
        """New connections are refused, as by a process that is dead; until `open`."""
        assert self._server is not None, "refusing already"
        self._server.close()
        self._server = None

    def stall(self) -> None:
        """A partition: nothing passes either way, and nobody is told."""
        self.to_server.stall()
        self.to_client.stall()

    def heal(self) -> None:
        self.to_server.heal()
        self.to_client.heal()

    def reset(self) -> None:
        """RST to both sides of every connection; later ones are served."""
        for connection in list(self._connections):
            connection.reset()

    def leave_half_open(self) -> None:
        """The server's side of every connection is gone, and the client hears nothing of it."""
        for connection in list(self._connections):
            connection.leave_half_open()

    async def close(self) -> None:
        if self._server is not None:
            self.refuse()
        self.reset()
        self.heal()
        for task in list(self._tasks):
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if ended is not None and not isinstance(ended, asyncio.CancelledError):
                raise ended

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio's streams complain of theirs when it is cancelled.
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
        except ConnectionError:
            _reset(writer)
            return
        connection = _Connection(writer, upstream)
        self._connections.add(connection)
        async with self._connected:
            self.num_connections += 1
            self._connected.notify_all()
        try:
            await connection.run(
                _Pump(self.to_server, reader, upstream),
                _Pump(self.to_client, upstream_reader, writer),
                reader,
            )
        finally:
            self._connections.discard(connection)


@asynccontextmanager
async def tcp_proxy(target: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(target)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    transport = writer.transport
    if not transport.is_closing():
        found: socket.socket = transport.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    transport.abort()


async def _swallow(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(CHUNK_BYTES):
            pass
    except ConnectionError:
        return
