"""A client of a router's AdminService, on its own port."""

from collections.abc import Awaitable, Sequence
from typing import Final, Self, TypeVar

import grpc

from baton.client.failures import baton_error
from baton.client.replies import Lease, Profile, Step, StepHistory, StepSummary, Worker
from baton.common.errors import InvalidRequest
from baton.common.grpc_options import channel_options
from baton.v1 import admin_pb2, admin_pb2_grpc, common_pb2, diagnostics_pb2, worker_pb2

DEFAULT_ADMIN: Final = "127.0.0.1:50052"
# An operator wants to know soon that a router is frozen; it answers from what it knows itself.
ANSWER_DEADLINE_S: Final = 10.0

_ROLE: Final = {
    common_pb2.ROLE_PREFILL: "prefill",
    common_pb2.ROLE_DECODE: "decode",
    common_pb2.ROLE_UNIFIED: "unified",
}
_Reply = TypeVar("_Reply")


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
        reply = await self._ask(self._stub.ListWorkers(request, timeout=ANSWER_DEADLINE_S))
        return [_worker(wire) for wire in reply.workers]

    async def leases(self) -> list[Lease]:
        """Every lease of every live worker, the oldest first."""
        request = admin_pb2.ListLeasesRequest()
        reply = await self._ask(self._stub.ListLeases(request, timeout=ANSWER_DEADLINE_S))
        return [_lease(wire) for wire in reply.leases]

    async def reap(
        self, leases: Sequence[Lease] | None = None, *, dry_run: bool = False
    ) -> list[Lease]:
        """End these leases at once and return those that were still there.

        None: the leases of this router whose request it no longer knows. `dry_run` ends nothing.
        """
        request = admin_pb2.ReapLeasesRequest(dry_run=dry_run)
        if leases is not None:
            if not leases:
                return []
            request.keys.extend(_key(lease) for lease in leases)
        reply = await self._ask(self._stub.ReapLeases(request, timeout=ANSWER_DEADLINE_S))
        return [_lease(wire) for wire in reply.reaped]

    async def drain(self, worker_id: str) -> Worker:
        """Give a worker nothing new and move away what it runs; the worker as it was just then.

        Returns before that is done: its state becomes draining, then drained. Draining twice is no
        error. UnknownWorker names the workers that there are.
        """
        request = admin_pb2.DrainWorkerRequest(worker_id=worker_id)
        reply = await self._ask(self._stub.DrainWorker(request, timeout=ANSWER_DEADLINE_S))
        return _worker(reply.worker)

    async def resume(self, worker_id: str) -> Worker:
        """Undo a drain; no error when there is none. UnknownWorker as for `drain`."""
        request = admin_pb2.ResumeWorkerRequest(worker_id=worker_id)
        reply = await self._ask(self._stub.ResumeWorker(request, timeout=ANSWER_DEADLINE_S))
        return _worker(reply.worker)

    async def steps(self, worker_id: str, last: int = 20) -> StepHistory:
        """The newest steps of a worker's engine, the oldest of them first.

        A worker keeps some thousands. UnknownWorker as for `drain`; WorkerLost when the worker does
        not answer.
        """
        request = admin_pb2.ListStepsRequest(worker_id=worker_id, last=_count("last", last))
        reply = await self._ask(self._stub.ListSteps(request, timeout=ANSWER_DEADLINE_S))
        return StepHistory(
            worker=_life(reply.worker),
            steps=tuple(_step(wire) for wire in reply.history.steps),
            summary=_summary(reply.history.summary),
        )

    async def start_profile(self, worker_id: str, steps: int = 20) -> Profile:
        """Profile the next steps of a worker's engine; the trace is written when they are done.

        AlreadyExists while another profile runs. UnknownWorker and WorkerLost as for `steps`.
        """
        request = admin_pb2.StartProfileRequest(worker_id=worker_id, steps=_count("steps", steps))
        reply = await self._ask(self._stub.StartProfile(request, timeout=ANSWER_DEADLINE_S))
        return Profile(worker=_life(reply.worker), path=reply.path, is_written=False)

    async def stop_profile(self, worker_id: str) -> Profile:
        """End the profile that runs; InvalidRequest when none does, which names the last one.

        UnknownWorker and WorkerLost as for `steps`.
        """
        request = admin_pb2.StopProfileRequest(worker_id=worker_id)
        reply = await self._ask(self._stub.StopProfile(request, timeout=ANSWER_DEADLINE_S))
        return Profile(worker=_life(reply.worker), path=reply.path, is_written=reply.is_written)

    async def _ask(self, call: Awaitable[_Reply]) -> _Reply:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise baton_error(error, self.address) from error


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
        preemptions=load.preemptions,
        draining=load.draining,
        steps=load.steps,
        stalled_s=load.stalled_s,
        pinned_unowned_bytes=load.pinned_unowned_bytes,
        counters=dict(load.counters),
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
        request_id=wire.request_id,
        router=wire.router,
        why=wire.why,
    )


def _life(wire: common_pb2.WorkerIdentity) -> str:
    return f"{wire.worker_id}@{wire.epoch}"


def _count(name: str, value: int) -> int:
    if not 0 < value < 2**32:
        raise InvalidRequest(f"{name} is a number from 1 on, not {value}", field=name)
    return value


def _step(wire: diagnostics_pb2.Step) -> Step:
    return Step(
        number=wire.number,
        age_s=wire.age_s,
        took_s=wire.took_s,
        rows=wire.rows,
        tokens=wire.tokens,
        prompt_tokens=wire.prompt_tokens,
        replayed=wire.replayed if wire.HasField("replayed") else None,
    )


def _summary(wire: diagnostics_pb2.StepSummary) -> StepSummary:
    return StepSummary(
        steps=wire.steps,
        p50_s=wire.p50_s,
        p90_s=wire.p90_s,
        p99_s=wire.p99_s,
        max_s=wire.max_s,
        window_s=wire.window_s,
        busy_s=wire.busy_s,
        tokens=wire.tokens,
        prompt_tokens=wire.prompt_tokens,
        tokens_per_s=wire.tokens / wire.window_s if wire.window_s > 0 else 0.0,
    )


def _key(lease: Lease) -> common_pb2.RequestKey:
    return common_pb2.RequestKey(
        transfer_id=bytes.fromhex(lease.transfer_id), attempt=lease.attempt
    )
