"""Leases end once, on time, and whatever happens their pins come out even."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from baton.common.clock import ManualClock
from baton.common.ids import (
    BlockHandle,
    Epoch,
    Generation,
    RequestKey,
    Slot,
    TransferId,
    WorkerId,
    WorkerIdentity,
)
from baton.common.timing import DEFAULT_TIMING
from baton.kvtransfer.ledger import Lease, LeaseEnd, Ledger

OWNER = WorkerIdentity(WorkerId("p0"), Epoch(1), "a")
READER = WorkerIdentity(WorkerId("d0"), Epoch(2), "b")
OTHER = WorkerIdentity(WorkerId("d1"), Epoch(3), "c")
BLOCK_BYTES = 100
FIRST_TERM_S = DEFAULT_TIMING.lease_first_term_s
TERM_S = DEFAULT_TIMING.lease_term_s
LINK_GRACE_S = DEFAULT_TIMING.link_grace_s


class CountedPins:
    """How often each slot is pinned; never less than not at all."""

    def __init__(self) -> None:
        self.counts: Counter[Slot] = Counter()

    def pin(self, slots: Iterable[Slot]) -> None:
        self.counts.update(slots)

    def unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            assert self.counts[slot] > 0, f"slot {slot} was unpinned once too often"
            self.counts[slot] -= 1

    @property
    def total(self) -> int:
        return self.counts.total()


def key(number: int, attempt: int = 1) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), attempt)


def handles(*slots: int) -> tuple[BlockHandle, ...]:
    return tuple(BlockHandle(Slot(slot), Generation(1000 + slot)) for slot in slots)


class Desk:
    """A ledger with its pins and its clock."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.pins = CountedPins()
        self.ledger = Ledger(self.pins, DEFAULT_TIMING)

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def open(self, number: int, *slots: int, reader: WorkerIdentity = READER) -> Lease:
        return self.ledger.open(
            key(number), reader, handles(*slots), block_bytes=BLOCK_BYTES, now=self.now
        )

    def renew(self, number: int, reader: WorkerIdentity = READER) -> bool:
        return self.ledger.renew(key(number), reader, now=self.now)

    def swept(self) -> list[RequestKey]:
        return [lease.key for lease, _ in self.ledger.sweep(now=self.now)]

    def ends(self) -> list[LeaseEnd]:
        return [how for _, how in self.ledger.sweep(now=self.now)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_open_lease_pins_its_slots_for_the_first_term(desk: Desk) -> None:
    lease = desk.open(1, 4, 2)
    assert dict(desk.pins.counts) == {Slot(4): 1, Slot(2): 1}
    assert lease.ends_at() == desk.now + FIRST_TERM_S
    desk.clock.advance(FIRST_TERM_S - 0.001)
    assert desk.swept() == []
    desk.clock.advance(0.001)
    assert desk.swept() == [key(1)]
    assert (desk.pins.total, len(desk.ledger)) == (0, 0)


def test_each_renewal_starts_a_whole_term(desk: Desk) -> None:
    desk.open(1, 0)
    for _ in range(3):
        desk.clock.advance(FIRST_TERM_S - 1)
        assert desk.renew(1)
    desk.clock.advance(TERM_S - 0.001)
    assert desk.swept() == []
    desk.clock.advance(0.001)
    assert desk.swept() == [key(1)]


def test_only_its_reader_renews_a_lease(desk: Desk) -> None:
    desk.open(1, 0)
    assert not desk.renew(1, OTHER)
    assert not desk.renew(2)
    desk.clock.advance(FIRST_TERM_S)
    assert desk.swept() == [key(1)]


def test_an_expired_lease_is_not_revived_before_its_sweep(desk: Desk) -> None:
    desk.open(1, 0)
    desk.clock.advance(FIRST_TERM_S)
    assert not desk.renew(1)
    assert desk.swept() == [key(1)]
    assert not desk.renew(1)


def test_one_sweep_ends_all_whose_time_has_come(desk: Desk) -> None:
    desk.open(1, 0, 1)
    desk.open(2, 1, 2)
    desk.clock.advance(3.0)
    desk.open(3, 2, 3)
    assert desk.renew(2)
    desk.clock.advance(FIRST_TERM_S)
    assert desk.swept() == [key(1), key(3)]
    assert {slot for slot, count in desk.pins.counts.items() if count} == {1, 2}


def test_a_slot_stays_pinned_until_its_last_lease_ends(desk: Desk) -> None:
    desk.open(1, 7)
    desk.open(2, 7, reader=OTHER)
    desk.ledger.end(key(1))
    assert desk.pins.counts[Slot(7)] == 1
    desk.ledger.end(key(2))
    assert desk.pins.total == 0


def test_a_release_ends_once(desk: Desk) -> None:
    lease = desk.open(1, 0)
    assert desk.ledger.end(key(1)) is lease
    assert desk.ledger.end(key(1)) is None
    assert desk.ledger.get(key(1)) is None
    assert desk.pins.total == 0


def test_a_lost_link_leaves_the_grace(desk: Desk) -> None:
    desk.open(1, 0)
    desk.open(2, 1, reader=OTHER)
    assert desk.renew(1)
    assert desk.renew(2, OTHER)
    desk.ledger.link_lost(READER, now=desk.now)
    desk.clock.advance(LINK_GRACE_S - 0.001)
    assert desk.swept() == []
    desk.clock.advance(0.001)
    assert desk.swept() == [key(1)], "the other reader's link is up"


def test_the_grace_never_prolongs_a_lease(desk: Desk) -> None:
    lease = desk.open(1, 0)
    desk.clock.advance(FIRST_TERM_S - 1)
    desk.ledger.link_lost(READER, now=desk.now)
    assert lease.ends_at() == lease.expires_at


def test_a_second_loss_does_not_start_the_grace_anew(desk: Desk) -> None:
    lease = desk.open(1, 0)
    assert desk.renew(1)
    desk.ledger.link_lost(READER, now=desk.now)
    ends_at = lease.ends_at()
    desk.clock.advance(2.0)
    desk.ledger.link_lost(READER, now=desk.now)
    assert lease.ends_at() == ends_at


def test_a_restored_link_gives_the_term_back(desk: Desk) -> None:
    lease = desk.open(1, 0)
    assert desk.renew(1)
    desk.ledger.link_lost(READER, now=desk.now)
    desk.clock.advance(LINK_GRACE_S - 0.001)
    desk.ledger.link_restored(READER, now=desk.now)
    assert lease.ends_at() == lease.expires_at
    desk.clock.advance(LINK_GRACE_S)
    assert desk.swept() == []


def test_a_reader_that_comes_back_after_the_grace_revives_nothing(desk: Desk) -> None:
    desk.open(1, 0)
    assert desk.renew(1)
    desk.ledger.link_lost(READER, now=desk.now)
    desk.clock.advance(LINK_GRACE_S)
    desk.ledger.link_restored(READER, now=desk.now)
    assert not desk.renew(1)
    assert desk.swept() == [key(1)]


def test_an_operator_reads_whole_rows(desk: Desk) -> None:
    lease = desk.open(1, 0, 1, 2)
    assert desk.renew(1)
    desk.clock.advance(2.0)
    row = desk.ledger.row(lease, OWNER, now=desk.now)
    assert (row.key, row.owner, row.reader) == (key(1), "p0@1", "d0@2")
    assert (row.blocks, row.num_bytes, row.age_s) == (3, 3 * BLOCK_BYTES, 2.0)
    assert (row.expires_in_s, row.state) == (TERM_S - 2.0, "open")
    desk.ledger.link_lost(READER, now=desk.now)
    row = desk.ledger.row(lease, OWNER, now=desk.now)
    assert (row.expires_in_s, row.state) == (LINK_GRACE_S, "link lost")


def test_an_expiry_is_told_apart_from_a_lost_link(desk: Desk) -> None:
    desk.open(1, 0)
    desk.open(2, 1, reader=OTHER)
    assert desk.renew(2, OTHER)
    desk.ledger.link_lost(OTHER, now=desk.now)
    desk.clock.advance(FIRST_TERM_S)
    assert desk.ends() == [LeaseEnd.EXPIRED, LeaseEnd.LINK_LOST]


class Leases(RuleBasedStateMachine):
    """Any order of opens, renewals, releases, losses and sweeps, with time passing between."""

    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.next_number = 0
        self.over: set[RequestKey] = set()

    @rule(target=opened, slots=st.sets(st.integers(0, 5)), first=st.booleans())
    def open(self, slots: set[int], first: bool) -> tuple[int, WorkerIdentity]:
        reader = READER if first else OTHER
        self.next_number += 1
        self.desk.open(self.next_number, *slots, reader=reader)
        return self.next_number, reader

    @rule(lease=opened)
    def renew(self, lease: tuple[int, WorkerIdentity]) -> None:
        number, reader = lease
        self._note_what_is_over()
        assert self.desk.renew(number, reader) == (key(number) not in self.over)

    @rule(lease=opened)
    def release(self, lease: tuple[int, WorkerIdentity]) -> None:
        self.desk.ledger.end(key(lease[0]))
        self.over.add(key(lease[0]))

    @rule(first=st.booleans())
    def lose(self, first: bool) -> None:
        self.desk.ledger.link_lost(READER if first else OTHER, now=self.desk.now)

    @rule(first=st.booleans())
    def restore(self, first: bool) -> None:
        """Before a sweep perhaps: what is over by then stays over."""
        self._note_what_is_over()
        self.desk.ledger.link_restored(READER if first else OTHER, now=self.desk.now)

    @rule(seconds=st.sampled_from([0.5, 2.5, FIRST_TERM_S, TERM_S]))
    def wait(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self._note_what_is_over()
        self.desk.swept()
        assert self.over.isdisjoint(lease.key for lease in self.desk.ledger)

    def _note_what_is_over(self) -> None:
        late = (lease for lease in self.desk.ledger if self.desk.now >= lease.ends_at())
        self.over.update(lease.key for lease in late)

    @invariant()
    def pins_are_those_of_the_leases(self) -> None:
        expected = Counter(slot for lease in self.desk.ledger for slot in lease.slots)
        assert +self.desk.pins.counts == expected


Leases.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLeases = Leases.TestCase
