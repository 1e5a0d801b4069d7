"""F22: what peers say of leases and arenas is damaged or forged; it costs a request at most."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError, Message
from support.core_mesh import GRANT, CoreMesh, D, E, P
from support.faulty_mesh import FaultyMesh, MeshMaker
from support.figures import Figure
from support.trials import prompt_of

from baton.common.errors import BatonError
from baton.common.ids import Generation, RequestKey, Slot, WorkerIdentity
from baton.common.messages import LeaseClaim, LeaseStatus
from baton.kvtransfer.events import FromOwner, FromReader
from baton.kvtransfer.grant import claim_mac
from baton.kvtransfer.link_codec import (
    arena_from_pb,
    arena_to_pb,
    reader_message_from_pb,
    reader_message_to_pb,
    status_from_pb,
    status_to_pb,
)
from baton.v1 import kv_pb2 as pb

MUTATIONS = [700, pytest.param(10_000, marks=[pytest.mark.slow_fault, pytest.mark.timeout(600)])]
PROMPT = prompt_of(70, 1)
Handles = tuple[tuple[Slot, ...], tuple[Generation, ...]]


def mutated(wire: bytes, draw: random.Random) -> bytes:
    """Some bits flipped, bytes cut out or put in, or the end torn off."""
    changed = bytearray(wire)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        at = draw.randrange(len(changed)) if changed else 0
        kind = draw.randrange(5)
        if not changed or kind == 0:
            changed[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 1:
            del changed[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            del changed[at:]
        else:
            changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


def parsed(kind: type[Message], wire: bytes) -> Message | None:
    message = kind()
    try:
        message.ParseFromString(wire)
    except DecodeError:
        return None
    return message


def held_by_owner(mesh: CoreMesh) -> RequestKey:
    """A request whose lease is open on P, and of which D has heard nothing."""
    key = mesh.submit(PROMPT, 8, to_decode=False)
    while not mesh.tokens(key):
        assert isinstance(mesh, FaultyMesh)
        mesh.step(P)
        mesh.deliver(P)
    return key


def told(mesh: CoreMesh) -> list[tuple[WorkerIdentity, LeaseStatus]]:
    """Who was told handles since the last look."""
    return [each for each in mesh.prefill.take_effects().statuses if each[1].slots]


@pytest.mark.parametrize("count", MUTATIONS)
def test_f22_damaged_claims_are_told_no_handle(
    count: int, faulty_mesh: MeshMaker, figure: Figure
) -> None:
    """Only the reader of the grant, with its MAC, hears where the blocks are."""
    mesh, draw = faulty_mesh(decodes=(D, E)), random.Random(22)
    key = held_by_owner(mesh)
    mac = claim_mac(GRANT, key, reader=D, owner=P)
    right = LeaseClaim(key, mac)
    wire = reader_message_to_pb(right).SerializeToString()
    refused = 0
    for _ in range(count):
        message = parsed(pb.LinkRequest, mutated(wire, draw))
        if not isinstance(message, pb.LinkRequest):
            refused += 1
            continue
        try:
            heard = reader_message_from_pb(message)
        except BatonError:
            refused += 1
            continue
        if heard == right or not isinstance(heard, LeaseClaim):
            # The damage is in what nobody reads, or made another message of it.
            continue
        mesh.prefill.handle(FromReader(D, heard))
        assert told(mesh) == []
        refused += 1
    for stranger in (E, replace(D, incarnation="another life")):
        mesh.prefill.handle(FromReader(stranger, right))
        assert told(mesh) == []
    mesh.prefill.handle(FromReader(D, right))
    assert [reader for reader, _ in told(mesh)] == [D]
    assert refused > count // 4
    figure(f"F22: damaged claims that were told a handle, of {count}", 0, "")


@pytest.mark.parametrize("count", MUTATIONS)
def test_f22_damaged_releases_and_renewals_end_nothing_else(
    count: int, faulty_mesh: MeshMaker
) -> None:
    """Another reader's words change no lease, whatever they are."""
    mesh, draw = faulty_mesh(decodes=(D, E)), random.Random(23)
    key = held_by_owner(mesh)
    wires = [
        pb.LinkRequest(renew=pb.LeaseRenew(keys=[_key(key)])).SerializeToString(),
        pb.LinkRequest(release=pb.LeaseRelease(key=_key(key), joined=True)).SerializeToString(),
    ]
    for _ in range(count):
        message = parsed(pb.LinkRequest, mutated(draw.choice(wires), draw))
        if isinstance(message, pb.LinkRequest):
            try:
                mesh.prefill.handle(FromReader(E, reader_message_from_pb(message)))
            except BatonError:
                continue
    assert len(mesh.prefill._owner.leased) == 1
    assert told(mesh) == []
    mesh.prefill.check_invariants()


