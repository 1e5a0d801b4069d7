"""Transports that lie: what crosses is changed after the real read, or said to have changed."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from support.cluster import TransportFactory, transports

from baton.common.ids import Slot, WorkerIdentity
from baton.kvtransfer.transport.base import (
    ArenaDescriptor,
    MemoryRegion,
    PeerReader,
    Read,
    ReadState,
    Transport,
)


class ForwardingReader:
    """A peer reader that can be tampered with; everything else is the real one's."""

    def __init__(self, inner: PeerReader, arena: MemoryRegion, block_bytes: int) -> None:
        self.inner = inner
        self.arena = arena
        self.block_bytes = block_bytes

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def poll(self, read: Read) -> ReadState:
        was_pending = read.state is ReadState.PENDING
        state = self.inner.poll(read)
        if was_pending and state is ReadState.DONE:
            self.has_read(read.local_slots)
        return state

    def has_read(self, slots: Sequence[Slot]) -> None:
        """Called once per read, when its bytes are in the local slots (none: it read words)."""

    def block(self, slot: Slot) -> int:
        """Address of the first byte of a local block."""
        return self.arena.address + slot * self.block_bytes


class ZeroingReader(ForwardingReader):
    """Reports success and leaves zeros."""

    def has_read(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            ctypes.memset(self.block(slot), 0, self.block_bytes)


class StaleReader(ForwardingReader):
    """Reports generation words as if the owner had reused the last slot."""

    def generations(self, read: Read) -> list[int]:
        words = self.inner.generations(read)
        return [*words[:-1], words[-1] + 1]


@dataclass
class Aim:
    """Which block of the next prompt is hit, and how many were hit so far.

    One request at a time: blocks are counted in the order in which they cross.
    """

    block: int | None = None
    num_hits: int = 0
    _num_seen: int = field(default=0, init=False)

    def at(self, block: int | None) -> None:
        """Hit this block of the next prompt, or none."""
        self.block, self._num_seen = block, 0

    def takes(self) -> bool:
        """Whether the block that crossed just now is the one."""
        self._num_seen += 1
        is_hit = self._num_seen - 1 == self.block
        self.num_hits += is_hit
        return is_hit


class FlippingReader(ForwardingReader):
    """Flips the sign of each float32 of one block; the fence has nothing to object to."""

    def __init__(
        self, inner: PeerReader, arena: MemoryRegion, block_bytes: int, *, aim: Aim
    ) -> None:
        super().__init__(inner, arena, block_bytes)
        self._aim = aim

    def has_read(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if self._aim.takes():
                words = (ctypes.c_uint32 * (self.block_bytes // 4)).from_address(self.block(slot))
                words[:] = [word ^ 0x8000_0000 for word in words]


ReaderFactory = Callable[[PeerReader, MemoryRegion, int], ForwardingReader]


class _TamperingTransport:
    def __init__(self, inner: Transport, reader: ReaderFactory) -> None:
        self._inner = inner
        self._reader = reader
        self.name = inner.name

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        self._arena, self._block_bytes = arena, block_bytes
        return self._inner.register(
            arena, generations, block_bytes=block_bytes, num_slots=num_slots
        )

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> ForwardingReader:
        inner = self._inner.connect(owner, remote)
        return self._reader(inner, self._arena, self._block_bytes)

    def close(self) -> None:
        self._inner.close()


def tampering(
    reader: ReaderFactory, transport: str = "memory"
) -> Callable[[str, WorkerIdentity], _TamperingTransport]:
    factory: TransportFactory = transports(transport)
    return lambda name, identity: _TamperingTransport(factory(name, identity), reader)
