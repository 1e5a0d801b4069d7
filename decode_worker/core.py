"""The decode role as a state machine. Life of a request here:

1. CLAIMING: accepted; the lease is claimed from the prefill worker and renewed from now on.
2. QUEUED: the lease is open; the request still holds nothing here.
3. PULLING: at the head of the queue its own cache hits are pinned and the rest of the prompt is
   reserved in one step; announced blocks are pulled while the owner computes the next.
4. RUNNING: the first token is known, every block has passed its fence, the lease is released; the
   sequence joined the running batch and the loss of the prefill worker is nothing to it.

Whoever holds space here already holds all it needs of the owner, so nothing waits in a circle.
"""

import logging

from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseLost,
    PeerLost,
)
from baton.common.ids import BlockHandle, RequestKey, RouterId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    HandoverReport,
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseState,
    LeaseStatus,
    LoadReport,
    OutputRecord,
    Submit,
)
from baton.decode_worker.decoding import Decoding
from baton.decode_worker.pull import Pull
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.conservation import check_conservation
from baton.engine.engine import Engine
from baton.engine.finish import finish_reason
from baton.kvtransfer.events import FromOwner, PeerConnected, PeerDisconnected
from baton.kvtransfer.ledger import RENEW_EVERY_S
from baton.kvtransfer.link_codec import merge_status
from baton.kvtransfer.open_reads import OpenReads
from baton.kvtransfer.transport.base import PeerReader
from baton.worker.admission import Limits
from baton.worker.core import Drain, Effects, Event, FromRouter, RouterAttached, RouterGone
from baton.worker.intake import Intake

log = logging.getLogger(__name__)

LOAD_EVERY_S = 1.0
IDLE_WAIT_S = 0.1
# Between polls of open reads when no sequence runs.
POLL_WAIT_S = 0.0002
# Of the pool, per peer.
MAX_QUARANTINED_SHARE = 0.05


