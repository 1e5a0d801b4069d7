"""The workers that this router knows: one control stream each, and who of them is alive.

Discovery comes from Redis; liveness from the control stream alone. A record that vanishes from
Redis removes nobody; a worker is gone when its stream is gone, or silent for 6 s.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from enum import Enum

import grpc

from baton.common.clock import Clock
from baton.common.codec import (
    cancel_to_pb,
    load_from_pb,
    record_from_pb,
    router_hello_to_pb,
    submit_to_pb,
    worker_hello_from_pb,
)
from baton.common.errors import BatonError
from baton.common.grpc_options import channel_options
from baton.common.ids import WorkerIdentity
from baton.common.messages import (
    Cancel,
    LoadReport,
    OutputRecord,
    RouterHello,
    Submit,
    WorkerHello,
)
from baton.common.periodic import every, wait_for
from baton.metadata.registry import RedisError, Registry, WorkerRecord
from baton.v1 import worker_pb2 as pb
from baton.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

DISCOVER_EVERY_S = 0.5
HEARTBEAT_EVERY_S = 1.0
HELLO_DEADLINE_S = 5.0
SUSPECT_AFTER_S = 3.0
DEAD_AFTER_S = 6.0
RECONNECT_EVERY_S = 0.5
MAX_UNSENT = 16_384


class WorkerState(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    GONE = "gone"


class FleetEvents:
    """What the fleet reports; called on the event loop."""

    def __init__(
        self,
        *,
        joined: Callable[["AttachedWorker"], None],
        records: Callable[["AttachedWorker", list[OutputRecord]], None],
        gone: Callable[["AttachedWorker"], None],
    ) -> None:
        self.joined = joined
        self.records = records
        self.gone = gone


class AttachedWorker:
    """One life of one worker: its stream, its last word, its load."""

    def __init__(self, record: WorkerRecord, clock: Clock) -> None:
        self.record = record
        self.hello: WorkerHello | None = None
        self.load = LoadReport()
        self.last_heard = clock.monotonic()
        self.is_connected = False
        self.stop = asyncio.Event()
        self.unsent: asyncio.Queue[pb.AttachRequest] = asyncio.Queue(maxsize=MAX_UNSENT)
        self._clock = clock

    @property
    def identity(self) -> WorkerIdentity:
        return self.record.identity

    @property
    def state(self) -> WorkerState:
        if self.stop.is_set():
            return WorkerState.GONE
        if not self.is_connected or self.hello is None:
            return WorkerState.CONNECTING
        if self._clock.monotonic() - self.last_heard > SUSPECT_AFTER_S:
            return WorkerState.SUSPECT
        return WorkerState.DRAINING if self.load.draining else WorkerState.READY

    def send(self, message: Submit | Cancel) -> None:
        """Queue a message; cancels of a full queue are dropped, their request's deadline holds."""
        if isinstance(message, Submit):
            request = pb.AttachRequest(submit=submit_to_pb(message))
        else:
            request = pb.AttachRequest(cancel=cancel_to_pb(message))
        try:
            self.unsent.put_nowait(request)
        except asyncio.QueueFull:
            log.error("%s takes no messages; closing its stream", self.identity)
            self.stop.set()


