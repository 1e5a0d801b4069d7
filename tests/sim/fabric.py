"""A device and a transport on virtual time, over the real ones; and what goes wrong with reads.

A step ends, and each block of a read crosses, at a random moment of its own, whoever is frozen
meanwhile: neither a GPU nor one-sided reads wait for a process.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from sim.network import Network
from sim.world import World
from support.fault_transport import LocalBlocks

from baton.common.errors import TransferError
from baton.common.ids import Slot, WorkerIdentity
from baton.engine.device import ManualDevice, Ticket
from baton.kvtransfer.transport.base import (
    ArenaDescriptor,
    MemoryRegion,
    PeerReader,
    Read,
    ReadState,
)
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport

T = TypeVar("T")

STEP_S = (0.02, 0.8)
CROSSING_S = (0.001, 0.25)
# Of blocks: their two halves cross at different times.
TORN_SHARE = 0.3


class PacedDevice:
    """Runs one step after the other, each for a random time; `ended` is told. `slowness` multiplies
    that time."""

    def __init__(self, world: World, ended: Callable[[], None]) -> None:
        self.slowness = 1.0
        self._free_at = 0.0
        self._world = world
        self._ended = ended
        self._inner = ManualDevice()

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        ticket = self._inner.submit(work)
        begins = max(self._world.now, self._free_at)
        self._free_at = begins + self._world.draw(*STEP_S) * self.slowness
        self._world.at(self._free_at - self._world.now, self._end)
        return ticket

    def close(self) -> None:
        self._inner.close()

    def _end(self) -> None:
        if self._inner.run_next():
            self._ended()


class ReadFault(Enum):
    """What a transport may do to a read, or may not and does."""

    NOT_POSTED = "the read cannot be posted"
    FAILED = "the read fails, nothing is written any more"
    LATE_WRITES = "the read fails, its writes land later"
    LATE = "the read takes seconds"
    HUNG = "the read never ends"
    WRONG_WORD = "a generation word is not the owner's"
    NO_WORDS = "the generation words cannot be read"
    FLIPPED = "a bit of a block is flipped on its way"
    NOT_WRITTEN = "a block is said to be read and was not written"


_OF_WORDS = {ReadFault.WRONG_WORD, ReadFault.NO_WORDS}
# Nothing but digests can see these.
SILENT = (ReadFault.FLIPPED, ReadFault.NOT_WRITTEN)


class ReadFaults:
    """Which of a cluster's reads go wrong: a share of them, at random."""

    def __init__(self, world: World, *, with_digests: bool) -> None:
        self.share = 0.0
        # Until then all reads take their time, and stay within their deadline.
        self.drag_until = 0.0
        self.injected: Counter[ReadFault] = Counter()
        self._world = world
        self._kinds = [kind for kind in ReadFault if with_digests or kind not in SILENT]

    def take(self, *, words: bool) -> ReadFault | None:
        if not self._world.chance(self.share):
            return None
        kinds = [kind for kind in self._kinds if (kind in _OF_WORDS) == words]
        kind = self._world.random.choice(kinds)
        self.injected[kind] += 1
        return kind


@dataclass(eq=False)
class _Crossing:
    """One read on its way; `parts` copies have not happened yet."""

    outer: Read
    fault: ReadFault | None
    parts: int
    failure: str = ""
    words: dict[Slot, int] = field(default_factory=dict)

    @property
    def has_landed(self) -> bool:
        return self.parts == 0


