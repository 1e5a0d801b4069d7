"""The seam between the engine thread and the two roles: events in, effects out.

A core is a state machine: it owns engine, ledger and requests, takes events, makes steps, and
leaves effects behind. It never does I/O and reads time from its clock, so that the same objects run
on an engine thread, in tests and on virtual time.
"""

from dataclasses import dataclass, field
from typing import Protocol

from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import Cancel, LeaseStatus, LoadReport, OutputRecord, Submit
from baton.kvtransfer.events import LinkEvent
from baton.kvtransfer.link_codec import ReaderMessage


@dataclass(frozen=True, slots=True)
class FromRouter:
    router_id: RouterId
    message: Submit | Cancel


@dataclass(frozen=True, slots=True)
class RouterAttached:
    """A router's new stream; whatever it does not name in `live` is aborted."""

    router_id: RouterId
    live: tuple[RequestKey, ...]


@dataclass(frozen=True, slots=True)
class RouterGone:
    """A router stayed away past its grace: all its requests are aborted."""

    router_id: RouterId


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no further requests; what runs may end."""


Event = FromRouter | RouterAttached | RouterGone | Drain | LinkEvent


@dataclass(slots=True)
class Effects:
    """What a step wants done outside: records for routers, messages for peers, dials."""

    records: dict[RouterId, list[OutputRecord]] = field(default_factory=dict)
    statuses: list[tuple[WorkerIdentity, LeaseStatus]] = field(default_factory=list)
    messages: list[tuple[WorkerIdentity, ReaderMessage]] = field(default_factory=list)
    dials: list[tuple[WorkerIdentity, str]] = field(default_factory=list)
    load: LoadReport | None = None

    def __bool__(self) -> bool:
        return bool(
            self.records or self.statuses or self.messages or self.dials or self.load is not None
        )

    def record(self, router_id: RouterId, record: OutputRecord) -> None:
        self.records.setdefault(router_id, []).append(record)


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

    def check_invariants(self) -> None:
        """Raise AssertionError unless every slot is accounted for (DESIGN §6)."""

    def close(self) -> None:
        """The last call: let go of what other threads are about to tear down."""

    @property
    def num_requests(self) -> int:
        """Requests that have not ended here."""
