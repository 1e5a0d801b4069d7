"""A router in a simulated process: the real dispatcher, and what Fleet does around it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sim import control
from sim.control import Frame, Heartbeat
from sim.network import End, Network
from sim.wire import Wire
from sim.world import Process

from baton.common.errors import BatonError, ExceedsKvCapacity, NoCapacity
from baton.common.ids import RequestKey, RouterId, TransferId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    LoadReport,
    Move,
    PrefillJob,
    RouterHello,
    RouterMessage,
    Submit,
    WorkerHello,
)
from baton.common.randomness import SeededRandomness
from baton.common.timing import Timing
from baton.router.dispatch import Dispatch
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry
from baton.router.placement import Candidate, LeastLoaded

SWEEP_EVERY_S = 0.25

OnEvent = Callable[[TokenEvent | BatonError], None]


@dataclass(eq=False)
class Attached:
    """One life of one worker as its router sees it."""

    identity: WorkerIdentity
    last_heard: float
    # When its stream last began or ended.
    changed_at: float
    hello: WorkerHello | None = None
    load: LoadReport = field(default_factory=LoadReport)
    end: End | None = None
    is_connected: bool = False
    has_joined: bool = False
    is_stalled: bool = False
    is_over: bool = False
    # With the time at which each was put here: while there is no stream.
    unsent: list[tuple[float, RouterMessage]] = field(default_factory=list)


class SimRouter:
    """`listed` tells the lives that are registered now."""

    def __init__(
        self,
        network: Network,
        wire: Wire,
        timing: Timing,
        name: str,
        *,
        listed: Callable[[], Iterable[WorkerIdentity]],
    ) -> None:
        self._network = network
        self._world = network.world
        self._wire = wire
        self._timing = timing
        self._listed = listed
        self.process = Process(self._world, name)
        self.router_id = RouterId(name)
        self._attached: dict[WorkerIdentity, Attached] = {}
        self._clients: dict[TransferId, OnEvent] = {}
        # The leases that each worker was asked to open.
        self.leases: dict[WorkerIdentity, list[RequestKey]] = {}
        seed = self._world.random.getrandbits(32)
        self.dispatch = Dispatch(
            LeastLoaded(SeededRandomness(seed)),
            candidates=lambda _: self._candidates(),
            link_address=self._link_address,
            clock=self._world.clock,
            randomness=SeededRandomness(seed + 1),
            timing=timing,
            max_requests=1000,
        )
        self.process.every(SWEEP_EVERY_S, self._sweep)
        self.process.every(timing.heartbeat_every_s / 2, self._discover)
        self.process.every(timing.heartbeat_every_s, self._beat)

    # --- clients ---

    def submit(self, spec: GenerationSpec, on_event: OnEvent) -> JournalEntry | None:
        """None when nobody can take it now."""
        try:
            entry = self.dispatch.submit(spec)
        except (NoCapacity, ExceedsKvCapacity):
            return None
        self._clients[entry.transfer_id] = on_event
        self._world.log(f"{self.router_id} accepts {spec.request_id}")
        self._flush()
        return entry

    def cancel(self, entry: JournalEntry) -> None:
        self._clients.pop(entry.transfer_id, None)
        self.dispatch.cancel(entry)
        self._flush()

    def crash(self) -> None:
        self._world.log(f"{self.router_id} crashes")
        self.process.kill()
        self._network.died(self.process)

    def send(self, worker: WorkerIdentity, message: RouterMessage) -> None:
        attached = self._attached.get(worker)
        if attached is None:
            return
        if attached.end is not None:
            attached.end.send(message)
        elif not (isinstance(message, Cancel) and _withdraw(attached, message)):
            attached.unsent.append((self._world.now, message))

    @property
    def unrest(self) -> list[str]:
        """What is left although nothing should be."""
        counts = {f"{worker}": self.dispatch.num_requests_on(worker) for worker in self._attached}
        counts["the journal"] = self.dispatch.num_requests
        return [f"{self.router_id}: {n} requests on {where}" for where, n in counts.items() if n]

    # --- the dispatcher ---

    def _flush(self) -> None:
        effects = self.dispatch.take_effects()
        for worker, message in effects.sends:
            key = getattr(message, "key", None)
            self._world.log(f"{self.router_id} -> {worker} {_said(message)} {_short(key)}")
            if isinstance(message, Move):
                self.leases.setdefault(worker, []).append(message.to)
            elif isinstance(message, Submit) and isinstance(message.job, PrefillJob):
                self.leases.setdefault(worker, []).append(message.key)
            self.send(worker, message)
        for transfer, event in effects.events:
            is_last = isinstance(event, BatonError) or event.finish is not None
            on_event = (self._clients.pop if is_last else self._clients.get)(transfer, None)
            if on_event is not None:
                on_event(event)

    def _sweep(self) -> None:
        self.dispatch.sweep()
        self._flush()

    def _candidates(self) -> list[Candidate]:
        now = self._world.now
        return [
            Candidate(
                identity=worker.identity,
                role=worker.hello.role,
                fingerprint=worker.hello.model.fingerprint,
                block_size=worker.hello.model.block_size,
                load=worker.load,
                in_flight=self.dispatch.num_requests_on(worker.identity),
            )
            for worker in self._attached.values()
            if worker.hello is not None
            and worker.is_connected
            and not worker.is_stalled
            and not worker.load.draining
            and now - worker.last_heard <= self._timing.suspect_after_s
        ]

    def _link_address(self, worker: WorkerIdentity) -> str:
        attached = self._attached[worker]
        assert attached.hello is not None, "placement chose among those that said hello"
        return attached.hello.link_address

    # --- the fleet ---

    def _discover(self) -> None:
        listed = list(self._listed())
        now = self._world.now
        for identity in listed:
            if identity not in self._attached:
                worker = self._attached[identity] = Attached(identity, now, now)
                self._dial(worker)
        for worker in list(self._attached.values()):
            is_dialled_in_vain = not worker.is_connected and not worker.has_joined
            if worker.identity not in listed and is_dialled_in_vain:
                self._gone(worker)

    def _beat(self) -> None:
        now = self._world.now
        for worker in list(self._attached.values()):
            if worker.is_connected and now - worker.last_heard > self._timing.dead_after_s:
                self._gone(worker)
            elif worker.end is not None:
                worker.end.send(Heartbeat())

    def _dial(self, worker: Attached) -> None:
        if worker.is_over:
            return
        address = control.address_of(worker.identity.worker_id)

        def connected(end: End) -> None:
            if worker.is_over:
                end.close()
                return
            worker.end = end
            end.on_message = lambda message: self._heard(worker, end, message)
            end.on_closed = lambda: self._broken(worker, end)
            unsent = {message.key for _, message in worker.unsent if isinstance(message, Submit)}
            live = self.dispatch.live_on(worker.identity)
            named = tuple(each for each in live if each.key not in unsent)
            end.send(RouterHello(self.router_id, 1, named))
            for put_at, message in worker.unsent:
                end.send(_aged(message, self._world.now - put_at))
            worker.unsent.clear()
            deadline_s = self._timing.dead_after_s
            if worker.has_joined:
                deadline_s = max(self._grace_left_s(worker), self._redial_s)
            self.process.after(deadline_s, lambda: self._unanswered(worker, end))

        self._network.dial(self.process, address, connected, lambda: self._again(worker))

    def _unanswered(self, worker: Attached, end: End) -> None:
        if worker.end is end and not worker.is_connected:
            end.close()
            self._broken(worker, end)

    def _broken(self, worker: Attached, end: End) -> None:
        if worker.end is not end:
            return
        worker.end = None
        if worker.is_connected:
            worker.is_connected = False
            worker.changed_at = self._world.now
        self._world.log(f"{self.router_id}: stream to {worker.identity} broke")
        self._again(worker)

    def _again(self, worker: Attached) -> None:
        """Dial once more, unless that is of no use."""
        if worker.is_over:
            return
        if worker.hello is not None:
            is_refused = self._network.is_refused(control.address_of(worker.identity.worker_id))
            is_late = worker.has_joined and self._grace_left_s(worker) <= 0
            if is_refused or is_late:
                self._gone(worker)
                return
        self.process.after(self._redial_s, lambda: self._dial(worker))

    @property
    def _redial_s(self) -> float:
        return self._timing.reconnect_grace_s / 6

    def _grace_left_s(self, worker: Attached) -> float:
        return self._timing.reconnect_grace_s - (self._world.now - worker.changed_at)

    def _gone(self, worker: Attached) -> None:
        worker.is_over = True
        self._attached.pop(worker.identity, None)
        if worker.end is not None:
            worker.end.close()
            worker.end = None
        self._lose(worker)

    def _lose(self, worker: Attached) -> None:
        worker.unsent.clear()
        if worker.has_joined:
            worker.has_joined = False
            self._world.log(f"{self.router_id}: {worker.identity} is gone")
            self.dispatch.worker_gone(worker.identity)
            self._flush()

    # --- what workers say ---

    def _heard(self, worker: Attached, end: End, message: Any) -> None:
        if worker.end is not end:
            return
        worker.last_heard = self._world.now
        match message:
            case WorkerHello():
                if message.identity != worker.identity:
                    self._gone(worker)
                    return
                worker.hello, worker.load = message, message.load
                worker.is_connected, worker.changed_at = True, self._world.now
                self._judge(worker, end)
            case LoadReport():
                worker.load = message
                self._judge(worker, end)
            case Frame(records):
                for record in records:
                    error = f" {record.error.reason}" if record.error is not None else ""
                    self._world.log(
                        f"{worker.identity} -> {self.router_id} {_short(record.key)} "
                        f"{record.position}+{len(record.tokens)}{error}"
                    )
                    self.dispatch.record(worker.identity, record)
                    self._flush()

    def _judge(self, worker: Attached, end: End) -> None:
        stalled_s = worker.load.stalled_s
        if worker.is_stalled:
            worker.is_stalled = stalled_s > self._timing.suspect_after_s
        elif stalled_s > self._timing.stalled_after_s:
            worker.is_stalled = True
            if worker.has_joined:
                self._world.log(f"{self.router_id}: {worker.identity} is stalled")
                self._lose(worker)
                end.close()
                self._broken(worker, end)
        if worker.is_stalled or worker.end is not end:
            return
        if not worker.has_joined:
            worker.has_joined = True
            self._world.log(f"{self.router_id}: {worker.identity} joined")
            self.dispatch.worker_joined(worker.identity)
        if worker.load.draining:
            self.dispatch.worker_draining(worker.identity)
        self._flush()


def _withdraw(attached: Attached, cancel: Cancel) -> bool:
    """Whether the submit of that request waited here; then the worker needs to hear of neither."""
    for entry in attached.unsent:
        message = entry[1]
        if isinstance(message, Submit) and message.key == cancel.key:
            attached.unsent.remove(entry)
            return True
    return False


def _aged(message: RouterMessage, waited_s: float) -> RouterMessage:
    if not isinstance(message, Submit):
        return message
    return replace(
        message, age_s=message.age_s + waited_s, time_left_s=message.time_left_s - waited_s
    )


def _said(message: RouterMessage) -> str:
    if isinstance(message, Submit):
        return f"Submit({type(message.job).__name__} after {len(message.output_tokens)})"
    return type(message).__name__


def _short(key: Any) -> str:
    return "" if key is None else f"{key.transfer_id.hex()[:6]}/{key.attempt}"
