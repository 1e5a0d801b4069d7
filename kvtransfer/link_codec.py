"""Link messages to protobuf and back. Malformed ones raise InvalidRequest."""

from dataclasses import replace
from hmac import compare_digest

from baton.common.codec import (
    error_from_pb,
    error_to_pb,
    identity_from_pb,
    identity_to_pb,
    key_from_pb,
    key_to_pb,
)
from baton.common.errors import InvalidRequest
from baton.common.ids import Generation, Slot, WorkerIdentity
from baton.common.messages import (
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseState,
    LeaseStatus,
)
from baton.kvtransfer.grant import arena_digest
from baton.kvtransfer.handshake import PROTOCOL_MAX, PROTOCOL_MIN, LocalSide, ReaderSide
from baton.kvtransfer.transport.base import ArenaDescriptor
from baton.v1 import kv_pb2 as pb

ReaderMessage = LeaseClaim | LeaseRenew | LeaseRelease

_STATE_TO_PB = {
    LeaseState.NOT_YET: pb.LEASE_STATE_NOT_YET,
    LeaseState.OPEN: pb.LEASE_STATE_OPEN,
    LeaseState.ENDED: pb.LEASE_STATE_ENDED,
}
_STATE_FROM_PB = {wire: state for state, wire in _STATE_TO_PB.items()}


def reader_hello_to_pb(ours: LocalSide, owner: WorkerIdentity) -> pb.LinkRequest:
    return pb.LinkRequest(
        hello=pb.ReaderHello(
            protocol=pb.ProtocolRange(min=PROTOCOL_MIN, max=PROTOCOL_MAX),
            identity=identity_to_pb(ours.identity),
            owner=identity_to_pb(owner),
            fingerprint=ours.fingerprint,
            fields=[
                pb.FingerprintField(name=name, value=value) for name, value in ours.fields.items()
            ],
            transport=ours.transport,
        )
    )


def reader_hello_from_pb(wire: pb.LinkRequest) -> ReaderSide:
    if not wire.HasField("hello"):
        raise InvalidRequest("a link opens with a hello", field="hello")
    hello = wire.hello
    return ReaderSide(
        protocol_min=hello.protocol.min,
        protocol_max=hello.protocol.max,
        identity=identity_from_pb(hello.identity),
        owner=identity_from_pb(hello.owner),
        fingerprint=hello.fingerprint,
        fields={entry.name: entry.value for entry in hello.fields},
        transport=hello.transport,
    )


def arena_to_pb(arena: ArenaDescriptor, owner: WorkerIdentity) -> pb.ArenaDescriptor:
    return pb.ArenaDescriptor(
        transport=arena.transport,
        metadata=arena.metadata,
        base_address=arena.base_address,
        block_bytes=arena.block_bytes,
        num_slots=arena.num_slots,
        generations_address=arena.generations_address,
        digest=arena_digest(arena, owner),
    )


def arena_from_pb(wire: pb.ArenaDescriptor, owner: WorkerIdentity) -> ArenaDescriptor:
    """The arena of `owner`. InvalidRequest: empty, or damaged on the way."""
    if not wire.block_bytes or not wire.num_slots:
        raise InvalidRequest("an arena has blocks and slots", field="arena")
    arena = ArenaDescriptor(
        transport=wire.transport,
        metadata=wire.metadata,
        base_address=wire.base_address,
        block_bytes=wire.block_bytes,
        num_slots=wire.num_slots,
        generations_address=wire.generations_address,
    )
    if not compare_digest(wire.digest, arena_digest(arena, owner)):
        raise InvalidRequest(
            f"the arena of {owner} does not have the digest that came with it", field="digest"
        )
    return arena


def owner_hello_to_pb(ours: LocalSide, arena: ArenaDescriptor, protocol: int) -> pb.LinkResponse:
    return pb.LinkResponse(
        hello=pb.OwnerHello(
            protocol=protocol,
            identity=identity_to_pb(ours.identity),
            fingerprint=ours.fingerprint,
            arena=arena_to_pb(arena, ours.identity),
        )
    )


