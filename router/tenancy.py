"""The key that keeps tenants' cached blocks apart: `block_hash` is keyed with it."""

from hashlib import blake2b

from baton.common.errors import InvalidRequest
from baton.router.tokenizer import check_text

MAX_SALT_BYTES = 128
KEY_BYTES = 32


def tenant_key(tenant_secret: bytes, cache_salt: str | None) -> bytes:
    """The key of a tenant, and within it of those who share a salt.

    `tenant_secret`: at most 64 bytes, empty for a cluster without tenants. Raises InvalidRequest.
    """
    if cache_salt is None:
        return tenant_secret
    check_text(cache_salt, "cache_salt")
    salt = cache_salt.encode()
    if not 0 < len(salt) <= MAX_SALT_BYTES:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} bytes; it must have 1 to {MAX_SALT_BYTES}",
            field="cache_salt",
        )
    return blake2b(salt, key=tenant_secret, digest_size=KEY_BYTES).digest()
