"""AdminService: what an operator asks a router, on a port of its own."""

from typing import Any

import grpc

from baton.common.codec import (
    identity_to_pb,
    lease_row_to_pb,
    load_to_pb,
    role_to_pb,
)
from baton.router.dispatch import Dispatch
from baton.router.fleet import AttachedWorker, Fleet
from baton.v1 import admin_pb2 as pb
from baton.v1 import admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Reads the router's own state; never dials a worker."""

    def __init__(self, fleet: Fleet, dispatch: Dispatch) -> None:
        self._fleet = fleet
        self._dispatch = dispatch

    async def ListWorkers(
        self,
        request: pb.ListWorkersRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ListWorkersResponse:
        workers = sorted(self._fleet.workers(), key=lambda worker: str(worker.identity))
        return pb.ListWorkersResponse(workers=[self._worker(worker) for worker in workers])

    async def ListLeases(
        self,
        request: pb.ListLeasesRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ListLeasesResponse:
        rows = [row for worker in self._fleet.workers() for row in worker.load.leases]
        rows.sort(key=lambda row: -row.age_s)
        return pb.ListLeasesResponse(leases=[lease_row_to_pb(row) for row in rows])

    def _worker(self, worker: AttachedWorker) -> pb.Worker:
        hello = worker.hello
        return pb.Worker(
            identity=identity_to_pb(worker.identity),
            role=role_to_pb(worker.record.role),
            state=worker.state.value,
            address=worker.record.address,
            link_address=hello.link_address if hello is not None else "",
            pid=hello.pid if hello is not None else 0,
            model=worker.record.model,
            load=load_to_pb(worker.load),
            fingerprint=worker.record.fingerprint,
            block_size=hello.model.block_size if hello is not None else 0,
            requests=self._dispatch.num_requests_on(worker.identity),
        )
