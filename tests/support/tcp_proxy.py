"""A TCP proxy on loopback that counts what passes: the control plane seen from outside."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CountingProxy:
    """Forwards `port` to `target`; `num_bytes` counts both directions."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.num_bytes = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(
            self._pump(reader, upstream_writer), self._pump(upstream_reader, writer)
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.num_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            self.num_bytes += 0
        finally:
            writer.close()


@asynccontextmanager
async def counting_proxy(target: int) -> AsyncIterator[CountingProxy]:
    proxy = CountingProxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
