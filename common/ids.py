"""Distinct types for values that look alike, and the identities that every message names."""

from dataclasses import dataclass
from typing import NewType

WorkerId = NewType("WorkerId", str)
RouterId = NewType("RouterId", str)
Epoch = NewType("Epoch", int)
Slot = NewType("Slot", int)
Generation = NewType("Generation", int)
BlockHash = NewType("BlockHash", bytes)
TransferId = NewType("TransferId", bytes)

TRANSFER_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One attempt at one request: what every message between parts names."""

    transfer_id: TransferId
    attempt: int

    def __str__(self) -> str:
        return f"{self.transfer_id.hex()}/{self.attempt}"


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """A worker's life: equal only when id, epoch and incarnation are."""

    worker_id: WorkerId
    epoch: Epoch
    incarnation: str

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.epoch}"


@dataclass(frozen=True, slots=True)
class BlockHandle:
    """What a peer may read: a slot of one life of a worker, at one generation."""

    slot: Slot
    generation: Generation
