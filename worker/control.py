"""WorkerService: one control stream per router, multiplexing all its requests.

A newer Attach of the same router ends the older and drops what it had queued. Reading never waits
for writing; a router that does not read hurts itself alone (`worker.outbox`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from baton.common.clock import Clock
from baton.common.codec import key_from_pb
from baton.common.control_codec import (
    router_hello_from_pb,
    router_message_from_pb,
    submit_from_pb,
    worker_hello_to_pb,
)
from baton.common.errors import BatonError, InvalidRequest, NoWorker, QueueFull
from baton.common.frames import SubmitAssembly
from baton.common.ids import RequestKey, RouterId
from baton.common.messages import Cancel, LoadReport, OutputRecord, RouterHello, WorkerHello
from baton.common.periodic import Punctuality
from baton.common.timing import Timing
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from baton.worker.core import Event, FromRouter, RouterAttached, RouterGone
from baton.worker.outbox import HIGH_WATER, Bounds, FrameOutbox

log = logging.getLogger(__name__)


class Post(Protocol):
    """`EngineThread.post`: an event for the core.

    `handled` is called on the event loop once the core has taken the event: after everything that
    it left behind before was delivered, and before anything that it leaves behind later is.
    """

    def __call__(self, event: Event, handled: Callable[[], None] | None = None) -> None: ...


class RouterStream:
    """One Attach: who, what waits to be written, what came in parts, and when it was last heard."""

    def __init__(self, router_id: RouterId, outbox: FrameOutbox, now: float) -> None:
        self.router_id = router_id
        self.outbox = outbox
        self.assembly = SubmitAssembly()
        self.last_heard = now


class ControlServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves Attach; used on the event loop only."""

    def __init__(
        self,
        hello: Callable[[], WorkerHello],
        post: Post,
        *,
        timing: Timing,
        clock: Clock,
        high_water: Bounds = HIGH_WATER,
    ) -> None:
        self._hello = hello
        self._post = post
        self._timing = timing
        self._clock = clock
        self._high_water = high_water
        self._streams: dict[RouterId, RouterStream] = {}
        self._graces: dict[RouterId, asyncio.TimerHandle] = {}
        self._punctuality = Punctuality(timing.heartbeat_every_s, clock.monotonic())
        self._is_closed = False

    def send_records(self, router_id: RouterId, records: list[OutputRecord]) -> None:
        """The records of a step for this router; dropped without its stream.

        What is dropped is asked for again: the next hello names the first position that is missing.
        """
        stream = self._streams.get(router_id)
        if stream is not None:
            stream.outbox.put_records(records)
            self._end_if_closed(stream)

    def send_load(self, load: LoadReport) -> None:
        """To be called each heartbeat: a load report to every router.

        It is the heartbeat as well, and the moment when streams are ended that are silent or slow.
        """
        now = self._clock.monotonic()
        was_late = self._punctuality.was_late(now)
        for stream in list(self._streams.values()):
            if was_late:
                stream.last_heard = now
            silent_s = now - stream.last_heard
            if silent_s > self._timing.dead_after_s:
                log.warning("router %s was silent for %.1f s", stream.router_id, silent_s)
                stream.outbox.close()
            stream.outbox.put_load(load)
            self._end_if_closed(stream)

    def close(self) -> None:
        """End all streams and take no further ones."""
        self._is_closed = True
        for stream in list(self._streams.values()):
            stream.outbox.close()
        for grace in self._graces.values():
            grace.cancel()
        self._graces.clear()

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.AttachRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.AttachResponse]:
        requests = aiter(request_iterator)
        hello = await self._read_hello(requests)
        if self._is_closed:
            raise NoWorker("this worker is stopping")
        stream = self._open(hello)
        outbox = stream.outbox
        reading = asyncio.create_task(self._read(stream, requests))
        try:
            yield pb.AttachResponse(hello=worker_hello_to_pb(self._hello()))
            # A message is taken when gRPC has room for it, so that what waits is joined meanwhile.
            while (message := await outbox.take()) is not None:
                yield message
            if outbox.failure is not None:
                raise outbox.failure
        finally:
            reading.cancel()
            outbox.close()
            self._end_if_closed(stream)

    async def _read_hello(self, requests: AsyncIterator[pb.AttachRequest]) -> RouterHello:
        try:
            async with asyncio.timeout(self._timing.dead_after_s):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError) as error:
            raise InvalidRequest("an attach opens with a hello", field="hello") from error
        if not first.HasField("hello"):
            raise InvalidRequest("an attach opens with a hello", field="hello")
        return router_hello_from_pb(first.hello)

    # --- which stream of a router is heard ---

    def _open(self, hello: RouterHello) -> RouterStream:
        router_id = hello.router_id
        older = self._streams.get(router_id)
        if older is not None:
            older.outbox.close()
        grace = self._graces.pop(router_id, None)
        if grace is not None:
            grace.cancel()
        outbox = FrameOutbox(
            router_id,
            self._post,
            self._clock,
            slow_router_s=self._timing.slow_router_s,
            high=self._high_water,
        )
        stream = RouterStream(router_id, outbox, self._clock.monotonic())
        self._streams[router_id] = stream
        self._post(RouterAttached(router_id, hello.live), outbox.listen)
        return stream

    def _end_if_closed(self, stream: RouterStream) -> None:
        """A closed stream is over at once, also while its last write still waits for the router."""
        router_id = stream.router_id
        if not stream.outbox.is_closed or self._streams.get(router_id) is not stream:
            return
        if stream.outbox.failure is not None:
            log.warning("stream of router %s: %s", router_id, stream.outbox.failure.message)
        del self._streams[router_id]
        if not self._is_closed:
            loop = asyncio.get_running_loop()
            self._graces[router_id] = loop.call_later(
                self._timing.router_grace_s, self._forget, router_id
            )

    def _forget(self, router_id: RouterId) -> None:
        del self._graces[router_id]
        self._post(RouterGone(router_id))

    # --- what a router says ---

    async def _read(self, stream: RouterStream, requests: AsyncIterator[pb.AttachRequest]) -> None:
        router_id = stream.router_id
        try:
            async for request in requests:
                # What an older stream still holds is of requests that the newer one disowned, or
                # names itself.
                if self._streams.get(router_id) is not stream:
                    return
                stream.last_heard = self._clock.monotonic()
                self._take(stream, request)
        except BatonError as error:
            log.warning("router %s broke the protocol: %s", router_id, error.message)
        except DecodeError:
            log.warning("router %s sent what is no valid protobuf", router_id)
        finally:
            stream.outbox.close()

    def _take(self, stream: RouterStream, request: pb.AttachRequest) -> None:
        kind = request.WhichOneof("message")
        if kind == "submit":
            self._take_submit(stream, key_from_pb(request.submit.key), request.submit)
        elif kind == "submit_part":
            self._take_part(stream, request.submit_part)
        elif (message := router_message_from_pb(request)) is not None:
            if isinstance(message, Cancel):
                stream.assembly.cancel(message.key)
            self._post(FromRouter(stream.router_id, message))

    def _take_part(self, stream: RouterStream, part: pb.SubmitPart) -> None:
        key = key_from_pb(part.key)
        try:
            submit = stream.assembly.add(key, part.data, is_last=part.is_last)
        except (InvalidRequest, QueueFull) as error:
            stream.outbox.answer(OutputRecord(key=key, error=error))
            return
        if submit is not None:
            self._take_submit(stream, key, submit)

    def _take_submit(self, stream: RouterStream, key: RequestKey, wire: pb.Submit) -> None:
        try:
            submit = submit_from_pb(wire)
        except InvalidRequest as error:
            stream.outbox.answer(OutputRecord(key=key, error=error))
            return
        self._post(FromRouter(stream.router_id, submit))
