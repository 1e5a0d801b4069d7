"""Real cores of both roles joined by hand on a manual clock: no threads, no gRPC, no time.

Messages wait in queues until `exchange` carries them, so that a test decides what is late.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.common.clock import ManualClock
from baton.common.ids import Epoch, RequestKey, RouterId, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import (
    DecodeJob,
    Move,
    OutputRecord,
    PrefillJob,
    RouterMessage,
    Submit,
)
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.common.timing import DEFAULT_TIMING
from baton.decode_worker.core import DecodeCore
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.device import Device
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.kvtransfer.events import FromOwner, FromReader, LinkOpened, PeerConnected
from baton.kvtransfer.transport.base import ArenaDescriptor, MemoryRegion
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.prefill_worker.core import PrefillCore
from baton.prefill_worker.scheduler import PrefillScheduler
from baton.worker.admission import Limits
from baton.worker.core import FromRouter

ROUTER = RouterId("router")
GRANT = b"the grant of every test"
P = WorkerIdentity(WorkerId("p"), Epoch(1), "p's incarnation")
D = WorkerIdentity(WorkerId("d"), Epoch(1), "d's incarnation")
E = WorkerIdentity(WorkerId("e"), Epoch(1), "e's incarnation")


class CoreMesh:
    """A prefill worker P and decode workers, each connected to all who may lease to it."""

    def __init__(
        self,
        model: Path,
        *,
        decodes: Sequence[WorkerIdentity] = (D,),
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        budget: int = 2048,
        devices: Mapping[WorkerIdentity, Device] | None = None,
        **engine_flags: Any,
    ) -> None:
        """`devices` run the steps of some workers; those of the others run in place."""
        devices = devices or {}
        self.clock = ManualClock(1000.0)
        self.records: list[OutputRecord] = []
        self.hangups: list[WorkerIdentity] = []
        self.engines = {P: _engine(model, prefill_blocks, devices.get(P), **engine_flags)} | {
            who: _engine(model, decode_blocks, devices.get(who), **engine_flags) for who in decodes
        }
        fabric = MemoryFabric()
        self._transports = {who: MemoryTransport(who, fabric) for who in self.engines}
        self._described = {who: self._register(who) for who in self.engines}
        self.prefill = PrefillCore(
            self.engines[P],
            PrefillScheduler(max_num_batched_tokens=budget, max_num_seqs=64),
            _limits(self.engines[P]),
            identity=P,
            clock=self.clock,
            timing=DEFAULT_TIMING,
        )
        self.decodes = {who: self._decode_core(who, budget) for who in decodes}
        self.cores: dict[WorkerIdentity, PrefillCore | DecodeCore] = {P: self.prefill}
        self.cores |= self.decodes
        for reader in decodes:
            for owner in self.cores:
                if owner != reader:
                    self.connect(reader, owner)
        self._next = 0

    @property
    def decode(self) -> DecodeCore:
        """The first decode worker."""
        return next(iter(self.decodes.values()))

    def connect(self, reader: WorkerIdentity = D, owner: WorkerIdentity = P) -> None:
        """The reader's link and transport to the owner are up."""
        self.cores[owner].handle(LinkOpened(reader))
        peer = self._transports[reader].connect(owner, self._described[owner])
        self.cores[reader].handle(PeerConnected(owner, peer))

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        to_decode: bool = True,
        time_left_s: float = 600,
    ) -> RequestKey:
        """A fresh request for P and the first decode worker."""
        self._next += 1
        key = RequestKey(TransferId(self._next.to_bytes(16, "big")), 1)
        reader = next(iter(self.decodes))
        self.send(P, self.job(key, prompt, max_tokens, PrefillJob(reader, GRANT), time_left_s))
        if to_decode:
            job = DecodeJob(P, "nowhere", GRANT)
            self.send(reader, self.job(key, prompt, max_tokens, job, time_left_s))
        return key

    def job(
        self,
        key: RequestKey,
        prompt: list[int],
        max_tokens: int,
        job: PrefillJob | DecodeJob,
        time_left_s: float = 600,
        output: Sequence[int] = (),
        **sampling: Any,
    ) -> Submit:
        params = {"temperature": 0.0, "ignore_eos": True, **sampling}
        return Submit(
            key=key,
            prompt_tokens=prompt,
            output_tokens=list(output),
            sampling=SamplingParams(max_tokens=max_tokens, **params),
            tenant_key=b"",
            age_s=0.0,
            time_left_s=time_left_s,
            job=job,
            request_id="test",
        )

    def send(self, worker: WorkerIdentity, message: RouterMessage) -> None:
        self.cores[worker].handle(FromRouter(ROUTER, message))

    def move(
        self, key: RequestKey, prompt: list[int], max_tokens: int, *, known: Sequence[int]
    ) -> RequestKey:
        """Ask for a move from D to E, as a router does that knows these tokens."""
        to = RequestKey(key.transfer_id, key.attempt + 1)
        job = DecodeJob(D, "nowhere", GRANT)
        self.send(E, self.job(to, prompt, max_tokens, job, output=known))
        self.send(D, Move(key, to, E, GRANT))
        return to

    def exchange(self) -> None:
        """One step of each core; what it leaves behind reaches the others before their next."""
        for who, core in self.cores.items():
            core.step()
            self.deliver(who)
            core.check_invariants()

    def deliver(self, who: WorkerIdentity) -> None:
        """Carry what a core left behind."""
        effects = self.cores[who].take_effects()
        self.records.extend(effects.records.get(ROUTER, []))
        self.hangups.extend(effects.hangups)
        for reader, status in effects.statuses:
            self.cores[reader].handle(FromOwner(who, status))
        for owner, message in effects.messages:
            self.cores[owner].handle(FromReader(who, message))

    def advance(self, seconds: float, *, step_s: float = 0.1) -> None:
        """Let time pass while all cores keep stepping."""
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            self.exchange()

    def tokens(self, key: RequestKey, known: Sequence[int] = ()) -> list[int]:
        """What the router would emit of this attempt: each position once, in order."""
        emitted = list(known)
        for record in self.records:
            if record.key == key:
                assert record.position <= len(emitted), "a position was left out"
                emitted.extend(record.tokens[len(emitted) - record.position :])
        return emitted

    @property
    def quarantined_blocks(self) -> int:
        return sum(len(slots) for slots in self.decode.handovers.reads.quarantined)

    def errors(self, key: RequestKey) -> list[str]:
        return [r.error.reason for r in self.records if r.key == key and r.error is not None]

    def expect_rest(self) -> None:
        """No request, no lease, no read: every slot is free or cached."""
        assert [core.num_requests for core in self.cores.values()] == [0] * len(self.cores)
        for engine in self.engines.values():
            assert engine.pool.num_free + engine.prefix.num_evictable == engine.num_blocks

    def _decode_core(self, who: WorkerIdentity, budget: int) -> DecodeCore:
        return DecodeCore(
            self.engines[who],
            DecodeScheduler(max_num_seqs=64),
            _limits(self.engines[who]),
            identity=who,
            transport_name="memory",
            max_num_batched_tokens=budget,
            clock=self.clock,
            timing=DEFAULT_TIMING,
        )

    def _register(self, who: WorkerIdentity) -> ArenaDescriptor:
        arena, words = self.engines[who].arena, self.engines[who].generations
        return self._transports[who].register(
            MemoryRegion(arena.base_address, arena.num_bytes, arena, device=arena.device),
            MemoryRegion(words.base_address, words.num_bytes, words),
            block_bytes=arena.block_bytes,
            num_slots=arena.num_slots,
        )


def _engine(model: Path, num_blocks: int, device: Device | None, **flags: Any) -> Engine:
    config = EngineConfig(model=model, num_blocks=num_blocks, num_threads=1, **flags)
    return Engine(config, SeededRandomness(1), device=device)


def _limits(engine: Engine) -> Limits:
    return Limits(
        max_model_len=engine.model_config.max_model_len,
        vocab_size=engine.model_config.vocab_size,
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        max_requests=100,
    )
