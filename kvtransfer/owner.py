"""The owner's side of hand-overs: who is told which handles, and how far they are readable.

    offered    the request is here, and with it the key that grants are made with
    open       its slots are pinned by a lease; its reader is told handles once it showed its grant
    ended      once, by one of `LeaseEnd`

A prefill worker leases the prompt that it computes; a decode worker leases a sequence that moves
away. What is said of a lease is cumulative, so a claim that comes again is answered with all of it.
Engine thread only; nothing here waits.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from typing import Final

from baton.common import metric_names as names
from baton.common.clock import Clock
from baton.common.errors import BatonError, GrantRefused, LeaseLost
from baton.common.ids import BlockHandle, Generation, RequestKey, RouterId, Slot, WorkerIdentity
from baton.common.messages import (
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseRow,
    LeaseState,
    LeaseStatus,
)
from baton.common.timing import Timing
from baton.kvtransfer.endings import Endings
from baton.kvtransfer.events import FromReader, LinkClosed, LinkOpened
from baton.kvtransfer.grant import claim_mac, handles_mac
from baton.kvtransfer.ledger import LeaseEnd, Ledger, Pins

log = logging.getLogger(__name__)

MAX_EARLY_CLAIMS: Final = 65_536
_COUNTER: Final = {
    LeaseEnd.JOINED: names.LEASES_RELEASED,
    LeaseEnd.GIVEN_UP: names.LEASES_RELEASED,
    LeaseEnd.EXPIRED: names.LEASES_EXPIRED,
    LeaseEnd.LINK_LOST: names.LEASES_LINK_LOST,
    LeaseEnd.CANCELLED: names.LEASES_CANCELLED,
    LeaseEnd.REAPED: names.LEASES_REAPED,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Offer:
    """What this worker offers to one reader; the fields below `why` change as it goes on."""

    key: RequestKey
    reader: WorkerIdentity
    grant_key: bytes = field(repr=False)
    router_id: RouterId
    request_id: str
    why: str
    handles: tuple[BlockHandle, ...] = field(default=(), repr=False)
    mac: bytes = b""
    kv_tokens: int = 0
    readable_tokens: int = 0
    cached_tokens: int = 0
    output_position: int = 0
    output_tokens: tuple[int, ...] = field(default=(), repr=False)
    finished: bool = False
    # One per readable block, if this worker keeps digests.
    digests: list[int] = field(default_factory=list, repr=False)
    is_open: bool = False
    # The reader has shown its grant.
    is_claimed: bool = False

    def status(self, *, with_handles: bool, first_digest: int = 0) -> LeaseStatus:
        """All that is known of the lease; handles and old digests may be left out."""
        if not self.is_open:
            return LeaseStatus(key=self.key, state=LeaseState.NOT_YET)
        handles = self.handles if with_handles else ()
        return LeaseStatus(
            key=self.key,
            state=LeaseState.OPEN,
            slots=tuple(handle.slot for handle in handles),
            generations=tuple(handle.generation for handle in handles),
            mac=self.mac if with_handles else b"",
            kv_tokens=self.kv_tokens,
            readable_tokens=self.readable_tokens,
            output_position=self.output_position,
            output_tokens=self.output_tokens,
            finished=self.finished,
            cached_tokens=self.cached_tokens,
            first_digest=first_digest,
            digests=tuple(self.digests[first_digest:]),
        )


class LeaseOwner:
    """`ended` is called when a lease ends without this worker's own doing; `send` reaches readers.

    `word` is a slot's current generation, `block_bytes` the size of a block.
    """

    def __init__(
        self,
        pins: Pins,
        *,
        identity: WorkerIdentity,
        word: Callable[[Slot], Generation],
        block_bytes: int,
        timing: Timing,
        clock: Clock,
        endings: Endings,
        send: Callable[[WorkerIdentity, LeaseStatus], None],
        ended: Callable[[RequestKey, LeaseEnd, LeaseRelease | None], None],
    ) -> None:
        self._identity = identity
        self._word = word
        self._block_bytes = block_bytes
        self._timing = timing
        self._clock = clock
        self._endings = endings
        self._send = send
        self._ended = ended
        self._ledger = Ledger(pins, timing)
        self._offers: dict[RequestKey, Offer] = {}
        # Claims that came before their request: the reader's link may be faster than the router's.
        self._early: dict[RequestKey, tuple[WorkerIdentity, bytes, float]] = {}
        self.counters: Counter[str] = Counter()

    @property
    def leased(self) -> list[list[Slot]]:
        """The slots of each lease."""
        return [lease.slots for lease in self._ledger]

    def num_digests(self, key: RequestKey) -> int:
        """Leading blocks whose digests were announced."""
        return len(self._offers[key].digests)

    def offer(self, offer: Offer) -> None:
        """The request is here: its reader may show its grant from now on."""
        assert offer.key not in self._offers, f"{offer.key} is offered twice"
        self._offers[offer.key] = offer
        early = self._early.pop(offer.key, None)
        if early is not None:
            self._claimed(early[0], LeaseClaim(offer.key, early[1]))

    def open(
        self, key: RequestKey, slots: Sequence[Slot], *, kv_tokens: int, cached_tokens: int
    ) -> None:
        """Pin the slots for the reader and tell it their handles, if it has shown its grant."""
        offer = self._offers[key]
        offer.handles = tuple(BlockHandle(slot, self._word(slot)) for slot in slots)
        offer.mac = handles_mac(
            offer.grant_key,
            key,
            reader=offer.reader,
            owner=self._identity,
            slots=[handle.slot for handle in offer.handles],
            generations=[handle.generation for handle in offer.handles],
        )
        offer.kv_tokens, offer.cached_tokens, offer.is_open = kv_tokens, cached_tokens, True
        now = self._clock.monotonic()
        self._ledger.open(key, offer.reader, offer.handles, block_bytes=self._block_bytes, now=now)
        self.counters[names.LEASES_OPENED] += 1
        self._tell(offer, with_handles=True)

    def readable(self, key: RequestKey, num_tokens: int, digests: Sequence[int] = ()) -> None:
        """`[0, num_tokens)` may be read now; `digests` are those of the blocks that became so."""
        offer = self._offers.get(key)
        if offer is not None:
            assert num_tokens >= offer.readable_tokens, "what is readable stays so"
            first_digest = len(offer.digests)
            offer.readable_tokens = num_tokens
            offer.digests.extend(digests)
            self._tell(offer, with_handles=False, first_digest=first_digest)

    def complete(
        self,
        key: RequestKey,
        *,
        output_position: int,
        output_tokens: Sequence[int],
        finished: bool = False,
        digests: Sequence[int] = (),
    ) -> None:
        """All is readable; these output tokens follow it."""
        offer = self._offers.get(key)
        if offer is not None:
            offer.output_position, offer.finished = output_position, finished
            offer.output_tokens = tuple(output_tokens)
            self.readable(key, offer.kv_tokens, digests)

    def end(self, key: RequestKey, error: BatonError | None) -> None:
        """This worker is done with the request; with an error its reader is told. Idempotent."""
        offer = self._offers.pop(key, None)
        if offer is None:
            return
        if self._ledger.end(key) is not None and error is not None:
            self.counters[_COUNTER[LeaseEnd.CANCELLED]] += 1
        now = self._clock.monotonic()
        self._endings.remember(key, now=now, is_well=offer.finished)
        if error is not None:
            status = LeaseStatus(key=key, state=LeaseState.ENDED, error=error)
            self._send(offer.reader, status)

    def handle(self, event: FromReader | LinkOpened | LinkClosed) -> None:
        """What readers and their links say. Never raises for it."""
        now = self._clock.monotonic()
        match event:
            case FromReader(reader, LeaseClaim() as claim):
                self._claimed(reader, claim)
            case FromReader(reader, LeaseRenew(keys)):
                for key in keys:
                    if not self._ledger.renew(key, reader, now=now):
                        self._not_renewed(reader, key)
            case FromReader(reader, LeaseRelease() as release):
                self._released(reader, release)
            case LinkOpened(reader):
                self._ledger.link_restored(reader, now=now)
            case LinkClosed(reader):
                self._ledger.link_lost(reader, now=now)

    def sweep(self, now: float) -> None:
        """End what was not renewed, or whose link stayed away, and forget claims of nobody."""
        for lease, how in self._ledger.sweep(now=now):
            log.warning("lease %s of %s ended: %s", lease.key, lease.reader, how.value)
            self._lost(lease.key, how, None)
        while self._early:
            key, (_, _, came_at) = next(iter(self._early.items()))
            if now - came_at < self._timing.lease_term_s and len(self._early) <= MAX_EARLY_CLAIMS:
                return
            del self._early[key]

    def forgive(self, seconds: float) -> None:
        """Time in which this worker could neither tell nor hear anything counts against nobody."""
        if seconds > 0:
            self._ledger.forgive(seconds)

    def reap(self, key: RequestKey) -> bool:
        """End a lease at once because an operator says so; whether there was one."""
        if self._ledger.end(key) is None:
            return False
        log.warning("lease %s was reaped by an operator", key)
        self._lost(key, LeaseEnd.REAPED, None)
        return True

    def rows(self, now: float) -> tuple[LeaseRow, ...]:
        """The ledger as an operator reads it."""
        rows = []
        for lease in self._ledger:
            offer = self._offers[lease.key]
            row = self._ledger.row(lease, self._identity, now=now)
            rows.append(
                replace(row, request_id=offer.request_id, why=offer.why, router=offer.router_id)
            )
        return tuple(rows)

    # --- inside ---

    def _claimed(self, reader: WorkerIdentity, claim: LeaseClaim) -> None:
        offer = self._offers.get(claim.key)
        if offer is None:
            self._claimed_of_nobody(reader, claim)
        elif self._is_granted(offer, reader, claim.mac):
            offer.is_claimed = True
            # A reader that still connects to the fabric claims and does not know what to renew.
            self._ledger.renew(claim.key, reader, now=self._clock.monotonic())
            self._tell(offer, with_handles=True)
        else:
            log.warning("%s claims lease %s without its grant", reader, claim.key)
            self.counters[names.CLAIMS_REFUSED] += 1
            refused = GrantRefused(f"{reader} was not granted this lease")
            self._send(reader, LeaseStatus(key=claim.key, state=LeaseState.ENDED, error=refused))

    def _is_granted(self, offer: Offer, reader: WorkerIdentity, mac: bytes) -> bool:
        expected = claim_mac(offer.grant_key, offer.key, reader=reader, owner=self._identity)
        return offer.reader == reader and compare_digest(mac, expected)

    def _claimed_of_nobody(self, reader: WorkerIdentity, claim: LeaseClaim) -> None:
        if not self._endings.has_ended(claim.key):
            self._early[claim.key] = (reader, claim.mac, self._clock.monotonic())
        self._not_renewed(reader, claim.key)

    def _not_renewed(self, reader: WorkerIdentity, key: RequestKey) -> None:
        """Not yet known is never *gone*; handles are told for a claim alone."""
        offer = self._offers.get(key)
        is_offered = offer is not None and offer.reader == reader
        if is_offered or not self._endings.has_ended(key):
            self._send(reader, LeaseStatus(key=key, state=LeaseState.NOT_YET))
            return
        is_well = self._endings.has_ended_well(key)
        gone = None if is_well else LeaseLost(f"the lease has ended on {self._identity}")
        self._send(reader, LeaseStatus(key=key, state=LeaseState.ENDED, error=gone))

    def _released(self, reader: WorkerIdentity, release: LeaseRelease) -> None:
        offer = self._offers.get(release.key)
        early = self._early.get(release.key)
        if early is not None and early[0] == reader:
            del self._early[release.key]
        if offer is None or offer.reader != reader:
            return
        self._ledger.end(release.key)
        leased = {handle.slot for handle in offer.handles}
        release = replace(
            release, bad_slots=tuple(slot for slot in release.bad_slots if slot in leased)
        )
        how = LeaseEnd.JOINED if release.joined else LeaseEnd.GIVEN_UP
        self._lost(release.key, how, release)

    def _lost(self, key: RequestKey, how: LeaseEnd, release: LeaseRelease | None) -> None:
        """The lease ended from outside; what that means for the request is the role's business."""
        offer = self._offers.pop(key)
        self.counters[_COUNTER[how]] += 1
        self._endings.remember(key, now=self._clock.monotonic())
        if release is None:
            error = LeaseLost(how.value)
            self._send(offer.reader, LeaseStatus(key=key, state=LeaseState.ENDED, error=error))
        self._ended(key, how, release)

    def _tell(self, offer: Offer, *, with_handles: bool, first_digest: int = 0) -> None:
        if offer.is_claimed:
            status = offer.status(with_handles=with_handles, first_digest=first_digest)
            self._send(offer.reader, status)
