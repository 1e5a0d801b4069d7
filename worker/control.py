"""WorkerService: one control stream per router, multiplexing all its requests.

A newer Attach of the same router ends the older and drops what it had queued. Reading never waits
for writing; a router that does not read fills its own bounded outbox and loses its own stream.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.common.codec import (
    key_from_pb,
    record_to_pb,
    router_hello_from_pb,
    submit_from_pb,
    worker_hello_to_pb,
)
from baton.common.codec import load_to_pb as encode_load
from baton.common.errors import BatonError, InvalidRequest
from baton.common.ids import RouterId
from baton.common.messages import Cancel, LoadReport, OutputRecord, RouterHello, WorkerHello
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from baton.worker.core import Event, FromRouter, RouterAttached, RouterGone

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 5.0
ROUTER_GRACE_S = 2.0
MAX_QUEUED_FRAMES = 4_096


class FrameOutbox:
    """Frames for one stream of one router, bounded; overflow closes the stream."""

    def __init__(self, router_id: RouterId) -> None:
        self.router_id = router_id
        self._frames: deque[pb.AttachResponse] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, frame: pb.AttachResponse) -> None:
        if self._closed:
            return
        if len(self._frames) >= MAX_QUEUED_FRAMES:
            log.error("router %s does not read its stream; closing it", self.router_id)
            self.close()
            return
        self._frames.append(frame)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._frames.clear()
        self._changed.set()

    async def take(self) -> pb.AttachResponse | None:
        """The next frame; None when closed."""
        while not self._frames and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return None if self._closed else self._frames.popleft()


class ControlServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves Attach; used on the event loop only."""

    def __init__(self, hello: Callable[[], WorkerHello], post: Callable[[Event], None]) -> None:
        self._hello = hello
        self._post = post
        self._outboxes: dict[RouterId, FrameOutbox] = {}
        self._graces: dict[RouterId, asyncio.TimerHandle] = {}

    def send_records(self, router_id: RouterId, records: list[OutputRecord]) -> None:
        """One frame with all records of a step for this router; dropped when it is gone."""
        outbox = self._outboxes.get(router_id)
        if outbox is not None:
            frame = pb.StepFrame(records=[record_to_pb(record) for record in records])
            outbox.put(pb.AttachResponse(frame=frame))

    def send_load(self, load: LoadReport) -> None:
        """A load report to every router; it is the heartbeat as well."""
        for outbox in list(self._outboxes.values()):
            outbox.put(pb.AttachResponse(load=encode_load(load)))

    def close(self) -> None:
        for outbox in list(self._outboxes.values()):
            outbox.close()
        for grace in self._graces.values():
            grace.cancel()

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.AttachRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.AttachResponse]:
        requests = aiter(request_iterator)
        hello = await self._read_hello(requests)
        outbox = self._open(hello)
        reading = asyncio.create_task(self._read(hello.router_id, requests, outbox))
        try:
            yield pb.AttachResponse(hello=worker_hello_to_pb(self._hello()))
            while (frame := await outbox.take()) is not None:
                yield frame
        finally:
            reading.cancel()
            self._ended(outbox)

    async def _read_hello(self, requests: AsyncIterator[pb.AttachRequest]) -> RouterHello:
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError) as error:
            raise InvalidRequest("an attach opens with a hello", field="hello") from error
        if not first.HasField("hello"):
            raise InvalidRequest("an attach opens with a hello", field="hello")
        return router_hello_from_pb(first.hello)

    def _open(self, hello: RouterHello) -> FrameOutbox:
        older = self._outboxes.get(hello.router_id)
        if older is not None:
            older.close()
        grace = self._graces.pop(hello.router_id, None)
        if grace is not None:
            grace.cancel()
        outbox = self._outboxes[hello.router_id] = FrameOutbox(hello.router_id)
        self._post(RouterAttached(hello.router_id, hello.live))
        return outbox

    def _ended(self, outbox: FrameOutbox) -> None:
        router_id = outbox.router_id
        if self._outboxes.get(router_id) is not outbox:
            return
        del self._outboxes[router_id]
        loop = asyncio.get_running_loop()
        self._graces[router_id] = loop.call_later(ROUTER_GRACE_S, self._forget, router_id)

    def _forget(self, router_id: RouterId) -> None:
        del self._graces[router_id]
        self._post(RouterGone(router_id))

    async def _read(
        self, router_id: RouterId, requests: AsyncIterator[pb.AttachRequest], outbox: FrameOutbox
    ) -> None:
        try:
            async for request in requests:
                # What an older stream still holds is of requests that the newer one disowned.
                if self._outboxes.get(router_id) is not outbox:
                    return
                self._take(router_id, request)
        except BatonError as error:
            log.warning("router %s broke the protocol: %s", router_id, error.message)
        except DecodeError:
            log.warning("router %s sent what is no valid protobuf", router_id)
        finally:
            outbox.close()

    def _take(self, router_id: RouterId, request: pb.AttachRequest) -> None:
        kind = request.WhichOneof("message")
        if kind == "submit":
            key = key_from_pb(request.submit.key)
            try:
                self._post(FromRouter(router_id, submit_from_pb(request.submit)))
            except InvalidRequest as error:
                self.send_records(router_id, [OutputRecord(key=key, error=error)])
        elif kind == "cancel":
            self._post(FromRouter(router_id, Cancel(key_from_pb(request.cancel.key))))
        elif kind != "heartbeat":
            raise InvalidRequest(f"a router does not send {kind} here", field="message")
