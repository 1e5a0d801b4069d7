"""The proxy does what its name says: each rule, seen from both ends of a real connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.tcp_proxy import MAX_HELD_BYTES, TcpProxy, tcp_proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

LIMIT_S = 10.0
# Long enough to be sure that nothing comes.
QUIET_S = 0.1


class Line:
    """One connection through the proxy, seen from both ends."""

    def __init__(self, client: Streams, server: Streams) -> None:
        self.from_server, self.to_server = client
        self.from_client, self.to_client = server

    def close(self) -> None:
        self.to_server.transport.abort()
        self.to_client.transport.abort()


class Backend:
    """A server that hands out what connects."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[Streams] = asyncio.Queue(maxsize=16)
        self.port = 0

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.put_nowait((reader, writer))


@asynccontextmanager
async def backend() -> AsyncIterator[Backend]:
    found = Backend()
    server = await asyncio.start_server(found.accept, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()


class Ends(Line):
    """A first line through a proxy, and more when asked for."""

    def __init__(self, proxy: TcpProxy, backend: Backend, first: tuple[Streams, Streams]) -> None:
        super().__init__(*first)
        self.proxy = proxy
        self._backend = backend
        self._further: list[Line] = []

    async def another(self) -> Line:
        self._further.append(Line(*await connect(self.proxy, self._backend)))
        return self._further[-1]

    def close(self) -> None:
        super().close()
        for line in self._further:
            line.close()


async def connect(proxy: TcpProxy, backend: Backend) -> tuple[Streams, Streams]:
    count = proxy.num_connections
    client = await asyncio.open_connection("127.0.0.1", proxy.port)
    server = await backend.accepted.get()
    await proxy.wait_for_connections(count + 1)
    return client, server


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    async with backend() as behind, tcp_proxy(behind.port) as proxy, asyncio.timeout(LIMIT_S):
        found = Ends(proxy, behind, await connect(proxy, behind))
        try:
            yield found
        finally:
            found.close()


async def nothing_comes(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(QUIET_S):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_both_ways_and_are_counted() -> None:
    async with ends() as at:
        payload = bytes(range(256)) * 4096
        at.to_server.write(payload)
        assert await at.from_client.readexactly(len(payload)) == payload
        at.to_client.write(b"answer")
        assert await at.from_server.readexactly(6) == b"answer"
        assert at.proxy.to_server.num_bytes == len(payload)
        assert at.proxy.to_client.num_bytes == 6
        assert (at.proxy.num_bytes, at.proxy.num_connections) == (len(payload) + 6, 1)


async def test_the_end_of_one_side_is_passed_on_and_the_other_may_go_on() -> None:
    async with ends() as at:
        at.to_server.write(b"all")
        at.to_server.write_eof()
        assert await at.from_client.read() == b"all"
        at.to_client.write(b"late answer")
        at.to_client.write_eof()
        assert await at.from_server.read() == b"late answer"


async def test_a_delay_moves_bytes_in_one_direction_and_keeps_the_throughput() -> None:
    loop = asyncio.get_running_loop()
    async with ends() as at:
        at.proxy.to_client.delay(0.2)
        payload = bytes(512 * 1024)
        started = loop.time()
        at.to_client.write(payload)
        await at.from_server.readexactly(1)
        assert loop.time() - started >= 0.2
        await at.from_server.readexactly(len(payload) - 1)
        assert loop.time() - started < 1.5, "each chunk is late by itself, not behind the last"
        started = loop.time()
        at.to_server.write(b"x")
        await at.from_client.readexactly(1)
        assert loop.time() - started < 0.2


async def test_a_limit_is_the_rate_of_one_direction() -> None:
    loop = asyncio.get_running_loop()
    async with ends() as at:
        at.proxy.to_server.limit(1_000_000)
        started = loop.time()
        at.to_server.write(bytes(300_000))
        await at.from_client.readexactly(300_000)
        assert loop.time() - started >= 0.3
        at.proxy.to_server.heal()
        started = loop.time()
        at.to_server.write(bytes(900_000))
        await at.from_client.readexactly(900_000)
        assert loop.time() - started < 0.9


async def test_a_stalled_direction_loses_nothing_and_the_other_goes_on() -> None:
    async with ends() as at:
        at.proxy.to_server.stall()
        at.to_server.write(b"waits")
        assert await nothing_comes(at.from_client)
        at.to_client.write(b"passes")
        assert await at.from_server.readexactly(6) == b"passes"
        at.proxy.heal()
        assert await at.from_client.readexactly(5) == b"waits"


async def test_a_partition_stops_both_ways_and_whoever_writes_on() -> None:
    async with ends() as at:
        at.proxy.stall()
        at.to_client.write(b"a")
        at.to_server.write(bytes(64 * MAX_HELD_BYTES))
        assert await nothing_comes(at.from_client)
        assert await nothing_comes(at.from_server)
        drain = asyncio.create_task(at.to_server.drain())
        done, _ = await asyncio.wait([drain], timeout=QUIET_S)
        assert not done, "the proxy holds a bounded part; the rest stays with the writer"
        at.proxy.heal()
        assert await at.from_server.readexactly(1) == b"a"
        await at.from_client.readexactly(64 * MAX_HELD_BYTES)
        await drain


async def test_a_reset_reaches_both_sides_and_later_connections_are_served() -> None:
    async with ends() as at:
        at.proxy.reset()
        for reader in (at.from_client, at.from_server):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        assert await nothing_comes((await at.another()).from_server)


async def test_a_half_open_connection_looks_alive_to_the_client() -> None:
    async with ends() as at:
        at.proxy.leave_half_open()
        with pytest.raises(ConnectionResetError):
            await at.from_client.read()
        at.to_server.write(b"is anybody there?")
        await at.to_server.drain()
        assert await nothing_comes(at.from_server)
        at.proxy.reset()
        with pytest.raises(ConnectionResetError):
            await at.from_server.read()


@pytest.mark.parametrize("allowed", [1, 1000, 100_000])
async def test_a_cut_comes_after_so_many_bytes(allowed: int) -> None:
    async with ends() as at:
        at.to_server.write(b"before")
        await at.from_client.readexactly(6)
        at.proxy.to_server.cut_after(allowed)
        at.to_server.write(bytes(200_000))
        with pytest.raises(ConnectionResetError):
            await at.from_server.read()
        assert at.proxy.to_server.num_bytes == 6 + allowed
        assert await nothing_comes((await at.another()).from_server), "one cut, once"


async def test_one_byte_is_flipped() -> None:
    async with ends() as at:
        at.to_server.write(b"......")
        await at.from_client.readexactly(6)
        at.proxy.to_server.flip(100_001, mask=0x81)
        payload = bytes(200_000)
        at.to_server.write(payload)
        arrived = await at.from_client.readexactly(len(payload))
        assert [i for i, byte in enumerate(arrived) if byte] == [100_001]
        assert arrived[100_001] == 0x81


async def test_new_connections_are_refused_until_it_opens_again() -> None:
    async with ends() as at:
        port = at.proxy.port
        at.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        at.to_server.write(b"old ones go on")
        await at.from_client.readexactly(14)
        await at.proxy.open()
        assert at.proxy.port == port
        await at.another()


async def test_a_dead_target_resets_whoever_connects() -> None:
    async with backend() as behind:
        dead = behind.port
    async with asyncio.timeout(LIMIT_S), tcp_proxy(dead) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.transport.abort()
