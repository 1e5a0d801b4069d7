"""The reader's end of peer links: dials owners, shakes hands, connects the transport.

One link per owner epoch. Connecting the transport (tens of milliseconds, at times seconds) runs in
a thread, off the event loop and off the engine thread. A link that comes back finds the transport
still connected, unless the engine thread has closed it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from baton.common.codec import error_from_pb, identity_from_pb
from baton.common.errors import BatonError, HandshakeMismatch, PeerLost
from baton.common.grpc_options import channel_options
from baton.common.ids import WorkerIdentity
from baton.kvtransfer.events import FromOwner, LinkEvent, PeerConnected, PeerDisconnected
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.link_codec import (
    ReaderMessage,
    arena_from_pb,
    reader_hello_to_pb,
    reader_message_to_pb,
    status_from_pb,
)
from baton.kvtransfer.transport.base import PeerReader, Transport
from baton.v1 import kv_pb2 as pb
from baton.v1 import kv_pb2_grpc

log = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 10.0
MAX_UNSENT = 65_536


class _Link:
    """One dialled owner: what is to be sent, and the task that runs the stream."""

    def __init__(self) -> None:
        # None ends the writing half: gRPC itself leaves a writer waiting when a call has ended.
        self.unsent: asyncio.Queue[ReaderMessage | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None


class LinkClient:
    """Keeps a link to each owner that was asked for; used on the event loop only."""

    def __init__(
        self, ours: LocalSide, transport: Transport, post: Callable[[LinkEvent], None]
    ) -> None:
        self._ours = ours
        self._transport = transport
        self._post = post
        self._links: dict[WorkerIdentity, _Link] = {}
        # The newest reader of each owner; the engine thread closes them.
        self._readers: dict[WorkerIdentity, PeerReader] = {}

    def dial(self, owner: WorkerIdentity, address: str) -> None:
        """Start a link unless one is there; the outcome is posted as an event."""
        if owner in self._links:
            return
        link = self._links[owner] = _Link()
        link.task = asyncio.create_task(self._run(owner, address, link), name=f"link to {owner}")

    def send(self, owner: WorkerIdentity, message: ReaderMessage) -> None:
        """Queue a message, also while the link is still connecting; dropped without a link."""
        link = self._links.get(owner)
        if link is None:
            return
        if link.unsent.qsize() < MAX_UNSENT:
            link.unsent.put_nowait(message)
            return
        # Safe: a claim or release that is lost ends with the lease's own deadline.
        log.error("link to %s takes no messages; closing it", owner)
        self.hang_up(owner)

    def hang_up(self, owner: WorkerIdentity) -> None:
        """End the link, if there is one; PeerDisconnected is posted as for any other end."""
        link = self._links.get(owner)
        if link is not None:
            assert link.task is not None, "a link in the table has its task"
            link.task.cancel()

    async def close(self) -> None:
        tasks = [link.task for link in self._links.values() if link.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, owner: WorkerIdentity, address: str, link: _Link) -> None:
        error: BatonError = PeerLost(f"the link to {owner} at {address} was closed")
        try:
            async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
                stub = kv_pb2_grpc.KvServiceStub(channel)
                await self._converse(owner, stub.Link(self._requests(owner, link)))
        except BatonError as refused:
            error = refused
        except grpc.aio.AioRpcError as broken:
            error = PeerLost(f"the link to {owner} at {address} broke: {broken.code().name}")
        except TimeoutError:
            error = PeerLost(f"{owner} at {address} did not connect in {CONNECT_DEADLINE_S:.0f} s")
        # The root of the task: whatever a peer can cause here costs its link and no more.
        except Exception:
            log.exception("the link to %s failed", owner)
            error = PeerLost(f"the link to {owner} at {address} failed")
        finally:
            del self._links[owner]
            link.unsent.put_nowait(None)
            log.info("link to %s ended: %s", owner, error.message)
            self._post(PeerDisconnected(owner, error))

    async def _requests(self, owner: WorkerIdentity, link: _Link) -> AsyncIterator[pb.LinkRequest]:
        yield reader_hello_to_pb(self._ours, owner)
        while (message := await link.unsent.get()) is not None:
            yield reader_message_to_pb(message)

    async def _converse(
        self,
        owner: WorkerIdentity,
        call: grpc.aio.StreamStreamCall[pb.LinkRequest, pb.LinkResponse],
    ) -> None:
        # Not `aiter(call)`: what that leaves behind keeps the call, and with it the connection.
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            hello = await call.read()
            if not isinstance(hello, pb.LinkResponse):
                raise PeerLost(f"{owner} closed the link before its hello")
            peer = await self._connect(owner, hello)
        self._post(PeerConnected(owner, peer))
        while isinstance(response := await call.read(), pb.LinkResponse):
            if response.HasField("status"):
                self._post(FromOwner(owner, status_from_pb(response.status)))
            elif response.HasField("refusal"):
                raise error_from_pb(response.refusal.error)

    async def _connect(self, owner: WorkerIdentity, response: pb.LinkResponse) -> PeerReader:
        if response.HasField("refusal"):
            raise error_from_pb(response.refusal.error)
        if not response.HasField("hello"):
            raise PeerLost(f"{owner} opened the link without a hello")
        answering = identity_from_pb(response.hello.identity)
        if answering != owner or response.hello.fingerprint != self._ours.fingerprint:
            raise HandshakeMismatch(f"dialled {owner}, but {answering} answered")
        arena = arena_from_pb(response.hello.arena, owner)
        self._forget_closed()
        reader = self._readers.get(owner)
        if reader is None:
            reader = await asyncio.to_thread(self._transport.connect, owner, arena)
            self._readers[owner] = reader
        return reader

    def _forget_closed(self) -> None:
        for owner in [owner for owner, reader in self._readers.items() if reader.is_closed]:
            del self._readers[owner]
