"""AdminService: what an operator asks a router, on a port of its own."""

from collections.abc import Iterator
from typing import Any

import grpc

from baton.common.codec import identity_to_pb, key_from_pb, role_to_pb
from baton.common.control_codec import lease_row_to_pb, load_to_pb
from baton.common.errors import BatonError, UnknownWorker
from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import LeaseRow, Reap, SetDraining
from baton.router.diagnostics import begin_profile, end_profile, read_steps
from baton.router.dispatch import Dispatch
from baton.router.fleet import AttachedWorker, Fleet, WorkerState
from baton.router.grpc_errors import abort_with
from baton.v1 import admin_pb2 as pb
from baton.v1 import admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers from the router's own state; what it asks of a worker goes over its stream.

    What a worker then did shows in its next load reports. Questions about an engine are passed on
    and answered by the worker.
    """

    def __init__(self, fleet: Fleet, dispatch: Dispatch, router_id: RouterId) -> None:
        self._fleet = fleet
        self._dispatch = dispatch
        self._router_id = router_id

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
        rows = [row for _, row in self._leases()]
        return pb.ListLeasesResponse(leases=[lease_row_to_pb(row) for row in _oldest_first(rows)])

    async def ReapLeases(
        self,
        request: pb.ReapLeasesRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ReapLeasesResponse:
        try:
            wanted = {key_from_pb(key) for key in request.keys}
        except BatonError as error:
            await abort_with(context, error)
        doomed = [
            (owner, row)
            for owner, row in self._leases()
            if (row.key in wanted if wanted else self._is_orphan(row))
        ]
        if not request.dry_run:
            by_owner: dict[WorkerIdentity, list[RequestKey]] = {}
            for owner, row in doomed:
                by_owner.setdefault(owner, []).append(row.key)
            for owner, keys in by_owner.items():
                self._fleet.send(owner, Reap(tuple(keys)))
        rows = _oldest_first([row for _, row in doomed])
        return pb.ReapLeasesResponse(reaped=[lease_row_to_pb(row) for row in rows])

    async def DrainWorker(
        self,
        request: pb.DrainWorkerRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.DrainWorkerResponse:
        try:
            return pb.DrainWorkerResponse(worker=self._set_draining(request.worker_id, True))
        except UnknownWorker as error:
            await abort_with(context, error)

    async def ResumeWorker(
        self,
        request: pb.ResumeWorkerRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ResumeWorkerResponse:
        try:
            return pb.ResumeWorkerResponse(worker=self._set_draining(request.worker_id, False))
        except UnknownWorker as error:
            await abort_with(context, error)

    async def ListSteps(
        self,
        request: pb.ListStepsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ListStepsResponse:
        try:
            worker = self._newest(request.worker_id)
            history = await read_steps(worker, request.last)
        except BatonError as error:
            await abort_with(context, error)
        return pb.ListStepsResponse(worker=identity_to_pb(worker.identity), history=history)

    async def StartProfile(
        self,
        request: pb.StartProfileRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.StartProfileResponse:
        try:
            worker = self._newest(request.worker_id)
            path = await begin_profile(worker, request.steps)
        except BatonError as error:
            await abort_with(context, error)
        return pb.StartProfileResponse(worker=identity_to_pb(worker.identity), path=path)

    async def StopProfile(
        self,
        request: pb.StopProfileRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.StopProfileResponse:
        try:
            worker = self._newest(request.worker_id)
            path, is_written = await end_profile(worker)
        except BatonError as error:
            await abort_with(context, error)
        return pb.StopProfileResponse(
            worker=identity_to_pb(worker.identity), path=path, is_written=is_written
        )

    def _set_draining(self, worker_id: str, draining: bool) -> pb.Worker:
        """Tell every life of that id that is not gone; the newest as it is known now."""
        lives = self._lives(worker_id)
        for worker in lives:
            self._fleet.send(worker.identity, SetDraining(draining))
        return self._worker(lives[-1])

    def _newest(self, worker_id: str) -> AttachedWorker:
        return self._lives(worker_id)[-1]

    def _lives(self, worker_id: str) -> list[AttachedWorker]:
        """The lives of that id that are not gone, one at least, the newest last."""
        alive = [one for one in self._fleet.workers() if one.state is not WorkerState.GONE]
        lives = [worker for worker in alive if worker.identity.worker_id == worker_id]
        if not lives:
            known = ", ".join(sorted({worker.identity.worker_id for worker in alive}))
            raise UnknownWorker(
                f"this router knows no worker {worker_id!r}; it knows {known or 'none at all'}"
            )
        return sorted(lives, key=lambda worker: worker.identity.epoch)

    def _leases(self) -> Iterator[tuple[WorkerIdentity, LeaseRow]]:
        """All leases with the worker that holds them."""
        for worker in self._fleet.workers():
            for row in worker.load.leases:
                yield worker.identity, row

    def _is_orphan(self, row: LeaseRow) -> bool:
        """Whether this router asked for it and no longer knows what for."""
        return row.router == self._router_id and not self._dispatch.knows(row.key.transfer_id)

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


def _oldest_first(rows: list[LeaseRow]) -> list[LeaseRow]:
    return sorted(rows, key=lambda row: -row.age_s)
