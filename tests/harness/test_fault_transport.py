"""Each injected fault does what it says, and what quarantine and fence must know of it is true."""

from collections.abc import Iterator

import numpy as np
import pytest
from support.fault_transport import FaultScript
from support.faults import (
    Fail,
    FailPost,
    Fault,
    FlipBit,
    Hold,
    Interpose,
    Kind,
    ShortWrite,
    WriteAgain,
    WrongWords,
)
from support.kv_arenas import Pair, connected_pair, finish, slots

from baton.common.errors import TransferError
from baton.kvtransfer.fence import FencedRead, FenceState
from baton.kvtransfer.transport.base import Read, ReadState

THERE, HERE = slots(5, 6, 7), slots(1, 2, 3)


@pytest.fixture
def script() -> FaultScript:
    return FaultScript()


@pytest.fixture(params=["memory", "nixl"])
def pair(request: pytest.FixtureRequest, script: FaultScript) -> Iterator[Pair]:
    with connected_pair(request.param, script=script) as connected:
        yield connected


def post(pair: Pair) -> Read:
    return pair.reader.post_blocks(THERE, HERE)


def arrived(pair: Pair) -> list[bool]:
    """Of each block of `post`, whether it is the owner's."""
    return [
        np.array_equal(pair.local.blocks[here], pair.owner.blocks[there])
        for there, here in zip(THERE, HERE, strict=True)
    ]


def fenced(pair: Pair) -> FencedRead:
    """A whole read with its fence, driven until it waits for something or has ended."""
    read = FencedRead(pair.reader, pair.owner.handles(THERE), HERE, now_s=0.0, min_deadline_s=2.0)
    for _ in range(100_000):
        if read.poll() in (FenceState.PASSED, FenceState.FAILED):
            break
    return read


def test_planned_faults_are_taken_once_and_in_order(pair: Pair, script: FaultScript) -> None:
    script.next(Fail(may_write=False), FlipBit())
    states = []
    for _ in range(3):
        read = post(pair)
        states.append((finish(pair.reader, read), arrived(pair)[0]))
        pair.reader.release(read)
        pair.local.blocks[:] = 0
    assert [state.value for state, _ in states] == ["failed", "done", "done"]
    assert [is_there for _, is_there in states] == [False, False, True]
    assert script.injected == {"Fail": 1, "FlipBit": 1}
    assert script.posted == {Kind.BLOCKS: 3}


def test_every_read_of_a_kind_until_cleared(pair: Pair, script: FaultScript) -> None:
    script.every(WrongWords())
    for expected in (FenceState.FAILED, FenceState.FAILED):
        assert fenced(pair).state is expected
    script.clear()
    assert fenced(pair).state is FenceState.PASSED
    assert script.injected == {"WrongWords": 2}


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
def test_a_read_that_cannot_be_posted(pair: Pair, script: FaultScript, kind: Kind) -> None:
    script.next(FailPost(kind))
    if kind is Kind.BLOCKS:
        with pytest.raises(TransferError, match="could not be posted"):
            fenced(pair)
    else:
        assert fenced(pair).state is FenceState.FAILED
    assert pair.reader.outstanding_bytes == 0
    assert fenced(pair).state is FenceState.PASSED


def test_a_failed_read_may_still_land_until_its_reader_is_closed() -> None:
    for is_closed in (False, True):
        script = FaultScript()
        with connected_pair("memory", script=script) as pair:
            lost = Fail(may_write=True)
            script.next(lost)
            read = post(pair)
            assert finish(pair.reader, read) is ReadState.FAILED
            assert read.may_write
            assert pair.reader.outstanding_bytes == 0
            assert arrived(pair) == [False] * 3
            pair.reader.release(read)
            if is_closed:
                pair.reader.close()
                assert not read.may_write
            assert script.land(lost) == (0 if is_closed else 3)
            assert arrived(pair) == [not is_closed] * 3
            # To its reader this read has failed, whatever landed.
            assert (pair.reader.bytes_read, pair.reader.blocks_read) == (0, 0)


