"""A router as a whole: fleet, dispatcher, the two fronts and the admin service."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from baton.common.addresses import join_address, require_loopback
from baton.common.clock import Clock, SystemClock
from baton.common.config import RouterConfig
from baton.common.errors import ConfigError
from baton.common.failpoints import reach
from baton.common.grpc_server import GrpcServer
from baton.common.ids import RouterId, WorkerIdentity
from baton.common.messages import ModelInfo, OutputRecord, RouterHello
from baton.common.periodic import every
from baton.common.randomness import Randomness, SystemRandomness, incarnation
from baton.common.timing import DEFAULT_TIMING
from baton.metadata.registry import RedisError, Registry, connect
from baton.router.admin import AdminServicer
from baton.router.dispatch import Dispatch
from baton.router.fleet import AttachedWorker, Fleet, FleetEvents, WorkerState
from baton.router.grpc_front import InferenceServicer
from baton.router.http_front import build_app
from baton.router.intake import Intake
from baton.router.live_catalog import LiveCatalog
from baton.router.placement import Candidate, LeastLoaded, Placement
from baton.router.token_stream import DispatchSource
from baton.v1 import admin_pb2_grpc, inference_pb2_grpc

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 0.25
STOP_GRACE_S = 1.0
HTTP_BACKLOG = 2048


class RouterServer:
    """Start, serve, drain, stop; used on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        placement: Placement | None = None,
        clock: Clock | None = None,
        randomness: Randomness | None = None,
    ) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._randomness = randomness or SystemRandomness()
        self._timing = timing = DEFAULT_TIMING.scaled(config.time_scale)
        self._redis = connect(config.redis)
        self.router_id = RouterId(f"router-{incarnation(self._randomness)}")
        hello = RouterHello(self.router_id, self._clock.unix_ms())
        events = FleetEvents(
            joined=self._joined,
            records=self._records,
            gone=self._gone,
            draining=self._worker_draining,
        )
        self.fleet = Fleet(
            Registry(self._redis, config.cluster),
            hello,
            events,
            self._clock,
            timing=timing,
            live_requests=lambda identity: self.dispatch.live_on(identity),
        )
        folder = Path(config.model) if config.model is not None else None
        self.catalog = LiveCatalog(self.fleet.workers, self._clock, model_folder=folder)
        self.dispatch = Dispatch(
            placement or LeastLoaded(self._randomness),
            candidates=self._candidates,
            link_address=self._link_address,
            clock=self._clock,
            randomness=self._randomness,
            timing=timing,
            max_requests=config.max_requests,
        )
        self.source = DispatchSource(self.dispatch, self._flush, clock=self._clock, timing=timing)
        self._stop = asyncio.Event()

    # --- life ---

    async def start(self) -> None:
        """Listen on the three ports and start discovery. Raises ConfigError."""
        require_loopback(self._config.host, insecure=self._config.insecure)
        try:
            await self._redis.ping()
        except RedisError as error:
            raise ConfigError(
                f"cannot reach Redis at start ({error}); start one, or name it with --redis URL"
            ) from error
        intake = Intake(self.catalog, self._randomness)
        self._grpc, self._admin = GrpcServer(), GrpcServer()
        try:
            # All ports are bound before anything serves.
            self._bind_grpc(intake)
            self._bind_http(intake)
        except ConfigError:
            for server in (self._grpc, self._admin):
                await server.stop(0)
            await self._redis.aclose()
            raise
        await self._grpc.start()
        await self._admin.start()
        self._serving_http = asyncio.create_task(self._http.serve([self._socket]), name="http")
        self.fleet.start()
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep")
        log.info(
            "router serves HTTP on %d, gRPC on %d, admin on %d",
            self.http_port,
            self.grpc_port,
            self.admin_port,
        )

    async def drain(self, deadline_s: float | None = None) -> None:
        """Refuse further requests and let running ones end, at most the deadline."""
        deadline_s = self._timing.drain_deadline_s if deadline_s is None else deadline_s
        self.catalog.stop_serving()
        self.dispatch.drain()
        try:
            async with asyncio.timeout(deadline_s):
                async for _ in every(0.05, self._stop):
                    if self.dispatch.num_requests == 0:
                        return
        except TimeoutError:
            log.warning("drain deadline passed with %d requests", self.dispatch.num_requests)

    async def stop(self) -> None:
        self._stop.set()
        self._http.should_exit = True
        await self._serving_http
        await self._grpc.stop(STOP_GRACE_S)
        await self._admin.stop(STOP_GRACE_S)
        await self._sweeping
        await self.fleet.stop()
        await self.catalog.close()
        await self._redis.aclose()

    def _bind_grpc(self, intake: Intake) -> None:
        config = self._config
        servicer = InferenceServicer(
            self.source, self.catalog, intake, timeout_s=config.request_timeout_s
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, self._grpc.server)
        self._grpc.add("baton.v1.InferenceService")
        self.grpc_port = self._grpc.listen(join_address(config.host, config.grpc_port))
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(self.fleet, self.dispatch, self.router_id), self._admin.server
        )
        self._admin.add("baton.v1.AdminService")
        self.admin_port = self._admin.listen(join_address(config.host, config.admin_port))

    def _bind_http(self, intake: Intake) -> None:
        app = build_app(self.source, self.catalog, intake, timeout_s=self._config.request_timeout_s)
        server_config = uvicorn.Config(
            app,
            host=self._config.host,
            port=self._config.http_port,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="httptools",
            timeout_graceful_shutdown=int(STOP_GRACE_S),
        )
        self._http = _EmbeddedHttpServer(server_config)
        try:
            self._socket = server_config.bind_socket()
        except SystemExit as error:
            raise ConfigError(
                f"cannot listen on {self._config.host}:{self._config.http_port}: "
                "the port is taken or the address is not ours"
            ) from error
        # From here on a client that connects waits for the server instead of being refused.
        self._socket.listen(HTTP_BACKLOG)
        self.http_port = self._socket.getsockname()[1]

    # --- between fleet, dispatcher and fronts ---

    def _joined(self, worker: AttachedWorker) -> None:
        assert worker.hello is not None, "a worker joins with its hello"
        log.info("%s %s joined", worker.record.role.value, worker.identity)
        self._warn_of_strangers(worker, worker.hello.model)
        self.catalog.learn(worker.hello.model)
        self.dispatch.worker_joined(worker.identity)
        self._flush()

    def _warn_of_strangers(self, worker: AttachedWorker, model: ModelInfo) -> None:
        """Workers of one model that store KV differently are never paired: an operator's slip."""
        for other in self.fleet.workers():
            if other.hello is None or other.hello.model.name != model.name:
                continue
            if other.hello.model.fingerprint != model.fingerprint:
                log.warning(
                    "%s and %s serve %s but store KV differently (block size %d and %d, "
                    "fingerprint %s and %s): they are never paired",
                    worker.identity,
                    other.identity,
                    model.name,
                    model.block_size,
                    other.hello.model.block_size,
                    model.fingerprint[:8],
                    other.hello.model.fingerprint[:8],
                )
                return

    def _records(self, worker: AttachedWorker, records: list[OutputRecord]) -> None:
        reach("r.before_emit")
        for record in records:
            self.dispatch.record(worker.identity, record)
        self._flush()
        reach("r.after_emit")

    def _gone(self, worker: AttachedWorker) -> None:
        log.info("%s %s is gone", worker.record.role.value, worker.identity)
        self.dispatch.worker_gone(worker.identity)
        self._flush()

    def _worker_draining(self, worker: AttachedWorker) -> None:
        self.dispatch.worker_draining(worker.identity)
        self._flush()

    def _flush(self) -> None:
        effects = self.dispatch.take_effects()
        for identity, message in effects.sends:
            self.fleet.send(identity, message)
        for key, event in effects.events:
            self.source.deliver(key, event)

    async def _sweep(self) -> None:
        async for _ in every(SWEEP_EVERY_S, self._stop):
            self.dispatch.sweep()
            self.source.sweep()
            self._flush()

    def _link_address(self, identity: WorkerIdentity) -> str:
        worker = self.fleet.get(identity)
        assert worker is not None, "placement chose among attached workers"
        return worker.hello.link_address if worker.hello is not None else worker.record.address

    def _candidates(self, model: str) -> list[Candidate]:
        return [
            Candidate(
                identity=worker.identity,
                role=worker.record.role,
                fingerprint=worker.hello.model.fingerprint,
                block_size=worker.hello.model.block_size,
                load=worker.load,
                in_flight=self.dispatch.num_requests_on(worker.identity),
            )
            for worker in self.fleet.workers()
            if worker.state is WorkerState.READY
            and worker.hello is not None
            and worker.hello.model.name == model
        ]


class _EmbeddedHttpServer(uvicorn.Server):
    """uvicorn inside our loop: signals are the process's business, not the HTTP server's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
