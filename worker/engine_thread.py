"""The engine thread: the only one that touches arena, pool, cache and ledger.

events → inbox → core.handle … core.step → effects → event loop
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from baton.common.clock import Clock
from baton.common.errors import DeadlineExceeded
from baton.engine.profiler import StepProfiler
from baton.worker.core import Effects, Event, WorkerCore

log = logging.getLogger(__name__)

# Each frame costs the event loop a few hundred µs, during which it and the engine thread fight for
# the interpreter. Steps faster than this share a frame; first tokens and ends never wait.
FRAME_INTERVAL_S = 0.010

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Posted:
    event: Event
    handled: Callable[[], None] | None


class EngineThread:
    """Runs a core until stopped; effects are delivered on the event loop.

    The inbox holds at most what routers and peers may have outstanding; the core answers a submit
    beyond its bound with QueueFull, so the queue drains each iteration.
    """

    def __init__(
        self,
        core: WorkerCore,
        *,
        deliver: Callable[[Effects], None],
        failed: Callable[[BaseException], None],
        clock: Clock,
        frame_interval_s: float = FRAME_INTERVAL_S,
        check_invariants: bool = False,
        profiler: StepProfiler | None = None,
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._failed = failed
        self._clock = clock
        self._frame_interval_s = frame_interval_s
        self._next_frame = 0.0
        self._check_invariants = check_invariants
        self._profiler = profiler
        self._inbox: queue.SimpleQueue[_Posted | Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = False
        # When the loop last came round; None while it waits for events, having nothing to do.
        self._came_round: float | None = None
        self._step: int | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Event, handled: Callable[[], None] | None = None) -> None:
        """Put an event in the inbox, from any thread.

        `handled` is called on the event loop once the core has taken the event: after everything
        that it left behind before was delivered, and before anything that it leaves behind later.
        """
        self._inbox.put(_Posted(event, handled))

    async def call(self, work: Callable[[], T], timeout_s: float) -> T:
        """What `work` returns or raises on the engine thread, between two rounds.

        DeadlineExceeded when the thread has not come to an end with it; `work` is then withdrawn,
        unless it has begun.
        """
        outcome: Future[T] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                outcome.set_result(work())
            # Whoever asked meets it, and not the engine.
            except Exception as error:
                outcome.set_exception(error)

        self._inbox.put(run)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(outcome)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the engine did not come round within {timeout_s:g} s; "
                "`baton admin steps` shows what it did, try again when it goes on"
            ) from error

    @property
    def stalled_s(self) -> float:
        """Seconds since the loop last came round, from any thread; 0 while it waits for events.

        A step in progress, in the thread or on the device, is a round that has not ended.
        """
        came_round = self._came_round
        return 0.0 if came_round is None else self._clock.monotonic() - came_round

    async def stop(self) -> None:
        """End after the current step and wait for the thread."""
        self._stopping = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._iterate_until_stopped()
        # The one root of the thread: whatever escapes ends the process loudly.
        except BaseException as error:
            log.critical("the engine thread failed", exc_info=True)
            self._loop.call_soon_threadsafe(self._failed, error)

    def _iterate_until_stopped(self) -> None:
        self._came_round = self._clock.monotonic()
        try:
            while not self._stopping:
                self._iterate()
        finally:
            # After a failure too: open reads must not outlive the arena that they write to.
            try:
                if self._profiler is not None:
                    self._profiler.close()
            finally:
                self._core.close()

    def _iterate(self) -> None:
        self._drain_inbox(self._core.wait_s())
        self._core.step()
        if self._check_invariants:
            self._core.check_invariants()
        now = self._clock.monotonic()
        is_idle = self._core.wait_s() > 0 and self._core.step_in_flight is None
        if is_idle or self._core.has_urgent_effects or now >= self._next_frame:
            self._next_frame = now + self._frame_interval_s
            self._hand_out()
        if self._profiler is not None:
            self._profiler.look()
        self._note_progress()

    def _hand_out(self) -> None:
        effects = self._core.take_effects()
        if effects:
            self._loop.call_soon_threadsafe(self._deliver, effects)

    def _drain_inbox(self, wait_s: float) -> None:
        try:
            posted = self._wait(wait_s) if wait_s > 0 else self._inbox.get_nowait()
            while True:
                if isinstance(posted, _Posted):
                    self._handle(posted)
                elif posted is not None:
                    posted()
                posted = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _wait(self, wait_s: float) -> _Posted | Callable[[], None] | None:
        if self._step is not None:
            return self._inbox.get(timeout=wait_s)
        self._came_round = None
        try:
            return self._inbox.get(timeout=wait_s)
        finally:
            self._came_round = self._clock.monotonic()

    def _note_progress(self) -> None:
        step = self._core.step_in_flight
        if step is None or step != self._step:
            self._came_round = self._clock.monotonic()
        self._step = step

    def _handle(self, posted: _Posted) -> None:
        if posted.handled is None:
            self._core.handle(posted.event)
            return
        self._hand_out()
        self._core.handle(posted.event)
        self._loop.call_soon_threadsafe(posted.handled)
