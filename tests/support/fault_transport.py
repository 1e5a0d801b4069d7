"""A transport that goes wrong as a test says, around any real one.

    script = FaultScript()
    async with run_cluster(model, redis_url, factory=faulty(transports("memory"), script)):
        script.next(FlipBit(block=2))           # the next read of blocks
        script.every(WrongWords())              # and each read of generation words

Each read takes at most one fault: the oldest planned one for its kind (blocks or words), else that
of `every`. With an empty script nothing differs from the real transport; the contract tests run
over it. The faults are in `support.faults`.

The engine thread drives the readers and a test steers from elsewhere: one lock for both.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from support.faults import Fault, FaultyRead, Kind, LocalBlocks

from baton.common.ids import Slot, WorkerIdentity
from baton.kvtransfer.transport.base import (
    ArenaDescriptor,
    MemoryRegion,
    PeerReader,
    Read,
    ReadState,
    Transport,
)

TransportFactory = Callable[[str, WorkerIdentity], Transport]
LAND_LIMIT_S = 10.0


class FaultScript:
    """Which reads go wrong, and how; shared by all readers of the transports that got it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # By class name of the fault: reads that took it. By kind: all reads that were posted.
        self.injected: Counter[str] = Counter()
        self.posted: Counter[Kind] = Counter()
        self._next: dict[Kind, deque[Fault]] = {kind: deque() for kind in Kind}
        self._every: dict[Kind, Fault] = {}

    def next(self, *faults: Fault) -> None:
        """The following reads of their kind take these, one each."""
        with self.lock:
            for fault in faults:
                self._next[fault.kind].append(fault)

    def every(self, fault: Fault) -> None:
        """Each read of its kind takes it, unless another was planned, until `clear`."""
        with self.lock:
            self._every[fault.kind] = fault

    def clear(self) -> None:
        """Later reads take nothing; those that have a fault keep it."""
        with self.lock:
            self._every.clear()
            for planned in self._next.values():
                planned.clear()

    def take(self, kind: Kind) -> Fault | None:
        self.posted[kind] += 1
        planned = self._next[kind]
        fault = planned.popleft() if planned else self._every.get(kind)
        if fault is not None:
            self.injected[type(fault).__name__] += 1
        return fault

    def land(self, fault: Fault) -> int:
        """Late writes of the reads that took `fault` (Fail, WriteAgain) and have ended, now.

        Returns the blocks written; none once their reader was closed: that agent is destroyed.
        """
        with self.lock:
            return sum(read.reader.land(read) for read in fault.reads)


class FaultyReader:
    """`PeerReader` whose reads go wrong by the script."""

    def __init__(self, inner: PeerReader, local: LocalBlocks, script: FaultScript) -> None:
        self.inner = inner
        self.local = local
        self._script = script
        self._faulty: dict[Read, FaultyRead] = {}
        # Blocks of real reads that ended although their reader was told that they had failed.
        self._late_blocks = 0

    @property
    def bytes_read(self) -> int:
        return self.inner.bytes_read - self._late_blocks * self.local.block_bytes

    @property
    def fence_bytes_read(self) -> int:
        return self.inner.fence_bytes_read

    @property
    def blocks_read(self) -> int:
        return self.inner.blocks_read - self._late_blocks

    @property
    def is_closed(self) -> bool:
        return self.inner.is_closed

    @property
    def outstanding_bytes(self) -> int:
        """Without those of which the reader was told that they have ended."""
        with self._script.lock:
            over = sum(
                len(read.outer.local_slots)
                for read in self._faulty.values()
                if read.is_out and read.outer.state is not ReadState.PENDING
            )
            return self.inner.outstanding_bytes - over * self.local.block_bytes

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        with self._script.lock:
            fault = self._script.take(Kind.BLOCKS)
            if fault is None:
                return self.inner.post_blocks(remote_slots, local_slots)
            return self._post(Read(tuple(remote_slots), tuple(local_slots)), fault)

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        with self._script.lock:
            fault = self._script.take(Kind.WORDS)
            if fault is None:
                return self.inner.post_generations(remote_slots)
            return self._post(Read(tuple(remote_slots)), fault)

    def poll(self, read: Read) -> ReadState:
        with self._script.lock:
            faulty = self._faulty.get(read)
            if faulty is None:
                return self.inner.poll(read)
            if read.state is ReadState.PENDING:
                faulty.num_polls += 1
                faulty.fault.poll(faulty)
            return read.state

    def generations(self, read: Read) -> list[int]:
        with self._script.lock:
            faulty = self._faulty.get(read)
            if faulty is None:
                return self.inner.generations(read)
            assert faulty.inner is not None, "words of a read that was posted"
            return faulty.fault.words(self.inner.generations(faulty.inner))

    def release(self, read: Read) -> None:
        with self._script.lock:
            faulty = self._faulty.get(read)
            if faulty is None:
                self.inner.release(read)
                return
            assert read.state is not ReadState.PENDING, "released only once it has ended"
            # A real read that is still out is kept until it lands or the reader is closed.
            if not faulty.is_out and faulty.inner is not None:
                self.inner.release(faulty.inner)
            # What may still write, for all its reader was told, is ended by the close.
            if not faulty.is_out and not read.may_write:
                del self._faulty[read]

    def close(self) -> None:
        with self._script.lock:
            self.inner.close()
            for faulty in self._faulty.values():
                if faulty.outer.state is ReadState.PENDING:
                    faulty.outer.fail("the reader was closed", may_write=False)
                faulty.outer.may_write = False

    # --- for faults, the script's lock held ---

    def post_inner(self, outer: Read) -> Read:
        if outer.local_slots:
            return self.inner.post_blocks(outer.remote_slots, outer.local_slots)
        return self.inner.post_generations(outer.remote_slots)

    def land(self, read: FaultyRead) -> int:
        """The late write of one read that has ended; how many blocks it wrote."""
        assert read.outer.state is not ReadState.PENDING, "what is pending is not late"
        if self.is_closed:
            return 0
        for slot, block in read.after.items():
            self.local.put(slot, block)
        if not read.is_out:
            return len(read.after)
        assert read.inner is not None, "it is out"
        deadline = time.monotonic() + LAND_LIMIT_S
        while self.inner.poll(read.inner) is ReadState.PENDING:
            assert time.monotonic() < deadline, f"not landed after {LAND_LIMIT_S} s"
        self._late_blocks += len(read.outer.local_slots)
        return len(read.outer.local_slots)

    def _post(self, outer: Read, fault: Fault) -> Read:
        read = FaultyRead(outer, self, fault)
        fault.post(read)
        fault.reads.append(read)
        self._faulty[outer] = read
        return outer


class FaultyTransport:
    """`Transport` whose readers go wrong by the script; the owner's side is the real one."""

    def __init__(self, inner: Transport, script: FaultScript) -> None:
        self.name = inner.name
        self._inner = inner
        self._script = script

    def register(
        self, arena: MemoryRegion, generations: MemoryRegion, *, block_bytes: int, num_slots: int
    ) -> ArenaDescriptor:
        self._local = LocalBlocks(arena, block_bytes)
        return self._inner.register(
            arena, generations, block_bytes=block_bytes, num_slots=num_slots
        )

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> FaultyReader:
        return FaultyReader(self._inner.connect(owner, remote), self._local, self._script)

    def close(self) -> None:
        self._inner.close()


def faulty(factory: TransportFactory, script: FaultScript) -> TransportFactory:
    """The transports of `factory`, each with readers of this script."""
    return lambda name, identity: FaultyTransport(factory(name, identity), script)
