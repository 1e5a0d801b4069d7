"""The fingerprint: a digest of what decides a block's bytes, and the fields it digests.

Two workers may exchange KV only when their fingerprints are equal. It names neither TP degree nor
rank nor release. The fields travel in the handshake so that a refusal can say which one differs.
"""

from collections.abc import Mapping
from hashlib import blake2b

LAYOUT_VERSION = 1


def fingerprint(fields: Mapping[str, str]) -> str:
    """32 hex digits over the sorted fields."""
    digest = blake2b(digest_size=16)
    for name in sorted(fields):
        for part in (name, fields[name]):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(4, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def differing_fields(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Sentences that name each differing field with both values."""
    missing = "absent"
    return [
        f"{name}: {ours.get(name, missing)} here, {theirs.get(name, missing)} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