class SimReader:
    """`PeerReader` on virtual time; the bytes are copied by the real one."""

    def __init__(
        self,
        world: World,
        inner: PeerReader,
        local: LocalBlocks,
        faults: ReadFaults,
        *,
        reachable_at: Callable[[], float],
        landed: Callable[[], None],
    ) -> None:
        self.bytes_read = 0
        self.fence_bytes_read = 0
        self.blocks_read = 0
        self._world = world
        self._inner = inner
        self._local = local
        self._faults = faults
        self._reachable_at = reachable_at
        self._landed = landed
        self._open: dict[Read, _Crossing] = {}
        self._words: dict[Read, list[int]] = {}

    @property
    def is_closed(self) -> bool:
        return self._inner.is_closed

    @property
    def outstanding_bytes(self) -> int:
        pending = (read for read in self._open if read.state is ReadState.PENDING)
        return sum(len(read.local_slots) for read in pending) * self._local.block_bytes

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        fault = self._take(words=False)
        read = Read(tuple(remote_slots), tuple(local_slots))
        crossing = self._open[read] = _Crossing(read, fault, len(remote_slots))
        skipped = self._world.random.randrange(len(remote_slots))
        for index, (remote, local) in enumerate(zip(remote_slots, local_slots, strict=True)):
            if fault is ReadFault.NOT_WRITTEN and index == skipped:
                self._later(fault, lambda: self._part_ended(crossing, ""))
            elif fault is not ReadFault.HUNG and fault is not ReadFault.FAILED:
                self._later(fault, lambda r=remote, w=local: self._copy_block(crossing, r, w))
        if fault in (ReadFault.FAILED, ReadFault.LATE_WRITES):
            crossing.failure = "injected: the read failed"
            self._world.at(self._world.draw(*CROSSING_S), self._landed)
        return read

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        fault = self._take(words=True)
        read = Read(tuple(remote_slots))
        crossing = self._open[read] = _Crossing(read, fault, len(remote_slots))
        for slot in remote_slots:
            self._later(None, lambda s=slot: self._copy_word(crossing, s))
        if fault is ReadFault.NO_WORDS:
            crossing.failure = "injected: the words could not be read"
        return read

    def poll(self, read: Read) -> ReadState:
        crossing = self._open.get(read)
        if crossing is None or read.state is not ReadState.PENDING:
            return read.state
        if crossing.failure:
            may_write = not crossing.has_landed and crossing.fault is ReadFault.LATE_WRITES
            read.fail(crossing.failure, may_write=may_write)
        elif crossing.has_landed:
            self._ended_well(crossing)
        return read.state

    def generations(self, read: Read) -> list[int]:
        return list(self._words[read])

    def release(self, read: Read) -> None:
        assert read.state is not ReadState.PENDING, "released only once it has ended"
        self._words.pop(read, None)
        if not read.may_write:
            self._open.pop(read, None)

    def close(self) -> None:
        self._inner.close()
        for read in self._open:
            if read.state is ReadState.PENDING:
                read.fail("the reader was closed", may_write=False)
            read.may_write = False
        self._open.clear()

    # --- inside ---

    def _take(self, *, words: bool) -> ReadFault | None:
        if self.is_closed:
            raise TransferError("the reader is closed: connect again")
        fault = self._faults.take(words=words)
        if fault is not None:
            self._world.log(f"read fault: {fault.name}")
        if fault is ReadFault.NOT_POSTED:
            raise TransferError("injected: the read could not be posted")
        return fault

    def _later(self, fault: ReadFault | None, action: Callable[[], None]) -> None:
        delay_s = self._world.draw(*CROSSING_S)
        if self._world.now < self._faults.drag_until:
            delay_s += self._world.random.uniform(0.1, 0.8)
        if fault is ReadFault.LATE or fault is ReadFault.LATE_WRITES:
            delay_s += self._world.draw(0.5, 8.0)
        self._world.at(delay_s, lambda: self._when_reachable(action))

    def _when_reachable(self, action: Callable[[], None]) -> None:
        wait_s = self._reachable_at() - self._world.now
        if wait_s > 0:
            self._world.at(wait_s, lambda: self._when_reachable(action))
        elif not self.is_closed:
            action()

    def _copy_block(self, crossing: _Crossing, remote: Slot, local: Slot) -> None:
        if not self._world.chance(TORN_SHARE):
            self._block_ended(crossing, local, self._copy(remote, local))
            return
        failure = self._copy(remote, local)
        if failure:
            self._part_ended(crossing, failure)
            return
        half = self._local.block_bytes // 2
        first = self._local.get(local)[:half]

        def other_half() -> None:
            failure = self._copy(remote, local)
            if not failure:
                self._local.put(local, first + self._local.get(local)[half:])
            self._block_ended(crossing, local, failure)

        self._later(None, other_half)

    def _copy(self, remote: Slot, local: Slot) -> str:
        """The failure, or nothing."""
        part = self._inner.post_blocks([remote], [local])
        self._inner.poll(part)
        self._inner.release(part)
        return part.failure

    def _copy_word(self, crossing: _Crossing, slot: Slot) -> None:
        part = self._inner.post_generations([slot])
        if self._inner.poll(part) is ReadState.DONE:
            crossing.words[slot] = self._inner.generations(part)[0]
        self._inner.release(part)
        self._part_ended(crossing, part.failure)

    def _block_ended(self, crossing: _Crossing, local: Slot, failure: str) -> None:
        is_flipped = crossing.fault is ReadFault.FLIPPED and not failure
        if is_flipped and local == crossing.outer.local_slots[-1]:
            block = bytearray(self._local.get(local))
            block[self._world.random.randrange(16)] ^= 1 << self._world.random.randrange(8)
            self._local.put(local, bytes(block))
        self._part_ended(crossing, failure)

    def _part_ended(self, crossing: _Crossing, failure: str) -> None:
        crossing.parts -= 1
        crossing.failure = crossing.failure or failure
        read = crossing.outer
        if crossing.has_landed:
            if read.state is ReadState.FAILED:
                read.may_write = False
                self._open.pop(read, None)
            self._landed()

    def _ended_well(self, crossing: _Crossing) -> None:
        read = crossing.outer
        read.succeed()
        if read.local_slots:
            self.blocks_read += len(read.local_slots)
            self.bytes_read += len(read.local_slots) * self._local.block_bytes
            return
        words = [crossing.words[slot] for slot in read.remote_slots]
        if crossing.fault is ReadFault.WRONG_WORD:
            words[self._world.random.randrange(len(words))] += 1
        self._words[read] = words
        self.fence_bytes_read += 8 * len(words)


class SimTransport:
    """`Transport` of one worker life over the memory of this process."""

    name = MemoryTransport.name

    def __init__(
        self,
        network: Network,
        identity: WorkerIdentity,
        fabric: MemoryFabric,
        faults: ReadFaults,
        landed: Callable[[], None],
    ) -> None:
        self._network = network
        self._identity = identity
        self._inner = MemoryTransport(identity, fabric)
        self._faults = faults
        self._landed = landed

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        self._local = LocalBlocks(arena, block_bytes)
        return self._inner.register(
            arena, generations, block_bytes=block_bytes, num_slots=num_slots
        )

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> SimReader:
        names = self._identity.worker_id, owner.worker_id
        return SimReader(
            self._network.world,
            self._inner.connect(owner, remote),
            self._local,
            self._faults,
            reachable_at=lambda: self._network.reachable_at(*names),
            landed=self._landed,
        )

    def close(self) -> None:
        self._inner.close()
