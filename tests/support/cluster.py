"""A whole cluster inside one event loop: real Redis, real gRPC, the real engines.

The three services run as servers of one process; KV crosses by the memory transport or by NIXL.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.common.config import RouterConfig, WorkerConfig
from baton.common.ids import WorkerIdentity
from baton.common.sampling import SamplingParams
from baton.decode_worker.service import decode_server, unified_server
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.kvtransfer.transport.open import open_transport
from baton.prefill_worker.service import prefill_server
from baton.router.generation import GenerationSpec, Report, Usage
from baton.router.server import RouterServer
from baton.worker.server import WorkerServer

READY_DEADLINE_S = 30.0
_NAMES = itertools.count()
_REQUESTS = itertools.count()


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    usage: Usage
    report: Report
    finish: str


@dataclass
class Cluster:
    router: RouterServer
    prefills: list[WorkerServer] = field(default_factory=list)
    decodes: list[WorkerServer] = field(default_factory=list)
    unified: list[WorkerServer] = field(default_factory=list)
    # Workers that a test has stopped itself.
    stopped: set[WorkerServer] = field(default_factory=set)

    async def generate(
        self, prompt: list[int], *, max_tokens: int = 64, timeout_s: float = 60.0, **sampling: Any
    ) -> Answer:
        """Greedy unless told otherwise; raises the request's BatonError."""
        params = {"temperature": 0.0, "ignore_eos": True, **sampling}
        spec = GenerationSpec(
            request_id=f"test-{next(_REQUESTS)}",
            model=self.router.catalog.models()[0].name,
            prompt_tokens=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, **params),
            stop=(),
            tenant_key=b"",
            timeout_s=timeout_s,
        )
        tokens: list[int] = []
        async for event in self.router.source.submit(spec):
            tokens.extend(event.token_ids)
            if event.finish is not None:
                assert event.usage is not None
                assert event.report is not None
                return Answer(tokens, event.usage, event.report, event.finish.value)
        raise AssertionError("the stream ended without a finish")

    @property
    def workers(self) -> list[WorkerServer]:
        return [*self.prefills, *self.decodes, *self.unified]

    async def expect_rest(self) -> None:
        """Every request ends, and then every slot is free or cached: no lease, no open read."""
        await until(
            lambda: not any(worker.core.num_requests for worker in self.workers),
            "requests are left",
        )
        for worker in self.workers:
            pool, prefix = worker.engine.pool, worker.engine.prefix
            await until(
                lambda pool=pool, prefix=prefix: (
                    pool.num_free + prefix.num_evictable == worker.engine.num_blocks  # noqa: B023
                ),
                f"{worker.identity} has blocks that are neither free nor cached",
            )

    def bytes_read(self) -> int:
        """KV bytes that all workers pulled, as their transports counted them."""
        return sum(
            peer.bytes_read
            for worker in [*self.decodes, *self.unified]
            for peer in worker.core.handovers.peers.values()
        )


async def until(holds: Callable[[], bool], failure: str, deadline_s: float = 15.0) -> None:
    """Wait until `holds()`; AssertionError with `failure` when it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while not holds():
        assert loop.time() < deadline, failure
        pause = asyncio.Event()
        loop.call_later(0.01, pause.set)
        await pause.wait()


TransportFactory = Callable[[str, WorkerIdentity], Transport]


def transports(name: str) -> TransportFactory:
    """One factory for all workers of a cluster."""
    if name == "nixl":
        return open_transport
    fabric = MemoryFabric()
    return lambda _, identity: MemoryTransport(identity, fabric)


@asynccontextmanager
async def run_cluster(
    model: Path,
    redis_url: str,
    *,
    prefill: int = 1,
    decode: int = 1,
    unified: int = 0,
    transport: str = "memory",
    factory: TransportFactory | None = None,
    per_worker: list[dict[str, Any]] | None = None,
    time_scale: float = 1.0,
    **worker_flags: Any,
) -> AsyncIterator[Cluster]:
    """A ready cluster; stopped in order at the end.

    `per_worker`: further flags of each worker, prefill ones first.
    """
    factory = factory or transports(transport)
    name = f"test-{next(_NAMES)}"
    flags = {
        "num_blocks": 512,
        "check_invariants": True,
        "num_threads": 1,
        "time_scale": time_scale,
        **worker_flags,
    }

    own = iter(per_worker or [{}] * (prefill + decode + unified))

    def config(worker_id: str) -> WorkerConfig:
        merged = {"worker_id": worker_id, **flags, **next(own)}
        return WorkerConfig(model=str(model), redis=redis_url, cluster=name, **merged)

    router = RouterServer(
        RouterConfig(
            redis=redis_url,
            cluster=name,
            http_port=0,
            grpc_port=0,
            admin_port=0,
            time_scale=time_scale,
        )
    )
    cluster = Cluster(router)
    for index in range(prefill):
        server = prefill_server(config(f"p{index}"), model, transport_factory=factory)
        cluster.prefills.append(server)
    for index in range(decode):
        server = decode_server(config(f"d{index}"), model, transport_factory=factory)
        cluster.decodes.append(server)
    for index in range(unified):
        server = unified_server(config(f"u{index}"), model, transport_factory=factory)
        cluster.unified.append(server)
    started: list[WorkerServer | RouterServer] = []
    try:
        for server in [*cluster.workers, router]:
            await server.start()
            started.append(server)
        await _ready(cluster)
        yield cluster
    finally:
        for server in reversed(started):
            if server not in cluster.stopped:
                await server.stop()


async def _ready(cluster: Cluster) -> None:
    """All workers attached, and the tokenizer read."""
    fleet, catalog = cluster.router.fleet, cluster.router.catalog
    await until(
        lambda: (
            [worker.state.value for worker in fleet.workers()] == ["ready"] * len(cluster.workers)
            and catalog.is_ready()
        ),
        "the cluster is not ready",
        READY_DEADLINE_S,
    )
