"""What every transport promises: the in-process one, real NIXL, and memory under an empty
fault script."""

import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.fault_transport import FaultScript
from support.kv_arenas import Pair, connected_pair, finish, identity, slots

from baton.common.errors import ConfigError, HandshakeMismatch, PeerLost, TransferError
from baton.common.ids import Slot
from baton.kvtransfer.transport import nixl_agent
from baton.kvtransfer.transport.base import GENERATION_BYTES, ReadState
from baton.kvtransfer.transport.open import open_transport


@pytest.fixture(params=["memory", "nixl", "memory under an empty script"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    name, _, is_scripted = request.param.partition(" under ")
    with connected_pair(name, script=FaultScript() if is_scripted else None) as connected:
        yield connected


@pytest.fixture
def nixl_pair() -> Iterator[Pair]:
    with connected_pair("nixl") as connected:
        yield connected


def read_words(pair: Pair, picked: list[Slot]) -> list[int]:
    read = pair.reader.post_generations(picked)
    assert finish(pair.reader, read) is ReadState.DONE
    found = pair.reader.generations(read)
    pair.reader.release(read)
    return found


def test_scattered_blocks_arrive_and_nothing_else_changes(pair: Pair) -> None:
    remote, local = slots(63, 0, 17, 5, 18), slots(2, 47, 0, 30, 31)
    expected = pair.local.blocks.copy()
    expected[local] = pair.owner.blocks[remote]
    owned = pair.owner.blocks.copy()

    read = pair.reader.post_blocks(remote, local)
    assert (read.remote_slots, read.local_slots) == (tuple(remote), tuple(local))
    assert finish(pair.reader, read) is ReadState.DONE
    assert not read.may_write
    pair.reader.release(read)

    assert np.array_equal(pair.local.blocks, expected)
    assert np.array_equal(pair.owner.blocks, owned)


def test_counters_are_blocks_times_block_bytes(pair: Pair) -> None:
    assert (pair.reader.bytes_read, pair.reader.blocks_read) == (0, 0)
    assert pair.reader.fence_bytes_read == 0
    for count in (1, 7, 20):
        read = pair.reader.post_blocks(slots(*range(count)), slots(*range(count)))
        finish(pair.reader, read)
        pair.reader.release(read)
    assert pair.reader.blocks_read == 28
    assert pair.reader.bytes_read == 28 * pair.owner.block_bytes
    assert pair.reader.fence_bytes_read == 0
    assert pair.reader.outstanding_bytes == 0

    read_words(pair, slots(3, 4))
    assert pair.reader.fence_bytes_read == 2 * GENERATION_BYTES
    assert pair.reader.bytes_read == 28 * pair.owner.block_bytes


def test_words_are_the_owners_and_show_a_raise(pair: Pair) -> None:
    picked = slots(9, 63, 0)
    before = pair.owner.words[picked].tolist()
    assert read_words(pair, picked) == before

    pair.owner.rewrite(Slot(63))
    assert read_words(pair, picked) == [before[0], before[1] + 1, before[2]]


def test_words_at_the_ends_of_64_bits(pair: Pair) -> None:
    pair.owner.words[:2] = [0, 2**64 - 2]
    assert read_words(pair, slots(0, 1)) == [0, 2**64 - 2]


def test_many_reads_are_outstanding_and_end_in_any_order(pair: Pair) -> None:
    reads = [pair.reader.post_blocks([Slot(i + 8)], [Slot(i)]) for i in range(40)]
    words = [pair.reader.post_generations(slots(i, i + 1)) for i in range(40)]
    for read in reversed(reads + words):
        assert finish(pair.reader, read) is ReadState.DONE
    for i, read in enumerate(words):
        assert pair.reader.generations(read) == pair.owner.words[i : i + 2].tolist()
    for read in reads + words:
        pair.reader.release(read)
    assert np.array_equal(pair.local.blocks[:40], pair.owner.blocks[8:48])
    assert pair.reader.blocks_read == 40
    assert pair.reader.outstanding_bytes == 0


@pytest.mark.parametrize(
    ("remote", "local"), [([64], [0]), ([0, 1], [1, 48]), ([-1], [0]), ([0], [-1])]
)
def test_slots_out_of_range_are_refused(pair: Pair, remote: list[int], local: list[int]) -> None:
    before = pair.local.blocks.copy()
    with pytest.raises(TransferError, match="slots outside"):
        pair.reader.post_blocks(slots(*remote), slots(*local))
    assert pair.reader.outstanding_bytes == 0
    assert np.array_equal(pair.local.blocks, before)


@pytest.mark.parametrize("slot", [-1, 64])
def test_words_out_of_range_are_refused(pair: Pair, slot: int) -> None:
    with pytest.raises(TransferError, match="slots outside"):
        pair.reader.post_generations(slots(0, slot))


def test_close_ends_what_is_pending(pair: Pair) -> None:
    everything = slots(*range(48))
    blocks = pair.reader.post_blocks(everything, everything)
    words = pair.reader.post_generations(everything)
    pair.reader.close()
    pair.reader.close()

    pair.local.blocks[:] = 0
    for read in (blocks, words):
        assert read.state is not ReadState.PENDING
        assert pair.reader.poll(read) is read.state
        assert not read.may_write
        pair.reader.release(read)
    assert pair.reader.outstanding_bytes == 0
    assert not pair.local.blocks.any()
    with pytest.raises(TransferError, match="closed"):
        pair.reader.post_blocks(slots(0), slots(0))
    with pytest.raises(TransferError, match="closed"):
        pair.reader.post_generations(slots(0))


def test_a_peer_is_read_again_after_its_reader_was_closed(pair: Pair) -> None:
    pair.reader.close()
    pair.reader = pair.local_transport.connect(pair.owner_id, pair.descriptor)
    read = pair.reader.post_blocks(slots(5), slots(6))
    assert finish(pair.reader, read) is ReadState.DONE
    pair.reader.release(read)
    assert np.array_equal(pair.local.blocks[6], pair.owner.blocks[5])


def test_workers_read_from_each_other(pair: Pair) -> None:
    back = pair.owner_transport.connect(pair.local_id, pair.local_descriptor)
    there, here = pair.reader.post_blocks(slots(7), slots(1)), back.post_blocks(slots(2), slots(8))
    assert finish(pair.reader, there) is ReadState.DONE
    assert finish(back, here) is ReadState.DONE
    back.close()
    assert np.array_equal(pair.local.blocks[1], pair.owner.blocks[7])
    assert np.array_equal(pair.owner.blocks[8], pair.local.blocks[2])


def test_a_peer_that_does_not_fit_is_refused(pair: Pair) -> None:
    connect, owner, good = pair.local_transport.connect, pair.owner_id, pair.descriptor
    with pytest.raises(HandshakeMismatch, match="blocks of 8192 bytes, this worker of 4096"):
        connect(owner, replace(good, block_bytes=8192))
    with pytest.raises(HandshakeMismatch, match="serves KV by 'pigeon'"):
        connect(owner, replace(good, transport="pigeon"))
    with pytest.raises(HandshakeMismatch, match="0 slots"):
        connect(owner, replace(good, num_slots=0))
    with pytest.raises(HandshakeMismatch, match="not of prefill@2"):
        connect(identity("prefill", epoch=2), good)
    with pytest.raises(TransferError):
        connect(owner, replace(good, metadata=b"\xff\xff\xff\xffgarbage"))


def test_memory_copies_at_the_poll_and_not_in_the_post() -> None:
    with connected_pair("memory") as pair:
        before = pair.local.blocks[1].copy()
        read = pair.reader.post_blocks(slots(1), slots(1))
        assert np.array_equal(pair.local.blocks[1], before)
        assert pair.reader.outstanding_bytes == pair.owner.block_bytes
        pair.owner.blocks[1] = 77
        assert pair.reader.poll(read) is ReadState.DONE
        assert (pair.local.blocks[1] == 77).all()


def test_memory_reads_fail_once_the_owner_is_closed() -> None:
    with connected_pair("memory") as pair:
        before = pair.local.blocks.copy()
        blocks = pair.reader.post_blocks(slots(1), slots(1))
        words = pair.reader.post_generations(slots(1))
        pair.owner_transport.close()
        for read in (blocks, words):
            assert pair.reader.poll(read) is ReadState.FAILED
            assert read.failure == "prefill@1 no longer serves its arena"
            assert not read.may_write
        assert pair.reader.bytes_read == pair.reader.fence_bytes_read == 0
        assert np.array_equal(pair.local.blocks, before)
        with pytest.raises(PeerLost, match="serves no arena"):
            pair.local_transport.connect(pair.owner_id, pair.descriptor)


def test_nixl_refuses_more_words_than_it_can_land_apart(nixl_pair: Pair) -> None:
    reader, everything = nixl_pair.reader, slots(*range(48))
    reads = [reader.post_generations(everything) for _ in range(2)]
    with pytest.raises(TransferError, match="1 generation words wanted, 0 of 96 free"):
        reader.post_generations(slots(0))
    for read in reads:
        assert finish(reader, read) is ReadState.DONE
        assert reader.generations(read) == nixl_pair.owner.words[:48].tolist()
        reader.release(read)
    assert read_words(nixl_pair, slots(3)) == nixl_pair.owner.words[[3]].tolist()


def test_nixl_close_destroys_the_agent_while_the_reader_is_still_held(nixl_pair: Pair) -> None:
    def num_open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    connect = nixl_pair.local_transport.connect
    connect(nixl_pair.owner_id, nixl_pair.descriptor).close()
    # What earlier tests left in cycles is not closed under this one.
    gc.collect()
    before = num_open_files()
    reader = connect(nixl_pair.owner_id, nixl_pair.descriptor)
    assert num_open_files() > before, "an agent's UCX worker holds sockets and event files"
    everything = slots(*range(48))
    read = reader.post_blocks(everything, everything)
    reader.close()
    assert num_open_files() == before
    assert not read.may_write


def test_nixl_is_quiet_and_leaves_logging_alone(
    nixl_pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    nixl_pair.local_transport.connect(nixl_pair.owner_id, nixl_pair.descriptor).close()
    assert capfd.readouterr() == ("", "")
    assert logging.raiseExceptions


def test_an_unknown_transport_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no KV transport is called 'pigeon'"):
        open_transport("pigeon", identity("w"))


def test_a_missing_wheel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "BINDINGS", ("nixl_of_nowhere._bindings",))
    with pytest.raises(ConfigError, match=r"nixl_of_nowhere.*kvbaton\[nixl-cu12\]"):
        nixl_agent.load_bindings.__wrapped__()
