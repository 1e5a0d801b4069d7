"""F03, F04, F08, F09, F10 and F21 on the memory that KV lies in: host memory here, a GPU's there.

Owner and reader are processes; on a GPU their reads are cuda_ipc's, with or without NVLink.
"""

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
from support.device_owner import (
    BLOCK_BYTES,
    NUM_SLOTS,
    DeviceArena,
    are_of,
    handles_at,
    run_owner,
)
from support.kv_arenas import identity

from baton.common.errors import TransferError
from baton.common.ids import Slot
from baton.kernels.block_digest import block_digest, block_digest_triton
from baton.kvtransfer.fence import FencedRead, FenceState
from baton.kvtransfer.transport.base import ArenaDescriptor
from baton.kvtransfer.transport.nixl import NixlPeerReader, NixlTransport

ANSWER_LIMIT_S = 60.0
READ_LIMIT_S = 30.0
CANARY = 0x5555_5555_5555_5555
SETTLE_S = 0.3
SLOTS = [Slot(slot) for slot in range(NUM_SLOTS)]

Figure = Callable[[str, float, str], None]
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLACES = [
    pytest.param((None, None), id="host"),
    pytest.param((0, 0), id="one-gpu", marks=[pytest.mark.gpu, has_gpu]),
    pytest.param(
        (0, 1),
        id="two-gpus",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


@dataclass
class Owner:
    process: BaseProcess
    pipe: Connection
    descriptor: ArenaDescriptor
    epoch: int

    def do(self, order: Any) -> int:
        self.pipe.send(order)
        assert self.pipe.poll(ANSWER_LIMIT_S), "the owner hangs"
        rewrites: int = self.pipe.recv()
        return rewrites

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


class Bench:
    """A reader in this process and owners in theirs."""

    def __init__(self, places: tuple[int | None, int | None]) -> None:
        self._owner_device, reader_device = places
        self._owners: list[Owner] = []
        self.transport = NixlTransport(identity("reader"))
        self.arena = DeviceArena(reader_device)
        self.arena.open_on(self.transport)
        self.readers: list[NixlPeerReader] = []

    def owner(self, epoch: int = 1) -> Owner:
        context = mp.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=run_owner, args=(there, self._owner_device, epoch))
        process.start()
        assert here.poll(ANSWER_LIMIT_S), "the owner does not start"
        self._owners.append(Owner(process, here, here.recv(), epoch))
        return self._owners[-1]

    def connect(self, owner: Owner) -> NixlPeerReader:
        reader = self.transport.connect(identity("owner", owner.epoch), owner.descriptor)
        self.readers.append(reader)
        return reader

    def clear(self) -> None:
        self.arena.blocks.fill_(CANARY)
        self.arena.sync()

    @property
    def is_untouched(self) -> bool:
        self.arena.sync()
        return bool((self.arena.blocks == CANARY).all())

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.transport.close()
        for owner in self._owners:
            owner.process.kill()
            owner.process.join()
            owner.process.close()
            owner.pipe.close()


@pytest.fixture(params=PLACES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def post(reader: NixlPeerReader, num_rewrites: int = 0) -> FencedRead:
    return FencedRead(
        reader, handles_at(num_rewrites), SLOTS, now_s=time.monotonic(), min_deadline_s=2.0
    )


def finish(read: FencedRead) -> FenceState:
    deadline = time.monotonic() + READ_LIMIT_S
    while read.poll() in (FenceState.READING, FenceState.CHECKING):
        assert time.monotonic() < deadline, "the read does not end"
    return read.state


def expect_no_late_write(bench: Bench, reader: NixlPeerReader) -> None:
    """Once the agent is destroyed, the slots are anybody's."""
    reader.close()
    bench.clear()
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        assert bench.is_untouched
    assert bench.is_untouched


def test_bytes_cross(bench: Bench) -> None:
    owner = bench.owner()
    owner.do("rewrite")
    assert finish(post(bench.connect(owner), 1)) is FenceState.PASSED
    assert are_of(bench.arena.blocks, 1)


def test_f03_an_owner_killed_in_the_middle_leaves_nothing_to_use(bench: Bench) -> None:
    owner = bench.owner()
    reader = bench.connect(owner)
    read = post(reader)
    owner.process.kill()
    owner.process.join()
    state = finish(read)
    if state is FenceState.PASSED:
        # The words were read while it lived: then the bytes are those of the handles.
        assert are_of(bench.arena.blocks, 0)
    expect_no_late_write(bench, reader)
    with pytest.raises(TransferError):
        bench.connect(owner)


def test_f04_an_owner_frozen_in_the_middle_cannot_write_after_its_agent_is_gone(
    bench: Bench, figure: Figure
) -> None:
    owner = bench.owner()
    reader = bench.connect(owner)
    owner.signal(signal.SIGSTOP)
    read = post(reader)
    read.abandon("the request ended")
    began = time.monotonic()
    expect_no_late_write(bench, reader)
    figure("F04 end of an agent and proof of silence", time.monotonic() - began, "s")
    owner.signal(signal.SIGCONT)
    assert owner.do("rewrite") == 1
    assert bench.is_untouched, "the thaw of the owner writes nothing"


def test_f08_blocks_that_are_reused_under_a_read_are_never_taken(
    bench: Bench, figure: Figure
) -> None:
    """Their lease ran out: the owner rewrites everything while it is read, again and again."""
    owner = bench.owner()
    reader = bench.connect(owner)
    at, passed, stale = 0, 0, 0
    for _ in range(40):
        at = owner.do("rest")
        read = post(reader, at)
        owner.pipe.send("churn")
        if finish(read) is FenceState.PASSED:
            passed += 1
            assert are_of(bench.arena.blocks, at), "the fence passed bytes of another generation"
        else:
            stale += read.stale > 0
        assert owner.pipe.poll(ANSWER_LIMIT_S)
        owner.pipe.recv()
    for _ in range(40):
        # Handles of a generation that is long gone.
        read = post(reader, at)
        assert finish(read) is FenceState.FAILED
        stale += read.stale == NUM_SLOTS
    figure("F08 reads refused of 80", stale, "reads")
    assert stale >= 40
    assert passed + stale <= 80


def test_f09_an_aborted_read_keeps_its_slots_until_it_has_ended(bench: Bench) -> None:
    owner = bench.owner()
    for _ in range(10):
        reader = bench.connect(owner)
        read = post(reader)
        read.abandon("the request ended")
        if read.pending_slots:
            assert set(read.pending_slots) == set(SLOTS), "quarantined as a whole"
        expect_no_late_write(bench, reader)
        read.poll()
        assert read.pending_slots == ()


def test_f10_references_to_an_earlier_life_are_refused(bench: Bench, figure: Figure) -> None:
    first = bench.owner(epoch=1)
    old = bench.connect(first)
    first.process.kill()
    first.process.join()
    began = time.monotonic()
    second = bench.owner(epoch=2)
    assert finish(post(old)) is FenceState.FAILED
    with pytest.raises(TransferError):
        bench.connect(Owner(second.process, second.pipe, first.descriptor, epoch=2))
    fresh = bench.connect(second)
    assert finish(post(fresh)) is FenceState.PASSED
    assert are_of(bench.arena.blocks, 0)
    figure("F10 first good read after a restart", time.monotonic() - began, "s")


def test_f21_a_flipped_bit_does_not_have_the_digest(bench: Bench, figure: Figure) -> None:
    owner = bench.owner()
    reader = bench.connect(owner)
    blocks = bench.arena.blocks
    slots = torch.arange(NUM_SLOTS, dtype=torch.int32, device=blocks.device)

    def digest() -> torch.Tensor:
        if not blocks.is_cuda:
            return block_digest(blocks, slots)
        with torch.cuda.device(blocks.device):
            return block_digest_triton(blocks, slots)

    assert finish(post(reader)) is FenceState.PASSED
    sound = digest()
    found = 0
    for slot in range(0, NUM_SLOTS, 8):
        owner.do((slot, (slot * 977) % (BLOCK_BYTES // 8)))
        assert finish(post(reader)) is FenceState.PASSED, "the fence has nothing to object to"
        differing = (digest() != sound).nonzero().flatten().tolist()
        assert slot in differing
        found += 1
    bench.arena.sync()
    began = time.perf_counter()
    digest()
    bench.arena.sync()
    took = time.perf_counter() - began
    figure("F21 digest of 128 MiB", 1000 * took, "ms")
    assert found == NUM_SLOTS // 8
