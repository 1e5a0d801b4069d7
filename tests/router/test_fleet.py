"""The fleet against workers that misbehave: a worker may cost its own stream and no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from support.cluster import until

from baton.common.clock import SystemClock
from baton.common.codec import worker_hello_to_pb
from baton.common.ids import Epoch, RouterId, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport, ModelInfo, RouterHello, WorkerHello
from baton.common.sampling import Role
from baton.metadata.registry import Registry, WorkerRecord, connect
from baton.router.fleet import AttachedWorker, Fleet, FleetEvents
from baton.v1 import worker_pb2 as pb

IDENTITY = WorkerIdentity(WorkerId("p0"), Epoch(1), "a")
MODEL = ModelInfo(name="m", path="/m", fingerprint="f", max_model_len=8, vocab_size=8, block_size=4)
NONSENSE = b"\xff\xff\xff"


def hello() -> bytes:
    wire = worker_hello_to_pb(
        WorkerHello(
            identity=IDENTITY,
            role=Role.PREFILL,
            model=MODEL,
            link_address="",
            pid=1,
            load=LoadReport(),
        )
    )
    return pb.AttachResponse(hello=wire).SerializeToString()


@asynccontextmanager
async def worker_that_says(*messages: bytes) -> AsyncIterator[str]:
    """The address of a server whose Attach sends these bytes and then stays silent."""
    silent = asyncio.Event()

    async def attach(
        requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        for message in messages:
            yield message
        await silent.wait()

    handler = grpc.stream_stream_rpc_method_handler(attach)
    service = grpc.method_handlers_generic_handler("baton.v1.WorkerService", {"Attach": handler})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        silent.set()
        await server.stop(0)


@asynccontextmanager
async def fleet_of(
    address: str, redis_url: str, cluster: str
) -> AsyncIterator[tuple[Fleet, Registry, list[AttachedWorker], list[AttachedWorker]]]:
    redis = connect(redis_url)
    registry = Registry(redis, cluster)
    await registry.heartbeat(
        WorkerRecord(
            identity=IDENTITY,
            role=Role.PREFILL,
            address=address,
            fingerprint="f",
            model="m",
            state="ready",
        )
    )
    joined: list[AttachedWorker] = []
    gone: list[AttachedWorker] = []
    events = FleetEvents(joined=joined.append, records=lambda _, __: None, gone=gone.append)
    fleet = Fleet(registry, RouterHello(RouterId("r"), 1), events, SystemClock())
    fleet.start()
    try:
        yield fleet, registry, joined, gone
    finally:
        await fleet.stop()
        await redis.aclose()


async def test_a_worker_that_sends_nonsense_after_its_hello_is_gone(redis_url: str) -> None:
    """Not forever ready with a dead stream, and no obstacle to shutting down."""
    async with (
        worker_that_says(hello(), NONSENSE) as address,
        fleet_of(address, redis_url, "nonsense") as (_, _, joined, gone),
    ):
        await until(lambda: len(gone) >= 1, "the worker stays in the fleet")
        assert joined[0] is gone[0]


async def test_a_worker_without_a_proper_hello_never_joins(redis_url: str) -> None:
    async with (
        worker_that_says(NONSENSE) as address,
        fleet_of(address, redis_url, "no-hello") as (fleet, registry, joined, gone),
    ):
        await until(lambda: bool(fleet.workers()), "it was not discovered")
        await registry.leave(IDENTITY)
        await until(lambda: not fleet.workers(), "it is dialled for ever")
        assert not joined
        assert not gone, "who never joined is not missed"


async def test_a_discovery_that_answers_after_the_stop_attaches_nobody(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        worker_that_says(hello()) as address,
        fleet_of(address, redis_url, "late") as (fleet, registry, joined, _),
    ):
        await until(lambda: bool(joined), "it did not join")
        records = await registry.workers()
        asked, answered = asyncio.Event(), asyncio.Event()

        async def slow() -> list[WorkerRecord]:
            asked.set()
            await answered.wait()
            return records

        monkeypatch.setattr(registry, "workers", slow)
        await asked.wait()
        stopping = asyncio.create_task(fleet.stop())
        await until(lambda: not fleet.workers(), "the worker was not let go")
        answered.set()
        await stopping
        assert not fleet.workers()
