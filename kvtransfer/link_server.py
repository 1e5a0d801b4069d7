"""The owner's end of peer links: handshake, then claims in and announcements out.

Reading never waits for writing. Announcements coalesce per lease, so an outbox holds at most one
status per open lease and a slow reader costs no memory.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.common.codec import error_to_pb
from baton.common.errors import BatonError, HandshakeMismatch, InvalidRequest
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import LeaseStatus
from baton.kvtransfer.events import FromReader, LinkClosed, LinkEvent, LinkOpened
from baton.kvtransfer.handshake import LocalSide, accept_reader
from baton.kvtransfer.link_codec import (
    merge_status,
    owner_hello_to_pb,
    reader_hello_from_pb,
    reader_message_from_pb,
    status_to_pb,
)
from baton.kvtransfer.transport.base import ArenaDescriptor
from baton.v1 import kv_pb2 as pb
from baton.v1 import kv_pb2_grpc

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 5.0


class StatusOutbox:
    """The newest unsent status of each lease; closed for good when its link ends."""

    def __init__(self) -> None:
        self._unsent: dict[RequestKey, LeaseStatus] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, status: LeaseStatus) -> None:
        self._unsent[status.key] = merge_status(self._unsent.get(status.key), status)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def take(self) -> list[LeaseStatus] | None:
        """All unsent statuses as soon as there is one; None when closed."""
        await self._changed.wait()
        self._changed.clear()
        if self._closed:
            return None
        statuses = list(self._unsent.values())
        self._unsent.clear()
        return statuses


class LinkServer(kv_pb2_grpc.KvServiceServicer):
    """Serves KvService; at most one link per reader, a newer one ends the older."""

    def __init__(
        self, ours: LocalSide, arena: ArenaDescriptor, post: Callable[[LinkEvent], None]
    ) -> None:
        self._ours = ours
        self._arena = arena
        self._post = post
        self._outboxes: dict[WorkerIdentity, StatusOutbox] = {}

    def send(self, reader: WorkerIdentity, status: LeaseStatus) -> None:
        """Queue a status; without a link it is dropped, the reader's next claim asks again."""
        outbox = self._outboxes.get(reader)
        if outbox is not None:
            outbox.put(status)

    def close(self) -> None:
        """End every link; readers see their stream close."""
        for outbox in list(self._outboxes.values()):
            outbox.close()

    async def Link(
        self,
        request_iterator: AsyncIterator[pb.LinkRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.LinkResponse]:
        requests = aiter(request_iterator)
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                hello = reader_hello_from_pb(await anext(requests))
            protocol = accept_reader(self._ours, hello)
        except HandshakeMismatch as refused:
            log.warning("refused a link: %s", refused.message)
            yield pb.LinkResponse(refusal=pb.LinkRefusal(error=error_to_pb(refused)))
            return
        except (TimeoutError, StopAsyncIteration, DecodeError) as error:
            raise InvalidRequest("a link opens with a hello", field="hello") from error
        reader = hello.identity
        outbox = self._replace_outbox(reader)
        self._post(LinkOpened(reader))
        reading = asyncio.create_task(self._read(reader, requests, outbox))
        try:
            yield owner_hello_to_pb(self._ours, self._arena, protocol)
            while (statuses := await outbox.take()) is not None:
                for status in statuses:
                    yield status_to_pb(status)
        finally:
            reading.cancel()
            if self._outboxes.get(reader) is outbox:
                del self._outboxes[reader]
                self._post(LinkClosed(reader))

    def _replace_outbox(self, reader: WorkerIdentity) -> StatusOutbox:
        older = self._outboxes.get(reader)
        if older is not None:
            older.close()
        outbox = self._outboxes[reader] = StatusOutbox()
        return outbox

    async def _read(
        self,
        reader: WorkerIdentity,
        requests: AsyncIterator[pb.LinkRequest],
        outbox: StatusOutbox,
    ) -> None:
        try:
            async for request in requests:
                self._post(FromReader(reader, reader_message_from_pb(request)))
        except BatonError as error:
            log.warning("link from %s broke the protocol: %s", reader, error.message)
        except DecodeError:
            log.warning("link from %s sent what is no valid protobuf", reader)
        finally:
            outbox.close()
