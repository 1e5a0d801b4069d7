"""One life of a worker: the real core, engine and transport inside a simulated process."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sim import control, links
from sim.fabric import PacedDevice, ReadFaults, SimTransport
from sim.network import Network
from sim.points import CrashedAtPoint, Points
from sim.wire import Wire
from sim.world import Process

from baton.common.ids import Epoch, RouterId, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport, ModelInfo, WorkerHello
from baton.common.randomness import SeededRandomness
from baton.common.sampling import Role
from baton.common.timing import Timing
from baton.decode_worker.core import DecodeCore
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.transport.base import MemoryRegion
from baton.kvtransfer.transport.memory import MemoryFabric
from baton.prefill_worker.core import PrefillCore
from baton.prefill_worker.scheduler import PrefillScheduler
from baton.worker.admission import Limits
from baton.worker.core import Drain, Effects, Event

MODEL_NAME = "oracle"
# How soon an engine thread comes round: after an event, with work, waiting, idle.
WAKE_S = (0.0001, 0.003)
ROUND_S = (0.0005, 0.004)
WAITING_S = (0.03, 0.1)
IDLE_S = (0.5, 0.95)
HAND_OVER_S = (0.00005, 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What all workers of a simulated cluster have in common."""

    model: Path
    timing: Timing
    block_size: int
    prefill_blocks: int
    decode_blocks: int
    prefill_budget: int
    decode_budget: int
    max_num_seqs: int
    max_requests: int
    kv_digest: bool

    def num_blocks(self, role: Role) -> int:
        return self.prefill_blocks if role is Role.PREFILL else self.decode_blocks


