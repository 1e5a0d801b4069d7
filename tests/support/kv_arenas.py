"""Arenas of random bytes, and two connected workers over either transport, for the KV suites."""

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from support.fault_transport import FaultScript, FaultyTransport

from baton.common.ids import BlockHandle, Epoch, Generation, Slot, WorkerId, WorkerIdentity
from baton.kvtransfer.transport.base import (
    GENERATION_BYTES,
    ArenaDescriptor,
    MemoryRegion,
    PeerReader,
    Read,
    ReadState,
    Transport,
)
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.kvtransfer.transport.nixl import NixlTransport

POLL_LIMIT_S = 10.0


def identity(name: str, epoch: int = 1) -> WorkerIdentity:
    return WorkerIdentity(WorkerId(name), Epoch(epoch), f"incarnation of {name}")


class Arena:
    """Random blocks [slot, byte] uint8 and generation words [slot] uint64 in own pages."""

    def __init__(self, num_slots: int, block_bytes: int, *, seed: int) -> None:
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._block_pages = mmap.mmap(-1, num_slots * block_bytes)
        self._word_pages = mmap.mmap(-1, num_slots * GENERATION_BYTES)
        rng = np.random.default_rng(seed)
        flat = np.frombuffer(self._block_pages, dtype=np.uint8)
        flat[:] = rng.integers(0, 256, size=len(flat), dtype=np.uint8)
        self.blocks = flat.reshape(num_slots, block_bytes)
        self.words = np.frombuffer(self._word_pages, dtype=np.uint64)
        self.words[:] = rng.integers(1, 2**62, size=num_slots, dtype=np.uint64)

    def open_on(self, transport: Transport) -> ArenaDescriptor:
        blocks, words = self.blocks, self.words
        return transport.register(
            MemoryRegion(blocks.ctypes.data, blocks.nbytes, keep=self),
            MemoryRegion(words.ctypes.data, words.nbytes, keep=self),
            block_bytes=self.block_bytes,
            num_slots=self.num_slots,
        )

    def handles(self, slots: list[Slot]) -> list[BlockHandle]:
        return [BlockHandle(slot, Generation(int(self.words[slot]))) for slot in slots]

    def rewrite(self, slot: Slot) -> None:
        """What an owner does before it uses a slot for something else: the word first."""
        self.words[slot] += np.uint64(1)
        self.blocks[slot] ^= np.uint8(255)


@dataclass
class Pair:
    """A worker that owns blocks, and one connected to read them."""

    owner: Arena
    owner_id: WorkerIdentity
    owner_transport: Transport
    descriptor: ArenaDescriptor
    local: Arena
    local_id: WorkerIdentity
    local_transport: Transport
    local_descriptor: ArenaDescriptor
    reader: PeerReader


@contextmanager
def connected_pair(
    transport: str,
    *,
    owner_slots: int = 64,
    local_slots: int = 48,
    block_bytes: int = 4096,
    script: FaultScript | None = None,
) -> Iterator[Pair]:
    """With a `script`, the readers of both workers go wrong by it."""
    owner_id, local_id = identity("prefill"), identity("decode")
    owner_transport: Transport
    local_transport: Transport
    if transport == "memory":
        fabric = MemoryFabric()
        owner_transport = MemoryTransport(owner_id, fabric)
        local_transport = MemoryTransport(local_id, fabric)
    else:
        owner_transport, local_transport = NixlTransport(owner_id), NixlTransport(local_id)
    if script is not None:
        owner_transport = FaultyTransport(owner_transport, script)
        local_transport = FaultyTransport(local_transport, script)
    owner = Arena(owner_slots, block_bytes, seed=1)
    local = Arena(local_slots, block_bytes, seed=2)
    descriptor = owner.open_on(owner_transport)
    local_descriptor = local.open_on(local_transport)
    reader = local_transport.connect(owner_id, descriptor)
    try:
        yield Pair(
            owner=owner,
            owner_id=owner_id,
            owner_transport=owner_transport,
            descriptor=descriptor,
            local=local,
            local_id=local_id,
            local_transport=local_transport,
            local_descriptor=local_descriptor,
            reader=reader,
        )
    finally:
        reader.close()
        local_transport.close()
        owner_transport.close()


def finish(reader: PeerReader, read: Read) -> ReadState:
    """Polls until the read has ended; fails the test if it never does."""
    deadline = time.monotonic() + POLL_LIMIT_S
    while reader.poll(read) is ReadState.PENDING:
        assert time.monotonic() < deadline, f"still pending after {POLL_LIMIT_S} s"
    return read.state


def slots(*numbers: int) -> list[Slot]:
    return [Slot(number) for number in numbers]
