"""One life of one worker as a router sees it: its state, its load, and what waits for it."""

import asyncio
from enum import Enum

from baton.common.clock import Clock
from baton.common.ids import WorkerIdentity
from baton.common.messages import LoadReport, RouterMessage, WorkerHello
from baton.common.timing import Timing
from baton.metadata.registry import WorkerRecord
from baton.router.lanes import Lanes


class WorkerState(Enum):
    """Only READY workers are given requests."""

    CONNECTING = "connecting"
    READY = "ready"
    # Its stream broke and is dialled again; its requests wait for that.
    RECONNECTING = "reconnecting"
    # Nothing was heard from it for a while.
    SUSPECT = "suspect"
    # Its engine does not come round: its requests are elsewhere.
    STALLED = "stalled"
    DRAINING = "draining"
    # Draining, and nothing is left.
    DRAINED = "drained"
    GONE = "gone"


class AttachedWorker:
    """Facts, changed by the fleet on the event loop."""

    def __init__(self, record: WorkerRecord, clock: Clock, timing: Timing) -> None:
        self.record = record
        self.hello: WorkerHello | None = None
        self.load = LoadReport()
        self.lanes = Lanes(clock)
        # Set when this life is over; ends its stream.
        self.stop = asyncio.Event()
        self.is_connected = False
        # Between `joined` and `gone`: requests may be on it.
        self.has_joined = False
        self.is_stalled = False
        self.last_heard = clock.monotonic()
        # When its stream last began or ended.
        self.changed_at = self.last_heard
        self._clock = clock
        self._timing = timing

    @property
    def identity(self) -> WorkerIdentity:
        return self.record.identity

    @property
    def state(self) -> WorkerState:
        if self.stop.is_set():
            return WorkerState.GONE
        if self.hello is None:
            return WorkerState.CONNECTING
        if self.is_stalled:
            return WorkerState.STALLED
        if not self.is_connected:
            return WorkerState.RECONNECTING
        if self._clock.monotonic() - self.last_heard > self._timing.suspect_after_s:
            return WorkerState.SUSPECT
        if not self.load.draining:
            return WorkerState.READY
        load = self.load
        is_empty = not (load.requests_running or load.requests_waiting or load.leases)
        return WorkerState.DRAINED if is_empty else WorkerState.DRAINING

    def send(self, message: RouterMessage) -> None:
        """Queue a message for the next frame. Raises QueueFull."""
        self.lanes.put(message)

    # --- its stream ---

    def connected(self, hello: WorkerHello) -> None:
        self.hello = hello
        self.load = hello.load
        self.is_connected = True
        self.changed_at = self.last_heard = self._clock.monotonic()

    def disconnected(self) -> None:
        """Idempotent: the time of the break is that of the first call."""
        if self.is_connected:
            self.is_connected = False
            self.changed_at = self._clock.monotonic()
