"""The engine thread: the only one that touches arena, pool, cache and ledger.

events → inbox → core.handle … core.step → effects → event loop
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from baton.common.clock import Clock
from baton.worker.core import Effects, Event, WorkerCore

log = logging.getLogger(__name__)

# Each frame costs the event loop a few hundred µs, during which it and the engine thread fight for
# the interpreter. Steps faster than this share a frame; first tokens and ends never wait.
FRAME_INTERVAL_S = 0.010


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
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._failed = failed
        self._clock = clock
        self._frame_interval_s = frame_interval_s
        self._next_frame = 0.0
        self._check_invariants = check_invariants
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Event) -> None:
        """Put an event in the inbox, from any thread."""
        self._inbox.put(event)

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
        try:
            while not self._stopping:
                self._iterate()
        finally:
            # After a failure too: open reads must not outlive the arena that they write to.
            self._core.close()

    def _iterate(self) -> None:
        self._drain_inbox(self._core.wait_s())
        self._core.step()
        if self._check_invariants:
            self._core.check_invariants()
        now = self._clock.monotonic()
        is_idle = self._core.wait_s() > 0
        if is_idle or self._core.has_urgent_effects or now >= self._next_frame:
            self._next_frame = now + self._frame_interval_s
            effects = self._core.take_effects()
            if effects:
                self._loop.call_soon_threadsafe(self._deliver, effects)

    def _drain_inbox(self, wait_s: float) -> None:
        try:
            event = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            while True:
                if event is not None:
                    self._core.handle(event)
                event = self._inbox.get_nowait()
        except queue.Empty:
            return
