"""The owner's side of hand-overs: who is told what, and how a lease ends."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from baton.common import metric_names as names
from baton.common.clock import ManualClock
from baton.common.errors import Cancelled
from baton.common.ids import (
    Epoch,
    Generation,
    RequestKey,
    RouterId,
    Slot,
    TransferId,
    WorkerId,
    WorkerIdentity,
)
from baton.common.messages import LeaseClaim, LeaseRelease, LeaseRenew, LeaseState, LeaseStatus
from baton.common.timing import DEFAULT_TIMING
from baton.kvtransfer.endings import Endings
from baton.kvtransfer.events import FromReader, LinkClosed, LinkOpened
from baton.kvtransfer.grant import claim_mac, handles_mac
from baton.kvtransfer.ledger import LeaseEnd
from baton.kvtransfer.owner import LeaseOwner, Offer

OWNER = WorkerIdentity(WorkerId("p0"), Epoch(1), "a")
READER = WorkerIdentity(WorkerId("d0"), Epoch(2), "b")
STRANGER = WorkerIdentity(WorkerId("d0"), Epoch(3), "c")
KEY = RequestKey(TransferId(bytes(range(16))), 1)
GRANT = b"only three know it"
SLOTS = [Slot(4), Slot(2), Slot(7)]


class Desk:
    """A lease owner, and everything that it pinned, said and reported."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.pinned: list[Slot] = []
        self.said: list[tuple[WorkerIdentity, LeaseStatus]] = []
        self.ended: list[tuple[RequestKey, LeaseEnd, LeaseRelease | None]] = []
        self.owner = LeaseOwner(
            self,
            identity=OWNER,
            word=lambda slot: Generation(1000 + slot),
            block_bytes=64,
            timing=DEFAULT_TIMING,
            clock=self.clock,
            endings=Endings(DEFAULT_TIMING.lease_term_s),
            send=lambda reader, status: self.said.append((reader, status)),
            ended=lambda key, how, release: self.ended.append((key, how, release)),
        )

    def pin(self, slots: Iterable[Slot]) -> None:
        self.pinned += slots

    def unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.pinned.remove(slot)

    def offer(self, key: RequestKey = KEY) -> None:
        self.owner.offer(
            Offer(
                key=key,
                reader=READER,
                grant_key=GRANT,
                router_id=RouterId("r"),
                request_id="req-1",
                why="prefill",
            )
        )

    def open(self) -> None:
        self.owner.open(KEY, SLOTS, kv_tokens=80, cached_tokens=32)

    def claim(self, reader: WorkerIdentity = READER, mac: bytes | None = None) -> None:
        granted = claim_mac(GRANT, KEY, reader=reader, owner=OWNER)
        self.hear(LeaseClaim(KEY, granted if mac is None else mac), reader)

    def hear(
        self, message: LeaseClaim | LeaseRenew | LeaseRelease, reader: WorkerIdentity = READER
    ) -> None:
        self.owner.handle(FromReader(reader, message))

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.owner.sweep(self.clock.monotonic())

    def states(self) -> list[LeaseState]:
        return [status.state for _, status in self.said]

    @property
    def last(self) -> LeaseStatus:
        return self.said[-1][1]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_handles_are_told_to_the_reader_that_shows_its_grant(desk: Desk) -> None:
    desk.offer()
    desk.open()
    assert desk.said == [], "nobody has claimed it"
    desk.claim()
    ((reader, status),) = desk.said
    assert reader == READER
    assert (list(status.slots), status.kv_tokens, status.cached_tokens) == (SLOTS, 80, 32)
    assert status.generations == tuple(Generation(1000 + slot) for slot in SLOTS)
    assert status.mac == handles_mac(
        GRANT, KEY, reader=READER, owner=OWNER, slots=SLOTS, generations=status.generations
    )


@pytest.mark.parametrize("wrong", ["another reader", "no mac", "another key", "another attempt"])
def test_nobody_else_learns_a_handle(desk: Desk, wrong: str) -> None:
    desk.offer()
    desk.open()
    reader = STRANGER if wrong == "another reader" else READER
    mac = {
        "another reader": claim_mac(GRANT, KEY, reader=STRANGER, owner=OWNER),
        "no mac": b"",
        "another key": claim_mac(b"guessed", KEY, reader=READER, owner=OWNER),
        "another attempt": claim_mac(GRANT, replace(KEY, attempt=2), reader=READER, owner=OWNER),
    }[wrong]
    desk.claim(reader, mac)
    desk.owner.readable(KEY, 32)
    ((told, status),) = desk.said
    assert (told, status.state, status.slots) == (reader, LeaseState.ENDED, ())
    assert status.error is not None
    assert status.error.reason == "grant_refused"
    assert desk.owner.counters[names.CLAIMS_REFUSED] == 1
    assert desk.pinned == SLOTS, "a refused claim ends nobody's lease"


def test_a_claim_may_overtake_the_request(desk: Desk) -> None:
    desk.claim()
    assert desk.states() == [LeaseState.NOT_YET]
    desk.offer()
    desk.open()
    assert desk.states()[-1] is LeaseState.OPEN
    assert list(desk.last.slots) == SLOTS


def test_a_forged_claim_that_overtakes_the_request_gains_nothing(desk: Desk) -> None:
    desk.claim(mac=b"forged")
    desk.offer()
    desk.open()
    assert all(not status.slots for _, status in desk.said)