class DecodeCore:
    """Implements `WorkerCore` for the decode role."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        limits: Limits,
        *,
        transport_name: str,
        max_num_batched_tokens: int,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits
        self._transport_name = transport_name
        self._clock = clock
        self._peers: dict[WorkerIdentity, PeerReader] = {}
        self._reads = OpenReads(engine.kv)
        # In a small pool one prompt is more than that share, and may well be cancelled.
        self._max_quarantined = max(
            int(MAX_QUARANTINED_SHARE * engine.num_blocks),
            limits.num_blocks_for(limits.max_model_len),
        )
        self._intake: Intake[DecodeRequest] = Intake(limits, clock, end=self._end)
        self._requests = self._intake.requests
        self._decoding = Decoding(
            engine, scheduler, self._requests, max_num_batched_tokens=max_num_batched_tokens
        )
        self._effects = Effects()
        self._next_load = 0.0

    # --- WorkerCore ---

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def handle(self, event: Event) -> None:
        match event:
            case FromRouter(router_id, Submit() as submit):
                self._submit(router_id, submit)
            case FromRouter(_, Cancel(key)):
                self._intake.cancel(key)
            case FromOwner(owner, status):
                self._status(owner, status)
            case PeerConnected(owner, peer):
                self._peers[owner] = peer
            case PeerDisconnected(owner, error):
                self._peer_lost(owner, error)
            case RouterAttached(router_id, live):
                self._intake.abort_router(router_id, keep=frozenset(live))
            case RouterGone(router_id):
                self._intake.abort_router(router_id, keep=frozenset())
            case Drain():
                self._intake.is_draining = True
            case _:
                raise AssertionError(f"a decode worker gets no {type(event).__name__}")

    def step(self) -> None:
        now = self._clock.monotonic()
        self._reads.poll()
        self._bound_quarantine(now)
        self._sweep(now)
        self._admit(now)
        self._advance_pulls(now)
        for request, token in self._decoding.step():
            self._sampled(request, token)
        if now >= self._next_load:
            self._next_load = now + LOAD_EVERY_S
            self._effects.load = self._load()

    def wait_s(self) -> float:
        if self._scheduler.num_running:
            return 0.0
        return POLL_WAIT_S if self._reads else IDLE_WAIT_S

    @property
    def has_urgent_effects(self) -> bool:
        return self._effects.is_urgent

    def take_effects(self) -> Effects:
        effects, self._effects = self._effects, Effects()
        return effects

    def close(self) -> None:
        """Destroy the agents that posted reads, so that nothing lands in the arena any more."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def check_invariants(self) -> None:
        check_conservation(
            self._engine.pool,
            self._engine.prefix,
            sequences=[request.sequence for request in self._requests.values()],
            receiving=self._reads.receiving,
            quarantined=self._reads.quarantined,
        )

    # --- what routers send ---

    def _submit(self, router_id: RouterId, submit: Submit) -> None:
        now = self._clock.monotonic()
        wrong_job = None
        if not isinstance(submit.job, DecodeJob):
            wrong_job = InvalidRequest("a decode worker takes decode jobs", field="job")
        if not self._intake.takes(
            router_id,
            submit,
            self._effects,
            # The last output token is never fed.
            kv_tokens=len(submit.prompt_tokens) + submit.sampling.max_tokens - 1,
            role_refusal=wrong_job,
        ):
            return
        assert isinstance(submit.job, DecodeJob), "other jobs were refused"
        owner = submit.job.owner
        self._requests[submit.key] = DecodeRequest(
            key=submit.key,
            router_id=router_id,
            sequence=self._engine.new_sequence(
                submit.prompt_tokens, submit.sampling, submit.tenant_key
            ),
            owner=owner,
            accepted_at=now - submit.age_s,
            deadline=now + submit.time_left_s,
            renew_at=now + RENEW_EVERY_S,
        )
        self._effects.dials.append((owner, submit.job.owner_link_address))
        self._effects.messages.append((owner, LeaseClaim(submit.key)))

    # --- what owners say ---

    def _status(self, owner: WorkerIdentity, status: LeaseStatus) -> None:
        if owner not in self._peers:
            # Its agent was destroyed: the link is about to end, which ends what waits for it.
            return
        request = self._requests.get(status.key)
        if request is None and status.state is LeaseState.OPEN and not status.finished:
            if self._intake.has_ended(status.key):
                self._effects.messages.append((owner, LeaseRelease(status.key)))
            return
        if request is None or request.owner != owner or request.has_joined:
            return
        if status.state is LeaseState.ENDED:
            cause = status.error.message if status.error is not None else "no cause given"
            self._end(request, LeaseLost(f"{owner} ended the lease: {cause}"))
        elif status.state is LeaseState.OPEN:
            self._opened(request, status)

    def _opened(self, request: DecodeRequest, status: LeaseStatus) -> None:
        error = self._misfit(request, status)
        if error is not None or status.finished:
            # Finished with its first token: the owner reported that itself.
            self._end(request, error)
            return
        request.status = merge_status(request.status, status)
        if request.state is DecodeState.CLAIMING and request.status.slots:
            request.state = DecodeState.QUEUED
            # The first term is short: it ends before a renewal every few seconds would come.
            request.renew_at = self._clock.monotonic()
            self._scheduler.add(request.key, accepted_at=request.accepted_at)

    def _misfit(self, request: DecodeRequest, status: LeaseStatus) -> BatonError | None:
        """What in this status cannot be of the request: it would corrupt or end the engine."""
        expected = self._limits.num_blocks_for(request.sequence.prompt_len)
        if status.slots and len(status.slots) != expected:
            return InternalError(
                f"{request.owner} leased {len(status.slots)} blocks for a prompt of {expected}"
            )
        if status.first_token is not None and status.first_token >= self._limits.vocab_size:
            return InternalError(
                f"{request.owner} sampled token {status.first_token}, "
                f"the vocabulary has {self._limits.vocab_size}"
            )
        return None

    def _bound_quarantine(self, now: float) -> None:
        """A read that does not end keeps its slots until the agent that posted it is destroyed."""
        given_up = self._reads.given_up(now=now, max_slots=self._max_quarantined)
        owners = [owner for owner, peer in self._peers.items() if peer in given_up]
        for owner in owners:
            log.warning("reads from %s do not end; its agent is destroyed", owner)
            self._peer_lost(owner, PeerLost(f"{owner} keeps reads from ending"))
            self._effects.hangups.append(owner)
        if owners:
            self._reads.poll()

    def _peer_lost(self, owner: WorkerIdentity, error: BatonError) -> None:
        for request in list(self._requests.values()):
            if request.owner == owner and not request.has_joined:
                self._end(request, error)
        peer = self._peers.pop(owner, None)
        if peer is not None:
            # Destroys the agent: the only fence for what it still has in flight.
            peer.close()

    # --- deadlines ---

    def _sweep(self, now: float) -> None:
        renewals: dict[WorkerIdentity, list[RequestKey]] = {}
        for request in list(self._requests.values()):
            if now >= request.deadline:
                self._end(request, DeadlineExceeded("the deadline passed during decode"))
            elif not request.has_joined and now >= request.renew_at:
                request.renew_at = now + RENEW_EVERY_S
                renewals.setdefault(request.owner, []).append(request.key)
        for owner, keys in renewals.items():
            self._effects.messages.append((owner, LeaseRenew(tuple(keys))))

    # --- the iteration ---

    def _admit(self, now: float) -> None:
        while (key := self._scheduler.head()) is not None:
            request = self._requests[key]
            sequence = request.sequence
            is_new = request.state is DecodeState.QUEUED
            num_tokens = len(sequence.tokens)
            # A pulled prompt needs no forward; one that is computed again ends in a token to feed.
            limit = num_tokens if is_new else num_tokens - 1
            if not self._decoding.has_room(request, num_tokens=num_tokens, limit_tokens=limit):
                return
            reserved = self._engine.kv.reserve(sequence, num_tokens, limit)
            assert reserved, "what has room can be reserved"
            if is_new:
                self._scheduler.admit(key)
                request.state = DecodeState.PULLING
                request.pull = self._start_pull(request, now)
            else:
                self._scheduler.resume(key)
                request.state = DecodeState.RUNNING

    def _start_pull(self, request: DecodeRequest, now: float) -> Pull:
        status = request.status
        assert status is not None, "a queued request knows its handles"
        handles = [
            BlockHandle(slot, generation)
            for slot, generation in zip(status.slots, status.generations, strict=True)
        ]
        return Pull(
            self._reads,
            self._peers[request.owner],
            handles=handles,
            slots=request.sequence.slots,
            first_block=request.sequence.num_published,
            block_bytes=self._engine.arena.block_bytes,
            now=now,
        )

    def _advance_pulls(self, now: float) -> None:
        for key in self._scheduler.pulling():
            request = self._requests[key]
            pull, status = request.pull, request.status
            assert pull is not None, "a pulling request has its pull"
            assert status is not None, "a pulling request has its status"
            pull.post(self._readable_blocks(request, status), now=now)
            pull.poll(now=now)
            if pull.error is not None:
                self._end(request, pull.error)
            elif pull.is_complete and status.first_token is not None:
                self._join(request, pull, status.first_token, now)

    def _readable_blocks(self, request: DecodeRequest, status: LeaseStatus) -> int:
        if status.readable_tokens >= request.sequence.prompt_len:
            return len(status.slots)
        return status.readable_tokens // self._engine.block_size

    def _join(self, request: DecodeRequest, pull: Pull, first_token: int, now: float) -> None:
        """All bytes are those of the handles: the lease ends and the sequence runs."""
        sequence = request.sequence
        sequence.num_computed = sequence.prompt_len
        self._engine.kv.publish(sequence, sequence.prompt_len)
        sequence.tokens.append(first_token)
        owner_cached_tokens = request.status.cached_tokens if request.status is not None else 0
        request.state = DecodeState.RUNNING
        request.pull = request.status = None
        self._scheduler.join(request.key)
        self._effects.messages.append((request.owner, LeaseRelease(request.key)))
        report = HandoverReport(
            pulled_blocks=pull.num_blocks,
            pulled_bytes=pull.pulled_bytes,
            transport=self._transport_name,
            cached_tokens=sequence.num_cached,
            owner_cached_tokens=owner_cached_tokens,
            pull_s=now - pull.started_at,
        )
        record = OutputRecord(key=request.key, tokens=(first_token,), handover=report)
        self._effects.record(request.router_id, record)

    def _sampled(self, request: DecodeRequest, token: int) -> None:
        sequence = request.sequence
        finish = finish_reason(
            sequence, self._engine.model_config.eos_token_ids, self._limits.max_model_len
        )
        record = OutputRecord(
            key=request.key,
            position=sequence.num_output - 1,
            tokens=(token,),
            finish=finish,
            forwarded_tokens=sequence.num_forwarded if finish is not None else 0,
        )
        self._effects.record(request.router_id, record)
        if finish is not None:
            self._end(request, None)

    # --- ends ---

    def _end(self, request: DecodeRequest, error: BatonError | None) -> None:
        """The request is over here: its blocks go, what is in flight stays in quarantine."""
        self._intake.forget(request.key)
        self._scheduler.remove(request.key)
        if request.pull is not None:
            request.pull.abandon("the request ended")
        sequence = request.sequence
        if request.state is DecodeState.RUNNING:
            self._engine.kv.publish(sequence, sequence.num_computed)
        self._engine.kv.release(sequence)
        if not request.has_joined:
            self._effects.messages.append((request.owner, LeaseRelease(request.key)))
        if error is not None and not isinstance(error, Cancelled):
            self._effects.record(request.router_id, OutputRecord(key=request.key, error=error))

    def _load(self) -> LoadReport:
        return LoadReport(
            blocks_total=self._engine.num_blocks,
            blocks_free=self._engine.pool.num_free,
            blocks_cached=self._engine.prefix.num_evictable,
            blocks_quarantined=sum(len(slots) for slots in self._reads.quarantined),
            requests_running=self._scheduler.num_running,
            requests_waiting=len(self._requests) - self._scheduler.num_running,
            preemptions=self._decoding.num_preemptions,
            draining=self._intake.is_draining,
        )
