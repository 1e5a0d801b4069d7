"""The identity of a full block: a chained keyed hash over everything that decides its bytes.

Version 1, fully specified so that any process of any release computes the same:

    h0 = blake2b(key=tenant_key, fingerprint)                             16 bytes
    hi = blake2b(key=tenant_key, h(i-1) ‖ token ids as little-endian u32) 16 bytes

`tenant_key` keeps tenants apart: equal prompts of two tenants share no hash.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

from baton.common.ids import BlockHash

HASH_VERSION = 1
HASH_BYTES = 16
MAX_KEY_BYTES = 64


def root_hash(tenant_key: bytes, fingerprint: str) -> BlockHash:
    """The parent of every first block of this tenant under this fingerprint."""
    digest = blake2b(fingerprint.encode(), digest_size=HASH_BYTES, key=tenant_key)
    return BlockHash(digest.digest())


def block_hash(tenant_key: bytes, parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of one full block of `tokens` behind `parent`."""
    message = parent + struct.pack(f"<{len(tokens)}I", *tokens)
    return BlockHash(blake2b(message, digest_size=HASH_BYTES, key=tenant_key).digest())


def extend_hashes(
    hashes: list[BlockHash],
    tenant_key: bytes,
    root: BlockHash,
    tokens: Sequence[int],
    block_size: int,
) -> None:
    """Append to `hashes` those of all further full blocks of `tokens`; existing entries stay."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = block_hash(tenant_key, parent, tokens[start : start + block_size])
        hashes.append(parent)
