"""Who may exchange KV with whom: protocol range, identity and fingerprint, checked before a lease.

Protocol history: 1 is the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.common.errors import HandshakeMismatch
from baton.common.fingerprint import differing_fields
from baton.common.ids import WorkerIdentity

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSide:
    """What this worker says of itself in every handshake."""

    identity: WorkerIdentity
    fingerprint: str
    fields: Mapping[str, str]
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSide:
    """What a reader said in its hello; `owner` is whom it meant to reach."""

    protocol_min: int
    protocol_max: int
    identity: WorkerIdentity
    owner: WorkerIdentity
    fingerprint: str
    fields: Mapping[str, str]
    transport: str


def accept_reader(ours: LocalSide, reader: ReaderSide) -> int:
    """The protocol to speak with this reader.

    Raises HandshakeMismatch, which names what differs.
    """
    protocol = min(PROTOCOL_MAX, reader.protocol_max)
    if protocol < max(PROTOCOL_MIN, reader.protocol_min):
        raise HandshakeMismatch(
            f"no common KV protocol: {ours.identity} speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}, "
            f"{reader.identity} speaks {reader.protocol_min} to {reader.protocol_max}; "
            "upgrade the older worker"
        )
    if reader.owner != ours.identity:
        raise HandshakeMismatch(
            f"{reader.identity} looks for {reader.owner} (incarnation {reader.owner.incarnation}), "
            f"but {ours.identity} (incarnation {ours.identity.incarnation}) listens here"
        )
    if reader.fingerprint != ours.fingerprint:
        differing = "; ".join(differing_fields(ours.fields, reader.fields))
        raise HandshakeMismatch(
            f"{reader.identity} and {ours.identity} store KV differently: "
            f"{differing or 'the fingerprints differ'}"
        )
    if reader.transport != ours.transport:
        raise HandshakeMismatch(
            f"{reader.identity} reads by {reader.transport}, "
            f"{ours.identity} offers {ours.transport}"
        )
    return protocol
