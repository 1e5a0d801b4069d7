"""Owner and reader as processes of their own, steered over pipes; spawn needs them importable."""

import hashlib
import time
from multiprocessing.connection import Connection

from support.kv_arenas import Arena, finish, identity, slots

from baton.common.errors import TransferError
from baton.common.ids import Slot
from baton.kvtransfer.fence import FencedRead, FenceState
from baton.kvtransfer.transport.base import ArenaDescriptor, ReadState
from baton.kvtransfer.transport.nixl import NixlTransport

NUM_SLOTS = 64
BLOCK_BYTES = 64 * 1024
READ_LIMIT_S = 10.0


def digest(arena: Arena, picked: list[Slot]) -> str:
    return hashlib.blake2b(b"".join(arena.blocks[slot].tobytes() for slot in picked)).hexdigest()


def run_owner(pipe: Connection, seed: int) -> None:
    """Sends (descriptor, digest of all blocks, words), then serves until told to stop."""
    transport = NixlTransport(identity("prefill"))
    arena = Arena(NUM_SLOTS, BLOCK_BYTES, seed=seed)
    descriptor = arena.open_on(transport)
    everything = slots(*range(NUM_SLOTS))
    pipe.send((descriptor, digest(arena, everything), arena.words.tolist()))
    pipe.recv()
    transport.close()


def run_reader(pipe: Connection) -> None:
    """Receives a descriptor and reads all blocks in reverse; sends (digest, bytes, words)."""
    with _Reading(pipe) as reading:
        everything = slots(*range(NUM_SLOTS))
        read = reading.reader.post_blocks(everything, everything[::-1])
        finish(reading.reader, read)
        reading.reader.release(read)
        words = reading.reader.post_generations(everything)
        finish(reading.reader, words)
        found = reading.reader.generations(words)
        reading.reader.release(words)
        pipe.send((digest(reading.arena, everything[::-1]), reading.reader.bytes_read, found))


def run_bereaved_reader(pipe: Connection) -> None:
    """A fenced read whose owner is stopped and then killed by the test, step by step over the pipe.

    Sends after the post: (state, pending slots); after the owner's death: (state, failure, pending
    slots, pending slots once the reader is closed, seconds).
    """
    with _Reading(pipe) as reading:
        assert pipe.recv() == "owner stopped"
        everything = slots(*range(NUM_SLOTS))
        handles = reading.arena.handles(everything)
        fenced = FencedRead(
            reading.reader, handles, everything, now_s=time.monotonic(), min_deadline_s=2.0
        )
        pipe.send((fenced.poll().name, len(fenced.pending_slots)))
        assert pipe.recv() == "owner killed"
        started = time.monotonic()
        while fenced.poll() in (FenceState.READING, FenceState.CHECKING):
            if time.monotonic() - started > READ_LIMIT_S:
                break
        seconds = time.monotonic() - started
        unsafe = len(fenced.pending_slots)
        reading.reader.close()
        fenced.poll()
        left = len(fenced.pending_slots)
        pipe.send((fenced.state.name, fenced.failure, unsafe, left, seconds))


def run_late_reader(pipe: Connection) -> None:
    """Reads, and connects anew, after the owner died; sends (how it ended, seconds) for each."""
    with _Reading(pipe) as reading:
        assert pipe.recv() == "owner killed"
        started = time.monotonic()
        read = reading.reader.post_blocks(slots(0, 1), slots(0, 1))
        while reading.reader.poll(read) is ReadState.PENDING:
            if time.monotonic() - started > READ_LIMIT_S:
                break
        pipe.send((read.state.name, time.monotonic() - started))
        started = time.monotonic()
        try:
            reading.transport.connect(identity("prefill"), reading.remote).close()
            ended = "connected"
        except TransferError as error:
            ended = type(error).__name__
        pipe.send((ended, time.monotonic() - started))


class _Reading:
    """A registered transport, connected to the owner whose descriptor came over the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.remote: ArenaDescriptor = pipe.recv()
        self.transport = NixlTransport(identity("decode"))
        self.arena = Arena(NUM_SLOTS, BLOCK_BYTES, seed=9)
        self.arena.open_on(self.transport)
        self.reader = self.transport.connect(identity("prefill"), self.remote)
        pipe.send("connected")

    def __enter__(self) -> "_Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.transport.close()
