"""Why the fence reads its words in a second request, and why only the agent's end is a fence.

    python benchmarks/fence_order.py [--owner cpu|0|1] [--reader cpu|0|1] [--trials 200] [--out F]

Two processes over NIXL. The owner raises a word and then overwrites its blocks, again and again, as
an engine that reuses slots; the reader reads blocks and word.

* order: in what share of reads did the bytes hold data newer than the word that came with them?
  Such a read would pass the fence with a reused block.
* teardown: a read is posted, something is torn down, and the destination is filled anew. In what
  share of trials, and of their bytes, did the read still write there afterwards?
"""

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from baton.common.errors import TransferError
from baton.kvtransfer.transport.base import MemoryRegion, ReadState
from baton.kvtransfer.transport.nixl_agent import NixlAgent

BLOCK = 1 << 20
GUARD = 0x55
SETTLE_S = 0.25
READ_LIMIT_S = 30.0


def device_of(name: str) -> int | None:
    return None if name == "cpu" else int(name)


class Memory:
    """One buffer of `num_blocks` blocks; block 0 begins with the word."""

    def __init__(self, device: int | None, num_blocks: int) -> None:
        where = "cpu" if device is None else f"cuda:{device}"
        self.words = torch.zeros(num_blocks * BLOCK // 8, dtype=torch.int64, device=where)
        self.region = MemoryRegion(
            self.words.data_ptr(), num_blocks * BLOCK, self.words, device=device
        )
        self.num_blocks = num_blocks

    @property
    def data(self) -> torch.Tensor:
        return self.words[BLOCK // 8 :]

    def sync(self) -> None:
        if self.words.is_cuda:
            torch.cuda.synchronize(self.words.device)


def own(pipe: Connection, device: int | None, num_blocks: int) -> None:
    memory = Memory(device, num_blocks)
    agent = NixlAgent("owner", progress_delay_us=0, telemetry=False)
    agent.register(memory.region)
    pipe.send((agent.metadata(), memory.region.address))
    stamp = 0
    is_churning = False
    while True:
        if pipe.poll(0 if is_churning else None):
            order = pipe.recv()
            if order == "stop":
                break
            is_churning = order == "churn"
            pipe.send(order)
        if is_churning:
            stamp += 1
            memory.words[:1] = stamp
            memory.sync()
            memory.data.fill_(stamp)
            memory.sync()


class Reader:
    """One agent of its own, connected to the owner."""

    def __init__(self, memory: Memory, metadata: bytes, address: int, owner: int | None) -> None:
        Reader.number += 1
        self.memory = memory
        self.agent = NixlAgent(f"reader{Reader.number}", progress_delay_us=None, telemetry=False)
        self.peer = self.agent.load_peer(metadata)
        self.agent.register(memory.region)
        self.agent.connect(self.peer)
        num = memory.num_blocks
        self.here = self.agent.prepare(
            None, memory.region.address, BLOCK, num, memory.region.device
        )
        self.there = self.agent.prepare(self.peer, address, BLOCK, num, owner)
        self.read([0])

    number = 0

    def post(self, blocks: list[int]) -> int:
        items = np.array(blocks, dtype=np.int32)
        handle = self.agent.create_read(self.here, items, self.there, items)
        self.agent.post(handle)
        return handle

    def read(self, blocks: list[int]) -> None:
        handle = self.post(blocks)
        deadline = time.monotonic() + READ_LIMIT_S
        while self.agent.state(handle) is ReadState.PENDING:
            assert time.monotonic() < deadline, "the read did not end"
        self.agent.release(handle)


def order(connect: Callable[[], Reader], trials: int) -> dict[str, float]:
    """Share of reads whose data is newer than their word, per way of reading the word."""
    reader = connect()
    blocks = list(range(1, reader.memory.num_blocks))
    ways: dict[str, list[list[int]]] = {
        "word first, one request": [[0, *blocks]],
        "word last, one request": [[*blocks, 0]],
        "word before, own request": [[0], blocks],
        "word after, own request": [blocks, [0]],
    }
    missed = dict.fromkeys(ways, 0)
    torn = 0
    for _ in range(trials):
        for way, requests in ways.items():
            for request in requests:
                reader.read(request)
            reader.memory.sync()
            word = int(reader.memory.words[0])
            newest, oldest = int(reader.memory.data.max()), int(reader.memory.data.min())
            missed[way] += newest > word
            torn += newest != oldest
    reader.agent.destroy()
    return {way: count / trials for way, count in missed.items()} | {
        "reads that mixed two generations": torn / (trials * len(ways))
    }


def _nothing(reader: Reader, _: int) -> None:
    """The reader only stops looking."""


def _release(reader: Reader, handle: int) -> None:
    reader.agent.release(handle)


def _remove_peer(reader: Reader, _: int) -> None:
    reader.agent._agent.invalidateRemoteMD(reader.peer)


def _deregister(reader: Reader, _: int) -> None:
    region = reader.memory.region
    row = (region.address, region.num_bytes, region.device or 0, "")
    nixl = reader.agent._nixl
    segment = reader.agent._segment(region.device)
    reader.agent._agent.deregisterMem(nixl.nixlRegDList(segment, [row]), [])


def _destroy(reader: Reader, _: int) -> None:
    reader.agent.destroy()


def teardown(connect: Callable[[], Reader], trials: int) -> dict[str, dict[str, float]]:
    """What still lands in a destination that was given to somebody else."""
    found = {}
    for name, end in (
        ("nothing torn down", _nothing),
        ("release_xfer_handle", _release),
        ("remove_remote_agent", _remove_peer),
        ("deregister_memory", _deregister),
        ("agent destroyed", _destroy),
    ):
        late, share, refused, took, done = 0, 0.0, 0, 0.0, 0
        for _ in range(trials):
            try:
                reader = connect()
            except TransferError as error:
                # UCX over TCP runs out of endpoints after some dozens of readers.
                print(f"{name}: {error.message}")
                break
            done += 1
            memory = reader.memory
            handle = reader.post(list(range(1, memory.num_blocks)))
            began = time.perf_counter()
            try:
                end(reader, handle)
            except Exception:
                refused += 1
            took += time.perf_counter() - began
            memory.data.view(torch.uint8).fill_(GUARD)
            memory.sync()
            settle(reader, handle if end in (_nothing, _remove_peer, _deregister) else None)
            changed = float((memory.data.view(torch.uint8) != GUARD).float().mean())
            late += changed > 0
            share += changed
            reader.agent.destroy()
            gc.collect()
        found[name] = {
            "trials with late writes": late / max(1, done),
            "bytes written late": share / max(1, done),
            "refused": refused / max(1, done),
            "ms": 1000 * took / max(1, done),
            "trials": done,
        }
        print(name, found[name], flush=True)
    return found


def settle(reader: Reader, handle: int | None) -> None:
    """Let whatever is in flight land; an agent without a thread moves when it is asked."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        if handle is not None:
            try:
                reader.agent.state(handle)
            except Exception:
                handle = None
    reader.memory.sync()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--owner", default="cpu")
    parser.add_argument("--reader", default="cpu")
    parser.add_argument("--blocks", type=int, default=257, help="of 1 MiB, the word's included")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--teardown-trials", type=int, default=20)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    owner, reader = device_of(flags.owner), device_of(flags.reader)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=own, args=(theirs, owner, flags.blocks), daemon=True)
    process.start()
    metadata, address = pipe.recv()
    memory = Memory(reader, flags.blocks)

    def connect() -> Reader:
        return Reader(memory, metadata, address, owner)

    pipe.send("churn")
    assert pipe.recv() == "churn"
    found = {"order": order(connect, flags.trials)}
    pipe.send("rest")
    assert pipe.recv() == "rest"
    found["teardown"] = teardown(connect, flags.teardown_trials)
    pipe.send("stop")
    process.join(10)
    places = {
        where: "host memory" if device is None else torch.cuda.get_device_name(device)
        for where, device in (("owner", owner), ("reader", reader))
    }
    result = {
        **places,
        "same device": flags.owner == flags.reader,
        "MiB": flags.blocks - 1,
        **found,
    }
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
