"""The workers that this router knows: who is there, who of them is alive, and who is gone.

Discovery comes from Redis; liveness from the control stream alone. A record that vanishes from
Redis removes nobody. A worker is gone when its stream is broken for longer than the grace, when
nobody listens at its address, when it is silent, or when its engine does not come round.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc

from baton.common.clock import Clock
from baton.common.errors import BatonError, QueueFull
from baton.common.ids import WorkerIdentity
from baton.common.messages import (
    LiveRequest,
    LoadReport,
    OutputRecord,
    RouterHello,
    RouterMessage,
    Submit,
    WorkerHello,
)
from baton.common.metric_names import STREAMS_RESUMED
from baton.common.periodic import Punctuality, every, wait_for
from baton.common.timing import Timing
from baton.metadata.registry import RedisError, Registry, WorkerRecord
from baton.router.attach_stream import Heard, converse, is_refused
from baton.router.attached import AttachedWorker, WorkerState

__all__ = ["AttachedWorker", "Fleet", "FleetEvents", "WorkerState"]

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FleetEvents:
    """What the fleet reports; called on the event loop.

    `joined` and `gone` alternate per worker; a stream that is resumed in time is neither. `gone`:
    its requests are to go on elsewhere. `records` also brings what the fleet itself refused.
    `draining` comes with each load report that says so.
    """

    joined: Callable[[AttachedWorker], None]
    records: Callable[[AttachedWorker, list[OutputRecord]], None]
    gone: Callable[[AttachedWorker], None]
    draining: Callable[[AttachedWorker], None]


class Fleet:
    """All attached workers; used on the event loop only.

    `live_requests`: what the router waits for from a worker, for the hello of a new stream.
    """

    def __init__(
        self,
        registry: Registry,
        hello: RouterHello,
        events: FleetEvents,
        clock: Clock,
        *,
        timing: Timing,
        live_requests: Callable[[WorkerIdentity], Sequence[LiveRequest]],
    ) -> None:
        self._registry = registry
        self._hello = hello
        self._events = events
        self._clock = clock
        self._timing = timing
        self._live_requests = live_requests
        self._workers: dict[WorkerIdentity, AttachedWorker] = {}
        self._tasks: dict[WorkerIdentity, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._redis_reachable = True
        # By the names of `common.metric_names`.
        self.counters: Counter[str] = Counter()

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

    def send(self, identity: WorkerIdentity, message: RouterMessage) -> None:
        """Queue a message. To a worker that is gone it is dropped: whoever asks has heard of that.

        A submit that finds no room is answered with QueueFull, like one that the worker refuses.
        """
        worker = self._workers.get(identity)
        if worker is None:
            log.debug("%s for %s, which is gone", type(message).__name__, identity)
            return
        try:
            worker.send(message)
        except QueueFull as full:
            if isinstance(message, Submit):
                # Not from within the caller, which is in the middle of its own effects.
                refusal = [OutputRecord(key=message.key, error=full)]
                asyncio.get_running_loop().call_soon(self._events.records, worker, refusal)
            else:
                log.error("%s takes no messages: %s", identity, full.message)
                worker.stop.set()

    # --- who is there ---

    async def _discover(self) -> None:
        async for _ in every(self._timing.heartbeat_every_s / 2, self._stop):
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
        worker = AttachedWorker(record, self._clock, self._timing)
        self._workers[record.identity] = worker
        task = asyncio.create_task(self._run(worker), name=f"attach {record.identity}")
        self._tasks[record.identity] = task

    def _forget_unlisted(self, listed: set[WorkerIdentity]) -> None:
        """Redis answered without it, no stream, nothing to resume: nobody is there to dial."""
        for worker in self.workers():
            is_dialled_in_vain = not worker.is_connected and not worker.has_joined
            if worker.identity not in listed and is_dialled_in_vain:
                worker.stop.set()

    async def _watch_silence(self) -> None:
        period_s = self._timing.heartbeat_every_s
        punctuality = Punctuality(period_s, self._clock.monotonic())
        async for _ in every(period_s, self._stop):
            now = self._clock.monotonic()
            was_late = punctuality.was_late(now)
            for worker in self.workers():
                if was_late:
                    worker.last_heard = now
                silent_s = now - worker.last_heard
                if worker.is_connected and silent_s > self._timing.dead_after_s:
                    log.warning("%s was silent for %.1f s", worker.identity, silent_s)
                    worker.stop.set()

    # --- one life ---

    async def _run(self, worker: AttachedWorker) -> None:
        """Dial, converse, dial again, until the worker is gone.

        It may still run; it is then discovered and attached anew.
        """
        while not worker.stop.is_set():
            began = self._clock.monotonic()
            await self._converse_until_stopped(worker)
            worker.disconnected()
            if worker.stop.is_set() or not await self._is_worth_dialling(worker):
                break
            # At once after a stream that had come up for a while.
            spent_s = self._clock.monotonic() - began
            await wait_for(worker.stop, max(0.0, self._redial_every_s - spent_s))
        worker.stop.set()
        del self._workers[worker.identity]
        del self._tasks[worker.identity]
        self._lose(worker)

    @property
    def _redial_every_s(self) -> float:
        return self._timing.heartbeat_every_s / 4

    async def _is_worth_dialling(self, worker: AttachedWorker) -> bool:
        if worker.hello is None:
            # Discovered, and perhaps not listening yet: until its record lapses.
            return True
        if await is_refused(worker.record.address, self._redial_every_s):
            log.info("nobody listens at the address of %s", worker.identity)
            return False
        return not worker.has_joined or self._grace_left_s(worker) > 0

    def _grace_left_s(self, worker: AttachedWorker) -> float:
        broken_s = self._clock.monotonic() - worker.changed_at
        return self._timing.reconnect_grace_s - broken_s

    async def _converse_until_stopped(self, worker: AttachedWorker) -> None:
        conversation = asyncio.create_task(self._converse(worker), name=f"to {worker.identity}")
        stopping = asyncio.create_task(worker.stop.wait())
        await asyncio.wait([conversation, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in (conversation, stopping):
            task.cancel()
        await asyncio.wait([conversation, stopping])

    async def _converse(self, worker: AttachedWorker) -> None:
        """One stream. A break may be repaired; a worker that talks nonsense is lost."""
        lanes, unsent = worker.lanes, worker.lanes.unsent_submits
        lanes.rewind()
        live = [live for live in self._live_requests(worker.identity) if live.key not in unsent]
        hello_deadline_s = self._timing.dead_after_s
        if worker.has_joined:
            hello_deadline_s = max(self._grace_left_s(worker), self._redial_every_s)
        try:
            await converse(
                worker.record.address,
                replace(self._hello, live=tuple(live)),
                lanes,
                lambda heard: self._hear(worker, heard),
                hello_deadline_s=hello_deadline_s,
                timing=self._timing,
            )
        except grpc.aio.AioRpcError as error:
            # A dial that nobody answers is repeated for a while: told once.
            level = logging.INFO if worker.is_connected else logging.DEBUG
            log.log(level, "stream to %s: %s", worker.identity, error.code().name)
        except TimeoutError:
            log.info("%s did not answer a hello in %.1f s", worker.identity, hello_deadline_s)
        except BatonError as error:
            log.warning("%s broke the protocol: %s", worker.identity, error.message)
            self._give_up(worker)
        # The root of the task: whatever a worker can cause here costs its stream and no more.
        except Exception:
            log.exception("stream to %s failed", worker.identity)
            self._give_up(worker)

    def _give_up(self, worker: AttachedWorker) -> None:
        """Nothing to resume with; one that never said hello is dialled until its record lapses."""
        if worker.hello is not None:
            worker.stop.set()

    # --- what a worker says; False ends its stream ---

    def _hear(self, worker: AttachedWorker, heard: Heard) -> bool:
        worker.last_heard = self._clock.monotonic()
        match heard:
            case WorkerHello():
                return self._welcome(worker, heard)
            case LoadReport():
                worker.load = heard
                return self._judge(worker)
            case list():
                self._events.records(worker, heard)
                return True

    def _welcome(self, worker: AttachedWorker, hello: WorkerHello) -> bool:
        if hello.identity != worker.identity:
            # An older life's record: the newer one is discovered under its own identity.
            log.info("%s answers where %s was", hello.identity, worker.identity)
            worker.stop.set()
            return False
        worker.connected(hello)
        if worker.has_joined:
            self.counters[STREAMS_RESUMED] += 1
            log.info("stream to %s resumed", worker.identity)
        return self._judge(worker)

    def _judge(self, worker: AttachedWorker) -> bool:
        """By its newest load report: whether its engine makes progress, and whether it drains."""
        stalled_s = worker.load.stalled_s
        if worker.is_stalled:
            # Lower than where it began, so that one long step does not let it come and go.
            worker.is_stalled = stalled_s > self._timing.suspect_after_s
        elif stalled_s > self._timing.stalled_after_s:
            log.warning(
                "the engine of %s has not come round for %.1f s", worker.identity, stalled_s
            )
            worker.is_stalled = True
            if worker.has_joined:
                self._lose(worker)
                # The hello of the next stream names none of them, so that the worker drops them.
                return False
        if worker.is_stalled:
            return True
        if not worker.has_joined:
            worker.has_joined = True
            self._events.joined(worker)
        if worker.load.draining:
            self._events.draining(worker)
        return True

    def _lose(self, worker: AttachedWorker) -> None:
        """Its requests, if there are any, are to go on elsewhere."""
        worker.lanes.clear()
        if worker.has_joined:
            worker.has_joined = False
            self._events.gone(worker)