def reader_message_to_pb(message: ReaderMessage) -> pb.LinkRequest:
    match message:
        case LeaseClaim(key, mac):
            return pb.LinkRequest(claim=pb.LeaseClaim(key=key_to_pb(key), mac=mac))
        case LeaseRenew(keys):
            return pb.LinkRequest(renew=pb.LeaseRenew(keys=[key_to_pb(key) for key in keys]))
        case LeaseRelease(key, joined, bad_slots):
            return pb.LinkRequest(
                release=pb.LeaseRelease(key=key_to_pb(key), joined=joined, bad_slots=bad_slots)
            )


def reader_message_from_pb(wire: pb.LinkRequest) -> ReaderMessage:
    kind = wire.WhichOneof("message")
    if kind == "claim":
        return LeaseClaim(key_from_pb(wire.claim.key), wire.claim.mac)
    if kind == "renew":
        return LeaseRenew(tuple(key_from_pb(key) for key in wire.renew.keys))
    if kind == "release":
        release = wire.release
        bad_slots = tuple(Slot(slot) for slot in release.bad_slots)
        return LeaseRelease(key_from_pb(release.key), release.joined, bad_slots)
    raise InvalidRequest(f"a reader sends claim, renew or release, not {kind}", field="message")


def status_to_pb(status: LeaseStatus) -> pb.LinkResponse:
    wire = pb.LeaseStatus(
        key=key_to_pb(status.key),
        state=_STATE_TO_PB[status.state],
        slots=status.slots,
        generations=status.generations,
        mac=status.mac,
        kv_tokens=status.kv_tokens,
        readable_tokens=status.readable_tokens,
        output_position=status.output_position,
        output_token_ids=status.output_tokens,
        finished=status.finished,
        cached_tokens=status.cached_tokens,
        first_digest=status.first_digest,
        digests=status.digests,
    )
    if status.error is not None:
        wire.error.CopyFrom(error_to_pb(status.error))
    return pb.LinkResponse(status=wire)


def status_from_pb(wire: pb.LeaseStatus) -> LeaseStatus:
    if wire.state not in _STATE_FROM_PB:
        raise InvalidRequest(f"unknown lease state {wire.state}", field="state")
    if len(wire.slots) != len(wire.generations):
        raise InvalidRequest(
            f"{len(wire.slots)} slots with {len(wire.generations)} generations", field="slots"
        )
    return LeaseStatus(
        key=key_from_pb(wire.key),
        state=_STATE_FROM_PB[wire.state],
        slots=tuple(Slot(slot) for slot in wire.slots),
        generations=tuple(Generation(word) for word in wire.generations),
        mac=wire.mac,
        kv_tokens=wire.kv_tokens,
        readable_tokens=wire.readable_tokens,
        output_position=wire.output_position,
        output_tokens=tuple(wire.output_token_ids),
        finished=wire.finished,
        cached_tokens=wire.cached_tokens,
        first_digest=wire.first_digest,
        digests=tuple(wire.digests),
        error=error_from_pb(wire.error) if wire.HasField("error") else None,
    )


def merge_status(older: LeaseStatus | None, newer: LeaseStatus) -> LeaseStatus:
    """One status that says what both said: announcements are cumulative, so they coalesce.

    Handles come once and stay; digests come block by block and add up.
    """
    if older is None or newer.state is LeaseState.ENDED or newer.slots:
        return newer
    digests, first = newer.digests, newer.first_digest
    if older.first_digest <= first <= older.first_digest + len(older.digests):
        digests = older.digests[: first - older.first_digest] + newer.digests
        first = older.first_digest
    return replace(
        newer,
        slots=older.slots,
        generations=older.generations,
        mac=older.mac,
        digests=digests,
        first_digest=first,
    )
