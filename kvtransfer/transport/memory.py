"""The transport between servers of one process: memmove between registered regions.

It keeps the whole contract of `transport.base`, and makes mistakes against it visible: a read
copies at its first poll, never inside the post, so bytes are those of the poll, and a reader that
uses its slots early sees the old ones.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from baton.common.errors import AlreadyExists, HandshakeMismatch, PeerLost, TransferError
from baton.common.ids import Slot, WorkerIdentity
from baton.kvtransfer.transport.base import (
    GENERATION_BYTES,
    ArenaDescriptor,
    MemoryRegion,
    Read,
    ReadState,
    check_peer,
    check_regions,
    check_slots,
)


@dataclass(frozen=True, slots=True)
class _Served:
    """What one life of a worker opened to readers."""

    arena: MemoryRegion
    generations: MemoryRegion
    block_bytes: int
    num_slots: int


class MemoryFabric:
    """The regions that the transports of one process share, by the identity that serves them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: dict[WorkerIdentity, _Served] = {}

    def serve(self, identity: WorkerIdentity, served: _Served) -> None:
        with self._lock:
            if identity in self._served:
                raise AlreadyExists(f"{identity} already serves its arena on this fabric")
            self._served[identity] = served

    def withdraw(self, identity: WorkerIdentity) -> None:
        """When it returns no copy from the identity's regions runs or will run."""
        with self._lock:
            self._served.pop(identity, None)

    def is_serving(self, identity: WorkerIdentity) -> bool:
        with self._lock:
            return identity in self._served

    def copy_blocks(self, owner: WorkerIdentity, read: Read, into: _Served) -> int:
        """Copies the blocks of a read, returns the bytes. PeerLost if the owner is gone."""
        with self._lock:
            source, size = self._find(owner), into.block_bytes
            for remote, local in zip(read.remote_slots, read.local_slots, strict=True):
                ctypes.memmove(
                    into.arena.address + local * size, source.arena.address + remote * size, size
                )
        return size * len(read.remote_slots)

    def copy_words(self, owner: WorkerIdentity, read: Read) -> list[int]:
        """The generation words of a read. PeerLost if the owner is gone."""
        with self._lock:
            base = self._find(owner).generations.address
            return [
                ctypes.c_uint64.from_address(base + GENERATION_BYTES * slot).value
                for slot in read.remote_slots
            ]

    def _find(self, owner: WorkerIdentity) -> _Served:
        served = self._served.get(owner)
        if served is None:
            raise PeerLost(f"{owner} no longer serves its arena")
        return served


class MemoryTransport:
    """`Transport` for one of several servers in a process; they share one `MemoryFabric`."""

    name = "memory"

    def __init__(self, identity: WorkerIdentity, fabric: MemoryFabric) -> None:
        self._identity = identity
        self._fabric = fabric
        self._served: _Served | None = None

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        assert self._served is None, "registered once per process"
        check_regions(arena, generations, block_bytes=block_bytes, num_slots=num_slots)
        assert arena.device is None, "memmove reaches host memory only"
        served = _Served(arena, generations, block_bytes, num_slots)
        self._fabric.serve(self._identity, served)
        self._served = served
        return ArenaDescriptor(
            transport=self.name,
            metadata=str(self._identity).encode(),
            base_address=arena.address,
            block_bytes=block_bytes,
            num_slots=num_slots,
            generations_address=generations.address,
        )

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> "MemoryPeerReader":
        assert self._served is not None, "connect follows register"
        check_peer(self.name, self._served.block_bytes, owner, remote)
        if remote.metadata != str(owner).encode():
            raise HandshakeMismatch(f"the descriptor is of {remote.metadata!r}, not of {owner}")
        if not self._fabric.is_serving(owner):
            raise PeerLost(f"{owner} serves no arena in this process")
        return MemoryPeerReader(self._fabric, owner, self._served, remote.num_slots)

    def close(self) -> None:
        self._fabric.withdraw(self._identity)


class MemoryPeerReader:
    """`PeerReader` that copies at the first poll of a read."""

    def __init__(
        self, fabric: MemoryFabric, owner: WorkerIdentity, local: _Served, num_remote_slots: int
    ) -> None:
        self.bytes_read = 0
        self.fence_bytes_read = 0
        self.blocks_read = 0
        self._fabric = fabric
        self._owner = owner
        self._local = local
        self._num_remote_slots = num_remote_slots
        self._open: set[Read] = set()
        self._words: dict[Read, list[int]] = {}
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def outstanding_bytes(self) -> int:
        pending = (r for r in self._open if r.state is ReadState.PENDING)
        return sum(len(read.local_slots) for read in pending) * self._local.block_bytes

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        assert len(remote_slots) == len(local_slots) > 0, (len(remote_slots), len(local_slots))
        check_slots(local_slots, self._local.num_slots, "this worker's")
        return self._post(Read(tuple(remote_slots), tuple(local_slots)))

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        assert remote_slots, "a read names at least one slot"
        return self._post(Read(tuple(remote_slots)))

    def poll(self, read: Read) -> ReadState:
        if read.state is ReadState.PENDING:
            assert read in self._open, "polled by the reader that posted it"
            self._copy(read)
        return read.state

    def generations(self, read: Read) -> list[int]:
        assert read.state is ReadState.DONE, f"words are read once DONE, not {read.state}"
        return list(self._words[read])

    def release(self, read: Read) -> None:
        assert read.state is not ReadState.PENDING, "released only once it has ended"
        self._open.discard(read)
        self._words.pop(read, None)

    def close(self) -> None:
        self._closed = True
        for read in self._open:
            if read.state is ReadState.PENDING:
                read.fail(f"the reader of {self._owner} was closed", may_write=False)

    def _post(self, read: Read) -> Read:
        check_slots(read.remote_slots, self._num_remote_slots, f"{self._owner}'s")
        if self._closed:
            raise TransferError(f"the reader of {self._owner} is closed: connect again")
        self._open.add(read)
        return read

    def _copy(self, read: Read) -> None:
        try:
            if read.local_slots:
                self.bytes_read += self._fabric.copy_blocks(self._owner, read, self._local)
                self.blocks_read += len(read.local_slots)
            else:
                self._words[read] = self._fabric.copy_words(self._owner, read)
                self.fence_bytes_read += GENERATION_BYTES * len(read.remote_slots)
        except PeerLost as lost:
            read.fail(lost.message, may_write=False)
        else:
            read.succeed()
