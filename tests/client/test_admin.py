"""The admin client against a real server that plays a router."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from support.ports import free_port

from baton.client.admin import AdminClient
from baton.client.failures import RouterUnreachable
from baton.client.replies import Lease
from baton.common.errors import InvalidRequest, UnknownWorker
from baton.common.grpc_server import GrpcServer
from baton.router.grpc_errors import abort_with
from baton.v1 import admin_pb2 as pb
from baton.v1 import admin_pb2_grpc, common_pb2, diagnostics_pb2, worker_pb2

TRANSFER = bytes(range(16))
ROW = worker_pb2.LeaseRow(
    key=common_pb2.RequestKey(transfer_id=TRANSFER, attempt=2),
    owner="p0@7",
    reader="d0@8",
    blocks=3,
    bytes=4096,
    age_s=1.5,
    expires_in_s=3.5,
    state="open",
    request_id="mine",
    router="router-1",
    why="prefill",
)
WORKER = pb.Worker(
    identity=common_pb2.WorkerIdentity(worker_id="d0", epoch=8, incarnation="x"),
    role=common_pb2.ROLE_DECODE,
    state="draining",
    load=worker_pb2.LoadReport(
        blocks_total=9,
        draining=True,
        steps=77,
        stalled_s=0.5,
        preemptions=4,
        pinned_unowned_bytes=64,
        counters={"moves_total": 3},
    ),
)


class Router(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def ListLeases(
        self, request: pb.ListLeasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListLeasesResponse:
        return pb.ListLeasesResponse(leases=[ROW])

    async def ReapLeases(
        self, request: pb.ReapLeasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReapLeasesResponse:
        self.asked.append(
            ([(key.transfer_id, key.attempt) for key in request.keys], request.dry_run)
        )
        return pb.ReapLeasesResponse(reaped=[ROW])

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainWorkerResponse:
        if request.worker_id != "d0":
            await abort_with(context, UnknownWorker("known are d0"))
        self.asked.append("drain")
        return pb.DrainWorkerResponse(worker=WORKER)

    async def ListSteps(
        self, request: pb.ListStepsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListStepsResponse:
        self.asked.append((request.worker_id, request.last))
        history = diagnostics_pb2.StepHistory(
            steps=[
                diagnostics_pb2.Step(number=number, took_s=0.5, replayed=replayed)
                for number, replayed in ((7, True), (8, False), (9, None))
            ],
            summary=diagnostics_pb2.StepSummary(steps=3, window_s=2.0, tokens=10, prompt_tokens=4),
        )
        return pb.ListStepsResponse(worker=WORKER.identity, history=history)

    async def ResumeWorker(
        self, request: pb.ResumeWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ResumeWorkerResponse:
        if request.worker_id != "d0":
            await abort_with(context, UnknownWorker("known are d0"))
        self.asked.append("resume")
        return pb.ResumeWorkerResponse(worker=WORKER)


@asynccontextmanager
async def connected(router: Router) -> AsyncIterator[AdminClient]:
    server = GrpcServer()
    admin_pb2_grpc.add_AdminServiceServicer_to_server(router, server.server)
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with AdminClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await server.stop(0)


async def test_a_lease_says_whose_it_is_and_is_reaped_by_its_key() -> None:
    router = Router()
    async with connected(router) as client:
        [lease] = await client.leases()
        assert lease == Lease(
            transfer_id=TRANSFER.hex(),
            attempt=2,
            owner="p0@7",
            reader="d0@8",
            blocks=3,
            bytes=4096,
            age_s=1.5,
            expires_in_s=3.5,
            state="open",
            request_id="mine",
            router="router-1",
            why="prefill",
        )
        assert lease.id == f"{TRANSFER.hex()}/2"
        assert await client.reap([lease]) == [lease]
        assert await client.reap(dry_run=True) == [lease]
    assert router.asked == [([(TRANSFER, 2)], False), ([], True)]


async def test_reaping_a_list_that_is_empty_reaps_no_orphans() -> None:
    router = Router()
    async with connected(router) as client:
        assert await client.reap([]) == []
    assert router.asked == []


async def test_a_worker_is_drained_and_resumed() -> None:
    router = Router()
    async with connected(router) as client:
        worker = await client.drain("d0")
        assert (worker.life, worker.state, worker.draining) == ("d0@8", "draining", True)
        assert (worker.steps, worker.stalled_s, worker.preemptions) == (77, 0.5, 4)
        assert (worker.pinned_unowned_bytes, worker.counters) == (64, {"moves_total": 3})
        assert (await client.resume("d0")).id == "d0"
        for ask in (client.drain, client.resume):
            with pytest.raises(UnknownWorker, match="known are d0"):
                await ask("d9")
    assert router.asked == ["drain", "resume"]


async def test_steps_say_how_they_ran_if_a_gpu_ran_them() -> None:
    router = Router()
    async with connected(router) as client:
        history = await client.steps("d0", 3)
        assert history.worker == "d0@8"
        assert [(one.number, one.replayed) for one in history.steps] == [
            (7, True),
            (8, False),
            (9, None),
        ]
        assert (history.summary.tokens_per_s, history.summary.prompt_tokens) == (5.0, 4)
        for wrong in (0, -1, 2**32):
            with pytest.raises(InvalidRequest, match=f"last is a number from 1 on, not {wrong}"):
                await client.steps("d0", wrong)
            with pytest.raises(InvalidRequest, match=f"steps is a number from 1 on, not {wrong}"):
                await client.start_profile("d0", wrong)
    assert router.asked == [("d0", 3)]


async def test_nobody_at_the_address() -> None:
    async with AdminClient(f"127.0.0.1:{free_port()}") as client:
        for ask in (client.workers, client.leases, client.reap):
            with pytest.raises(RouterUnreachable):
                await ask()
        for ask_of in (client.drain, client.steps, client.start_profile, client.stop_profile):
            with pytest.raises(RouterUnreachable):
                await ask_of("d0")
