"""KvService links on the simulated network: what LinkClient and LinkServer do, without gRPC."""

from collections.abc import Callable
from typing import Any

from sim.network import End, Network
from sim.wire import Wire
from sim.world import Process

from baton.common.errors import BatonError, HandshakeMismatch, PeerLost
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import LeaseStatus
from baton.kvtransfer.events import (
    FromOwner,
    FromReader,
    LinkClosed,
    LinkEvent,
    LinkOpened,
    PeerConnected,
    PeerDisconnected,
)
from baton.kvtransfer.handshake import LocalSide, ReaderSide, accept_reader
from baton.kvtransfer.link_codec import ReaderMessage, merge_status
from baton.kvtransfer.transport.base import ArenaDescriptor, PeerReader, Transport

CONNECT_DEADLINE_S = 10.0
# Connecting a transport, and how long statuses may wait to be written.
CONNECT_S = (0.005, 0.2)
FLUSH_S = (0.0001, 0.003)

Post = Callable[[LinkEvent], None]


def address_of(worker_id: str) -> str:
    return f"{worker_id}:link"


class _Dialled:
    """One dialled owner; what it says waits until the transport is connected."""

    def __init__(self) -> None:
        self.end: End | None = None
        self.unsent: list[ReaderMessage] = []
        self.unheard: list[LeaseStatus] = []
        self.is_up = False


class LinkDialler:
    """The reader's end: one link per owner that was asked for."""

    def __init__(
        self,
        network: Network,
        process: Process,
        ours: LocalSide,
        transport: Transport,
        wire: Wire,
        post: Post,
    ) -> None:
        self._network = network
        self._process = process
        self._ours = ours
        self._transport = transport
        self._wire = wire
        self._post = post
        self._links: dict[WorkerIdentity, _Dialled] = {}
        self._readers: dict[WorkerIdentity, PeerReader] = {}

    def dial(self, owner: WorkerIdentity, address: str) -> None:
        if owner in self._links:
            return
        link = self._links[owner] = _Dialled()

        def connected(end: End) -> None:
            if self._links.get(owner) is not link:
                end.close()
                return
            link.end = end
            end.on_message = lambda message: self._heard(owner, link, message)
            end.on_closed = lambda: self._lost(owner, link, PeerLost("the link broke"))
            end.send(self._hello(owner))
            for message in link.unsent:
                end.send(self._wire.reader_message(message))
            link.unsent.clear()

        def refused() -> None:
            self._lost(owner, link, PeerLost("nobody answered"))

        self._network.dial(self._process, address, connected, refused)
        self._process.after(CONNECT_DEADLINE_S, lambda: self._too_late(owner, link))

    def send(self, owner: WorkerIdentity, message: ReaderMessage) -> None:
        link = self._links.get(owner)
        if link is None:
            return
        if link.end is None:
            link.unsent.append(message)
        else:
            link.end.send(self._wire.reader_message(message))

    def hang_up(self, owner: WorkerIdentity) -> None:
        link = self._links.get(owner)
        if link is not None:
            self._lost(owner, link, PeerLost("the link was closed"))

    def _hello(self, owner: WorkerIdentity) -> ReaderSide:
        return ReaderSide(
            protocol_min=1,
            protocol_max=1,
            identity=self._ours.identity,
            owner=owner,
            fingerprint=self._ours.fingerprint,
            fields=self._ours.fields,
            transport=self._ours.transport,
        )

    def _heard(self, owner: WorkerIdentity, link: _Dialled, message: Any) -> None:
        if self._links.get(owner) is not link:
            return
        match message:
            case HandshakeMismatch():
                self._lost(owner, link, message)
            case ArenaDescriptor():
                delay_s = self._network.world.draw(*CONNECT_S)
                self._process.after(delay_s, lambda: self._connect(owner, link, message))
            case LeaseStatus() if link.is_up:
                self._post(FromOwner(owner, self._wire.status(message)))
            case LeaseStatus():
                link.unheard.append(message)

    def _connect(self, owner: WorkerIdentity, link: _Dialled, arena: ArenaDescriptor) -> None:
        if self._links.get(owner) is not link:
            return
        reader = self._readers.get(owner)
        if reader is None or reader.is_closed:
            try:
                reader = self._transport.connect(owner, arena)
            except BatonError as error:
                self._lost(owner, link, error)
                return
            self._readers[owner] = reader
        link.is_up = True
        self._post(PeerConnected(owner, reader))
        for status in link.unheard:
            self._post(FromOwner(owner, self._wire.status(status)))
        link.unheard.clear()

    def _too_late(self, owner: WorkerIdentity, link: _Dialled) -> None:
        if not link.is_up:
            self._lost(owner, link, PeerLost("it did not connect in time"))

    def _lost(self, owner: WorkerIdentity, link: _Dialled, error: BatonError) -> None:
        if self._links.get(owner) is not link:
            return
        del self._links[owner]
        if link.end is not None:
            link.end.close()
        self._post(PeerDisconnected(owner, error))


class _Outbox:
    """The newest unsent status of each lease of one link."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.unsent: dict[RequestKey, LeaseStatus] = {}
        self.is_writing = False


class LinkListener:
    """The owner's end: at most one link per reader, a newer one ends the older."""

    def __init__(
        self,
        network: Network,
        process: Process,
        ours: LocalSide,
        arena: ArenaDescriptor,
        wire: Wire,
        post: Post,
    ) -> None:
        self._network = network
        self._process = process
        self._ours = ours
        self._arena = arena
        self._wire = wire
        self._post = post
        self._outboxes: dict[WorkerIdentity, _Outbox] = {}
        network.listen(address_of(ours.identity.worker_id), process, self._accept)

    def send(self, reader: WorkerIdentity, status: LeaseStatus) -> None:
        """Without a link it is dropped: the reader's next claim asks again."""
        outbox = self._outboxes.get(reader)
        if outbox is None:
            return
        outbox.unsent[status.key] = merge_status(outbox.unsent.get(status.key), status)
        if not outbox.is_writing:
            outbox.is_writing = True
            self._process.after(self._network.world.draw(*FLUSH_S), lambda: self._write(outbox))

    def _write(self, outbox: _Outbox) -> None:
        outbox.is_writing = False
        statuses = list(outbox.unsent.values())
        outbox.unsent.clear()
        for status in statuses:
            outbox.end.send(status)

    def _accept(self, end: End) -> None:
        end.on_message = lambda message: self._greet(end, message)

    def _greet(self, end: End, hello: ReaderSide) -> None:
        try:
            accept_reader(self._ours, hello)
        except HandshakeMismatch as refused:
            end.send(refused)
            end.close()
            return
        reader = hello.identity
        older = self._outboxes.get(reader)
        if older is not None:
            older.end.close()
        outbox = self._outboxes[reader] = _Outbox(end)
        end.on_message = lambda message: self._heard(reader, outbox, message)
        end.on_closed = lambda: self._closed(reader, outbox)
        self._post(LinkOpened(reader))
        end.send(self._arena)

    def _heard(self, reader: WorkerIdentity, outbox: _Outbox, message: ReaderMessage) -> None:
        if self._outboxes.get(reader) is outbox:
            self._post(FromReader(reader, message))

    def _closed(self, reader: WorkerIdentity, outbox: _Outbox) -> None:
        if self._outboxes.get(reader) is outbox:
            del self._outboxes[reader]
            self._post(LinkClosed(reader))
