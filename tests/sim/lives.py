"""One life of a worker that is driven by hand: nothing happens in it that was not asked for."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from sim.clients import VOCAB_SIZE
from sim.cluster import TIMING

from baton.common.clock import ManualClock
from baton.common.ids import Epoch, Slot, WorkerId, WorkerIdentity
from baton.common.messages import RouterMessage
from baton.common.randomness import SeededRandomness
from baton.decode_worker.core import DecodeCore
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.device import ManualDevice
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.kvtransfer.transport.base import ArenaDescriptor, MemoryRegion, Read, ReadState
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryPeerReader, MemoryTransport
from baton.prefill_worker.core import PrefillCore
from baton.prefill_worker.scheduler import PrefillScheduler
from baton.worker.admission import Limits

PREFILLS, DECODES = ("p0", "p1"), ("d0", "d1")
BLOCK_SIZE, NUM_BLOCKS = 4, 8


class HeldReader:
    """The real reader, whose reads end only once its worker has been told so."""

    def __init__(self, inner: MemoryPeerReader) -> None:
        self._inner = inner
        self._held: set[Read] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def post_blocks(self, remote_slots: Sequence[Slot], local_slots: Sequence[Slot]) -> Read:
        return self._hold(self._inner.post_blocks(remote_slots, local_slots))

    def post_generations(self, remote_slots: Sequence[Slot]) -> Read:
        return self._hold(self._inner.post_generations(remote_slots))

    def poll(self, read: Read) -> ReadState:
        return read.state if read in self._held else self._inner.poll(read)

    def let_go(self) -> None:
        """The bytes of all reads that are out cross now."""
        held, self._held = self._held, set()
        for read in held:
            self._inner.poll(read)

    def _hold(self, read: Read) -> Read:
        self._held.add(read)
        return read


class Life:
    """One life of one worker."""

    def __init__(self, name: str, epoch: int, model: Path, clock: ManualClock) -> None:
        self.identity = WorkerIdentity(WorkerId(name), Epoch(epoch), f"{name}-{epoch}")
        self.is_frozen = False
        self.device = ManualDevice()
        config = EngineConfig(model=model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
        self.engine = Engine(config, SeededRandomness(epoch), device=self.device)
        self.readers: list[HeldReader] = []
        # What the router has sent and the worker has not taken.
        self.control: deque[RouterMessage] = deque()
        limits = Limits(
            max_model_len=self.engine.model_config.max_model_len,
            vocab_size=VOCAB_SIZE,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_requests=100,
        )
        self.core: PrefillCore | DecodeCore
        if name in PREFILLS:
            self.core = PrefillCore(
                self.engine,
                PrefillScheduler(max_num_batched_tokens=8, max_num_seqs=8),
                limits,
                identity=self.identity,
                clock=clock,
                timing=TIMING,
            )
        else:
            self.core = DecodeCore(
                self.engine,
                DecodeScheduler(max_num_seqs=8),
                limits,
                identity=self.identity,
                transport_name="memory",
                max_num_batched_tokens=8,
                clock=clock,
                timing=TIMING,
            )

    def serve(self, fabric: MemoryFabric) -> tuple[MemoryTransport, ArenaDescriptor]:
        transport = MemoryTransport(self.identity, fabric)
        arena, words = self.engine.arena, self.engine.generations
        described = transport.register(
            MemoryRegion(arena.base_address, arena.num_bytes, arena),
            MemoryRegion(words.base_address, words.num_bytes, words),
            block_bytes=arena.block_bytes,
            num_slots=arena.num_slots,
        )
        return transport, described
