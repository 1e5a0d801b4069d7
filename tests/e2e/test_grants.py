"""Handles that their owner did not vouch for to this reader are not read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.core_mesh import GRANT, CoreMesh, D, E, P

from baton.common import metric_names as names
from baton.common.ids import BlockHandle, Generation, RequestKey, Slot, WorkerIdentity
from baton.common.messages import DecodeJob, LeaseStatus
from baton.kvtransfer.events import FromOwner
from baton.kvtransfer.grant import handles_mac
from baton.kvtransfer.transport.base import PeerReader

PROMPT = list(range(10, 140))


def vouched(
    key: RequestKey,
    handles: tuple[BlockHandle, ...],
    *,
    grant: bytes = GRANT,
    reader: WorkerIdentity = D,
) -> bytes:
    return handles_mac(
        grant,
        key,
        reader=reader,
        owner=P,
        slots=[handle.slot for handle in handles],
        generations=[handle.generation for handle in handles],
    )


def with_handles(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return replace(
        status,
        slots=tuple(handle.slot for handle in handles),
        generations=tuple(handle.generation for handle in handles),
    )


def other_slot(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    moved = BlockHandle(Slot(handles[0].slot + 20), handles[0].generation)
    return with_handles(status, (moved, *handles[1:]))


def other_generation(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    newer = BlockHandle(handles[0].slot, Generation(handles[0].generation + 1))
    return with_handles(status, (newer, *handles[1:]))


def other_order(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return with_handles(status, handles[::-1])


def other_reader(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return replace(status, mac=vouched(status.key, handles, reader=E))


def other_attempt(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return replace(status, mac=vouched(replace(status.key, attempt=2), handles))


def guessed_key(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return replace(status, mac=vouched(status.key, handles, grant=b"guessed"))


def no_mac(status: LeaseStatus, handles: tuple[BlockHandle, ...]) -> LeaseStatus:
    return replace(status, mac=b"")


@pytest.mark.parametrize(
    "forge",
    [
        other_slot,
        other_generation,
        other_order,
        other_reader,
        other_attempt,
        guessed_key,
        no_mac,
    ],
)
def test_forged_handles_are_not_read(
    forge: Callable[[LeaseStatus, tuple[BlockHandle, ...]], LeaseStatus], tiny_llama: Path
) -> None:
    """Of whatever part: the request ends, and not one block of the owner was touched."""
    mesh = CoreMesh(tiny_llama)
    key = mesh.submit(PROMPT, 40)
    mesh.decode.step()
    mesh.deliver(D)
    mesh.prefill.step()
    effects = mesh.prefill.take_effects()
    told = next(status for _, status in effects.statuses if status.slots)
    assert (told.key, len(told.slots)) == (key, 5)
    handles = tuple(map(BlockHandle, told.slots, told.generations))
    assert told.mac == vouched(key, handles), "what P itself says is vouched for"
    (peer,) = peers(mesh)
    mesh.decode.handle(FromOwner(P, forge(told, handles)))
    mesh.advance(0.5)
    assert mesh.errors(key) == ["grant_refused"]
    assert mesh.decode.handovers.counters[names.HANDLES_REFUSED] == 1
    assert (peer.blocks_read, peer.outstanding_bytes) == (0, 0)
    mesh.expect_rest()


def test_a_reader_with_another_grant_is_told_no_handle(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama)
    key = mesh.submit(PROMPT, 40, to_decode=False)
    mesh.send(D, mesh.job(key, PROMPT, 40, DecodeJob(P, "nowhere", b"not the router's")))
    mesh.advance(1)
    assert mesh.errors(key) == ["grant_refused"]
    assert mesh.prefill._owner.counters[names.CLAIMS_REFUSED] == 1
    (peer,) = peers(mesh)
    assert peer.blocks_read == 0


def peers(mesh: CoreMesh) -> list[PeerReader]:
    return list(mesh.decode.handovers.peers.values())