@pytest.mark.parametrize("count", MUTATIONS)
def test_f22_damaged_statuses_give_no_foreign_handle(
    count: int, faulty_mesh: MeshMaker, figure: Figure
) -> None:
    """D reads the owner's handles or none: what it was told wrongly costs that request alone."""
    mesh, draw = faulty_mesh(), random.Random(24)
    key, status, right = _claimed(mesh)
    wire = status_to_pb(status).status.SerializeToString()
    refused = 0
    for _ in range(count):
        message = parsed(pb.LeaseStatus, mutated(wire, draw))
        if not isinstance(message, pb.LeaseStatus):
            refused += 1
            continue
        try:
            heard = status_from_pb(message)
        except BatonError:
            refused += 1
            continue
        mesh.decode.handle(FromOwner(P, heard))
        mesh.decode.check_invariants()
        request = mesh.decode._requests.get(key)
        if request is not None and request.status is None:
            refused += 1
            continue
        if request is not None and request.status is not None and request.status.slots:
            assert (request.status.slots, request.status.generations) == right
        # It was believed, or has ended the request: the next one.
        mesh.decode.take_effects()
        refused += request is None
        mesh.decode._intake.cancel(key)
        key, status, right = _claimed(mesh)
        wire = status_to_pb(status).status.SerializeToString()
    assert refused > count // 4
    figure(f"F22: damaged statuses that gave a foreign handle, of {count}", 0, "")


@pytest.mark.parametrize(
    "forge",
    [
        lambda status: replace(status, slots=tuple(reversed(status.slots))),
        lambda status: replace(status, slots=(Slot(2**31), *status.slots[1:])),
        lambda status: replace(
            status, generations=tuple(Generation(word + 1) for word in status.generations)
        ),
        lambda status: replace(status, mac=bytes(16)),
        lambda status: replace(status, mac=b""),
    ],
    ids=["order", "beyond the arena", "generations", "zero mac", "no mac"],
)
def test_f22_forged_handles_are_refused(
    forge: Callable[[LeaseStatus], LeaseStatus], faulty_mesh: MeshMaker
) -> None:
    mesh = faulty_mesh()
    key, status, _ = _claimed(mesh)
    mesh.decode.handle(FromOwner(P, forge(status)))
    mesh.deliver(D)
    assert mesh.errors(key) == ["grant_refused"]


@pytest.mark.parametrize("count", MUTATIONS)
def test_f22_damaged_arenas_are_refused(count: int, faulty_mesh: MeshMaker, figure: Figure) -> None:
    """NIXL crashes on some damaged metadata: it is not shown any."""
    mesh, draw = faulty_mesh(), random.Random(25)
    arena = replace(mesh._described[P], metadata=draw.randbytes(600))
    wire = arena_to_pb(arena, P).SerializeToString()
    assert arena_from_pb(pb.ArenaDescriptor.FromString(wire), P) == arena
    for _ in range(count):
        message = parsed(pb.ArenaDescriptor, mutated(wire, draw))
        if isinstance(message, pb.ArenaDescriptor):
            try:
                taken = arena_from_pb(message, P)
            except BatonError:
                continue
            assert taken == arena
    figure(f"F22: damaged arenas that were taken, of {count}", 0, "")


def _claimed(mesh: FaultyMesh) -> tuple[RequestKey, LeaseStatus, Handles]:
    """A request that waits for handles on D, and what P would say of its lease."""
    key = held_by_owner(mesh)
    offer = mesh.prefill._owner._offers[key]
    status = offer.status(with_handles=True)
    mesh.send(D, mesh.decode_job(key, PROMPT, 8))
    mesh.prefill._intake.cancel(key)
    mesh.prefill.take_effects()
    mesh.decode.take_effects()
    return key, status, (status.slots, status.generations)


def _key(key: RequestKey) -> Message:
    return reader_message_to_pb(LeaseClaim(key, b"")).claim.key
