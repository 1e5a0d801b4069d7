"""A question about an engine whose worker does not answer, or answers with an error."""

from typing import Any

import grpc
import pytest
from support.control_streams import FAST, IDENTITY
from support.ports import free_port

from baton.common.clock import ManualClock
from baton.common.codec import error_to_pb
from baton.common.errors import AlreadyExists, WorkerLost
from baton.common.grpc_server import GrpcServer
from baton.common.sampling import Role
from baton.metadata.registry import WorkerRecord
from baton.router.attached import AttachedWorker
from baton.router.diagnostics import begin_profile, end_profile, read_steps
from baton.v1 import diagnostics_pb2 as pb
from baton.v1 import diagnostics_pb2_grpc


class Worker(diagnostics_pb2_grpc.DiagnosticsServiceServicer):
    async def BeginProfile(
        self, request: pb.BeginProfileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.BeginProfileResponse:
        return pb.BeginProfileResponse(error=error_to_pb(AlreadyExists("one runs")))


def worker_at(port: int) -> AttachedWorker:
    record = WorkerRecord(
        identity=IDENTITY,
        role=Role.DECODE,
        address=f"127.0.0.1:{port}",
        fingerprint="f",
        model="m",
        state="ready",
    )
    return AttachedWorker(record, ManualClock(), FAST)


async def test_a_worker_that_is_not_there_is_named_with_its_address() -> None:
    port = free_port()
    worker = worker_at(port)
    gone = rf"{IDENTITY} does not answer at 127\.0\.0\.1:{port} \(UNAVAILABLE\)"
    with pytest.raises(WorkerLost, match=gone):
        await read_steps(worker, 1)
    with pytest.raises(WorkerLost, match=gone):
        await begin_profile(worker, 1)
    with pytest.raises(WorkerLost, match=gone):
        await end_profile(worker)


async def test_what_a_worker_has_against_it_is_raised_as_its_own_error() -> None:
    server = GrpcServer()
    diagnostics_pb2_grpc.add_DiagnosticsServiceServicer_to_server(Worker(), server.server)
    worker = worker_at(server.listen("127.0.0.1:0"))
    await server.start()
    try:
        with pytest.raises(AlreadyExists, match="one runs"):
            await begin_profile(worker, 1)
    finally:
        await server.stop(0)


async def test_a_worker_of_an_older_release_has_no_such_service() -> None:
    server = GrpcServer()
    worker = worker_at(server.listen("127.0.0.1:0"))
    await server.start()
    try:
        with pytest.raises(WorkerLost, match="UNIMPLEMENTED"):
            await read_steps(worker, 1)
    finally:
        await server.stop(0)
