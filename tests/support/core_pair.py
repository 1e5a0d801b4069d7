"""The two real cores joined by hand on a manual clock: no threads, no gRPC, no time of its own.

Messages wait in queues until `exchange` carries them, so that a test decides what is late.
"""

from pathlib import Path

from baton.common.clock import ManualClock
from baton.common.ids import Epoch, RequestKey, RouterId, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import DecodeJob, OutputRecord, PrefillJob, Submit
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.decode_worker.core import DecodeCore
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine, EngineConfig
from baton.kvtransfer.events import FromOwner, FromReader, LinkOpened, PeerConnected
from baton.kvtransfer.transport.base import ArenaDescriptor, MemoryRegion
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.prefill_worker.core import PrefillCore
from baton.prefill_worker.scheduler import PrefillScheduler
from baton.worker.admission import Limits
from baton.worker.core import FromRouter

ROUTER = RouterId("router")
P = WorkerIdentity(WorkerId("p"), Epoch(1), "p's incarnation")
D = WorkerIdentity(WorkerId("d"), Epoch(1), "d's incarnation")


class CorePair:
    def __init__(
        self, model: Path, *, prefill_blocks: int = 64, decode_blocks: int = 64, budget: int = 2048
    ) -> None:
        self.clock = ManualClock(1000.0)
        self.records: list[OutputRecord] = []
        self.hangups: list[WorkerIdentity] = []
        self.engines = {
            P: _engine(model, prefill_blocks),
            D: _engine(model, decode_blocks),
        }
        fabric = MemoryFabric()
        self._transports = {who: MemoryTransport(who, fabric) for who in (P, D)}
        self._described = {who: self._register(who) for who in (P, D)}
        self.prefill = PrefillCore(
            self.engines[P],
            PrefillScheduler(max_num_batched_tokens=budget, max_num_seqs=64),
            _limits(self.engines[P]),
            identity=P,
            clock=self.clock,
        )
        self.decode = DecodeCore(
            self.engines[D],
            DecodeScheduler(max_num_seqs=64),
            _limits(self.engines[D]),
            transport_name="memory",
            max_num_batched_tokens=budget,
            clock=self.clock,
        )
        self.prefill.handle(LinkOpened(D))
        self.connect()
        self._next = 0

    def connect(self) -> None:
        """The decode worker's link and transport to the prefill worker are up."""
        peer = self._transports[D].connect(P, self._described[P])
        self.decode.handle(PeerConnected(P, peer))

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        to_decode: bool = True,
        time_left_s: float = 600,
    ) -> RequestKey:
        self._next += 1
        key = RequestKey(TransferId(self._next.to_bytes(16, "big")), 1)
        jobs = {self.prefill: PrefillJob(D), self.decode: DecodeJob(P, "nowhere")}
        for core, job in jobs.items():
            if core is self.decode and not to_decode:
                continue
            submit = Submit(
                key=key,
                prompt_tokens=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
                tenant_key=b"",
                age_s=0.0,
                time_left_s=time_left_s,
                job=job,
            )
            core.handle(FromRouter(ROUTER, submit))
        return key

    def exchange(self) -> None:
        """One step of each core; what it leaves behind reaches the other before its next step."""
        self.prefill.step()
        effects = self.prefill.take_effects()
        self.records.extend(effects.records.get(ROUTER, []))
        for reader, status in effects.statuses:
            assert reader == D
            self.decode.handle(FromOwner(P, status))
        self.decode.step()
        effects = self.decode.take_effects()
        self.records.extend(effects.records.get(ROUTER, []))
        self.hangups.extend(effects.hangups)
        for owner, message in effects.messages:
            assert owner == P
            self.prefill.handle(FromReader(D, message))
        self.prefill.check_invariants()
        self.decode.check_invariants()

    def advance(self, seconds: float, *, step_s: float = 0.1) -> None:
        """Let time pass while both cores keep stepping."""
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            self.exchange()

    def tokens(self, key: RequestKey) -> list[int]:
        """What the router would emit: each position once, in order."""
        emitted: list[int] = []
        for record in self.records:
            if record.key == key:
                assert record.position <= len(emitted), "a position was left out"
                emitted.extend(record.tokens[len(emitted) - record.position :])
        return emitted

    @property
    def quarantined_blocks(self) -> int:
        return sum(len(slots) for slots in self.decode._reads.quarantined)

    def errors(self, key: RequestKey) -> list[str]:
        return [r.error.reason for r in self.records if r.key == key and r.error is not None]

    def _register(self, who: WorkerIdentity) -> ArenaDescriptor:
        arena, words = self.engines[who].arena, self.engines[who].generations
        return self._transports[who].register(
            MemoryRegion(arena.base_address, arena.num_bytes, arena),
            MemoryRegion(words.base_address, words.num_bytes, words),
            block_bytes=arena.block_bytes,
            num_slots=arena.num_slots,
        )


def _engine(model: Path, num_blocks: int) -> Engine:
    config = EngineConfig(model=model, num_blocks=num_blocks, num_threads=1)
    return Engine(config, SeededRandomness(1))


def _limits(engine: Engine) -> Limits:
    return Limits(
        max_model_len=engine.model_config.max_model_len,
        vocab_size=engine.model_config.vocab_size,
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        max_requests=100,
    )
