"""A stream that has ended leaves nothing behind: its connection is closed then, not some day."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from support.waiting import eventually

from baton.common.clock import SystemClock
from baton.common.control_codec import worker_hello_to_pb
from baton.common.ids import Epoch, RouterId, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport, ModelInfo, RouterHello, WorkerHello
from baton.common.sampling import Role
from baton.common.timing import DEFAULT_TIMING
from baton.router.attach_stream import converse
from baton.router.lanes import Lanes
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc

HELLO = WorkerHello(
    identity=WorkerIdentity(WorkerId("d0"), Epoch(1), "life"),
    role=Role.DECODE,
    model=ModelInfo(
        name="m", path="", fingerprint="f", max_model_len=9, vocab_size=9, block_size=9
    ),
    link_address="127.0.0.1:1",
    pid=1,
    load=LoadReport(),
)


class _Worker(worker_pb2_grpc.WorkerServiceServicer):
    """Says hello, and then ends the stream as told, or stays."""

    def __init__(self, ending: str) -> None:
        self._ending = ending

    async def Attach(
        self, requests: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        await anext(requests)
        yield pb.AttachResponse(hello=worker_hello_to_pb(HELLO))
        if self._ending == "fails":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        if self._ending != "ends":
            await asyncio.Event().wait()


def _calls() -> list[object]:
    return [each for each in gc.get_objects() if issubclass(type(each), grpc.aio.StreamStreamCall)]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Cycles stay, as they do for long in a process that is idle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("ending", ["ends", "fails", "is left", "is cancelled", "is refused"])
async def test_a_stream_that_is_over_keeps_no_connection(ending: str) -> None:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(_Worker(ending), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    if ending == "is refused":
        await server.stop(0)
    greeted = asyncio.Event()

    async def attach() -> None:
        def hear(_: object) -> bool:
            greeted.set()
            return ending != "is left"

        hello = RouterHello(RouterId("r"), 1)
        lanes = Lanes(SystemClock())
        with suppress(grpc.aio.AioRpcError):
            await converse(
                f"127.0.0.1:{port}", hello, lanes, hear, hello_deadline_s=5, timing=DEFAULT_TIMING
            )

    attaching = asyncio.create_task(attach())
    if ending == "is cancelled":
        await greeted.wait()
        attaching.cancel()
    await asyncio.wait([attaching])
    # A task keeps the error that ended it.
    del attaching
    assert greeted.is_set() == (ending != "is refused")

    async def left() -> list[object]:
        return _calls()

    try:
        await eventually(left, "calls are kept", deadline_s=2)
    finally:
        await server.stop(0)
