"""KV by NIXL: UCX picks cuda_ipc, RDMA, shared memory or TCP.

One serving agent per worker opens arena and generation words to others; it has a progress thread,
since UCX cannot be connected to without one. One reading agent per peer life posts the reads and is
driven by `poll` alone: destroying it fences its unfinished reads and hurts no other peer.

The metadata blob of a descriptor is the arena's device (i32 little-endian, -1 for host memory)
followed by NIXL's agent metadata. NIXL's pickled descriptors are never used.
"""

import itertools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.common.clock import Clock, SystemClock
from baton.common.errors import HandshakeMismatch, PeerLost, TransferError
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
from baton.kvtransfer.transport.nixl_agent import NixlAgent

CONNECT_TIMEOUT_S: Final = 5.0
CONNECT_POLL_S: Final = 0.0005
LANDING_WORDS_PER_SLOT: Final = 2
# Put where a word will land: no generation has this value, so a word that never came is noticed.
UNREAD_WORD: Final = 2**64 - 1
HOST_DEVICE: Final = -1


@dataclass(frozen=True, slots=True)
class _LocalArena:
    """Where the reads of this worker land."""

    region: MemoryRegion
    block_bytes: int
    num_slots: int


class NixlTransport:
    """`Transport` over NIXL. `progress_delay_us`: pause of the serving agent's thread in µs."""

    name = "nixl"

    def __init__(
        self,
        identity: WorkerIdentity,
        *,
        progress_delay_us: int = 1000,
        clock: Clock | None = None,
    ) -> None:
        self._identity = identity
        self._clock = clock or SystemClock()
        self._serving = NixlAgent(
            str(identity), progress_delay_us=progress_delay_us, telemetry=False
        )
        self._local: _LocalArena | None = None
        self._reader_numbers = itertools.count(1)
        self._closing = threading.Event()

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        assert self._local is None, "registered once per process"
        check_regions(arena, generations, block_bytes=block_bytes, num_slots=num_slots)
        self._serving.register(arena)
        self._serving.register(generations)
        self._local = _LocalArena(arena, block_bytes, num_slots)
        device = HOST_DEVICE if arena.device is None else arena.device
        return ArenaDescriptor(
            transport=self.name,
            metadata=struct.pack("<i", device) + self._serving.metadata(),
            base_address=arena.address,
            block_bytes=block_bytes,
            num_slots=num_slots,
            generations_address=generations.address,
        )

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> "NixlPeerReader":
        assert self._local is not None, "connect follows register"
        check_peer(self.name, self._local.block_bytes, owner, remote)
        # A number of its own: a peer is read again after its agent was destroyed for a quarantine.
        name = f"{self._identity}>{owner}#{next(self._reader_numbers)}"
        agent = NixlAgent(name, progress_delay_us=None, telemetry=True)
        try:
            reader = NixlPeerReader(agent, self._local, owner, remote)
            self._warm(reader, owner)
        except BaseException:
            agent.destroy()
            raise
        return reader

    def close(self) -> None:
        self._closing.set()
        self._serving.destroy()

    def _warm(self, reader: "NixlPeerReader", owner: WorkerIdentity) -> None:
        """Reads one word, which brings the connection up (15 to 35 ms)."""
        deadline = self._clock.monotonic() + CONNECT_TIMEOUT_S
        read = reader.post_generations([Slot(0)])
        while reader.poll(read) is ReadState.PENDING:
            if self._clock.monotonic() > deadline:
                raise PeerLost(f"{owner} did not answer NIXL within {CONNECT_TIMEOUT_S} s")
            if self._closing.wait(CONNECT_POLL_S):
                raise TransferError(f"closed while connecting to {owner}")
        if read.state is ReadState.FAILED:
            raise PeerLost(f"the first read from {owner} failed: {read.failure}")
        reader.release(read)
        reader.fence_bytes_read = 0


class _Landing:
    """Words for generations in flight: a word serves one read from its post to its end."""

    def __init__(self, num_words: int) -> None:
        self.words = np.full(num_words, UNREAD_WORD, dtype=np.uint64)
        self._free = list(range(num_words))

    @property
    def region(self) -> MemoryRegion:
        return MemoryRegion(self.words.ctypes.data, self.words.nbytes, keep=self.words)

    def take(self, num_words: int) -> npt.NDArray[np.int32]:
        """TransferError when fewer are free: the caller polls and releases what it has."""
        if num_words > len(self._free):
            raise TransferError(
                f"{num_words} generation words wanted, {len(self._free)} of {len(self.words)} "
                "free: release reads that have ended first"
            )
        taken = np.array(self._free[-num_words:], dtype=np.int32)
        del self._free[-num_words:]
        self.words[taken] = UNREAD_WORD
        return taken

    def give_back(self, taken: npt.NDArray[np.int32]) -> None:
        self._free.extend(taken.tolist())
        assert len(self._free) <= len(self.words), "a landing word was given back twice"


@dataclass(slots=True)
class _Posted:
    """The transport's side of a `Read`: NIXL's handle while it is held, and the landing words."""

    handle: int | None
    words: npt.NDArray[np.int32] | None


