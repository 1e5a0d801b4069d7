"""The seam between the engine thread and the two roles: events in, effects out.

A core is a state machine: it owns engine, ledger and requests, takes events, makes steps, and
leaves effects behind. It never does I/O and reads time from its clock, so that the same objects run
on an engine thread, in tests and on virtual time.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import (
    LeaseStatus,
    LiveRequest,
    LoadReport,
    OutputRecord,
    RouterMessage,
)
from baton.kvtransfer.events import LinkEvent
from baton.kvtransfer.link_codec import ReaderMessage


@dataclass(frozen=True, slots=True)
class FromRouter:
    router_id: RouterId
    message: RouterMessage


@dataclass(frozen=True, slots=True)
class RouterAttached:
    """A router's new stream: what it names goes on from the position it asks for.

    Named requests that are not known here are answered with UnknownRequest; whatever it does not
    name is aborted.
    """

    router_id: RouterId
    live: tuple[LiveRequest, ...]


@dataclass(frozen=True, slots=True)
class RouterGone:
    """A router stayed away past its grace: all its requests are aborted."""

    router_id: RouterId


@dataclass(frozen=True, slots=True)
class RouterPaused:
    """A router does not read its stream: its sequences wait until `RouterResumed`."""

    router_id: RouterId


@dataclass(frozen=True, slots=True)
class RouterResumed:
    """A paused router reads again."""

    router_id: RouterId


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no further requests; what runs may end, or is moved away by its router."""


@dataclass(frozen=True, slots=True)
class LoopCameRound:
    """The event loop is alive: posted with each heartbeat."""


Event = (
    FromRouter
    | RouterAttached
    | RouterGone
    | RouterPaused
    | RouterResumed
    | Drain
    | LoopCameRound
    | LinkEvent
)


@dataclass(slots=True)
class Effects:
    """What a step wants done outside: records for routers, messages for peers, links."""

    records: dict[RouterId, list[OutputRecord]] = field(default_factory=dict)
    statuses: list[tuple[WorkerIdentity, LeaseStatus]] = field(default_factory=list)
    messages: list[tuple[WorkerIdentity, ReaderMessage]] = field(default_factory=list)
    dials: list[tuple[WorkerIdentity, str]] = field(default_factory=list)
    # Links to drop: their transport was given up, and the next dial begins anew.
    hangups: list[WorkerIdentity] = field(default_factory=list)
    load: LoadReport | None = None
    _has_news: bool = False
    # Where the newest record of each request stands in its router's list.
    _newest: dict[RequestKey, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.records) or self.is_urgent or self.load is not None

    @property
    def is_urgent(self) -> bool:
        """Whether something waits for this: a peer, a first token, an end."""
        return self._has_news or bool(self.statuses or self.messages or self.dials or self.hangups)

    def drop_records(self, router_id: RouterId) -> None:
        """Forget what was to be told to this router."""
        for record in self.records.pop(router_id, []):
            self._newest.pop(record.key, None)

    def record(self, router_id: RouterId, record: OutputRecord) -> None:
        """Add a record; tokens that merely follow join the request's record that stands here."""
        records = self.records.setdefault(router_id, [])
        is_plain = (
            record.prefill is None
            and record.handover is None
            and record.error is None
            and record.finish is None
        )
        index = self._newest.get(record.key)
        if is_plain and index is not None:
            older = records[index]
            if older.position + len(older.tokens) == record.position and older.finish is None:
                records[index] = replace(older, tokens=older.tokens + record.tokens)
                return
        self._has_news = self._has_news or not is_plain
        self._newest[record.key] = len(records)
        records.append(record)


class WorkerCore(Protocol):
    """One role's state machine. All methods are called from the engine thread alone."""

    def handle(self, event: Event) -> None:
        """Take one event. Never blocks, never raises for what a peer sent."""

    def step(self) -> None:
        """Sweep deadlines, admit, and run one iteration of the model if there is work."""

    def wait_s(self) -> float:
        """How long the loop may wait for an event before the next step; 0 with runnable work."""

    def take_effects(self) -> Effects:
        """Everything left behind since the last call; the caller owns it."""

    @property
    def has_urgent_effects(self) -> bool:
        """Whether the effects are to be taken at once rather than with those of later steps."""

    @property
    def step_in_flight(self) -> int | None:
        """Which step of the model the device runs now; None when none. To tell a stuck one."""

    def check_invariants(self) -> None:
        """Raise AssertionError unless every slot is accounted for (DESIGN §6)."""

    def close(self) -> None:
        """The last call: let go of what other threads are about to tear down."""

    @property
    def num_requests(self) -> int:
        """Requests that have not ended here."""
