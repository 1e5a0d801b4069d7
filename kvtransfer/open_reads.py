"""All reads that this worker has posted and that have not ended, and the pins on their targets.

A destination slot has two lifetimes, its request's and its read's, and is free only when both have
ended. So each open read pins its slots by itself: when its request is gone the slots are
*quarantined* until the transfer has ended or the agent that posted it is destroyed.
"""

from collections.abc import Sequence

from baton.common.ids import BlockHandle, Slot
from baton.common.timing import Timing
from baton.kvtransfer.fence import FencedRead, FenceState
from baton.kvtransfer.ledger import Pins
from baton.kvtransfer.transport.base import PeerReader


class OpenReads:
    """Engine thread only."""

    def __init__(self, pins: Pins, timing: Timing) -> None:
        self._pins = pins
        self._min_deadline_s = timing.transfer_deadline_s
        self._receiving: list[FencedRead] = []
        self._quarantined: list[FencedRead] = []

    def __bool__(self) -> bool:
        return bool(self._receiving or self._quarantined)

    @property
    def receiving(self) -> list[tuple[Slot, ...]]:
        return [read.slots for read in self._receiving]

    @property
    def quarantined(self) -> list[tuple[Slot, ...]]:
        return [read.slots for read in self._quarantined]

    def post(
        self, peer: PeerReader, handles: Sequence[BlockHandle], slots: Sequence[Slot], *, now: float
    ) -> FencedRead:
        """Start a fenced read into `slots`. TransferError: nothing was posted."""
        read = FencedRead(peer, handles, slots, now_s=now, min_deadline_s=self._min_deadline_s)
        self._pins.pin(slots)
        self._receiving.append(read)
        return read

    def abandon(self, read: FencedRead, why: str) -> None:
        """The request gave up: until the transfer has ended its slots are quarantined."""
        read.abandon(why)
        if read in self._receiving:
            self._receiving.remove(read)
            self._quarantined.append(read)

    def given_up(self, *, now: float, max_slots: int) -> list[PeerReader]:
        """Readers that have kept slots in quarantine for two transfer deadlines, or more than
        `max_slots` of them: to be closed, which ends their reads."""
        slots_of: dict[int, int] = {}
        found: dict[int, PeerReader] = {}
        for read in self._quarantined:
            reader = id(read.reader)
            slots_of[reader] = slots_of.get(reader, 0) + len(read.slots)
            if now >= read.last_deadline_s or slots_of[reader] > max_slots:
                found[reader] = read.reader
        return list(found.values())

    def poll(self) -> None:
        """Move every open read on, and unpin the targets of those that have ended."""
        self._receiving = self._still_open(self._receiving)
        self._quarantined = self._still_open(self._quarantined)

    def _still_open(self, reads: list[FencedRead]) -> list[FencedRead]:
        still_open = []
        for read in reads:
            state = read.poll()
            if state in (FenceState.PASSED, FenceState.FAILED) and not read.pending_slots:
                self._pins.unpin(read.slots)
            else:
                still_open.append(read)
        return still_open
