"""Both ends of a control stream without a model: a core that counts, a worker that serves it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from baton.common.clock import Clock, SystemClock
from baton.common.errors import UnknownRequest
from baton.common.grpc_options import STREAM_WINDOW
from baton.common.grpc_server import GrpcServer
from baton.common.ids import Epoch, RequestKey, RouterId, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    LiveRequest,
    LoadReport,
    ModelInfo,
    OutputRecord,
    RouterMessage,
    SetDraining,
    Submit,
    WorkerHello,
)
from baton.common.periodic import every
from baton.common.sampling import FinishReason, Role, SamplingParams
from baton.common.timing import DEFAULT_TIMING, Timing
from baton.v1 import worker_pb2_grpc
from baton.worker.control import ControlServicer
from baton.worker.core import (
    Effects,
    Event,
    FromRouter,
    RouterAttached,
    RouterGone,
    RouterPaused,
    RouterResumed,
)
from baton.worker.engine_thread import EngineThread
from baton.worker.outbox import HIGH_WATER, Bounds

IDENTITY = WorkerIdentity(WorkerId("d0"), Epoch(1), "a")
MODEL = ModelInfo(name="m", path="/m", fingerprint="f", max_model_len=8, vocab_size=8, block_size=4)
# Short enough for tests, and long enough for a busy machine of two cores.
FAST = replace(DEFAULT_TIMING.scaled(0.1), router_grace_s=2.0, reconnect_grace_s=1.5)


def key_of(number: int, attempt: int = 1) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), attempt)


def worker_hello(
    load: LoadReport | None = None, identity: WorkerIdentity = IDENTITY
) -> WorkerHello:
    return WorkerHello(
        identity=identity,
        role=Role.DECODE,
        model=MODEL,
        link_address="",
        pid=1,
        load=load or LoadReport(),
    )


def submit_of(number: int, *, max_tokens: int = 8, prompt_len: int = 3) -> Submit:
    return Submit(
        key=key_of(number),
        prompt_tokens=[100_000 + index % 1000 for index in range(prompt_len)],
        sampling=SamplingParams(max_tokens=max_tokens),
        tenant_key=b"",
        age_s=0.0,
        time_left_s=60.0,
        job=DecodeJob(None),
    )


@dataclass
class _Counting:
    router_id: RouterId
    max_tokens: int
    num_tokens: int = 0


class CountingCore:
    """Each step gives every request its next token, which is its position; resumes as told.

    `events` are all events in the order in which they were taken.
    """

    def __init__(self, *, step_every_s: float = 0.0005) -> None:
        self.events: list[Event] = []
        self.is_draining = False
        self.num_steps = 0
        self.step_in_flight: int | None = None
        self.before_step: Callable[[], None] = lambda: None
        self._step_every_s = step_every_s
        self._requests: dict[RequestKey, _Counting] = {}
        self._paused: set[RouterId] = set()
        self._effects = Effects()

    @property
    def num_requests(self) -> int:
        return sum(found.num_tokens < found.max_tokens for found in self._requests.values())

    @property
    def messages(self) -> list[RouterMessage]:
        return [event.message for event in self.events if isinstance(event, FromRouter)]

    def handle(self, event: Event) -> None:
        self.events.append(event)
        match event:
            case FromRouter(router_id, Submit() as submit):
                self._requests[submit.key] = _Counting(router_id, submit.sampling.max_tokens)
            case FromRouter(_, Cancel(key)):
                self._requests.pop(key, None)
            case FromRouter(_, SetDraining(draining)):
                self.is_draining = draining
            case RouterAttached(router_id, live):
                named = {entry.key for entry in live}
                self._abort(router_id, keep=named)
                for entry in live:
                    self._resume(router_id, entry)
            case RouterGone(router_id):
                self._abort(router_id, keep=set())
            case RouterPaused(router_id):
                self._paused.add(router_id)
            case RouterResumed(router_id):
                self._paused.discard(router_id)

    def step(self) -> None:
        self.before_step()
        self.num_steps += 1
        for key, found in self._requests.items():
            if found.num_tokens < found.max_tokens and found.router_id not in self._paused:
                found.num_tokens += 1
                self._tell(key, found, found.num_tokens - 1)
        self._effects.load = LoadReport(
            requests_running=self.num_requests, draining=self.is_draining, steps=self.num_steps
        )

    def wait_s(self) -> float:
        return self._step_every_s

    def take_effects(self) -> Effects:
        effects, self._effects = self._effects, Effects()
        return effects

    @property
    def has_urgent_effects(self) -> bool:
        return self._effects.is_urgent

    def check_invariants(self) -> None:
        assert all(found.num_tokens <= found.max_tokens for found in self._requests.values())

    def close(self) -> None:
        self._requests.clear()

    def _tell(self, key: RequestKey, found: _Counting, position: int) -> None:
        has_ended = found.num_tokens == found.max_tokens
        self._effects.record(
            found.router_id,
            OutputRecord(
                key=key,
                position=position,
                tokens=tuple(range(position, found.num_tokens)),
                finish=FinishReason.LENGTH if has_ended else None,
            ),
        )

    def _resume(self, router_id: RouterId, live: LiveRequest) -> None:
        found = self._requests.get(live.key)
        if found is None:
            error = UnknownRequest("not here")
            self._effects.record(router_id, OutputRecord(key=live.key, error=error))
        elif live.next_position < found.num_tokens:
            self._tell(live.key, found, live.next_position)

    def _abort(self, router_id: RouterId, *, keep: set[RequestKey]) -> None:
        for key in [key for key in self._requests if key not in keep]:
            if self._requests[key].router_id == router_id:
                del self._requests[key]


class CountingWorker:
    """A counting core on a real engine thread behind a real port."""

    def __init__(
        self, timing: Timing, clock: Clock, high_water: Bounds, identity: WorkerIdentity
    ) -> None:
        self.core = CountingCore()
        self.load = LoadReport()
        self.identity = identity
        self.failure: BaseException | None = None
        self.thread = EngineThread(
            self.core,
            deliver=self._deliver,
            failed=self._failed,
            clock=clock,
            frame_interval_s=0.0,
        )
        self.control = ControlServicer(
            lambda: worker_hello(self._load_now(), identity),
            self.thread.post,
            timing=timing,
            clock=clock,
            high_water=high_water,
        )
        self.grpc = GrpcServer(STREAM_WINDOW)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.control, self.grpc.server)
        self.port = self.grpc.listen("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        self._timing = timing
        self._stop = asyncio.Event()

    async def run(self) -> None:
        async for _ in every(self._timing.heartbeat_every_s, self._stop):
            self.control.send_load(self._load_now())

    def end(self) -> None:
        self._stop.set()

    def _load_now(self) -> LoadReport:
        return replace(self.load, stalled_s=self.thread.stalled_s)

    def _deliver(self, effects: Effects) -> None:
        for router_id, records in effects.records.items():
            self.control.send_records(router_id, records)
        if effects.load is not None:
            self.load = effects.load

    def _failed(self, error: BaseException) -> None:
        self.failure = error


@asynccontextmanager
async def counting_worker(
    *,
    timing: Timing = FAST,
    clock: Clock | None = None,
    high_water: Bounds = HIGH_WATER,
    identity: WorkerIdentity = IDENTITY,
) -> AsyncIterator[CountingWorker]:
    worker = CountingWorker(timing, clock or SystemClock(), high_water, identity)
    await worker.grpc.start()
    worker.thread.start()
    beating = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.end()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
        worker.control.close()
        await worker.grpc.stop(0)
        await worker.thread.stop()
    assert worker.failure is None
