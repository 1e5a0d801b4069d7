"""grpc.health.v1 of a Baton server: what it answers follows what the server is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from baton.common.grpc_options import STREAM_WINDOW, channel_options
from baton.common.grpc_server import GrpcServer

SERVICE = "baton.v1.WorkerService"
SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[GrpcServer, health_pb2_grpc.HealthStub]]:
    server = GrpcServer(STREAM_WINDOW)
    server.add(SERVICE)
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=channel_options()
        ) as channel:
            yield server, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_follows(name: str) -> None:
    async with serving() as (server, health):

        async def status() -> int:
            answer = await health.Check(pb.HealthCheckRequest(service=name))
            return int(answer.status)

        assert await status() == SERVING
        await server.set_serving(False)
        await server.set_serving(False)
        assert await status() == NOT_SERVING
        await server.set_serving(True)
        assert await status() == SERVING
