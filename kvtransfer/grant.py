"""Who may be told where blocks lie, and that nobody else made it up.

The router draws a key per attempt and gives it to the owner and to the reader of that attempt,
nobody else. With it

    the reader claims      claim_mac(key; transfer, attempt, reader, owner)
    the owner announces    handles_mac(key; transfer, attempt, reader, owner, slots, generations)

so a reader that the router did not name learns no handle, and handles that were changed or belong
to another lease, reader or epoch are not read. MACs are BLAKE2b in its keyed mode (RFC 7693), each
use with its own personalisation; fields are length-prefixed, so no two messages share their bytes.

`arena_digest` is a checksum, keyed by the incarnation that reader and owner know beforehand: some
transports accept damaged metadata. It does not keep a forger out; the authenticated link does.
"""

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

from baton.common.ids import Generation, RequestKey, Slot, WorkerIdentity
from baton.common.randomness import Randomness
from baton.kvtransfer.transport.base import ArenaDescriptor

GRANT_KEY_BYTES: Final = 32
MAC_BYTES: Final = 16


def grant_key(source: Randomness) -> bytes:
    """A fresh key for one attempt."""
    return source.bits(8 * GRANT_KEY_BYTES).to_bytes(GRANT_KEY_BYTES, "big")


def claim_mac(
    key: bytes, request: RequestKey, *, reader: WorkerIdentity, owner: WorkerIdentity
) -> bytes:
    """What a reader shows with its claim."""
    return _mac(key, b"baton claim", _parties(request, reader, owner))


def handles_mac(
    key: bytes,
    request: RequestKey,
    *,
    reader: WorkerIdentity,
    owner: WorkerIdentity,
    slots: Sequence[Slot],
    generations: Sequence[Generation],
) -> bytes:
    """What an owner shows with its handles."""
    handles = struct.pack(f"<{len(slots)}I{len(generations)}Q", *slots, *generations)
    return _mac(key, b"baton handles", [*_parties(request, reader, owner), handles])


def arena_digest(arena: ArenaDescriptor, owner: WorkerIdentity) -> bytes:
    """A checksum over all that a reader is told of an arena."""
    numbers = struct.pack(
        "<QQQQ",
        arena.base_address,
        arena.block_bytes,
        arena.num_slots,
        arena.generations_address,
    )
    parts = [arena.transport.encode(), arena.metadata, numbers]
    return _mac(owner.incarnation.encode()[:64], b"baton arena", parts)


def _parties(request: RequestKey, reader: WorkerIdentity, owner: WorkerIdentity) -> list[bytes]:
    parts = [request.transfer_id, struct.pack("<Q", request.attempt)]
    for identity in (reader, owner):
        parts += [
            identity.worker_id.encode(),
            struct.pack("<Q", identity.epoch),
            identity.incarnation.encode(),
        ]
    return parts


def _mac(key: bytes, use: bytes, parts: Iterable[bytes]) -> bytes:
    mac = blake2b(key=key, digest_size=MAC_BYTES, person=use)
    for part in parts:
        mac.update(struct.pack("<Q", len(part)))
        mac.update(part)
    return mac.digest()
