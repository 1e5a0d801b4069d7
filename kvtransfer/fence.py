"""A read of blocks that is used only if no slot changed under it.

    READING    the blocks are on their way
    CHECKING   the blocks have arrived; the generation words are on their way
    PASSED     every word is the one that the handle names: the bytes are those of the handle
    FAILED     a word differs or could not be read, the blocks could not be read, or abandoned

The owner raises a slot's word before it lets anything change the slot. So if the word, read after
the bytes, is still the announced one, the bytes were not touched before they were read. The order
is the whole point: the words are posted only after the blocks reported their end, since a fabric
orders neither the descriptors of one request nor two requests in flight.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final

from baton.common.errors import TransferError
from baton.common.ids import BlockHandle, Slot
from baton.kvtransfer.transport.base import PeerReader, Read, ReadState

TRANSFER_DEADLINE_FACTOR: Final = 4.0
# Below every fabric that Baton is meant for, shared memory of a small laptop included.
DEFAULT_BYTES_PER_S: Final = 1e9


class FenceState(Enum):
    READING = "reading"
    CHECKING = "checking"
    PASSED = "passed"
    FAILED = "failed"


def transfer_deadline_s(num_bytes: int, bytes_per_s: float, min_s: float) -> float:
    """Seconds from posting after which a transfer of `num_bytes` is late."""
    return max(min_s, TRANSFER_DEADLINE_FACTOR * num_bytes / bytes_per_s)


class FencedRead:
    """Reads handles[i] into slots[i] and checks it. Engine thread only; never waits.

    Posts on construction (TransferError: a slot out of range, a closed reader; then nothing was
    posted). `now_s` is the monotonic time of that; the deadline counts all bytes then outstanding
    on the reader, these included. A late or abandoned read is polled on until `pending_slots` is
    empty, or its reader is closed.
    """

    def __init__(
        self,
        reader: PeerReader,
        handles: Sequence[BlockHandle],
        slots: Sequence[Slot],
        *,
        now_s: float,
        min_deadline_s: float,
        bytes_per_s: float = DEFAULT_BYTES_PER_S,
    ) -> None:
        self.handles = tuple(handles)
        self.slots = tuple(slots)
        self.failure = ""
        self.stale = 0
        self.reader = reader
        self._state = FenceState.READING
        self._words: Read | None = None
        self._has_followed_data = False
        # Block bytes that the reader itself counted for this read.
        self.bytes_read = -reader.bytes_read
        self._data = reader.post_blocks([handle.slot for handle in self.handles], self.slots)
        self.bytes_read += reader.bytes_read
        allowed_s = transfer_deadline_s(reader.outstanding_bytes, bytes_per_s, min_deadline_s)
        self.deadline_s = now_s + allowed_s
        # From here on the agent that posted it is given up.
        self.last_deadline_s = now_s + 2 * allowed_s

    @property
    def state(self) -> FenceState:
        return self._state

    @property
    def pending_slots(self) -> tuple[Slot, ...]:
        """Destination slots that may still be written: quarantined, whatever the state is."""
        return self.slots if self._data.may_write else ()

    def is_overdue(self, now_s: float) -> bool:
        """True if the transfer is late and has not ended: its slots go into quarantine."""
        ended = self._state in (FenceState.PASSED, FenceState.FAILED) and not self.pending_slots
        return not ended and now_s >= self.deadline_s

    def poll(self) -> FenceState:
        """Moves as far as the reader allows without waiting. Idempotent once all has ended."""
        if not self._has_followed_data:
            self._follow_data()
        if self._words is not None:
            self._follow_words(self._words)
        return self._state

    def abandon(self, why: str) -> None:
        """Nobody wants the bytes any more: FAILED, while `poll` still follows what is in flight."""
        if self._state in (FenceState.READING, FenceState.CHECKING):
            self._fail(why)

    def _follow_data(self) -> None:
        before = self.reader.bytes_read
        state = self.reader.poll(self._data)
        self.bytes_read += self.reader.bytes_read - before
        if state is ReadState.PENDING:
            return
        self._has_followed_data = True
        self.reader.release(self._data)
        if state is ReadState.FAILED:
            self._fail(f"the blocks could not be read: {self._data.failure}")
        elif self._state is FenceState.READING:
            self._post_words()

    def _post_words(self) -> None:
        assert self._data.state is ReadState.DONE, "words are read after the bytes"
        try:
            self._words = self.reader.post_generations(self._data.remote_slots)
        except TransferError as error:
            self._fail(f"the generation words could not be read: {error.message}")
        else:
            self._state = FenceState.CHECKING

    def _follow_words(self, words: Read) -> None:
        state = self.reader.poll(words)
        if state is ReadState.PENDING:
            return
        if state is ReadState.FAILED:
            self._fail(f"the generation words could not be read: {words.failure}")
        elif self._state is FenceState.CHECKING:
            self._compare(self.reader.generations(words))
        self.reader.release(words)
        self._words = None

    def _compare(self, found: list[int]) -> None:
        pairs = zip(self.handles, found, strict=True)
        moved = [handle for handle, word in pairs if word != handle.generation]
        self.stale = len(moved)
        if moved:
            self._fail(
                f"{len(moved)} of {len(self.handles)} blocks changed before they were read, "
                f"first slot {moved[0].slot}"
            )
        else:
            self._state = FenceState.PASSED

    def _fail(self, failure: str) -> None:
        """The first failure stands."""
        if self._state is not FenceState.FAILED:
            self._state, self.failure = FenceState.FAILED, failure
