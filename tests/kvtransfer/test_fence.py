"""A fenced read passes only with the bytes that its handles announced."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kv_arenas import POLL_LIMIT_S, Pair, connected_pair, slots

from baton.common.errors import TransferError
from baton.common.ids import BlockHandle, Generation, Slot
from baton.kvtransfer.fence import FencedRead, FenceState, transfer_deadline_s
from baton.kvtransfer.transport.base import PeerReader, Read, ReadState

REMOTE, LOCAL = slots(40, 3, 4, 5), slots(0, 9, 8, 7)


class InterruptedReader:
    """A real reader; something happens just before the words are posted."""

    def __init__(self, inner: PeerReader, before_words: Callable[[], None]) -> None:
        self._inner = inner
        self._before_words = before_words
        self.blocks: list[Read] = []
        self.word_posts = 0
        self.release = inner.release
        self.poll = inner.poll
        self.generations = inner.generations
        self.close = inner.close

    @property
    def bytes_read(self) -> int:
        return self._inner.bytes_read

    @property
    def fence_bytes_read(self) -> int:
        return self._inner.fence_bytes_read

    @property
    def blocks_read(self) -> int:
        return self._inner.blocks_read

    @property
    def outstanding_bytes(self) -> int:
        return self._inner.outstanding_bytes

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        self.blocks.append(self._inner.post_blocks(remote_slots, local_slots))
        return self.blocks[-1]

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        assert self.blocks[-1].state is ReadState.DONE, "words were posted before the data ended"
        self.word_posts += 1
        self._before_words()
        return self._inner.post_generations(remote_slots)


@pytest.fixture(params=["memory", "nixl"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with connected_pair(request.param) as connected:
        yield connected


def fenced(pair: Pair, reader: PeerReader | None = None) -> FencedRead:
    return FencedRead(
        reader or pair.reader, pair.owner.handles(REMOTE), LOCAL, now_s=0.0, min_deadline_s=2.0
    )


def finish(read: FencedRead) -> FenceState:
    deadline = time.monotonic() + POLL_LIMIT_S
    while read.poll() in (FenceState.READING, FenceState.CHECKING):
        assert time.monotonic() < deadline, f"still {read.state} after {POLL_LIMIT_S} s"
    return read.state


def test_an_untouched_read_passes(pair: Pair) -> None:
    read = fenced(pair)
    assert read.state is FenceState.READING
    assert finish(read) is FenceState.PASSED
    assert (read.failure, read.stale, read.pending_slots) == ("", 0, ())
    assert np.array_equal(pair.local.blocks[LOCAL], pair.owner.blocks[REMOTE])
    assert pair.reader.fence_bytes_read == 8 * len(REMOTE)
    assert read.poll() is FenceState.PASSED


def test_words_are_posted_once_and_only_after_the_data_ended(pair: Pair) -> None:
    reader = InterruptedReader(pair.reader, lambda: None)
    read = fenced(pair, reader)
    assert reader.word_posts == 0
    assert finish(read) is FenceState.PASSED
    read.poll()
    assert reader.word_posts == 1


def test_a_slot_raised_before_the_read_fails(pair: Pair) -> None:
    handles = pair.owner.handles(REMOTE)
    pair.owner.rewrite(Slot(3))
    pair.owner.rewrite(Slot(5))
    read = FencedRead(pair.reader, handles, LOCAL, now_s=0.0, min_deadline_s=2.0)
    assert finish(read) is FenceState.FAILED
    assert read.stale == 2
    assert read.failure == "2 of 4 blocks changed before they were read, first slot 3"
    assert read.pending_slots == ()


def test_a_slot_raised_between_data_and_words_fails(pair: Pair) -> None:
    reader = InterruptedReader(pair.reader, lambda: pair.owner.rewrite(Slot(40)))
    read = fenced(pair, reader)
    assert finish(read) is FenceState.FAILED
    assert read.stale == 1
    assert reader.word_posts == 1


def test_a_slot_raised_elsewhere_does_no_harm(pair: Pair) -> None:
    reader = InterruptedReader(pair.reader, lambda: pair.owner.rewrite(Slot(41)))
    assert finish(fenced(pair, reader)) is FenceState.PASSED


def test_a_word_that_went_back_fails_too(pair: Pair) -> None:
    handles = [
        BlockHandle(h.slot, Generation(h.generation + 1)) for h in pair.owner.handles(REMOTE)
    ]
    read = FencedRead(pair.reader, handles, LOCAL, now_s=0.0, min_deadline_s=2.0)
    assert finish(read) is FenceState.FAILED
    assert read.stale == 4


def test_words_that_cannot_be_read_fail(pair: Pair) -> None:
    read = fenced(pair, InterruptedReader(pair.reader, pair.reader.close))
    assert finish(read) is FenceState.FAILED
    assert read.failure.startswith("the generation words could not be read: ")
    assert (read.stale, read.pending_slots) == (0, ())


def test_words_of_an_owner_that_left_fail() -> None:
    with connected_pair("memory") as pair:
        read = fenced(pair, InterruptedReader(pair.reader, pair.owner_transport.close))
        assert finish(read) is FenceState.FAILED
        assert read.failure.endswith("prefill@1 no longer serves its arena")


def test_blocks_that_cannot_be_read_fail() -> None:
    with connected_pair("memory") as pair:
        read = fenced(pair)
        pair.owner_transport.close()
        assert read.poll() is FenceState.FAILED
        assert read.failure.startswith("the blocks could not be read: ")
        assert pair.reader.fence_bytes_read == 0


def test_an_abandoned_read_is_followed_to_its_end() -> None:
    with connected_pair("memory") as pair:
        reader = InterruptedReader(pair.reader, lambda: None)
        read = fenced(pair, reader)
        read.abandon("the request was cancelled")
        assert read.state is FenceState.FAILED
        assert read.pending_slots == tuple(LOCAL)
        assert read.poll() is FenceState.FAILED
        assert read.pending_slots == ()
        assert read.failure == "the request was cancelled"
        assert reader.word_posts == 0
        assert pair.reader.outstanding_bytes == 0


def test_closing_the_reader_frees_the_slots_of_a_late_read() -> None:
    with connected_pair("memory") as pair:
        read = fenced(pair)
        assert not read.is_overdue(1.9)
        assert read.is_overdue(2.0)
        read.abandon("late")
        assert read.is_overdue(2.0), "late until nothing is in flight"
        pair.reader.close()
        assert read.pending_slots == ()
        assert read.poll() is FenceState.FAILED
        assert not read.is_overdue(2.0)


def test_a_passed_read_is_never_late(pair: Pair) -> None:
    read = fenced(pair)
    assert finish(read) is FenceState.PASSED
    assert not read.is_overdue(1e9)


def test_a_slot_out_of_range_is_refused_at_once(pair: Pair) -> None:
    handles = [BlockHandle(Slot(64), Generation(1))]
    with pytest.raises(TransferError, match="slots outside"):
        FencedRead(pair.reader, handles, slots(0), now_s=0.0, min_deadline_s=2.0)
    assert pair.reader.outstanding_bytes == 0


def test_the_deadline_is_four_times_the_bytes_and_at_least_two_seconds() -> None:
    assert transfer_deadline_s(0, 1e9, 2.0) == 2.0
    assert transfer_deadline_s(500_000_000, 1e9, 2.0) == 2.0
    assert transfer_deadline_s(1_000_000_000, 1e9, 2.0) == 4.0


def test_the_deadline_counts_what_is_outstanding_on_the_link() -> None:
    with connected_pair("memory") as pair:
        block_bytes = float(pair.owner.block_bytes)
        first = FencedRead(
            pair.reader,
            pair.owner.handles(slots(1)),
            slots(1),
            now_s=10.0,
            min_deadline_s=2.0,
            bytes_per_s=block_bytes,
        )
        second = FencedRead(
            pair.reader,
            pair.owner.handles(slots(2)),
            slots(2),
            now_s=11.0,
            min_deadline_s=2.0,
            bytes_per_s=block_bytes,
        )
        assert (first.deadline_s, second.deadline_s) == (14.0, 19.0)


@settings(max_examples=60, deadline=None)
@given(
    early=st.lists(st.integers(0, 7), max_size=3),
    between=st.lists(st.integers(0, 7), max_size=3),
    late=st.lists(st.integers(0, 7), max_size=3),
    picked=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
)
def test_passed_means_the_announced_bytes(
    early: list[int], between: list[int], late: list[int], picked: list[int]
) -> None:
    """Whenever the owner rewrites slots, PASSED comes with the bytes that were announced."""
    with connected_pair("memory", owner_slots=8, local_slots=8, block_bytes=16) as pair:

        def rewrite(which: list[int]) -> None:
            for slot in which:
                pair.owner.rewrite(Slot(slot))

        remote, local = slots(*picked), slots(*range(len(picked)))
        handles, announced = pair.owner.handles(remote), pair.owner.blocks[remote].copy()
        reader = InterruptedReader(pair.reader, lambda: rewrite(between))
        read = FencedRead(reader, handles, local, now_s=0.0, min_deadline_s=2.0)
        rewrite(early)
        state = finish(read)
        rewrite(late)
        touched = set(picked) & {*early, *between}
        assert (state is FenceState.PASSED) == (not touched)
        assert read.stale == len(touched)
        if state is FenceState.PASSED:
            assert np.array_equal(pair.local.blocks[local], announced)
