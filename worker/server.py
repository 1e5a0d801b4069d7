"""A worker as a whole: engine, engine thread, control and link services, presence in Redis.

The same object is the process of `baton serve prefill|decode|unified` and, with the memory
transport, one of several servers inside one process.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from baton.common.addresses import join_address, require_loopback, split_address
from baton.common.clock import Clock, SystemClock
from baton.common.config import WorkerConfig
from baton.common.errors import BatonError, InternalError, WorkerLost
from baton.common.failpoints import reach
from baton.common.grpc_options import STREAM_WINDOW
from baton.common.grpc_server import GrpcServer
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport, ModelInfo, WorkerHello
from baton.common.periodic import every
from baton.common.progress import Progress, no_progress
from baton.common.randomness import Randomness, SystemRandomness
from baton.common.sampling import Role
from baton.common.timing import DEFAULT_TIMING, Timing
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.profiler import StepProfiler
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.link_client import LinkClient
from baton.kvtransfer.link_server import LinkServer
from baton.kvtransfer.transport.base import ArenaDescriptor, MemoryRegion, Transport
from baton.kvtransfer.transport.open import open_transport
from baton.metadata.registry import (
    RedisError,
    Registry,
    WorkerRecord,
    connect,
)
from baton.v1 import diagnostics_pb2_grpc, kv_pb2_grpc, worker_pb2_grpc
from baton.worker.admission import Limits
from baton.worker.control import ControlServicer
from baton.worker.core import Drain, Effects, LoopCameRound, WorkerCore
from baton.worker.diagnostics import DiagnosticsServicer, TraceWriter
from baton.worker.engine_thread import EngineThread
from baton.worker.registration import Heartbeat, first_identity, settle_epoch

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What a role needs to build its core."""

    engine: Engine
    limits: Limits
    identity: WorkerIdentity
    transport_name: str
    clock: Clock
    timing: Timing
    config: WorkerConfig


CoreFactory = Callable[[Rank], WorkerCore]
TransportFactory = Callable[[str, WorkerIdentity], Transport]


