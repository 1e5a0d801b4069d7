"""The seam between a worker and whatever moves its KV bytes.

A transport is registered once per process and serves two roles with the same arena: others read
from it (the owner's side needs nothing but to stay alive), and reads from others land in it.

    worker start   Transport.register(arena, generation words)  -> ArenaDescriptor, told to peers
    peer joins     Transport.connect(owner, its descriptor)     -> PeerReader, off the engine thread
    hand-over      PeerReader.post_blocks -> poll ... DONE -> release
                   PeerReader.post_generations -> poll ... DONE -> generations -> release
    peer gone      PeerReader.close()

A read moves once: PENDING to DONE or to FAILED. Descriptors of one read, and reads among each
other, are not ordered; only "DONE was seen, then posted" orders two reads. FAILED does not say that
nothing will be written any more: `Read.may_write` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from baton.common.errors import HandshakeMismatch, TransferError
from baton.common.ids import Slot, WorkerIdentity

GENERATION_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Bytes [address, address + num_bytes) of this process, kept alive by `keep`.

    `device` is the CUDA ordinal that holds them, None for host memory. `keep` is whatever owns the
    buffer (a tensor, an mmap): a transport holds the region as long as anything may touch it.
    """

    address: int
    num_bytes: int
    keep: object = field(repr=False, compare=False)
    device: int | None = None


@dataclass(frozen=True, slots=True)
class ArenaDescriptor:
    """What a reader must know of an owner's arena. Goes over the authenticated link only.

    Slot s lies at [base_address + s * block_bytes, + block_bytes); its generation word, an aligned
    little-endian u64, at generations_address + 8 * s. `metadata` is the transport's own blob.
    """

    transport: str
    metadata: bytes
    base_address: int
    block_bytes: int
    num_slots: int
    generations_address: int


class ReadState(Enum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Read:
    """One posted read, of blocks (`local_slots` as long as `remote_slots`) or words (empty).

    Written by the reader that posted it, read by everybody. While `may_write` holds, the local
    slots belong to the transport: they are neither read nor given to anyone else.
    """

    remote_slots: tuple[Slot, ...]
    local_slots: tuple[Slot, ...] = ()
    state: ReadState = ReadState.PENDING
    failure: str = ""
    may_write: bool = True

    def succeed(self) -> None:
        assert self.state is ReadState.PENDING, f"read ended twice: {self.state}"
        self.state, self.may_write = ReadState.DONE, False

    def fail(self, failure: str, *, may_write: bool) -> None:
        assert self.state is ReadState.PENDING, f"read ended twice: {self.state}"
        self.state, self.failure, self.may_write = ReadState.FAILED, failure, may_write


class PeerReader(Protocol):
    """Reads from one life of one peer. Every method is called from the engine thread.

    None waits for the peer. Over shared memory the copy itself may run inside `post_blocks`, on the
    caller's time: that is the transport's bandwidth, not a wait. No method is idempotent unless it
    says so.
    """

    @property
    def bytes_read(self) -> int:
        """Block bytes of the reads that are DONE, as the transport itself counted them."""
        ...

    @property
    def fence_bytes_read(self) -> int:
        """Generation bytes of the reads that are DONE, counted the same way."""
        ...

    @property
    def blocks_read(self) -> int:
        """Blocks of the reads that are DONE."""
        ...

    @property
    def outstanding_bytes(self) -> int:
        """Block bytes posted whose read has not ended: what the transfer clock counts."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called; may be asked from any thread."""
        ...

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        """Starts copying remote_slots[i] into local_slots[i], in no order.

        The local slots belong to the transport until `Read.may_write` is False. A fault of the
        fabric comes back as a FAILED read. TransferError: a slot is out of range or the reader is
        closed; then nothing was posted.
        """
        ...

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        """Starts reading the generation words of the slots, into memory of the reader.

        Errors as for `post_blocks`; TransferError also when too many words are outstanding.
        """
        ...

    def poll(self, read: Read) -> ReadState:
        """Drives the link and says how the read stands. Idempotent once the read has ended."""
        ...

    def generations(self, read: Read) -> list[int]:
        """The words, in the order of `remote_slots`: after DONE, before `release`."""
        ...

    def release(self, read: Read) -> None:
        """Forgets a read that has ended. Safe after `close`."""
        ...

    def close(self) -> None:
        """Destroys the agent that posted: the only fence for reads that have not ended.

        When it returns nothing is written any more: each pending read is FAILED and no read
        `may_write`. Takes some ms. Idempotent.
        """
        ...


class Transport(Protocol):
    """A worker's access to one fabric."""

    name: str

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        """Opens the arena to readers and as the destination of own reads. Once per process.

        Called at start, may block (pinning an arena takes seconds). The regions are held until
        `close` and until the last reader is closed; they stay the caller's to write.
        """
        ...

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> PeerReader:
        """A reader of `owner`, warmed: its first read is as fast as the next ones.

        Called off the engine thread, from any thread, after `register`; blocks up to some seconds.
        The caller owns the reader and closes it. HandshakeMismatch: another transport, block size
        or name; PeerLost: nobody answers; TransferError: anything else the fabric says.
        """
        ...

    def close(self) -> None:
        """Ends serving: nobody connects any more. Readers are closed first. Idempotent.

        Reads of those that are connected fail, or, where the fabric is one-sided, may still reach
        the arena for as long as its memory exists: only the generation words speak for the bytes.
        """
        ...


def check_regions(
    arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
) -> None:
    """Our own invariants of a registration."""
    assert block_bytes > 0, block_bytes
    assert num_slots > 0, num_slots
    assert arena.num_bytes >= block_bytes * num_slots, (arena.num_bytes, block_bytes, num_slots)
    assert generations.num_bytes >= GENERATION_BYTES * num_slots, generations.num_bytes
    assert generations.address % GENERATION_BYTES == 0, "generation words are aligned"
    assert generations.device is None, "generation words live in host memory"


def check_peer(name: str, block_bytes: int, owner: WorkerIdentity, remote: ArenaDescriptor) -> None:
    """HandshakeMismatch unless `remote` speaks transport `name` and stores our block size."""
    if remote.transport != name:
        raise HandshakeMismatch(
            f"{owner} serves KV by {remote.transport!r}, this worker reads by {name!r}: "
            "start both with the same --transport"
        )
    if remote.block_bytes != block_bytes:
        raise HandshakeMismatch(
            f"{owner} stores blocks of {remote.block_bytes} bytes, this worker of {block_bytes}: "
            "start both with the same model, dtype, block size and tensor parallel size"
        )
    if remote.num_slots <= 0:
        raise HandshakeMismatch(f"{owner} announced an arena of {remote.num_slots} slots")


def check_slots(slots: Sequence[Slot], num_slots: int, whose: str) -> None:
    """TransferError unless every slot lies in [0, num_slots)."""
    if min(slots) < 0 or max(slots) >= num_slots:
        wrong = [slot for slot in slots if not 0 <= slot < num_slots]
        raise TransferError(
            f"{len(wrong)} slots outside {whose} arena of {num_slots} slots, first {wrong[0]}: "
            "nothing was read"
        )
