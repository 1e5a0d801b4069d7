"""What can go wrong with one read of KV: the faults that a `FaultScript` hands out.

What a fault does to bytes it does to the real local arena, which must be host memory.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from baton.common.errors import TransferError
from baton.common.ids import Slot
from baton.kvtransfer.transport.base import MemoryRegion, Read, ReadState

if TYPE_CHECKING:
    from support.fault_transport import FaultyReader


class Kind(Enum):
    """What a read reads."""

    BLOCKS = "blocks"
    WORDS = "words"


@dataclass(frozen=True, slots=True)
class LocalBlocks:
    """The arena that reads land in, as bytes."""

    arena: MemoryRegion
    block_bytes: int

    def get(self, slot: Slot) -> bytes:
        return ctypes.string_at(self._address(slot), self.block_bytes)

    def put(self, slot: Slot, block: bytes) -> None:
        assert len(block) == self.block_bytes, (len(block), self.block_bytes)
        ctypes.memmove(self._address(slot), block, self.block_bytes)

    def _address(self, slot: Slot) -> int:
        assert self.arena.device is None, "this fault reaches host memory only"
        return self.arena.address + slot * self.block_bytes


@dataclass(eq=False)
class FaultyRead:
    """One read with a fault: what its reader is told (`outer`), and the real one, once posted."""

    outer: Read
    reader: "FaultyReader"
    fault: "Fault"
    inner: Read | None = None
    num_polls: int = 0
    # Local blocks by slot: as they were before the read, and as it brought them.
    before: dict[Slot, bytes] = field(default_factory=dict)
    after: dict[Slot, bytes] = field(default_factory=dict)

    @property
    def local(self) -> LocalBlocks:
        return self.reader.local

    @property
    def is_out(self) -> bool:
        """Whether the real read was posted and has not ended."""
        return self.inner is not None and self.inner.state is ReadState.PENDING

    def keep(self, kept: dict[Slot, bytes]) -> None:
        kept.update({slot: self.local.get(slot) for slot in self.outer.local_slots})


class Fault:
    """What goes wrong with the reads that take it; the base changes nothing.

    All methods are called with the script's lock held.
    """

    kind = Kind.BLOCKS

    def __init__(self) -> None:
        self.reads: list[FaultyRead] = []

    def post(self, read: FaultyRead) -> None:
        """Posts the real read, unless the fault is that nothing is posted."""
        read.inner = read.reader.post_inner(read.outer)

    def poll(self, read: FaultyRead) -> None:
        """Ends `read.outer` when it is to end."""
        assert read.inner is not None, "a read that is polled was posted"
        state = read.reader.inner.poll(read.inner)
        if state is ReadState.DONE:
            self.has_read(read)
            read.outer.succeed()
        elif state is ReadState.FAILED:
            read.outer.fail(read.inner.failure, may_write=read.inner.may_write)

    def has_read(self, read: FaultyRead) -> None:
        """The bytes are here, and nobody was told."""

    def words(self, words: list[int]) -> list[int]:
        """The generation words that the reader is told."""
        return words


class FailPost(Fault):
    """The fabric takes no read: TransferError, and nothing was posted."""

    def __init__(self, kind: Kind = Kind.BLOCKS) -> None:
        super().__init__()
        self.kind = kind

    def post(self, read: FaultyRead) -> None:
        raise TransferError("injected: the read could not be posted")


class Fail(Fault):
    """FAILED at the first poll. With `may_write` the real read is out, and lands by `land`."""

    def __init__(self, *, may_write: bool = True, kind: Kind = Kind.BLOCKS) -> None:
        super().__init__()
        self.kind = kind
        self._may_write = may_write

    def post(self, read: FaultyRead) -> None:
        if self._may_write:
            super().post(read)

    def poll(self, read: FaultyRead) -> None:
        read.outer.fail("injected: the read failed", may_write=self._may_write)


class Hold(Fault):
    """PENDING until `release`, which may never come, or for a number of polls.

    Whatever lands after the release lands in the destination slots of then.
    """

    def __init__(self, *, polls: int | None = None, kind: Kind = Kind.BLOCKS) -> None:
        super().__init__()
        self.kind = kind
        self._polls = polls
        self._is_released = threading.Event()

    def release(self) -> None:
        self._is_released.set()

    def poll(self, read: FaultyRead) -> None:
        is_over = self._polls is not None and read.num_polls > self._polls
        if is_over or self._is_released.is_set():
            super().poll(read)


class FlipBit(Fault):
    """One bit of one local block is not what crossed; the fence has nothing to object to."""

    def __init__(self, *, block: int = 0, byte: int = 0, bit: int = 0) -> None:
        super().__init__()
        self._block, self._byte, self._mask = block, byte, 1 << bit

    def has_read(self, read: FaultyRead) -> None:
        slot = read.outer.local_slots[self._block]
        block = bytearray(read.local.get(slot))
        block[self._byte] ^= self._mask
        read.local.put(slot, bytes(block))


class ShortWrite(Fault):
    """DONE, although the last `missing` blocks were not written."""

    def __init__(self, *, missing: int = 1) -> None:
        super().__init__()
        self._missing = missing

    def post(self, read: FaultyRead) -> None:
        read.keep(read.before)
        super().post(read)

    def has_read(self, read: FaultyRead) -> None:
        for slot in read.outer.local_slots[-self._missing :]:
            read.local.put(slot, read.before[slot])


class Interpose(Fault):
    """Calls a test between the blocks and their words, or just before the blocks are read.

    With an owner that rewrites its slots there, bytes and words are of different times.
    """

    def __init__(
        self,
        *,
        before_blocks: Callable[[Read], None] | None = None,
        before_words: Callable[[Read], None] | None = None,
    ) -> None:
        super().__init__()
        self._before_blocks = before_blocks
        self._before_words = before_words

    def post(self, read: FaultyRead) -> None:
        if self._before_blocks is not None:
            self._before_blocks(read.outer)
        super().post(read)

    def has_read(self, read: FaultyRead) -> None:
        if self._before_words is not None:
            self._before_words(read.outer)


class WriteAgain(Fault):
    """DONE as it should be; `FaultScript.land` writes the same bytes once more, into whatever
    the destination slots have become."""

    def has_read(self, read: FaultyRead) -> None:
        read.keep(read.after)


class WrongWords(Fault):
    """One generation word of a read is not the owner's, as if the owner had reused the slot."""

    kind = Kind.WORDS

    def __init__(self, *, index: int = -1, by: int = 1) -> None:
        super().__init__()
        self._index, self._by = index, by

    def words(self, words: list[int]) -> list[int]:
        changed = list(words)
        changed[self._index] += self._by
        return changed
