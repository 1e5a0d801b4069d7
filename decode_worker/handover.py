"""The reader's side of hand-overs, from the claim of a lease to the join.

1. CLAIMING: the link to the owner is dialled, the lease is claimed with its grant, and renewed.
2. QUEUED: the handles are here; the request still holds nothing.
3. PULLING: its blocks are reserved; what is announced is pulled.
4. The output that follows the KV is known and every block has passed its fence, and its digest
   where both sides keep them: the lease is released and the request joins.

A link that breaks is dialled again; only when it stays away past its grace is the owner lost.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from typing import Final

from baton.common import metric_names as names
from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    DigestMismatch,
    FenceFailed,
    GrantRefused,
    HandshakeMismatch,
    LeaseLost,
    PeerLost,
    TransferTimeout,
)
from baton.common.failpoints import reach
from baton.common.ids import BlockHandle, RequestKey, Slot, WorkerIdentity
from baton.common.messages import (
    HandoverReport,
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseState,
    LeaseStatus,
)
from baton.common.timing import Timing
from baton.decode_worker.lease_check import misfit
from baton.decode_worker.pull import Pull
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine
from baton.kvtransfer.grant import claim_mac, handles_mac
from baton.kvtransfer.link_codec import ReaderMessage, merge_status
from baton.kvtransfer.open_reads import OpenReads
from baton.kvtransfer.transport.base import PeerReader
from baton.worker.admission import Limits
from baton.worker.integrity import Integrity

log = logging.getLogger(__name__)

# Of the pool, per peer.
MAX_QUARANTINED_SHARE: Final = 0.05
# Of a link's grace, between two dials.
REDIAL_SHARE: Final = 0.05


@dataclass(slots=True, eq=False)
class _Link:
    """One owner as this worker sees it; `lost_at` runs while its link is down."""

    address: str
    peer: PeerReader | None = None
    lost_at: float | None = None
    redial_at: float = 0.0


class Outward:
    """What hand-overs ask of the world; called on the engine thread."""

    def __init__(
        self,
        *,
        send: Callable[[WorkerIdentity, ReaderMessage], None],
        dial: Callable[[WorkerIdentity, str], None],
        hang_up: Callable[[WorkerIdentity], None],
        end: Callable[[DecodeRequest, BatonError | None], None],
    ) -> None:
        self.send = send
        self.dial = dial
        self.hang_up = hang_up
        self.end = end


class Handovers:
    """All requests that have not joined. Engine thread only."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        requests: dict[RequestKey, DecodeRequest],
        limits: Limits,
        outward: Outward,
        integrity: Integrity,
        *,
        identity: WorkerIdentity,
        transport_name: str,
        clock: Clock,
        timing: Timing,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._requests = requests
        self._limits = limits
        self._outward = outward
        self._integrity = integrity
        self._identity = identity
        self._transport_name = transport_name
        self._clock = clock
        self._timing = timing
        self._links: dict[WorkerIdentity, _Link] = {}
        self.reads = OpenReads(engine.kv, timing)
        # In a small pool one prompt is more than that share, and may well be cancelled.
        self._max_quarantined = max(
            int(MAX_QUARANTINED_SHARE * engine.num_blocks),
            limits.num_blocks_for(limits.max_model_len),
        )
        self.counters: Counter[str] = Counter()

    @property
    def peers(self) -> dict[WorkerIdentity, PeerReader]:
        """The owners that blocks can be read from now."""
        return {owner: link.peer for owner, link in self._links.items() if link.peer is not None}

    # --- links ---

    def start(self, request: DecodeRequest) -> None:
        """Dial the request's owner and claim its lease."""
        assert request.owner is not None, "only what has an owner is handed over"
        link = self._links.setdefault(request.owner, _Link(request.owner_address))
        link.address = request.owner_address
        self._outward.dial(request.owner, link.address)
        self._claim(request, request.owner)

    def connected(self, owner: WorkerIdentity, peer: PeerReader) -> None:
        """The link is up, perhaps again: what is claimed of this owner is claimed again."""
        if peer.is_closed:
            # Given up while the link came back: the next dial begins anew.
            self._outward.hang_up(owner)
            return
        link = self._links.setdefault(owner, _Link(""))
        link.peer, link.lost_at = peer, None
        for request in self._waiting_for(owner):
            self._claim(request, owner)

    def disconnected(self, owner: WorkerIdentity, error: BatonError) -> None:
        """The link broke or did not come up: it is dialled again while somebody waits for it."""
        link = self._links.get(owner)
        if link is None:
            return
        is_final = isinstance(error, HandshakeMismatch) or not link.address
        if is_final or not self._waiting_for(owner):
            self._lose(owner, error)
        elif link.lost_at is None:
            link.lost_at = self._clock.monotonic()
            self._redial(owner, link)

    def close(self) -> None:
        """Destroy the agents that posted reads, so that nothing lands in the arena any more."""
        for peer in self.peers.values():
            peer.close()
        self._links.clear()

    # --- time ---

    def tick(self, now: float) -> None:
        """Follow open reads, bound quarantine, dial again, renew."""
        self.reads.poll()
        self._bound_quarantine(now)
        for owner, link in list(self._links.items()):
            if link.lost_at is None:
                continue
            if now - link.lost_at >= self._timing.link_grace_s:
                self._lose(owner, PeerLost(f"the link to {owner} stayed away past its grace"))
            elif now >= link.redial_at:
                self._redial(owner, link)
        self._renew(now)

    def _renew(self, now: float) -> None:
        renewals: dict[WorkerIdentity, list[RequestKey]] = {}
        for request in self._requests.values():
            if request.has_joined or now < request.renew_at:
                continue
            assert request.owner is not None, "only what is handed over has not joined"
            request.renew_at = now + self._timing.renew_every_s
            if request.state is DecodeState.CLAIMING:
                # The owner may have opened the lease and nobody heard of it: its first term is
                # as short as the time between two renewals.
                request.renew_at = now + self._timing.renew_every_s / 2
                self._claim(request, request.owner)
            else:
                renewals.setdefault(request.owner, []).append(request.key)
        for owner, keys in renewals.items():
            self._outward.send(owner, LeaseRenew(tuple(keys)))

    def _redial(self, owner: WorkerIdentity, link: _Link) -> None:
        link.redial_at = self._clock.monotonic() + REDIAL_SHARE * self._timing.link_grace_s
        self._outward.dial(owner, link.address)

    def _bound_quarantine(self, now: float) -> None:
        """A read that does not end keeps its slots until the agent that posted it is destroyed."""
        given_up = self.reads.given_up(now=now, max_slots=self._max_quarantined)
        if not given_up:
            return
        for owner in [owner for owner, peer in self.peers.items() if peer in given_up]:
            log.warning("reads from %s do not end; its agent is destroyed", owner)
            self.counters[names.AGENTS_DESTROYED] += 1
            self._lose(owner, PeerLost(f"{owner} keeps reads from ending"))
            self._outward.hang_up(owner)
        self.reads.poll()

    def _lose(self, owner: WorkerIdentity, error: BatonError) -> None:
        for request in self._waiting_for(owner):
            self._outward.end(request, error)
        peer = self._links.pop(owner).peer
        if peer is not None:
            # Destroys the agent: the only fence for what it still has in flight.
            peer.close()

    def _waiting_for(self, owner: WorkerIdentity) -> list[DecodeRequest]:
        return [
            request
            for request in self._requests.values()
            if request.owner == owner and not request.has_joined
        ]

    def _claim(self, request: DecodeRequest, owner: WorkerIdentity) -> None:
        mac = claim_mac(request.grant_key, request.key, reader=self._identity, owner=owner)
        self._outward.send(owner, LeaseClaim(request.key, mac))

    # --- what owners say ---

    def status(self, owner: WorkerIdentity, status: LeaseStatus) -> None:
        """An owner's word on a lease."""
        link = self._links.get(owner)
        if link is None or link.peer is None:
            # Its agent was destroyed: the link is about to end, which ends what waits for it.
            return
        request = self._requests.get(status.key)
        if request is None and status.state is LeaseState.OPEN and not status.finished:
            self._outward.send(owner, LeaseRelease(status.key))
        if request is None or request.owner != owner or request.has_joined:
            return
        if status.state is LeaseState.ENDED:
            self._outward.end(request, self._why_ended(owner, status))
        elif status.state is LeaseState.OPEN:
            self._opened(request, owner, status)

    def _why_ended(self, owner: WorkerIdentity, status: LeaseStatus) -> BatonError | None:
        """None: the owner gave the whole answer itself, before it heard of this reader."""
        if status.error is None or isinstance(status.error, GrantRefused):
            return status.error
        self.counters[names.PULLS_LEASE_LOST] += 1
        return LeaseLost(f"{owner} ended the lease: {status.error.message}")

    def _opened(self, request: DecodeRequest, owner: WorkerIdentity, status: LeaseStatus) -> None:
        error = misfit(request, status, self._limits) or self._forged(request, owner, status)
        if error is not None or status.finished:
            # Finished with its first token: the owner reported that itself.
            self._outward.end(request, error)
            return
        merged = request.status = merge_status(request.status, status)
        sequence = request.sequence
        sequence.tokens.extend(merged.output_tokens[sequence.num_output - merged.output_position :])
        is_told = bool(merged.slots) and len(sequence.tokens) >= merged.kv_tokens
        if request.state is DecodeState.CLAIMING and is_told:
            request.state = DecodeState.QUEUED
            # The first term is short: it ends before a renewal every few seconds would come.
            request.renew_at = self._clock.monotonic()
            self._scheduler.add(request.key, accepted_at=request.accepted_at)

    def _forged(
        self, request: DecodeRequest, owner: WorkerIdentity, status: LeaseStatus
    ) -> BatonError | None:
        if not status.slots:
            return None
        expected = handles_mac(
            request.grant_key,
            request.key,
            reader=self._identity,
            owner=owner,
            slots=status.slots,
            generations=status.generations,
        )
        if compare_digest(status.mac, expected):
            return None
        self.counters[names.HANDLES_REFUSED] += 1
        return GrantRefused(f"the handles from {owner} are not those of this lease")

    # --- pulls ---

    def start_pull(self, request: DecodeRequest, now: float) -> None:
        """The request's blocks are reserved: pull what its own cache did not have."""
        status = request.status
        assert status is not None, "a queued request knows its handles"
        assert request.owner is not None, "a queued request has an owner"
        peer = self._links[request.owner].peer
        assert peer is not None, "handles come over a link whose blocks can be read"
        handles = [
            BlockHandle(slot, generation)
            for slot, generation in zip(status.slots, status.generations, strict=True)
        ]
        request.state = DecodeState.PULLING
        request.pull = Pull(
            self.reads,
            peer,
            handles=handles,
            slots=request.sequence.slots,
            first_block=request.sequence.num_published,
            block_bytes=self._engine.arena.block_bytes,
            now=now,
        )
        reach("d.after_reserve")

    def advance(self, now: float) -> list[DecodeRequest]:
        """Move all pulls on; the requests that have joined."""
        joined = []
        for key in self._scheduler.pulling():
            request = self._requests[key]
            pull, status = request.pull, request.status
            assert pull is not None, "a pulling request has its pull"
            assert status is not None, "a pulling request has its status"
            pull.post(self._readable_blocks(status), now=now)
            if pull.is_reading:
                reach("d.mid_pull")
            pull.poll(now=now)
            if pull.error is not None:
                self._count_failure(pull.error)
                self._outward.end(request, pull.error)
            elif pull.is_complete and len(request.sequence.tokens) > status.kv_tokens:
                if self._is_damaged(request, pull, status):
                    continue
                self._join(request, pull, status, now)
                joined.append(request)
        return joined

    def _count_failure(self, error: BatonError) -> None:
        if isinstance(error, TransferTimeout):
            self.counters[names.PULLS_LATE] += 1
        elif isinstance(error, FenceFailed):
            self.counters[names.FENCE_FAILURES] += 1
        else:
            self.counters[names.PULLS_FAILED] += 1

    def _readable_blocks(self, status: LeaseStatus) -> int:
        if status.readable_tokens >= status.kv_tokens:
            return len(status.slots)
        return status.readable_tokens // self._engine.block_size

    def _is_damaged(self, request: DecodeRequest, pull: Pull, status: LeaseStatus) -> bool:
        """Whether pulled bytes are not those that the owner digested; then the request is ended."""
        first = pull.first_block
        pulled = request.sequence.slots[first : len(status.slots)]
        bad = self._integrity.differing(pulled, status.digests[first:])
        if not bad:
            return False
        self._integrity.drop(request.key, [pulled[index] for index in bad])
        bad_slots = tuple(Slot(status.slots[first + index]) for index in bad)
        error = DigestMismatch(f"{len(bad)} of {len(pulled)} KV blocks are not what was sent")
        assert request.owner is not None, "what was pulled has an owner"
        self._outward.send(request.owner, LeaseRelease(request.key, bad_slots=bad_slots))
        self._outward.end(request, error)
        return True

    def _join(self, request: DecodeRequest, pull: Pull, status: LeaseStatus, now: float) -> None:
        """All bytes are those of the handles: the lease ends and the sequence runs."""
        is_move = request.num_submitted > status.output_position
        self.counters[names.MOVED_IN] += is_move
        reach("move.before_join" if is_move else "d.before_join")
        sequence = request.sequence
        assert len(sequence.tokens) == status.kv_tokens + 1, "the newest token was not fed"
        assert request.owner is not None, "what is pulled has an owner"
        sequence.num_computed = status.kv_tokens
        self._engine.kv.publish(sequence, status.kv_tokens)
        self.counters[names.KV_BYTES_PULLED] += pull.pulled_bytes
        request.handover = HandoverReport(
            pulled_blocks=pull.num_blocks,
            pulled_bytes=pull.pulled_bytes,
            transport=self._transport_name,
            cached_tokens=sequence.num_cached,
            owner_cached_tokens=status.cached_tokens,
            pull_s=now - pull.started_at,
        )
        request.state = DecodeState.RUNNING
        request.pull = request.status = None
        self._scheduler.join(request.key)
        self._outward.send(request.owner, LeaseRelease(request.key, joined=True))

    def give_up(self, request: DecodeRequest) -> None:
        """The request ended before it joined: its lease goes, open reads are quarantined."""
        if request.pull is not None:
            request.pull.abandon("the request ended")
        if not request.has_joined:
            assert request.owner is not None, "what has not joined has an owner"
            self._outward.send(request.owner, LeaseRelease(request.key))
