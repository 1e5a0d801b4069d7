"""What links tell the engine thread, both sides."""

from dataclasses import dataclass

from baton.common.errors import BatonError
from baton.common.ids import WorkerIdentity
from baton.common.messages import LeaseStatus
from baton.kvtransfer.link_codec import ReaderMessage
from baton.kvtransfer.transport.base import PeerReader


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """Owner side: a reader passed the handshake."""

    reader: WorkerIdentity


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """Owner side: the reader's current link broke."""

    reader: WorkerIdentity


@dataclass(frozen=True, slots=True)
class FromReader:
    reader: WorkerIdentity
    message: ReaderMessage


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """Reader side: the owner's blocks may be read through `peer`."""

    owner: WorkerIdentity
    peer: PeerReader


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """Reader side: the link broke or was refused; `error` says why."""

    owner: WorkerIdentity
    error: BatonError


@dataclass(frozen=True, slots=True)
class FromOwner:
    owner: WorkerIdentity
    status: LeaseStatus


LinkEvent = LinkOpened | LinkClosed | FromReader | PeerConnected | PeerDisconnected | FromOwner
