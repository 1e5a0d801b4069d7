"""The control stream's servicer alone: which stream of a router is heard."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.common.codec import cancel_to_pb, router_hello_to_pb
from baton.common.errors import InvalidRequest
from baton.common.ids import Epoch, RequestKey, RouterId, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import Cancel, LoadReport, ModelInfo, RouterHello, WorkerHello
from baton.common.sampling import Role
from baton.v1 import worker_pb2 as pb
from baton.worker.control import ControlServicer
from baton.worker.core import Event, FromRouter, RouterAttached

ROUTER = RouterId("r")
HELLO = pb.AttachRequest(hello=router_hello_to_pb(RouterHello(ROUTER, 1)))


def worker_hello() -> WorkerHello:
    return WorkerHello(
        identity=WorkerIdentity(WorkerId("d0"), Epoch(1), "a"),
        role=Role.DECODE,
        model=ModelInfo(
            name="m", path="/m", fingerprint="f", max_model_len=8, vocab_size=8, block_size=4
        ),
        link_address="",
        pid=1,
        load=LoadReport(),
    )


class Router:
    """One stream of a router; the answers are read only when the test asks for one."""

    def __init__(self, servicer: ControlServicer) -> None:
        self.sent: asyncio.Queue[pb.AttachRequest | None] = asyncio.Queue()
        self.answers = servicer.Attach(self._requests(), None)  # type: ignore[arg-type]

    async def _requests(self) -> AsyncIterator[pb.AttachRequest]:
        while (request := await self.sent.get()) is not None:
            yield request

    async def attach(self) -> None:
        self.sent.put_nowait(HELLO)
        assert (await anext(self.answers)).HasField("hello")

    def cancel(self, number: int) -> RequestKey:
        key = RequestKey(TransferId(number.to_bytes(16, "big")), 1)
        self.sent.put_nowait(pb.AttachRequest(cancel=cancel_to_pb(Cancel(key))))
        return key


async def settle(router: Router) -> None:
    """The servicer has taken everything that was sent."""
    router.sent.put_nowait(None)
    with pytest.raises(StopAsyncIteration):
        await anext(router.answers)


async def test_an_older_stream_is_not_heard_once_a_newer_is_attached() -> None:
    """Whatever it still holds came before the newer hello, which disowned it."""
    events: list[Event] = []
    servicer = ControlServicer(worker_hello, events.append)
    older, newer = Router(servicer), Router(servicer)
    await older.attach()
    await newer.attach()
    older.cancel(1)
    key = newer.cancel(2)
    await settle(newer)
    await settle(older)
    servicer.close()
    attached = RouterAttached(ROUTER, ())
    assert events == [attached, attached, FromRouter(ROUTER, Cancel(key))]


async def test_a_stream_without_a_hello_is_refused() -> None:
    servicer = ControlServicer(worker_hello, [].append)
    router = Router(servicer)
    router.cancel(1)
    with pytest.raises(InvalidRequest, match="hello"):
        await anext(router.answers)
