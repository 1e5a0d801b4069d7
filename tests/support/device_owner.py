"""Arenas in host or GPU memory whose bytes say which generation of which slot they are.

    block of slot s at its k-th rewrite: every 8-byte word is 1000 * k + s

An owner is a process of its own that rewrites its slots, word first, as an engine that reuses them.
"""

from multiprocessing.connection import Connection

import numpy as np
import torch
from support.kv_arenas import identity

from baton.common.ids import BlockHandle, Generation, Slot
from baton.kvtransfer.transport.base import ArenaDescriptor, MemoryRegion, Transport
from baton.kvtransfer.transport.nixl import NixlTransport

NUM_SLOTS = 128
BLOCK_BYTES = 1 << 20
FIRST_WORD = 2**40


class DeviceArena:
    """Blocks on a device (None: host memory), generation words in host memory."""

    def __init__(self, device: int | None) -> None:
        self.device = device
        where = "cpu" if device is None else f"cuda:{device}"
        self.blocks = torch.zeros((NUM_SLOTS, BLOCK_BYTES // 8), dtype=torch.int64, device=where)
        self.words = np.full(NUM_SLOTS, FIRST_WORD, dtype=np.uint64)
        self.num_rewrites = 0
        self.fill()

    def open_on(self, transport: Transport) -> ArenaDescriptor:
        return transport.register(
            MemoryRegion(
                self.blocks.data_ptr(), NUM_SLOTS * BLOCK_BYTES, self.blocks, device=self.device
            ),
            MemoryRegion(self.words.ctypes.data, self.words.nbytes, self.words),
            block_bytes=BLOCK_BYTES,
            num_slots=NUM_SLOTS,
        )

    def rewrite(self) -> None:
        """Every slot goes to somebody else: its word first, then its bytes."""
        self.num_rewrites += 1
        self.words += np.uint64(1)
        self.fill()

    def fill(self) -> None:
        values = 1000 * self.num_rewrites + torch.arange(NUM_SLOTS, device=self.blocks.device)
        self.blocks.copy_(values[:, None].expand_as(self.blocks))
        self.sync()

    def sync(self) -> None:
        if self.blocks.is_cuda:
            torch.cuda.synchronize(self.blocks.device)


def handles_at(num_rewrites: int) -> list[BlockHandle]:
    return [
        BlockHandle(Slot(slot), Generation(FIRST_WORD + num_rewrites)) for slot in range(NUM_SLOTS)
    ]


def are_of(blocks: torch.Tensor, num_rewrites: int) -> bool:
    """Whether every byte of all blocks is of that rewrite."""
    values = 1000 * num_rewrites + torch.arange(NUM_SLOTS, device=blocks.device)
    return bool((blocks == values[:, None]).all())


def run_owner(pipe: Connection, device: int | None, epoch: int) -> None:
    """Sends its descriptor; then does what it is told and answers with its number of rewrites."""
    transport = NixlTransport(identity("owner", epoch))
    arena = DeviceArena(device)
    pipe.send(arena.open_on(transport))
    is_churning = False
    while True:
        if pipe.poll(0 if is_churning else None):
            order = pipe.recv()
            if order == "stop":
                break
            if order == "rewrite":
                arena.rewrite()
            elif isinstance(order, tuple):
                arena.blocks[order] ^= 1 << 20
                arena.sync()
            is_churning = order == "churn"
            pipe.send(arena.num_rewrites)
        if is_churning:
            arena.rewrite()
    transport.close()
