"""The owner's table of leases: who may read which slots, for which request, until when.

Life of a lease:

1. The owner opens it when the bytes have a place; the slots are pinned. The first term is short.
2. The reader renews it from the moment it knows the request.
3. It ends once, by one of `LeaseEnd`; the slots are unpinned.

Leases are for progress: they keep bytes in place. Safety never rests on them; that is the fence's.
Only the engine thread touches a ledger.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton.common.ids import BlockHandle, RequestKey, Slot, WorkerIdentity
from baton.common.messages import LeaseRow
from baton.common.timing import Timing


class LeaseEnd(Enum):
    """Why a lease ended; an operator reads these apart from failures of the transport."""

    JOINED = "the reader has the bytes"
    GIVEN_UP = "the reader gave up"
    EXPIRED = "the reader did not renew it in time"
    LINK_LOST = "the reader's link was lost for longer than its grace"
    CANCELLED = "the owner ended the request"
    REAPED = "an operator ended it"


class Pins(Protocol):
    """Reference counts of slots: a pinned slot is never evicted and keeps its generation."""

    def pin(self, slots: Iterable[Slot]) -> None: ...

    def unpin(self, slots: Iterable[Slot]) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """A promise to keep `handles` readable by `reader` until `expires_at` (monotonic seconds)."""

    key: RequestKey
    reader: WorkerIdentity
    handles: tuple[BlockHandle, ...]
    num_bytes: int
    opened_at: float
    expires_at: float
    link_grace_s: float
    # Set while the reader's link is down; the lease ends when the grace has passed.
    link_lost_at: float | None = None

    @property
    def slots(self) -> list[Slot]:
        return [handle.slot for handle in self.handles]

    def ends_at(self) -> float:
        """When the lease ends if nothing more is heard of the reader."""
        if self.link_lost_at is None:
            return self.expires_at
        return min(self.expires_at, self.link_lost_at + self.link_grace_s)


class Ledger:
    """All open leases of this worker, by request key."""

    def __init__(self, pins: Pins, timing: Timing) -> None:
        self._pins = pins
        self._timing = timing
        self._leases: dict[RequestKey, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, key: RequestKey) -> Lease | None:
        return self._leases.get(key)

    def open(
        self,
        key: RequestKey,
        reader: WorkerIdentity,
        handles: tuple[BlockHandle, ...],
        *,
        block_bytes: int,
        now: float,
    ) -> Lease:
        """Pin the handles' slots for the reader. A key has at most one lease."""
        assert key not in self._leases, f"lease {key} is open already"
        lease = Lease(
            key=key,
            reader=reader,
            handles=handles,
            num_bytes=len(handles) * block_bytes,
            opened_at=now,
            expires_at=now + self._timing.lease_first_term_s,
            link_grace_s=self._timing.link_grace_s,
        )
        self._pins.pin(lease.slots)
        self._leases[key] = lease
        return lease

    def renew(self, key: RequestKey, reader: WorkerIdentity, *, now: float) -> bool:
        """Whether the lease is open for this reader; if so its term starts anew."""
        lease = self._leases.get(key)
        if lease is None or lease.reader != reader:
            return False
        # An expired lease stays expired even when its sweep has not come yet.
        if now >= lease.ends_at():
            return False
        lease.expires_at = now + self._timing.lease_term_s
        return True

    def end(self, key: RequestKey) -> Lease | None:
        """Unpin and forget the lease; None when there is none (ending twice is no error)."""
        lease = self._leases.pop(key, None)
        if lease is not None:
            self._pins.unpin(lease.slots)
        return lease

    def link_lost(self, reader: WorkerIdentity, *, now: float) -> None:
        """The reader's link broke: its leases live for the grace, unless it comes back."""
        for lease in self._leases.values():
            if lease.reader == reader and lease.link_lost_at is None:
                lease.link_lost_at = now

    def link_restored(self, reader: WorkerIdentity, *, now: float) -> None:
        """The reader is back in time for those of its leases whose grace still runs."""
        for lease in self._leases.values():
            if lease.reader == reader and now < lease.ends_at():
                lease.link_lost_at = None

    def forgive(self, seconds: float) -> None:
        """Time in which this worker could neither tell nor hear anything counts against nobody."""
        for lease in self._leases.values():
            lease.expires_at += seconds
            if lease.link_lost_at is not None:
                lease.link_lost_at += seconds

    def sweep(self, *, now: float) -> list[tuple[Lease, LeaseEnd]]:
        """End every lease whose time has come, whatever their order, and say why."""
        over = [lease for lease in self._leases.values() if now >= lease.ends_at()]
        for lease in over:
            self.end(lease.key)
        return [
            (lease, LeaseEnd.EXPIRED if now >= lease.expires_at else LeaseEnd.LINK_LOST)
            for lease in over
        ]

    def row(self, lease: Lease, owner: WorkerIdentity, *, now: float) -> LeaseRow:
        """A lease as an operator reads it."""
        return LeaseRow(
            key=lease.key,
            owner=str(owner),
            reader=str(lease.reader),
            blocks=len(lease.handles),
            num_bytes=lease.num_bytes,
            age_s=now - lease.opened_at,
            expires_in_s=lease.ends_at() - now,
            state="open" if lease.link_lost_at is None else "link lost",
        )
