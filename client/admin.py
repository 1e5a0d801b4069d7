"""A client of a router's AdminService, on its own port."""

from typing import Final, Self

import grpc

from baton.client.failures import baton_error
from baton.client.replies import Lease, Worker
from baton.common.grpc_options import channel_options
from baton.v1 import admin_pb2, admin_pb2_grpc, common_pb2, worker_pb2

DEFAULT_ADMIN: Final = "127.0.0.1:50052"
# An operator wants to know soon that a router is frozen; it answers from what it knows itself.
ANSWER_DEADLINE_S: Final = 10.0

_ROLE: Final = {common_pb2.ROLE_PREFILL: "prefill", common_pb2.ROLE_DECODE: "decode"}


class AdminClient:
    """One channel to one router's admin port, for one event loop."""

    def __init__(self, address: str = DEFAULT_ADMIN) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def workers(self) -> list[Worker]:
        """All workers that the router knows, live or not."""
        request = admin_pb2.ListWorkersRequest()
        try:
            reply = await self._stub.ListWorkers(request, timeout=ANSWER_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        return [_worker(wire) for wire in reply.workers]

    async def leases(self) -> list[Lease]:
        """Every lease of every live worker, the oldest first."""
        request = admin_pb2.ListLeasesRequest()
        try:
            reply = await self._stub.ListLeases(request, timeout=ANSWER_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error
        return [_lease(wire) for wire in reply.leases]


def _worker(wire: admin_pb2.Worker) -> Worker:
    load = wire.load
    return Worker(
        id=wire.identity.worker_id,
        epoch=wire.identity.epoch,
        incarnation=wire.identity.incarnation,
        role=_ROLE.get(wire.role, "unknown"),
        state=wire.state,
        address=wire.address,
        link_address=wire.link_address,
        pid=wire.pid,
        model=wire.model,
        requests=wire.requests,
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        blocks_cached=load.blocks_cached,
        blocks_leased=load.blocks_leased,
        blocks_quarantined=load.blocks_quarantined,
        requests_running=load.requests_running,
        requests_waiting=load.requests_waiting,
        tokens_pending=load.tokens_pending,
        fingerprint=wire.fingerprint,
        block_size=wire.block_size,
    )


def _lease(wire: worker_pb2.LeaseRow) -> Lease:
    return Lease(
        transfer_id=wire.key.transfer_id.hex(),
        attempt=wire.key.attempt,
        owner=wire.owner,
        reader=wire.reader,
        blocks=wire.blocks,
        bytes=wire.bytes,
        age_s=wire.age_s,
        expires_in_s=wire.expires_in_s,
        state=wire.state,
    )