class Fleet:
    """All attached workers; used on the event loop only."""

    def __init__(
        self, registry: Registry, hello: RouterHello, events: FleetEvents, clock: Clock
    ) -> None:
        self._registry = registry
        self._hello = hello
        self._events = events
        self._clock = clock
        self._workers: dict[WorkerIdentity, AttachedWorker] = {}
        self._tasks: dict[WorkerIdentity, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._redis_reachable = True

    def start(self) -> None:
        self._loops = [
            asyncio.create_task(self._discover(), name="discovery"),
            asyncio.create_task(self._watch_silence(), name="silence"),
        ]

    async def stop(self) -> None:
        self._stop.set()
        for worker in self._workers.values():
            worker.stop.set()
        await asyncio.gather(*self._loops, *self._tasks.values())

    def workers(self) -> list[AttachedWorker]:
        return list(self._workers.values())

    def get(self, identity: WorkerIdentity) -> AttachedWorker | None:
        return self._workers.get(identity)

    # --- who is there ---

    async def _discover(self) -> None:
        async for _ in every(DISCOVER_EVERY_S, self._stop):
            try:
                records = await self._registry.workers()
            except RedisError as error:
                if self._redis_reachable:
                    log.warning("Redis is out of reach, known workers go on: %s", error)
                self._redis_reachable = False
                continue
            self._redis_reachable = True
            if self._stop.is_set():
                return
            for record in records:
                if record.identity not in self._workers:
                    self._attach(record)
            self._forget_unlisted({record.identity for record in records})

    def _attach(self, record: WorkerRecord) -> None:
        worker = AttachedWorker(record, self._clock)
        self._workers[record.identity] = worker
        task = asyncio.create_task(self._run(worker), name=f"attach {record.identity}")
        self._tasks[record.identity] = task

    def _forget_unlisted(self, listed: set[WorkerIdentity]) -> None:
        """Redis answered without it and there is no stream either: nobody is there to dial."""
        for worker in self.workers():
            if worker.identity not in listed and not worker.is_connected:
                worker.stop.set()

    async def _watch_silence(self) -> None:
        period_s = HEARTBEAT_EVERY_S
        last = self._clock.monotonic()
        async for _ in every(period_s, self._stop):
            now = self._clock.monotonic()
            # Silence counts only while this loop itself was on time.
            was_late = now - last > 2 * period_s
            last = now
            for worker in self.workers():
                if was_late:
                    worker.last_heard = now
                if worker.is_connected and now - worker.last_heard > DEAD_AFTER_S:
                    log.warning("%s was silent for %.0f s", worker.identity, DEAD_AFTER_S)
                    worker.stop.set()

    # --- one stream ---

    async def _run(self, worker: AttachedWorker) -> None:
        """Dial until attached, converse until the stream breaks; a broken stream is a lost life.

        The worker may still run; it is then discovered and attached anew.
        """
        has_failed = False
        while not worker.stop.is_set() and worker.hello is None:
            try:
                await self._converse(worker)
            except grpc.aio.AioRpcError as error:
                # A dial that nobody answers is repeated until the record lapses: told once.
                level = logging.DEBUG if has_failed else logging.INFO
                log.log(level, "stream to %s: %s", worker.identity, error.code().name)
                has_failed = True
            except (BatonError, TimeoutError) as error:
                log.warning("stream to %s broke: %s", worker.identity, error)
            # The root of the task: whatever a worker can cause here costs its stream and no more.
            except Exception:
                log.exception("stream to %s failed", worker.identity)
            if worker.hello is None:
                await wait_for(worker.stop, RECONNECT_EVERY_S)
        worker.is_connected = False
        worker.stop.set()
        del self._workers[worker.identity]
        del self._tasks[worker.identity]
        if worker.hello is not None:
            self._events.gone(worker)

    async def _converse(self, worker: AttachedWorker) -> None:
        address = worker.record.address
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = stub.Attach(self._requests(worker))
            ending = asyncio.create_task(self._cancel_on_stop(worker, call))
            try:
                await self._read(worker, aiter(call))
            except asyncio.CancelledError:
                if not worker.stop.is_set():
                    raise
            finally:
                ending.cancel()

    async def _cancel_on_stop(
        self,
        worker: AttachedWorker,
        call: grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse],
    ) -> None:
        await worker.stop.wait()
        call.cancel()

    async def _requests(self, worker: AttachedWorker) -> AsyncIterator[pb.AttachRequest]:
        yield pb.AttachRequest(hello=router_hello_to_pb(self._hello))
        heartbeat = pb.AttachRequest(heartbeat=pb.Heartbeat())
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_EVERY_S):
                    request = await worker.unsent.get()
            except TimeoutError:
                request = heartbeat
            yield request

    async def _read(
        self, worker: AttachedWorker, responses: AsyncIterator[pb.AttachResponse]
    ) -> None:
        async with asyncio.timeout(HELLO_DEADLINE_S):
            try:
                first = await anext(responses)
            except StopAsyncIteration:
                return
        self._welcome(worker, worker_hello_from_pb(first.hello))
        async for response in responses:
            worker.last_heard = self._clock.monotonic()
            if response.HasField("frame"):
                records = [record_from_pb(record) for record in response.frame.records]
                self._events.records(worker, records)
            elif response.HasField("load"):
                worker.load = load_from_pb(response.load)

    def _welcome(self, worker: AttachedWorker, hello: WorkerHello) -> None:
        if hello.identity != worker.identity:
            # An older life's record: the newer one is discovered under its own identity.
            log.info("%s answers where %s was", hello.identity, worker.identity)
            worker.stop.set()
            return
        worker.hello = hello
        worker.load = hello.load
        worker.last_heard = self._clock.monotonic()
        worker.is_connected = True
        self._events.joined(worker)
