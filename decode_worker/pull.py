"""The pull of one prompt's blocks: announced ones are read while the owner computes the next.

    blocks   | own cache hits | passed | open reads | announced | not announced yet |
             [0, first)       [first, cursor)       [cursor, readable)

A block may be used only when its own fence has passed.
"""

from collections.abc import Sequence

from baton.common.errors import BatonError, FenceFailed, PeerLost, TransferError, TransferTimeout
from baton.common.ids import BlockHandle, Slot
from baton.kvtransfer.fence import FencedRead, FenceState
from baton.kvtransfer.open_reads import OpenReads
from baton.kvtransfer.transport.base import PeerReader

# What may be posted on one link at a time: the transfer clock counts from posting.
MAX_POSTED_BYTES = 256 * 1024 * 1024


class Pull:
    """Reads blocks `[first_block, len(handles))` of a prompt into `slots` of the same indices."""

    def __init__(
        self,
        reads: OpenReads,
        peer: PeerReader,
        *,
        handles: Sequence[BlockHandle],
        slots: Sequence[Slot],
        first_block: int,
        block_bytes: int,
        now: float,
    ) -> None:
        assert len(slots) >= len(handles), "a pull has its destination before it starts"
        self._reads = reads
        self._peer = peer
        self._handles = handles
        self._slots = slots
        self._cursor = first_block
        self.first_block = first_block
        self._max_posted_blocks = max(1, MAX_POSTED_BYTES // block_bytes)
        self._open: list[FencedRead] = []
        self.started_at = now
        self.num_blocks = len(handles) - first_block
        self.pulled_bytes = 0
        self.error: BatonError | None = None

    @property
    def is_complete(self) -> bool:
        """Every block is here and has passed its fence."""
        return self.error is None and self._cursor == len(self._handles) and not self._open

    @property
    def is_reading(self) -> bool:
        """A read is posted, and nobody has seen its end."""
        return bool(self._open)

    def post(self, readable_blocks: int, *, now: float) -> None:
        """Start reading what was announced up to `readable_blocks` and is not started yet."""
        while self.error is None and self._cursor < readable_blocks:
            if self._open and self._peer.outstanding_bytes >= MAX_POSTED_BYTES:
                break
            end = min(readable_blocks, self._cursor + self._max_posted_blocks)
            span = slice(self._cursor, end)
            try:
                read = self._reads.post(self._peer, self._handles[span], self._slots[span], now=now)
            except TransferError as error:
                self._fail(error)
                break
            self._open.append(read)
            self._cursor = end

    def poll(self, *, now: float) -> None:
        """Move the open reads on; the first failure or lateness ends the pull."""
        for read in list(self._open):
            state = read.poll()
            if state is FenceState.PASSED:
                self._open.remove(read)
                self.pulled_bytes += read.bytes_read
            elif state is FenceState.FAILED:
                self._fail(FenceFailed(read.failure) if read.stale else PeerLost(read.failure))
                break
            elif read.is_overdue(now):
                self._fail(
                    TransferTimeout(
                        f"{len(read.slots)} KV blocks did not arrive in "
                        f"{read.deadline_s - self.started_at:.1f} s"
                    )
                )
                break

    def abandon(self, why: str) -> None:
        """Nobody wants the blocks any more; open reads keep their targets in quarantine."""
        for read in self._open:
            self._reads.abandon(read, why)
        self._open.clear()

    def _fail(self, error: BatonError) -> None:
        self.error = error
        self.abandon(error.message)