def test_a_renewal_of_what_is_not_known_yet_is_never_answered_gone(desk: Desk) -> None:
    desk.hear(LeaseRenew((KEY,)))
    desk.offer()
    desk.hear(LeaseRenew((KEY,)))
    assert desk.states() == [LeaseState.NOT_YET, LeaseState.NOT_YET]


def test_a_claim_renews_what_is_open(desk: Desk) -> None:
    """A reader that takes long to connect cannot read what it is told, and must not lose it."""
    desk.offer()
    desk.open()
    for _ in range(3):
        desk.wait(DEFAULT_TIMING.lease_first_term_s - 1)
        desk.claim()
    assert desk.ended == []
    desk.claim(mac=b"forged")
    desk.wait(DEFAULT_TIMING.lease_term_s)
    assert [how for _, how, _ in desk.ended] == [LeaseEnd.EXPIRED]


def test_a_renewal_is_answered_with_no_handles(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.claim()
    desk.wait(DEFAULT_TIMING.lease_term_s)
    desk.hear(LeaseRenew((KEY,)))
    assert (desk.last.state, desk.last.slots) == (LeaseState.ENDED, ())


def test_announcements_tell_progress_once_and_a_new_claim_all_of_it(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.claim()
    desk.owner.readable(KEY, 32, digests=[11])
    assert (desk.last.slots, desk.last.readable_tokens, desk.last.digests) == ((), 32, (11,))
    desk.owner.complete(KEY, output_position=0, output_tokens=[5], digests=[12, 13])
    assert (desk.last.first_digest, desk.last.digests) == (1, (12, 13))
    assert (desk.last.readable_tokens, desk.last.output_tokens) == (80, (5,))
    desk.claim()
    assert list(desk.last.slots) == SLOTS
    assert (desk.last.first_digest, desk.last.digests) == (0, (11, 12, 13))


@pytest.mark.parametrize("joined", [True, False])
def test_a_release_unpins_and_says_whether_the_reader_has_the_bytes(
    desk: Desk, joined: bool
) -> None:
    desk.offer()
    desk.open()
    desk.claim()
    desk.hear(LeaseRelease(KEY, joined=joined, bad_slots=(Slot(2), Slot(5))))
    ((key, how, release),) = desk.ended
    assert (key, how) == (KEY, LeaseEnd.JOINED if joined else LeaseEnd.GIVEN_UP)
    assert release is not None
    assert release.bad_slots == (2,), "only slots of the lease are the reader's to judge"
    assert desk.pinned == []
    assert desk.owner.counters[names.LEASES_RELEASED] == 1


def test_a_stranger_releases_nothing(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.hear(LeaseRelease(KEY), STRANGER)
    assert desk.pinned == SLOTS
    assert desk.ended == []


def test_expiry_and_a_lost_link_are_counted_apart(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.claim()
    desk.wait(DEFAULT_TIMING.lease_term_s)
    assert [how for _, how, _ in desk.ended] == [LeaseEnd.EXPIRED]
    assert desk.last.state is LeaseState.ENDED
    counters = desk.owner.counters
    assert (counters[names.LEASES_EXPIRED], counters[names.LEASES_LINK_LOST]) == (1, 0)
    other = replace(KEY, attempt=2)
    desk.offer(other)
    desk.owner.open(other, SLOTS, kv_tokens=80, cached_tokens=0)
    desk.hear(LeaseRenew((other,)))
    desk.owner.handle(LinkClosed(READER))
    desk.wait(DEFAULT_TIMING.link_grace_s)
    assert (counters[names.LEASES_EXPIRED], counters[names.LEASES_LINK_LOST]) == (1, 1)


def test_a_link_that_comes_back_in_time_ends_nothing(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.hear(LeaseRenew((KEY,)))
    desk.owner.handle(LinkClosed(READER))
    desk.wait(DEFAULT_TIMING.link_grace_s - 0.1)
    desk.owner.handle(LinkOpened(READER))
    desk.wait(DEFAULT_TIMING.link_grace_s)
    assert desk.ended == []
    assert desk.pinned == SLOTS


def test_an_operator_reaps_a_lease(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.claim()
    assert desk.owner.reap(KEY)
    assert not desk.owner.reap(KEY)
    assert [how for _, how, _ in desk.ended] == [LeaseEnd.REAPED]
    assert (desk.pinned, desk.last.state) == ([], LeaseState.ENDED)
    assert desk.owner.counters[names.LEASES_REAPED] == 1


def test_what_ended_is_over_for_late_claims(desk: Desk) -> None:
    desk.offer()
    desk.open()
    desk.owner.end(KEY, Cancelled("the client went away"))
    desk.owner.end(KEY, Cancelled("twice is no error"))
    desk.claim()
    assert desk.states() == [LeaseState.ENDED, LeaseState.ENDED]
    assert desk.last.error is not None
    assert desk.last.error.reason == "lease_lost"
    assert desk.pinned == []


def test_a_claim_after_the_whole_answer_is_told_of_no_error(desk: Desk) -> None:
    """The request ended with its first token before its reader's claim arrived."""
    desk.offer()
    desk.open()
    desk.owner.complete(KEY, output_position=0, output_tokens=[3], finished=True)
    desk.owner.end(KEY, None)
    desk.claim()
    assert (desk.last.state, desk.last.error) == (LeaseState.ENDED, None)


def test_claims_of_nobody_are_forgotten(desk: Desk) -> None:
    desk.claim()
    desk.wait(DEFAULT_TIMING.lease_term_s)
    desk.offer()
    desk.open()
    assert desk.states() == [LeaseState.NOT_YET], "the early claim is gone; the reader claims anew"
