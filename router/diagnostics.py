"""What the router asks of a worker's engine for an operator, each time by a call of its own."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc

from baton.common.codec import error_from_pb
from baton.common.errors import WorkerLost
from baton.common.grpc_options import channel_options
from baton.router.attached import AttachedWorker
from baton.v1 import diagnostics_pb2 as pb
from baton.v1 import diagnostics_pb2_grpc

# Longer than the worker waits for its engine, shorter than the operator waits for the router.
WORKER_DEADLINE_S: Final = 8.0

_Reply = TypeVar("_Reply")
_Stub = diagnostics_pb2_grpc.DiagnosticsServiceStub


async def read_steps(worker: AttachedWorker, last: int) -> pb.StepHistory:
    """The newest `last` steps that it keeps; WorkerLost when it does not answer."""
    request = pb.ReadStepsRequest(last=last)
    reply: pb.ReadStepsResponse = await _ask(
        worker, lambda stub: stub.ReadSteps(request, timeout=WORKER_DEADLINE_S)
    )
    return reply.history


async def begin_profile(worker: AttachedWorker, steps: int) -> str:
    """Where the trace of the next `steps` steps will be. Raises what the worker has against it."""
    request = pb.BeginProfileRequest(steps=steps)
    reply: pb.BeginProfileResponse = await _ask(
        worker, lambda stub: stub.BeginProfile(request, timeout=WORKER_DEADLINE_S)
    )
    if reply.HasField("error"):
        raise error_from_pb(reply.error)
    return reply.path


async def end_profile(worker: AttachedWorker) -> tuple[str, bool]:
    """Where the trace is, and whether it is whole. Raises what the worker has against it."""
    request = pb.EndProfileRequest()
    reply: pb.EndProfileResponse = await _ask(
        worker, lambda stub: stub.EndProfile(request, timeout=WORKER_DEADLINE_S)
    )
    if reply.HasField("error"):
        raise error_from_pb(reply.error)
    return reply.path, reply.is_written


async def _ask(worker: AttachedWorker, call: Callable[[_Stub], Awaitable[_Reply]]) -> _Reply:
    address = worker.record.address
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        try:
            return await call(_Stub(channel))
        except grpc.aio.AioRpcError as error:
            raise WorkerLost(
                f"{worker.identity} does not answer at {address} ({error.code().name}); "
                "`baton admin workers list` shows its state"
            ) from error
