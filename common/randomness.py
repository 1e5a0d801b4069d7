"""Randomness as an interface: ids and tie-breaks, seeded in tests and simulation."""

import random
import secrets
from typing import Protocol

from baton.common.ids import TRANSFER_ID_BYTES, TransferId


class Randomness(Protocol):
    """Bits for ids that must not be guessed, and choices among equals."""

    def bits(self, count: int) -> int: ...


class SystemRandomness:
    """The operating system's generator."""

    def bits(self, count: int) -> int:
        return secrets.randbits(count)


class SeededRandomness:
    """The same bits for the same seed: tests and simulation."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def bits(self, count: int) -> int:
        return self._random.getrandbits(count)


def transfer_id(source: Randomness) -> TransferId:
    """A fresh 128-bit transfer id."""
    return TransferId(source.bits(8 * TRANSFER_ID_BYTES).to_bytes(TRANSFER_ID_BYTES, "big"))


def incarnation(source: Randomness) -> str:
    """A fresh name for one life of a process."""
    return f"{source.bits(64):016x}"
