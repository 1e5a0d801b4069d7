"""DiagnosticsService: what an operator asks of this worker's engine.

Steps are read out of the recorder, whatever the engine thread does. A profile is begun and ended on
the engine thread; its trace is written on a thread of its own.
"""

import asyncio
import logging
import re
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import grpc

from baton.common.clock import Clock
from baton.common.codec import error_to_pb
from baton.common.errors import (
    AlreadyExists,
    BatonError,
    ConfigError,
    InternalError,
    InvalidRequest,
)
from baton.common.ids import WorkerIdentity
from baton.engine.profiler import MAX_PROFILED_STEPS, Recording, StepProfiler
from baton.engine.step_recorder import KEPT_STEPS, Step, StepRecorder, summarise
from baton.v1 import diagnostics_pb2 as pb
from baton.v1 import diagnostics_pb2_grpc

log = logging.getLogger(__name__)

# Both together are shorter than the router waits.
ENGINE_DEADLINE_S: Final = 5.0
WRITTEN_DEADLINE_S: Final = 2.0

T = TypeVar("T")


class OnEngine(Protocol):
    """`EngineThread.call`."""

    def __call__(self, work: Callable[[], T], timeout_s: float) -> Awaitable[T]: ...


class TraceWriter:
    """Writes what the profiler recorded, one trace at a time."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="trace")
        self._writing: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def write(self, recording: Recording) -> None:
        """Called on the engine thread; returns at once."""
        self._writing = self._executor.submit(self._write, recording)

    async def written(self, timeout_s: float) -> bool:
        """Whether the newest trace is there, waiting for it so long at most.

        Raises ConfigError when it could not be written.
        """
        if self._writing is None:
            return False
        writing = asyncio.wrap_future(self._writing)
        # Not wait_for, which would cancel a trace that waits for its thread.
        done, _ = await asyncio.wait([writing], timeout=timeout_s)
        if done:
            writing.result()
        return bool(done)

    def close(self) -> None:
        """Take nothing more; the process does not end before a trace that is being written."""
        self._executor.shutdown(wait=False)

    def _write(self, recording: Recording) -> None:
        try:
            recording.write()
        except OSError as error:
            log.warning("no trace at %s: %s", recording.path, error)
            raise _cannot_write(recording.path, error) from error
        log.info("wrote the trace of %d steps to %s", recording.num_steps, recording.path)


class DiagnosticsServicer(diagnostics_pb2_grpc.DiagnosticsServiceServicer):
    """Used on the event loop only. Without a `folder`, traces go into a fresh one."""

    def __init__(
        self,
        identity: WorkerIdentity,
        recorder: StepRecorder,
        profiler: StepProfiler,
        writer: TraceWriter,
        on_engine: OnEngine,
        *,
        clock: Clock,
        folder: str | None,
    ) -> None:
        self._identity = identity
        self._recorder = recorder
        self._profiler = profiler
        self._writer = writer
        self._on_engine = on_engine
        self._clock = clock
        self._folder = None if folder is None else Path(folder).absolute()
        self._num_profiles = 0

    async def ReadSteps(
        self, request: pb.ReadStepsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReadStepsResponse:
        steps = self._recorder.last(min(request.last or KEPT_STEPS, KEPT_STEPS))
        return pb.ReadStepsResponse(history=_history(steps, self._clock.monotonic()))

    async def BeginProfile(
        self, request: pb.BeginProfileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.BeginProfileResponse:
        try:
            return pb.BeginProfileResponse(path=str(await self._begin(request.steps)))
        except BatonError as error:
            return pb.BeginProfileResponse(error=error_to_pb(error))

    async def EndProfile(
        self, request: pb.EndProfileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EndProfileResponse:
        try:
            path = await self._on_engine(_explained(self._profiler.stop), ENGINE_DEADLINE_S)
            is_written = await self._writer.written(WRITTEN_DEADLINE_S)
        except BatonError as error:
            return pb.EndProfileResponse(error=error_to_pb(error))
        return pb.EndProfileResponse(path=str(path), is_written=is_written)

    async def _begin(self, num_steps: int) -> Path:
        if not 1 <= num_steps <= MAX_PROFILED_STEPS:
            raise InvalidRequest(
                f"a profile is of 1 to {MAX_PROFILED_STEPS} steps, not of {num_steps}",
                field="steps",
            )
        if self._writer.is_writing:
            raise AlreadyExists("the last profile is still being written; try again in a moment")
        path = await asyncio.to_thread(self._next_path)
        await self._on_engine(
            _explained(lambda: self._profiler.start(num_steps, path)), ENGINE_DEADLINE_S
        )
        log.info("profiling the next %d steps, into %s", num_steps, path)
        return path

    def _next_path(self) -> Path:
        """Where no file is. Raises ConfigError when nothing can be written there."""
        folder = self._folder
        try:
            if folder is None:
                folder = self._folder = Path(tempfile.mkdtemp(prefix="baton-profile-"))
            folder.mkdir(parents=True, exist_ok=True)
            # Told now rather than after the profile.
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise _cannot_write(folder or tempfile.gettempdir(), error) from error
        self._num_profiles += 1
        # A worker's id may be anything; its epoch makes a name that no other life takes.
        name = re.sub(r"[^A-Za-z0-9._-]", "_", self._identity.worker_id)
        return folder / f"{name}-{self._identity.epoch}-{self._num_profiles}.json"


def _cannot_write(where: Path | str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write a trace to {where} ({error}); give the worker another --profile-dir",
        field="profile_dir",
    )


def _explained(work: Callable[[], T]) -> Callable[[], T]:
    """The profiler is torch's: what it raises is told to the operator, and costs nobody else."""

    def run() -> T:
        try:
            return work()
        except BatonError:
            raise
        except Exception as error:
            log.exception("the profiler failed")
            raise InternalError(f"the profiler failed: {error}") from error

    return run


def _history(steps: list[Step], now: float) -> pb.StepHistory:
    found = summarise(steps)
    return pb.StepHistory(
        steps=[
            pb.Step(
                number=step.number,
                age_s=now - step.launched_at,
                took_s=step.took_s,
                rows=step.rows,
                tokens=step.tokens,
                prompt_tokens=step.prompt_tokens,
                replayed=step.replayed,
            )
            for step in steps
        ],
        summary=pb.StepSummary(
            steps=found.steps,
            p50_s=found.p50_s,
            p90_s=found.p90_s,
            p99_s=found.p99_s,
            max_s=found.max_s,
            window_s=found.window_s,
            busy_s=found.busy_s,
            tokens=found.tokens,
            prompt_tokens=found.prompt_tokens,
        ),
    )