def test_a_read_that_failed_for_good_writes_nothing(pair: Pair, script: FaultScript) -> None:
    script.next(Fail(may_write=False))
    read = fenced(pair)
    assert (read.state, read.pending_slots) == (FenceState.FAILED, ())
    assert arrived(pair) == [False] * 3


def test_a_read_is_late_by_polls_or_until_it_is_released(pair: Pair, script: FaultScript) -> None:
    hold = Hold()
    script.next(Hold(polls=5), hold)
    read = post(pair)
    assert [pair.reader.poll(read) for _ in range(5)] == [ReadState.PENDING] * 5
    assert finish(pair.reader, read) is ReadState.DONE
    pair.reader.release(read)

    held = post(pair)
    for _ in range(1000):
        assert pair.reader.poll(held) is ReadState.PENDING
    assert held.may_write
    hold.release()
    assert finish(pair.reader, held) is ReadState.DONE
    assert arrived(pair) == [True] * 3
    assert pair.reader.blocks_read == 6


def test_what_never_completes_ends_with_its_reader(pair: Pair, script: FaultScript) -> None:
    script.next(Hold())
    read = fenced(pair)
    assert read.state is FenceState.READING
    read.abandon("nobody wants it")
    read.poll()
    assert read.pending_slots == tuple(HERE)
    pair.reader.close()
    read.poll()
    assert read.pending_slots == ()


def test_words_may_be_held_too(pair: Pair, script: FaultScript) -> None:
    script.next(Hold(kind=Kind.WORDS))
    read = fenced(pair)
    assert (read.state, read.pending_slots) == (FenceState.CHECKING, ())


def test_one_bit_of_one_block_is_flipped(pair: Pair, script: FaultScript) -> None:
    script.next(FlipBit(block=1, byte=100, bit=3))
    assert fenced(pair).state is FenceState.PASSED, "words speak for time, not for bits"
    differs = pair.local.blocks[HERE] ^ pair.owner.blocks[THERE]
    assert differs[1, 100] == 8
    assert np.count_nonzero(differs) == 1


def test_a_short_write_says_that_all_is_there(pair: Pair, script: FaultScript) -> None:
    before = pair.local.blocks[HERE].copy()
    script.next(ShortWrite(missing=2))
    assert fenced(pair).state is FenceState.PASSED
    assert arrived(pair) == [True, False, False]
    assert np.array_equal(pair.local.blocks[HERE[1:]], before[1:])


def test_an_owner_that_rewrites_between_blocks_and_words_is_noticed(
    pair: Pair, script: FaultScript
) -> None:
    def rewrite(read: Read) -> None:
        pair.owner.rewrite(read.remote_slots[2])

    for fault in (Interpose(before_words=rewrite), Interpose(before_blocks=rewrite)):
        handles = pair.owner.handles(THERE)
        script.next(fault)
        read = FencedRead(pair.reader, handles, HERE, now_s=0.0, min_deadline_s=2.0)
        for _ in range(100_000):
            if read.poll() is FenceState.FAILED:
                break
        assert read.state is FenceState.FAILED
        assert read.stale == 1


def test_a_read_may_write_again_after_all_is_over() -> None:
    for is_closed in (False, True):
        script = FaultScript()
        with connected_pair("memory", script=script) as pair:
            again = WriteAgain()
            script.next(again)
            assert fenced(pair).state is FenceState.PASSED
            pair.local.blocks[:] = 0
            if is_closed:
                pair.reader.close()
            assert script.land(again) == (0 if is_closed else 3)
            assert arrived(pair) == [not is_closed] * 3


@pytest.mark.parametrize("fault", [Fail(), Hold()], ids=["failed", "held"])
def test_close_is_the_end_of_every_faulty_read(fault: Fault) -> None:
    script = FaultScript()
    with connected_pair("memory", script=script) as pair:
        script.next(fault)
        read = post(pair)
        pair.reader.poll(read)
        assert read.may_write
        pair.reader.close()
        pair.reader.close()
        assert not read.may_write
        assert read.state is ReadState.FAILED
        assert pair.reader.outstanding_bytes == 0
        pair.reader.release(read)
