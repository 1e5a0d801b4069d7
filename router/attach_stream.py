"""One Attach stream to one worker: dial, say hello, write its lanes, hear what it says."""

import asyncio
from collections.abc import Callable
from typing import Final

import grpc

from baton.common.addresses import split_address
from baton.common.control_codec import (
    load_from_pb,
    record_from_pb,
    router_hello_to_pb,
    worker_hello_from_pb,
)
from baton.common.errors import InvalidRequest
from baton.common.grpc_options import STREAM_WINDOW, channel_options
from baton.common.messages import LoadReport, OutputRecord, RouterHello, WorkerHello
from baton.common.timing import Timing
from baton.router.lanes import Lanes
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc

Heard = WorkerHello | LoadReport | list[OutputRecord]
_Call = grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]

_HEARTBEAT: Final = pb.AttachRequest(heartbeat=pb.Heartbeat())


async def converse(
    address: str,
    hello: RouterHello,
    lanes: Lanes,
    hear: Callable[[Heard], bool],
    *,
    hello_deadline_s: float,
    timing: Timing,
) -> None:
    """Returns when the worker ends the stream, or `hear` says False.

    `hear` gets the worker's hello first. Raises AioRpcError or TimeoutError when the stream breaks
    or does not come up, InvalidRequest for what no worker sends.
    """
    options = [*channel_options(), *STREAM_WINDOW]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Attach()
        writing = asyncio.create_task(_write(call, hello, lanes, timing), name=f"write {address}")
        # Who cannot write has no use for reading either.
        writing.add_done_callback(lambda _: call.cancel())
        try:
            await _read(call, hear, hello_deadline_s)
        finally:
            writing.cancel()
            call.cancel()
            await asyncio.wait([writing])
            failure = None if writing.cancelled() else writing.exception()
            try:
                if failure is not None:
                    raise failure
            finally:
                # An error knows this frame: what the frame knows of it would keep both, and the
                # connection, until a garbage collection.
                del failure, writing


async def _read(call: _Call, hear: Callable[[Heard], bool], hello_deadline_s: float) -> None:
    # Not `aiter(call)`: what that leaves behind keeps the call, and with it the connection.
    async with asyncio.timeout(hello_deadline_s):
        first = await call.read()
    if first is grpc.aio.EOF:
        return
    # gRPC gives None for what is no valid protobuf.
    if not isinstance(first, pb.AttachResponse) or not first.HasField("hello"):
        raise InvalidRequest("a worker opens with a hello", field="hello")
    goes_on = hear(worker_hello_from_pb(first.hello))
    while goes_on and (response := await call.read()) is not grpc.aio.EOF:
        goes_on = hear(_decode(response))


def _decode(response: object) -> Heard:
    if isinstance(response, pb.AttachResponse):
        if response.HasField("frame"):
            return [record_from_pb(record) for record in response.frame.records]
        if response.HasField("load"):
            return load_from_pb(response.load)
    raise InvalidRequest("a worker sends frames and load reports", field="message")


async def _write(call: _Call, hello: RouterHello, lanes: Lanes, timing: Timing) -> None:
    """Each frame is chosen when gRPC has room for it, so that what is urgent overtakes."""
    try:
        await call.write(pb.AttachRequest(hello=router_hello_to_pb(hello)))
        while True:
            try:
                async with asyncio.timeout(timing.heartbeat_every_s):
                    frame = await lanes.next_frame()
            except TimeoutError:
                frame = _HEARTBEAT
            await call.write(frame)
            lanes.written()
    except asyncio.InvalidStateError:
        # The call has ended: the reader tells why.
        return


async def is_refused(address: str, timeout_s: float) -> bool:
    """Whether nobody listens there: the process is dead, and waiting for it is of no use."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