class NixlPeerReader:
    """`PeerReader` over one agent of its own, which only the engine thread drives."""

    def __init__(
        self, agent: NixlAgent, local: _LocalArena, owner: WorkerIdentity, remote: ArenaDescriptor
    ) -> None:
        self.bytes_read = 0
        self.fence_bytes_read = 0
        self.blocks_read = 0
        self.outstanding_bytes = 0
        self._agent = agent
        self._local = local
        self._owner = owner
        self._num_remote_slots = remote.num_slots
        self._landing = _Landing(LANDING_WORDS_PER_SLOT * local.num_slots)
        self._posted: dict[Read, _Posted] = {}
        self._closed = False
        peer, device = _introduce(agent, owner, remote)
        agent.register(local.region)
        agent.register(self._landing.region)
        agent.connect(peer)
        self._blocks_here = agent.prepare(
            None, local.region.address, local.block_bytes, local.num_slots, local.region.device
        )
        self._blocks_there = agent.prepare(
            peer, remote.base_address, remote.block_bytes, remote.num_slots, device
        )
        self._words_here = agent.prepare(
            None, self._landing.region.address, GENERATION_BYTES, len(self._landing.words), None
        )
        self._words_there = agent.prepare(
            peer, remote.generations_address, GENERATION_BYTES, remote.num_slots, None
        )

    @property
    def is_closed(self) -> bool:
        return self._closed

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        assert len(remote_slots) == len(local_slots) > 0, (len(remote_slots), len(local_slots))
        self._check_postable(remote_slots)
        check_slots(local_slots, self._local.num_slots, "this worker's")
        read = Read(tuple(remote_slots), tuple(local_slots))
        self.outstanding_bytes += self._local.block_bytes * len(local_slots)
        here = np.asarray(local_slots, dtype=np.int32)
        self._post(read, self._blocks_here, here, self._blocks_there, words=None)
        return read

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        assert remote_slots, "a read names at least one slot"
        self._check_postable(remote_slots)
        read = Read(tuple(remote_slots))
        words = self._landing.take(len(remote_slots))
        self._post(read, self._words_here, words, self._words_there, words=words)
        return read

    def poll(self, read: Read) -> ReadState:
        if read.state is ReadState.PENDING:
            posted = self._posted[read]
            assert posted.handle is not None, "a pending read has a handle"
            try:
                self._settle(read, posted.handle, self._agent.state(posted.handle))
            except TransferError as error:
                self._fail(read, error.message, may_write=True)
        return read.state

    def generations(self, read: Read) -> list[int]:
        assert read.state is ReadState.DONE, f"words are read once DONE, not {read.state}"
        words = self._posted[read].words
        assert words is not None, "a read of blocks has no words"
        found: list[int] = self._landing.words[words].tolist()
        return found

    def release(self, read: Read) -> None:
        assert read.state is not ReadState.PENDING, "released only once it has ended"
        # What may still land keeps its words and its handle until the agent is destroyed.
        if read.may_write:
            return
        posted = self._posted.pop(read, None)
        if posted is None or self._closed:
            return
        if posted.handle is not None:
            self._agent.release(posted.handle)
        if posted.words is not None:
            self._landing.give_back(posted.words)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._agent.destroy()
        for read in self._posted:
            if read.state is ReadState.PENDING:
                self._fail(read, f"the reader of {self._owner} was closed", may_write=False)
            read.may_write = False

    def _check_postable(self, remote_slots: Sequence[Slot]) -> None:
        if self._closed:
            raise TransferError(f"the reader of {self._owner} is closed: connect again")
        check_slots(remote_slots, self._num_remote_slots, f"{self._owner}'s")

    def _post(
        self,
        read: Read,
        local: int,
        local_items: npt.NDArray[np.int32],
        remote: int,
        *,
        words: npt.NDArray[np.int32] | None,
    ) -> None:
        posted = self._posted[read] = _Posted(handle=None, words=words)
        remote_items = np.asarray(read.remote_slots, dtype=np.int32)
        try:
            posted.handle = self._agent.create_read(local, local_items, remote, remote_items)
            self._settle(read, posted.handle, self._agent.post(posted.handle))
        except TransferError as error:
            # Without a handle nothing reached the fabric.
            self._fail(read, error.message, may_write=posted.handle is not None)

    def _settle(self, read: Read, handle: int, state: ReadState) -> None:
        if state is ReadState.FAILED:
            self._fail(
                read, f"NIXL reports an error of the read from {self._owner}", may_write=True
            )
        elif state is ReadState.DONE:
            num_bytes = self._agent.num_bytes(handle)
            read.succeed()
            if read.local_slots:
                self.bytes_read += num_bytes
                self.blocks_read += len(read.local_slots)
                self.outstanding_bytes -= self._local.block_bytes * len(read.local_slots)
            else:
                self.fence_bytes_read += num_bytes

    def _fail(self, read: Read, failure: str, *, may_write: bool) -> None:
        read.fail(failure, may_write=may_write)
        self.outstanding_bytes -= self._local.block_bytes * len(read.local_slots)


def _introduce(
    agent: NixlAgent, owner: WorkerIdentity, remote: ArenaDescriptor
) -> tuple[str, int | None]:
    """Loads the owner's metadata; its agent name and the device of its arena."""
    if len(remote.metadata) <= 4:
        raise HandshakeMismatch(f"{owner} sent {len(remote.metadata)} bytes of NIXL metadata")
    (device,) = struct.unpack_from("<i", remote.metadata)
    peer = agent.load_peer(remote.metadata[4:])
    if peer != str(owner):
        raise HandshakeMismatch(f"the NIXL metadata is of {peer!r}, not of {owner}")
    return peer, None if device == HOST_DEVICE else device
