"""A destination slot is nobody else's before its read has ended or its agent is destroyed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from support.fault_transport import FaultScript
from support.faults import Fail, Hold
from support.kv_arenas import Pair, connected_pair, slots

from baton.common.ids import Slot
from baton.common.randomness import SeededRandomness
from baton.common.timing import DEFAULT_TIMING
from baton.engine.arena import GenerationTable
from baton.engine.block_pool import BlockPool
from baton.kvtransfer.fence import FencedRead
from baton.kvtransfer.open_reads import OpenReads

REMOTE = slots(5, 9)
DEADLINE_S = DEFAULT_TIMING.transfer_deadline_s


@dataclass
class Desk:
    """A pool over the reading worker's arena, and a request that holds two slots of it."""

    pair: Pair
    script: FaultScript
    pool: BlockPool
    reads: OpenReads
    targets: list[Slot]

    def post(self) -> FencedRead:
        handles = self.pair.owner.handles(REMOTE)
        return self.reads.post(self.pair.reader, handles, self.targets, now=0.0)

    def end_request(self, read: FencedRead) -> None:
        """The request is gone: its read is abandoned, its table let go."""
        self.reads.abandon(read, "cancelled")
        self.pool.unpin(self.targets)

    def take_all(self) -> list[Slot]:
        """Another request takes every free slot and writes its own bytes there."""
        taken = self.pool.take(self.pool.num_free)
        self.pair.local.blocks[taken] = 77
        return taken

    def is_untouched(self, taken: list[Slot]) -> bool:
        return bool((self.pair.local.blocks[taken] == 77).all())


@pytest.fixture
def desk() -> Iterator[Desk]:
    script = FaultScript()
    with connected_pair("memory", local_slots=4, script=script) as pair:
        pool = BlockPool(4, GenerationTable(4, SeededRandomness(1)))
        reads = OpenReads(pool, DEFAULT_TIMING)
        yield Desk(pair, script, pool, reads, pool.take(len(REMOTE)))


def test_a_read_that_ends_leaves_its_slots_to_the_request(desk: Desk) -> None:
    read = desk.post()
    assert [desk.pool.refcount(slot) for slot in desk.targets] == [2, 2]
    while desk.reads:
        desk.reads.poll()
    assert np.array_equal(desk.pair.local.blocks[desk.targets], desk.pair.owner.blocks[REMOTE])
    assert [desk.pool.refcount(slot) for slot in desk.targets] == [1, 1]
    assert read.pending_slots == ()


def test_a_late_write_of_an_aborted_read_lands_in_nobodys_block(desk: Desk) -> None:
    late = Hold()
    desk.script.next(late)
    read = desk.post()
    desk.reads.poll()
    desk.end_request(read)
    desk.reads.poll()
    assert desk.reads.quarantined == [tuple(desk.targets)]
    taken = desk.take_all()
    assert set(taken).isdisjoint(desk.targets)
    late.release()
    desk.reads.poll()
    assert desk.is_untouched(taken)
    assert (desk.reads.quarantined, desk.pool.num_free) == ([], 2), "its transfer has ended"


def test_a_read_that_failed_may_still_write(desk: Desk) -> None:
    """FAILED says that nobody waits for it any more, not that nothing lands."""
    fault = Fail(may_write=True)
    desk.script.next(fault)
    read = desk.post()
    desk.reads.poll()
    desk.end_request(read)
    desk.reads.poll()
    taken = desk.take_all()
    assert desk.script.land(fault) == len(REMOTE), "here it lands"
    assert desk.is_untouched(taken)
    assert desk.reads.quarantined == [tuple(desk.targets)]


def test_the_end_of_the_agent_is_the_end_of_quarantine(desk: Desk) -> None:
    desk.script.next(Fail(may_write=True))
    read = desk.post()
    desk.reads.poll()
    desk.end_request(read)
    assert desk.reads.given_up(now=2 * DEADLINE_S - 0.1, max_slots=2) == []
    assert desk.reads.given_up(now=2 * DEADLINE_S, max_slots=2) == [desk.pair.reader]
    assert desk.reads.given_up(now=0.0, max_slots=1) == [desk.pair.reader]
    desk.pair.reader.close()
    desk.reads.poll()
    assert (desk.reads.quarantined, desk.pool.num_free) == ([], 4)