class WorkerServer:
    """Start, serve, drain, stop; used on one event loop."""

    def __init__(
        self,
        config: WorkerConfig,
        role: Role,
        build_core: CoreFactory,
        *,
        model_folder: Path,
        open_transport: TransportFactory = open_transport,
        clock: Clock | None = None,
        randomness: Randomness | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self._config = config
        self._role = role
        self._build_core = build_core
        self._model_folder = model_folder
        self._open_transport = open_transport
        self._clock = clock or SystemClock()
        self._randomness = randomness or SystemRandomness()
        self._progress = progress
        self._timing = DEFAULT_TIMING.scaled(config.time_scale)
        self._load = LoadReport()
        self._draining = False
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[BatonError] = asyncio.get_running_loop().create_future()

    # --- life ---

    async def start(self) -> None:
        """Load, listen, register. Raises ConfigError or ModelError with what to do."""
        host, port = split_address(self._config.listen)
        require_loopback(host, insecure=self._config.insecure)
        self._redis = connect(self._config.redis)
        registry = Registry(self._redis, self._config.cluster)
        self.identity = await self._settle_identity(registry)
        self.engine = await asyncio.to_thread(self._load_engine)
        log.info("%s", self.engine.arena_summary())
        # A router may ask before the first step has reported.
        self._load = LoadReport(
            blocks_total=self.engine.num_blocks, blocks_free=self.engine.num_blocks
        )
        self._transport = self._open_transport(self._config.transport, self.identity)
        arena = await asyncio.to_thread(self._register_arena)
        self.core = self._build_core(self._rank())
        self._traces = TraceWriter()
        self._profiler = StepProfiler(
            self.engine.recorder, self._traces.write, on_gpu=self.engine.arena.device is not None
        )
        self._thread = EngineThread(
            self.core,
            deliver=self._deliver,
            failed=self._engine_failed,
            clock=self._clock,
            check_invariants=self._config.check_invariants,
            profiler=self._profiler,
        )
        self._serve(host, port, arena)
        await self._grpc.start()
        self._thread.start()
        reach("w.before_register")
        self._heartbeat = Heartbeat(registry, self._record, self._superseded)
        self._registry = registry
        self._tasks = [
            asyncio.create_task(self._heartbeat.run(), name="presence in Redis"),
            asyncio.create_task(self._beat(), name="heartbeat"),
        ]
        if self._role is Role.DECODE:
            self._tasks.append(asyncio.create_task(self._prewarm_links(), name="prewarm"))
        log.info(
            "%s %s serves %s on %s",
            self._role.value,
            self.identity,
            self.model.name,
            self.address,
        )

    async def failed(self) -> BatonError:
        """Waits until the worker cannot go on and returns why."""
        return await asyncio.shield(self._failure)

    async def drain(self, deadline_s: float | None = None) -> None:
        """Take nothing new and wait until nothing is here, at most the deadline.

        Routers hear of it at once and move what decodes here to other workers.
        """
        deadline_s = self._timing.drain_deadline_s if deadline_s is None else deadline_s
        self._draining = True
        self._thread.post(Drain())
        self._control.send_load(self._load_now())
        idle = asyncio.Event()
        try:
            async with asyncio.timeout(deadline_s):
                async for _ in every(0.05, idle):
                    if self.core.num_requests == 0:
                        return
        except TimeoutError:
            log.warning("drain deadline passed with %d requests left", self.core.num_requests)

    async def stop(self) -> None:
        """Leave the cluster and tear everything down, readers before the arena they write to."""
        self._heartbeat.stop()
        self._stopping.set()
        self._control.close()
        self._link_server.close()
        await asyncio.gather(*self._tasks)
        await self._links.close()
        await self._grpc.stop(STOP_GRACE_S)
        await self._thread.stop()
        self._traces.close()
        self._transport.close()
        await self._redis.aclose()

    # --- start-up steps ---

    async def _settle_identity(self, registry: Registry) -> WorkerIdentity:
        worker_id = self._config.worker_id or f"{self._role.value}-{os.getpid()}"
        identity = first_identity(WorkerId(worker_id), self._clock, self._randomness)
        return await settle_epoch(registry, identity)

    def _load_engine(self) -> Engine:
        config = self._config
        return Engine(
            EngineConfig(
                model=self._model_folder,
                dtype=config.dtype,
                block_size=config.block_size,
                num_blocks=config.num_blocks,
                kv_memory_bytes=config.kv_memory,
                max_model_len=config.max_model_len,
                load_format=config.load_format,
                num_threads=config.num_threads,
                check_invariants=config.check_invariants,
                kv_digest=config.kv_digest,
                device=config.device,
                gpu_memory_share=config.gpu_memory_share,
                cuda_graphs=config.cuda_graphs,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
            ),
            self._randomness,
            progress=self._progress,
            clock=self._clock,
        )

    def _register_arena(self) -> ArenaDescriptor:
        arena, generations = self.engine.arena, self.engine.generations
        return self._transport.register(
            MemoryRegion(arena.base_address, arena.num_bytes, arena, device=arena.device),
            MemoryRegion(generations.base_address, generations.num_bytes, generations),
            block_bytes=arena.block_bytes,
            num_slots=arena.num_slots,
        )

    def _rank(self) -> Rank:
        engine = self.engine
        limits = Limits(
            max_model_len=engine.model_config.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            num_blocks=engine.num_blocks,
            block_size=engine.block_size,
            max_requests=self._config.max_requests,
        )
        return Rank(
            engine=engine,
            limits=limits,
            identity=self.identity,
            transport_name=self._transport.name,
            clock=self._clock,
            timing=self._timing,
            config=self._config,
        )

    def _serve(self, host: str, port: int, arena: ArenaDescriptor) -> None:
        self._grpc = GrpcServer(STREAM_WINDOW)
        self.port = self._grpc.listen(join_address(host, port))
        self.address = self._config.advertise or join_address(host, self.port)
        ours = LocalSide(
            identity=self.identity,
            fingerprint=self.engine.fingerprint,
            fields=self.engine.fingerprint_fields,
            transport=self._transport.name,
        )
        self._control = ControlServicer(
            self._hello, self._thread.post, timing=self._timing, clock=self._clock
        )
        self._link_server = LinkServer(ours, arena, self._thread.post)
        self._links = LinkClient(ours, self._transport, self._thread.post)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._control, self._grpc.server)
        self._grpc.add("baton.v1.WorkerService")
        kv_pb2_grpc.add_KvServiceServicer_to_server(self._link_server, self._grpc.server)
        self._grpc.add("baton.v1.KvService")
        diagnostics = DiagnosticsServicer(
            self.identity,
            self.engine.recorder,
            self._profiler,
            self._traces,
            self._thread.call,
            clock=self._clock,
            folder=self._config.profile_dir,
        )
        diagnostics_pb2_grpc.add_DiagnosticsServiceServicer_to_server(
            diagnostics, self._grpc.server
        )
        self._grpc.add("baton.v1.DiagnosticsService")

    # --- what the services say of this worker ---

    @property
    def model(self) -> ModelInfo:
        engine = self.engine
        return ModelInfo(
            name=self._config.served_model_name or self._config.model.rstrip("/").split("/")[-1],
            path=str(self._model_folder.resolve()),
            fingerprint=engine.fingerprint,
            max_model_len=engine.model_config.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            block_size=engine.block_size,
        )

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            identity=self.identity,
            role=self._role,
            model=self.model,
            link_address=self.address,
            pid=os.getpid(),
            load=self._load_now(),
        )

    def _record(self) -> WorkerRecord:
        return WorkerRecord(
            identity=self.identity,
            role=self._role,
            address=self.address,
            fingerprint=self.engine.fingerprint,
            model=self.model.name,
            state="draining" if self._is_draining else "ready",
        )

    # --- effects and failures ---

    def _deliver(self, effects: Effects) -> None:
        for router_id, records in effects.records.items():
            self._control.send_records(router_id, records)
        for reader, status in effects.statuses:
            self._link_server.send(reader, status)
        for owner in effects.hangups:
            self._links.hang_up(owner)
        for owner, address in effects.dials:
            self._links.dial(owner, address)
        for owner, message in effects.messages:
            self._links.send(owner, message)
        if effects.load is not None:
            self._load = effects.load

    async def _beat(self) -> None:
        """The heartbeat comes from the event loop, since a step may take longer than a second."""
        async for _ in every(self._timing.heartbeat_every_s, self._stopping):
            self._thread.post(LoopCameRound())
            load = self._load_now()
            self._control.send_load(load)
            is_stalled = load.stalled_s > self._timing.stalled_after_s
            await self._grpc.set_serving(not load.draining and not is_stalled)

    def _load_now(self) -> LoadReport:
        """The engine's last report, and how long ago its loop came round."""
        return replace(self._load, stalled_s=self._thread.stalled_s, draining=self._is_draining)

    @property
    def _is_draining(self) -> bool:
        """Because it is about to stop, or because an operator said so."""
        return self._draining or self._load.draining

    def _engine_failed(self, error: BaseException) -> None:
        self._fail(InternalError(f"the engine thread failed: {type(error).__name__}"))

    def _superseded(self, epoch: Epoch) -> None:
        self._fail(WorkerLost(f"another life of {self.identity.worker_id} runs as epoch {epoch}"))

    def _fail(self, error: BatonError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    # --- links are warmed when a prefill worker joins ---

    async def _prewarm_links(self) -> None:
        """Each life of an owner is dialled once; later losses are repaired on demand."""
        dialled: set[WorkerIdentity] = set()
        async for _ in every(1.0, self._stopping):
            try:
                records = await self._registry.workers()
            except RedisError as error:
                log.debug("no discovery this second: %s", error)
                continue
            # Lives that are no longer listed are forgotten, so that the set stays small.
            dialled &= {record.identity for record in records}
            for record in records:
                if (
                    record.role is Role.PREFILL
                    and record.fingerprint == self.engine.fingerprint
                    and record.identity not in dialled
                ):
                    dialled.add(record.identity)
                    self._links.dial(record.identity, record.address)