class SimWorker:
    """Engine thread and event loop of one process; both stand still while it is frozen."""

    def __init__(
        self,
        network: Network,
        fabric: MemoryFabric,
        faults: ReadFaults,
        wire: Wire,
        config: WorkerConfig,
        *,
        role: Role,
        name: str,
        epoch: int,
        slow_until: Callable[[RouterId], float],
        points: Points,
        died_at: Callable[[str], None],
        froze_at: Callable[[str], None],
    ) -> None:
        self._world = network.world
        self._points = points
        self._died_at = died_at
        self._froze_at = froze_at
        # The failpoint that asked for it.
        self.freezes_after_round = ""
        self._network = network
        self._config = config
        self.role = role
        self.process = Process(self._world, name)
        self.identity = WorkerIdentity(WorkerId(name), Epoch(epoch), f"{name}-{epoch}")
        self.is_draining = False
        # Until when the engine thread does not come round.
        self.stalled_until = 0.0
        self.device = PacedDevice(self._world, self.wake)
        engine_config = EngineConfig(
            model=config.model,
            block_size=config.block_size,
            num_blocks=config.num_blocks(role),
            kv_digest=config.kv_digest,
        )
        randomness = SeededRandomness(self._world.random.getrandbits(32))
        self.engine = Engine(engine_config, randomness, device=self.device)
        self._transport = SimTransport(network, self.identity, fabric, faults, self.wake)
        arena, words = self.engine.arena, self.engine.generations
        described = self._transport.register(
            MemoryRegion(arena.base_address, arena.num_bytes, arena),
            MemoryRegion(words.base_address, words.num_bytes, words),
            block_bytes=arena.block_bytes,
            num_slots=arena.num_slots,
        )
        self.core = self._build_core()
        self._inbox: deque[tuple[Event, Callable[[], None] | None]] = deque()
        self._rounds = 0
        self._last_round = self._world.now
        self._to_loop: deque[Callable[[], None]] = deque()
        self.load = LoadReport(
            blocks_total=self.engine.num_blocks, blocks_free=self.engine.num_blocks
        )
        ours = LocalSide(
            identity=self.identity,
            fingerprint=self.engine.fingerprint,
            fields=self.engine.fingerprint_fields,
            transport=self._transport.name,
        )
        self._dialler = links.LinkDialler(
            network, self.process, ours, self._transport, wire, self.post
        )
        self._listener = links.LinkListener(network, self.process, ours, described, wire, self.post)
        self._control = control.ControlService(
            network, self.process, self._hello, wire, config.timing, self.post, slow_until
        )
        self.process.every(config.timing.heartbeat_every_s, self._beat)
        self.wake()

    def drain(self) -> None:
        self.post(Drain())

    def crash(self) -> None:
        """Its memory goes, and with it all that others read from it."""
        self._world.log(f"{self.identity} crashes")
        self.process.kill()
        self._transport.close()
        # Nothing that this process posted may touch its arena any more.
        self.core.close()
        self._network.died(self.process)

    def stop(self) -> None:
        """In order: streams end, and then everything is as after a crash."""
        self._control.close()
        self.crash()

    def post(self, event: Event, handled: Callable[[], None] | None = None) -> None:
        self._inbox.append((event, handled))
        self.wake()

    def wake(self) -> None:
        """An event came, a step or a read ended: the engine thread comes round soon."""
        self._come_round_in(self._world.draw(*WAKE_S))

    # --- the engine thread ---

    def _build_core(self) -> PrefillCore | DecodeCore:
        config, engine = self._config, self.engine
        limits = Limits(
            max_model_len=engine.model_config.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            num_blocks=engine.num_blocks,
            block_size=engine.block_size,
            max_requests=config.max_requests,
        )
        if self.role is Role.PREFILL:
            return PrefillCore(
                engine,
                PrefillScheduler(
                    max_num_batched_tokens=config.prefill_budget,
                    max_num_seqs=config.max_num_seqs,
                ),
                limits,
                identity=self.identity,
                clock=self._world.clock,
                timing=config.timing,
            )
        return DecodeCore(
            engine,
            DecodeScheduler(max_num_seqs=config.max_num_seqs),
            limits,
            identity=self.identity,
            transport_name=self._transport.name,
            max_num_batched_tokens=config.decode_budget,
            clock=self._world.clock,
            timing=config.timing,
        )

    def _come_round_in(self, delay_s: float) -> None:
        """Unless it comes round before; an older plan is void once it has."""
        planned = self._rounds

        def come_round() -> None:
            if self._rounds == planned:
                self._come_round()

        self.process.after(delay_s, come_round)

    def _come_round(self) -> None:
        if self._world.now < self.stalled_until:
            self._come_round_in(self.stalled_until - self._world.now)
            return
        self._rounds += 1
        self._last_round = self._world.now
        self._points.running = self
        try:
            self._run_core()
        except CrashedAtPoint as point:
            self._died_at(str(point))
            return
        finally:
            self._points.running = None
        self.core.check_invariants()
        self._hand_out()
        self._come_round_in(self._world.draw(*self._wait()))
        if self.freezes_after_round:
            name, self.freezes_after_round = self.freezes_after_round, ""
            self._froze_at(name)

    def _run_core(self) -> None:
        while self._inbox:
            event, handled = self._inbox.popleft()
            if handled is None:
                self.core.handle(event)
                continue
            self._hand_out()
            self.core.handle(event)
            self._call_loop(handled)
        self.core.step()

    def _wait(self) -> tuple[float, float]:
        if self.core.wait_s() == 0:
            return ROUND_S
        return WAITING_S if self.core.num_requests else IDLE_S

    def _hand_out(self) -> None:
        effects = self.core.take_effects()
        if effects:
            self._call_loop(lambda: self._deliver(effects))

    # --- the event loop ---

    def _call_loop(self, action: Callable[[], None]) -> None:
        self._to_loop.append(action)
        delay_s = self._world.draw(*HAND_OVER_S)
        self.process.after(delay_s, lambda: self._to_loop.popleft()())

    def _deliver(self, effects: Effects) -> None:
        for router_id, records in effects.records.items():
            self._control.send_records(router_id, records)
        for reader, status in effects.statuses:
            self._listener.send(reader, status)
        for owner in effects.hangups:
            self._dialler.hang_up(owner)
        for owner, address in effects.dials:
            self._dialler.dial(owner, address)
        for owner, message in effects.messages:
            self._dialler.send(owner, message)
        if effects.load is not None:
            self.load = effects.load

    def _beat(self) -> None:
        stalled_s = 0.0
        if self._world.now < self.stalled_until:
            stalled_s = self._world.now - self._last_round
        self._control.beat(replace(self.load, stalled_s=stalled_s))

    def _hello(self) -> WorkerHello:
        engine = self.engine
        model = ModelInfo(
            name=MODEL_NAME,
            path="",
            fingerprint=engine.fingerprint,
            max_model_len=engine.model_config.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            block_size=engine.block_size,
        )
        return WorkerHello(
            identity=self.identity,
            role=self.role,
            model=model,
            link_address=links.address_of(self.identity.worker_id),
            pid=1,
            load=self.load,
        )
