"""Sizes in bytes as people write them."""

import re
from typing import Final

from baton.common.errors import ConfigError

_BYTES: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """1024, 512M, 2G, 1.5GiB: suffixes are powers of 1024. Raises ConfigError."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no size in bytes; write it as 1048576, 512M or 2G")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * 1024**power)
