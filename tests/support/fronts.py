"""A front over a scripted source, on real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import uvicorn
from starlette.applications import Starlette

from baton.common.clock import ManualClock
from baton.common.grpc_server import GrpcServer
from baton.common.randomness import SeededRandomness
from baton.router.catalog import FixedCatalog
from baton.router.grpc_front import InferenceServicer
from baton.router.http_front import build_app
from baton.router.intake import Intake
from baton.router.scripted import ScriptedSource
from baton.router.served_model import ServedModel
from baton.v1 import inference_pb2_grpc


@dataclass
class Fronts:
    """One model and one scripted source behind both fronts."""

    model: ServedModel
    source: ScriptedSource
    catalog: FixedCatalog = field(init=False)
    intake: Intake = field(init=False)
    app: Starlette = field(init=False)

    def __post_init__(self) -> None:
        self.catalog = FixedCatalog([self.model])
        self.intake = Intake(self.catalog, SeededRandomness(5))
        self.app = build_app(
            self.source, self.catalog, self.intake, timeout_s=9.0, clock=ManualClock(1000)
        )

    @asynccontextmanager
    async def http(self) -> AsyncIterator[int]:
        """uvicorn on a free port, which is yielded."""
        config = uvicorn.Config(
            self.app, port=0, log_config=None, access_log=False, lifespan="off", http="httptools"
        )
        server = uvicorn.Server(config)
        listener = config.bind_socket()
        # From here on connections wait, instead of being refused until uvicorn has started.
        listener.listen()
        serving = asyncio.create_task(server._serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving

    @asynccontextmanager
    async def grpc(self) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
        """grpc.aio on a free port, and a stub for it."""
        server = GrpcServer()
        servicer = InferenceServicer(self.source, self.catalog, self.intake, timeout_s=9.0)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
        port = server.listen("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield inference_pb2_grpc.InferenceServiceStub(channel)
        finally:
            await server.stop(0)
