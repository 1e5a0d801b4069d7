"""Attach streams on the simulated network, the worker's side: what ControlServicer does.

A router's newer stream ends its older one. What waits for a router is bounded: above high water its
sequences pause, and a router that stays slow loses its stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sim.network import End, Network
from sim.wire import Wire
from sim.world import Process

from baton.common.ids import RouterId
from baton.common.messages import LoadReport, OutputRecord, RouterHello, WorkerHello
from baton.common.timing import Timing
from baton.worker.core import (
    Event,
    FromRouter,
    RouterAttached,
    RouterGone,
    RouterPaused,
    RouterResumed,
)

HIGH_WATER = 6
LOW_WATER = 2
HARD_CAP = 24
FLUSH_S = (0.0001, 0.004)


def address_of(worker_id: str) -> str:
    return f"{worker_id}:control"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A router that has nothing to say says so."""


@dataclass(frozen=True, slots=True)
class Frame:
    records: tuple[OutputRecord, ...]


@dataclass(eq=False)
class _Stream:
    router_id: RouterId
    end: End
    last_heard: float
    # Set once the engine has taken the hello: what it told before is of older positions.
    is_listening: bool = False
    unsent: list[OutputRecord] = field(default_factory=list)
    is_writing: bool = False
    paused_at: float | None = None


class ControlService:
    """`slow_until` tells when a router reads its streams again."""

    def __init__(
        self,
        network: Network,
        process: Process,
        hello: Callable[[], WorkerHello],
        wire: Wire,
        timing: Timing,
        post: Callable[[Event, Callable[[], None] | None], None],
        slow_until: Callable[[RouterId], float],
    ) -> None:
        self._network = network
        self._world = network.world
        self._process = process
        self._hello = hello
        self._wire = wire
        self._timing = timing
        self._post = post
        self._slow_until = slow_until
        self._streams: dict[RouterId, _Stream] = {}
        # By router: which of its graces is running, so that an older timer does nothing.
        self._graces: dict[RouterId, object] = {}
        network.listen(address_of(process.name), process, self._accept)

    def send_records(self, router_id: RouterId, records: list[OutputRecord]) -> None:
        stream = self._streams.get(router_id)
        if stream is None or not stream.is_listening:
            return
        if len(stream.unsent) > HARD_CAP:
            self._close(stream)
            return
        stream.unsent += records
        if len(stream.unsent) > HIGH_WATER and stream.paused_at is None:
            stream.paused_at = self._world.now
            self._world.log(f"{self._process.name} pauses {router_id}")
            self._post(RouterPaused(router_id), None)
        self._write_soon(stream)

    def beat(self, load: LoadReport) -> None:
        now = self._world.now
        for stream in list(self._streams.values()):
            is_silent = now - stream.last_heard > self._timing.dead_after_s
            is_slow = (
                stream.paused_at is not None and now - stream.paused_at > self._timing.slow_router_s
            )
            if is_silent or is_slow:
                self._close(stream)
            elif self._slow_until(stream.router_id) <= now:
                stream.end.send(self._wire.load(load))

    def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.end.close()
        self._streams.clear()

    # --- streams ---

    def _accept(self, end: End) -> None:
        end.on_message = lambda hello: self._open(end, self._wire.hello(hello))

    def _open(self, end: End, hello: RouterHello) -> None:
        router_id = hello.router_id
        older = self._streams.get(router_id)
        if older is not None:
            self._resume(older)
            older.end.close()
        self._graces.pop(router_id, None)
        stream = self._streams[router_id] = _Stream(router_id, end, self._world.now)
        end.on_message = lambda message: self._heard(stream, message)
        end.on_closed = lambda: self._forget(stream)
        self._world.log(f"{self._process.name} attached by {router_id}, {len(hello.live)} live")

        def listen() -> None:
            stream.is_listening = True

        self._post(RouterAttached(router_id, hello.live), listen)
        end.send(self._hello())

    def _heard(self, stream: _Stream, message: Any) -> None:
        if self._streams.get(stream.router_id) is not stream:
            return
        stream.last_heard = self._world.now
        if not isinstance(message, Heartbeat):
            self._post(FromRouter(stream.router_id, self._wire.router_message(message)), None)

    def _close(self, stream: _Stream) -> None:
        self._world.log(f"{self._process.name} closes the stream of {stream.router_id}")
        stream.end.close()
        self._forget(stream)

    def _forget(self, stream: _Stream) -> None:
        router_id = stream.router_id
        if self._streams.get(router_id) is not stream:
            return
        self._resume(stream)
        del self._streams[router_id]
        grace = self._graces[router_id] = object()

        def over() -> None:
            if self._graces.get(router_id) is grace:
                del self._graces[router_id]
                self._world.log(f"{self._process.name}: {router_id} is gone")
                self._post(RouterGone(router_id), None)

        self._process.after(self._timing.router_grace_s, over)

    # --- what waits ---

    def _write_soon(self, stream: _Stream) -> None:
        if stream.is_writing:
            return
        stream.is_writing = True
        wait_s = max(0.0, self._slow_until(stream.router_id) - self._world.now)
        self._process.after(wait_s + self._world.draw(*FLUSH_S), lambda: self._write(stream))

    def _write(self, stream: _Stream) -> None:
        stream.is_writing = False
        if self._streams.get(stream.router_id) is not stream:
            return
        if self._slow_until(stream.router_id) > self._world.now:
            self._write_soon(stream)
            return
        num_taken = self._world.random.randint(1, len(stream.unsent))
        taken, stream.unsent = stream.unsent[:num_taken], stream.unsent[num_taken:]
        stream.end.send(Frame(tuple(self._wire.record(record) for record in taken)))
        if len(stream.unsent) <= LOW_WATER:
            self._resume(stream)
        if stream.unsent:
            self._write_soon(stream)

    def _resume(self, stream: _Stream) -> None:
        if stream.paused_at is not None:
            stream.paused_at = None
            self._post(RouterResumed(stream.router_id), None)
