"""The fleet against workers that misbehave: a worker may cost its own stream and no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from support.cluster import until
from support.control_streams import FAST, IDENTITY, key_of, submit_of, worker_hello
from support.fleets import fleet_of

from baton.common.clock import ManualClock
from baton.common.control_codec import load_to_pb, worker_hello_to_pb
from baton.common.errors import QueueFull
from baton.common.frames import MAX_FRAME_BYTES
from baton.common.grpc_options import STREAM_WINDOW
from baton.common.messages import Cancel, LoadReport
from baton.metadata.registry import WorkerRecord
from baton.router import lanes
from baton.router.fleet import WorkerState
from baton.v1 import worker_pb2 as pb

NONSENSE = b"\xff\xff\xff"
UNHURRIED = replace(FAST, suspect_after_s=30.0, dead_after_s=60.0, stalled_after_s=60.0)


def hello(load: LoadReport | None = None) -> bytes:
    return pb.AttachResponse(hello=worker_hello_to_pb(worker_hello(load))).SerializeToString()


def load(report: LoadReport) -> bytes:
    return pb.AttachResponse(load=load_to_pb(report)).SerializeToString()


class Scripted:
    """A worker whose Attach sends bytes and then waits; reads only when `reads` is set."""

    def __init__(self, messages: tuple[bytes, ...]) -> None:
        self.messages = messages
        self.address = ""
        self.reads = asyncio.Event()
        self.heard: list[pb.AttachRequest] = []
        self.over = asyncio.Event()

    async def attach(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        over = self.over
        for message in self.messages:
            yield message
        reading = asyncio.create_task(self._read(requests))
        await over.wait()
        reading.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        await self.reads.wait()
        async for request in requests:
            self.heard.append(pb.AttachRequest.FromString(request))

    def end_stream(self) -> None:
        """The one that is open; later ones stay."""
        self.over.set()
        self.over = asyncio.Event()


@asynccontextmanager
async def worker_that_says(*messages: bytes) -> AsyncIterator[Scripted]:
    worker = Scripted(messages)
    handler = grpc.stream_stream_rpc_method_handler(worker.attach)
    service = grpc.method_handlers_generic_handler("baton.v1.WorkerService", {"Attach": handler})
    server = grpc.aio.server(options=STREAM_WINDOW)
    server.add_generic_rpc_handlers((service,))
    worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield worker
    finally:
        worker.over.set()
        await server.stop(0)


async def test_a_worker_that_sends_nonsense_after_its_hello_is_gone(redis_url: str) -> None:
    """Not forever ready with a dead stream, and no obstacle to shutting down."""
    async with (
        worker_that_says(hello(), NONSENSE) as worker,
        fleet_of(worker.address, redis_url, "nonsense") as watched,
    ):
        await until(lambda: len(watched.gone) >= 1, "the worker stays in the fleet")
        assert watched.joined[0] is watched.gone[0]


async def test_a_worker_without_a_proper_hello_never_joins(redis_url: str) -> None:
    async with (
        worker_that_says(NONSENSE) as worker,
        fleet_of(worker.address, redis_url, "no-hello") as watched,
    ):
        await until(lambda: bool(watched.fleet.workers()), "it was not discovered")
        await watched.registry.leave(IDENTITY)
        await until(lambda: not watched.fleet.workers(), "it is dialled for ever")
        assert not watched.joined
        assert not watched.gone, "who never joined is not missed"


async def test_a_discovery_that_answers_after_the_stop_attaches_nobody(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        worker_that_says(hello()) as worker,
        fleet_of(worker.address, redis_url, "late", timing=UNHURRIED) as watched,
    ):
        fleet, registry = watched.fleet, watched.registry
        await until(lambda: bool(watched.joined), "it did not join")
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


async def test_a_silent_worker_is_first_suspect_and_then_gone(redis_url: str) -> None:
    async with (
        worker_that_says(hello()) as worker,
        fleet_of(worker.address, redis_url, "silent") as watched,
    ):
        await until(lambda: watched.state is WorkerState.SUSPECT, "silence is not noticed")
        assert not watched.gone
        await until(lambda: bool(watched.gone), "silence is for ever")


async def test_silence_does_not_count_while_this_loop_was_late(redis_url: str) -> None:
    clock = ManualClock()
    async with (
        worker_that_says(hello()) as worker,
        fleet_of(worker.address, redis_url, "late-loop", clock=clock) as watched,
    ):
        await watched.until_ready()
        clock.advance(10 * FAST.dead_after_s)
        assert watched.state is WorkerState.SUSPECT
        await until(lambda: watched.state is WorkerState.READY, "the pause was this process's own")
        assert not watched.gone


async def test_a_stalled_worker_joins_once_its_engine_comes_round(redis_url: str) -> None:
    stalled = LoadReport(stalled_s=UNHURRIED.stalled_after_s + 1)
    still = LoadReport(stalled_s=UNHURRIED.suspect_after_s + 1)
    async with (
        worker_that_says(hello(stalled), load(still)) as worker,
        fleet_of(worker.address, redis_url, "stalled", timing=UNHURRIED) as watched,
    ):
        await until(lambda: watched.state is WorkerState.STALLED, "it is placed upon")
        # The script of its next stream.
        worker.messages = (hello(stalled), load(still), load(LoadReport()))
        attached = watched.fleet.get(IDENTITY)
        assert attached is not None
        assert not watched.joined
        worker.end_stream()
        await until(lambda: bool(watched.joined), "it came round and is not used")
        assert not watched.gone
    assert watched.gone == watched.joined == [attached]


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (LoadReport(draining=True, requests_running=1), WorkerState.DRAINING),
        (LoadReport(draining=True, requests_waiting=1), WorkerState.DRAINING),
        (LoadReport(draining=True), WorkerState.DRAINED),
    ],
)
async def test_each_report_of_a_draining_worker_is_told(
    report: LoadReport, state: WorkerState, redis_url: str
) -> None:
    async with (
        worker_that_says(hello(report), load(report), load(report)) as worker,
        fleet_of(
            worker.address, redis_url, f"drain-{report.requests_running}", timing=UNHURRIED
        ) as watched,
    ):
        await until(lambda: len(watched.draining) == 3, "nobody moves its requests")
        assert watched.state is state
        assert len(watched.joined) == 1


async def test_a_cancel_overtakes_a_submit_that_is_being_written(redis_url: str) -> None:
    async with (
        worker_that_says(hello()) as worker,
        fleet_of(worker.address, redis_url, "overtake", timing=UNHURRIED) as watched,
    ):
        await watched.until_ready()
        watched.submit(submit_of(1, prompt_len=1_500_000))
        attached = watched.fleet.get(IDENTITY)
        assert attached is not None
        (outgoing,) = attached.lanes._submits.values()
        await until(lambda: outgoing.is_begun, "it is not written")
        watched.fleet.send(IDENTITY, Cancel(key_of(2)))
        worker.reads.set()
        await until(
            lambda: any(request.submit_part.is_last for request in worker.heard),
            "the submit does not arrive",
        )
        kinds = [request.WhichOneof("message") for request in worker.heard]
        assert kinds.count("submit_part") > 60
        # What was on its way to a worker that did not read: the stream's window, 64 KiB, and the
        # frame that waited for it.
        assert kinds.index("cancel") <= kinds.index("submit_part") + 3
        assert max(request.ByteSize() for request in worker.heard) <= MAX_FRAME_BYTES


async def test_a_submit_that_finds_no_room_is_answered(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_SUBMITS", 2)
    async with (
        worker_that_says(hello()) as worker,
        fleet_of(worker.address, redis_url, "full", timing=UNHURRIED) as watched,
    ):
        await watched.until_ready()
        for number in range(3):
            watched.submit(submit_of(number))
        assert watched.errors == {}, "not from within the call"
        await until(lambda: bool(watched.errors), "nobody answers")
        assert set(watched.errors) == {key_of(2)}
        assert isinstance(watched.errors[key_of(2)], QueueFull)
        assert watched.state is WorkerState.READY
