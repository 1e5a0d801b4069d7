"""Control streams over a real port: a slow router hurts itself alone."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest
from support.cluster import until
from support.control_streams import FAST, CountingWorker, counting_worker, submit_of

from baton.common.control_codec import router_hello_to_pb, router_message_to_pb
from baton.common.grpc_options import STREAM_WINDOW, channel_options
from baton.common.ids import RouterId
from baton.common.messages import RouterHello
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc
from baton.worker.core import RouterAttached, RouterGone, RouterPaused, RouterResumed
from baton.worker.outbox import Bounds

SLOW, OTHER = RouterId("slow"), RouterId("other")
# Of 500 requests a step is about 15 KB, so that the slow router is behind at once.
REQUESTS = 500
HIGH = Bounds(num_bytes=128 * 1024, num_frames=1024)
TIMING = replace(FAST, slow_router_s=1.0, dead_after_s=60.0)

Call = grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]


@dataclass
class Router:
    call: Call

    async def submit(self, number: int, max_tokens: int) -> None:
        await self.call.write(router_message_to_pb(submit_of(number, max_tokens=max_tokens)))

    async def read_to_the_end(self) -> None:
        while await self.call.read() is not grpc.aio.EOF:
            pass

    async def read_until_end_of(self, num_requests: int) -> dict[bytes, list[int]]:
        """All tokens by transfer id, once so many requests have ended."""
        tokens: dict[bytes, list[int]] = {}
        ended = 0
        while ended < num_requests:
            response = await self.call.read()
            assert isinstance(response, pb.AttachResponse), "the stream has ended"
            for record in response.frame.records:
                assert record.position == len(tokens.setdefault(record.key.transfer_id, []))
                tokens[record.key.transfer_id].extend(record.token_ids)
                ended += record.finish != 0
        return tokens


@asynccontextmanager
async def attached(worker: CountingWorker, router_id: RouterId) -> AsyncIterator[Router]:
    options = [*channel_options(), *STREAM_WINDOW]
    async with grpc.aio.insecure_channel(worker.address, options=options) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Attach()
        await call.write(pb.AttachRequest(hello=router_hello_to_pb(RouterHello(router_id, 1))))
        first = await call.read()
        assert isinstance(first, pb.AttachResponse)
        assert first.HasField("hello")
        yield Router(call)
        call.cancel()


async def test_a_router_that_stops_reading_is_paused_and_another_one_goes_on() -> None:
    async with (
        counting_worker(timing=replace(TIMING, slow_router_s=60.0), high_water=HIGH) as worker,
        attached(worker, SLOW) as slow,
        attached(worker, OTHER) as other,
    ):
        for number in range(REQUESTS):
            await slow.submit(number, 100_000)
        await until(lambda: RouterPaused(SLOW) in worker.core.events, "nobody notices it")
        await other.submit(REQUESTS, 200)
        tokens = await other.read_until_end_of(1)
        assert list(tokens.values()) == [list(range(200))]
        assert RouterPaused(OTHER) not in worker.core.events
        assert RouterResumed(SLOW) not in worker.core.events
        # It reads on, and nothing was lost.
        seen: dict[bytes, int] = {}
        while len(seen) < REQUESTS or RouterResumed(SLOW) not in worker.core.events:
            response = await slow.call.read()
            assert isinstance(response, pb.AttachResponse)
            for record in response.frame.records:
                assert record.position == seen.get(record.key.transfer_id, 0)
                seen[record.key.transfer_id] = record.position + len(record.token_ids)


async def test_a_router_that_does_not_read_for_too_long_loses_its_stream_alone() -> None:
    async with (
        counting_worker(timing=replace(TIMING, router_grace_s=0.2), high_water=HIGH) as worker,
        attached(worker, SLOW) as slow,
        attached(worker, OTHER) as other,
    ):
        for number in range(REQUESTS):
            await slow.submit(number, 100_000)
        events = worker.core.events
        await until(lambda: RouterGone(SLOW) in events, "its requests hold the worker for ever")
        assert events.index(RouterPaused(SLOW)) < events.index(RouterResumed(SLOW))
        assert worker.core.num_requests == 0
        await other.submit(REQUESTS, 50)
        await other.read_until_end_of(1)
        # It may still read what was on its way, then it is told why.
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await slow.read_to_the_end()
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_newer_stream_ends_an_older_one_that_nobody_reads() -> None:
    async with (
        counting_worker(timing=TIMING, high_water=HIGH) as worker,
        attached(worker, SLOW) as slow,
    ):
        for number in range(REQUESTS):
            await slow.submit(number, 100_000)
        events = worker.core.events
        await until(lambda: RouterPaused(SLOW) in events, "nobody notices it")
        async with attached(worker, SLOW) as newer:
            await until(lambda: events.count(RouterAttached(SLOW, ())) == 2, "not attached")
            assert RouterResumed(SLOW) in events
            await until(lambda: worker.core.num_requests == 0, "the newer hello names nothing")
            await newer.submit(REQUESTS, 20)
            tokens = await newer.read_until_end_of(1)
            assert list(tokens.values()) == [list(range(20))]
        assert RouterGone(SLOW) not in events
