"""The prefill role as a state machine. Life of a request here:

1. WAITING: accepted; holds nothing.
2. RUNNING: all blocks of the prompt are reserved (cached ones pinned) and the lease for the decode
   worker is open; chunks are computed, each announced as far as whole blocks reach.
3. LEASED: the first token went to the router and, with the last announcement, to the decode worker;
   only the lease holds the blocks now, until release, expiry or cancel.

Space is taken here before the decode worker takes any, and admission counts what was not pulled
yet: that is the back-pressure.
"""

import logging

from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LeaseLost,
)
from baton.common.ids import BlockHandle, RequestKey, RouterId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    LeaseClaim,
    LeaseRelease,
    LeaseRenew,
    LeaseState,
    LeaseStatus,
    LoadReport,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    Submit,
)
from baton.common.sampling import FinishReason
from baton.engine.conservation import check_conservation
from baton.engine.engine import Engine
from baton.engine.finish import finish_reason
from baton.engine.sequence import Chunk
from baton.kvtransfer.events import FromReader, LinkClosed, LinkOpened
from baton.kvtransfer.ledger import Ledger
from baton.prefill_worker.request import PrefillRequest, PrefillState
from baton.prefill_worker.scheduler import PlannedChunk, PrefillScheduler
from baton.worker.admission import Limits
from baton.worker.core import Drain, Effects, Event, FromRouter, RouterAttached, RouterGone
from baton.worker.intake import Intake

log = logging.getLogger(__name__)

LOAD_EVERY_S = 1.0
IDLE_WAIT_S = 0.1
# A step longer than this stops the clocks of the leases for the rest of it.
COUNTED_STEP_S = 1.0


class PrefillCore:
    """Implements `WorkerCore` for the prefill role."""

    def __init__(
        self,
        engine: Engine,
        scheduler: PrefillScheduler,
        limits: Limits,
        *,
        identity: WorkerIdentity,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits
        self._identity = identity
        self._clock = clock
        self._ledger = Ledger(engine.kv)
        self._intake: Intake[PrefillRequest] = Intake(limits, clock, end=self._end)
        self._requests = self._intake.requests
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
            case FromReader(reader, LeaseClaim(key)):
                self._claimed(reader, key)
            case FromReader(reader, LeaseRenew(keys)):
                self._renewed(reader, keys)
            case FromReader(reader, LeaseRelease(key)):
                self._released(reader, key)
            case LinkOpened(reader):
                self._ledger.link_restored(reader, now=self._clock.monotonic())
            case LinkClosed(reader):
                self._ledger.link_lost(reader, now=self._clock.monotonic())
            case RouterAttached(router_id, live):
                self._intake.abort_router(router_id, keep=frozenset(live))
            case RouterGone(router_id):
                self._intake.abort_router(router_id, keep=frozenset())
            case Drain():
                self._intake.is_draining = True
            case _:
                raise AssertionError(f"a prefill worker gets no {type(event).__name__}")

    def step(self) -> None:
        now = self._clock.monotonic()
        self._sweep(now)
        self._admit(now)
        plan = self._scheduler.plan()
        if plan:
            self._compute(plan)
        if now >= self._next_load:
            self._next_load = now + LOAD_EVERY_S
            self._effects.load = self._load(now)

    def wait_s(self) -> float:
        return 0.0 if self._scheduler.num_running else IDLE_WAIT_S

    @property
    def has_urgent_effects(self) -> bool:
        return self._effects.is_urgent

    def take_effects(self) -> Effects:
        effects, self._effects = self._effects, Effects()
        return effects

    def close(self) -> None:
        """Nothing of this role is torn down from outside."""

    def check_invariants(self) -> None:
        check_conservation(
            self._engine.pool,
            self._engine.prefix,
            sequences=[request.sequence for request in self._requests.values()],
            leased=[lease.slots for lease in self._ledger],
        )

    # --- what routers send ---

    def _submit(self, router_id: RouterId, submit: Submit) -> None:
        now = self._clock.monotonic()
        if not self._intake.takes(
            router_id,
            submit,
            self._effects,
            kv_tokens=len(submit.prompt_tokens),
            role_refusal=_job_refusal(submit),
        ):
            return
        assert isinstance(submit.job, PrefillJob), "other jobs were refused"
        self._requests[submit.key] = PrefillRequest(
            key=submit.key,
            router_id=router_id,
            sequence=self._engine.new_sequence(
                submit.prompt_tokens, submit.sampling, submit.tenant_key
            ),
            reader=submit.job.reader,
            submitted_at=now,
            deadline=now + submit.time_left_s,
        )
        self._scheduler.add(submit.key, accepted_at=now - submit.age_s)

    # --- what readers send ---

    def _claimed(self, reader: WorkerIdentity, key: RequestKey) -> None:
        request = self._requests.get(key)
        if request is None:
            if self._intake.has_ended(key):
                lost = LeaseLost("the request has ended on its prefill worker")
                status = LeaseStatus(key=key, state=LeaseState.ENDED, error=lost)
            else:
                status = LeaseStatus(key=key, state=LeaseState.NOT_YET)
            self._effects.statuses.append((reader, status))
        elif request.reader == reader:
            self._announce(request, with_handles=True)
        else:
            # Only the reader that the router named is told handles.
            log.warning("%s claims the lease of %s, which is not its own", reader, key)
            refused = LeaseLost(f"the router named another reader than {reader}")
            status = LeaseStatus(key=key, state=LeaseState.ENDED, error=refused)
            self._effects.statuses.append((reader, status))

    def _renewed(self, reader: WorkerIdentity, keys: tuple[RequestKey, ...]) -> None:
        now = self._clock.monotonic()
        for key in keys:
            if not self._ledger.renew(key, reader, now=now):
                self._claimed(reader, key)

    def _released(self, reader: WorkerIdentity, key: RequestKey) -> None:
        request = self._requests.get(key)
        if request is not None and request.reader == reader:
            # A reader that lets go before the prompt is done has given the request up.
            self._end(
                request, None if request.state is PrefillState.LEASED else Cancelled("released")
            )

    # --- deadlines ---

    def _sweep(self, now: float) -> None:
        for lease in self._ledger.sweep(now=now):
            request = self._requests[lease.key]
            log.warning("lease %s of %s ended unreleased", lease.key, lease.reader)
            self._end(request, LeaseLost(f"{lease.reader} did not renew its lease in time"))
        for request in list(self._requests.values()):
            if now >= request.deadline and request.state is not PrefillState.LEASED:
                self._end(request, DeadlineExceeded("the deadline passed during prefill"))

    # --- the iteration ---

    def _admit(self, now: float) -> None:
        while (key := self._scheduler.head()) is not None:
            request = self._requests[key]
            sequence = request.sequence
            # One token must be forwarded to get logits, so the last one is never a hit.
            limit = sequence.prompt_len - 1
            if not self._engine.kv.reserve(sequence, sequence.prompt_len, limit):
                return
            self._scheduler.admit(key, num_tokens=sequence.num_pending)
            request.state = PrefillState.RUNNING
            request.started_at = now
            if request.reader is not None:
                self._open_lease(request, request.reader, now)

    def _open_lease(self, request: PrefillRequest, reader: WorkerIdentity, now: float) -> None:
        generations = self._engine.generations
        request.handles = tuple(
            BlockHandle(slot, generations.word(slot)) for slot in request.sequence.slots
        )
        self._ledger.open(
            request.key,
            reader,
            request.handles,
            block_bytes=self._engine.arena.block_bytes,
            now=now,
        )
        self._announce(request, with_handles=True)

    def _compute(self, plan: list[PlannedChunk]) -> None:
        chunks = [Chunk(self._requests[entry.key].sequence, entry.num_tokens) for entry in plan]
        began = self._clock.monotonic()
        sampled = dict(self._engine.step(chunks))
        # What is announced before a step is told after it, and renewals wait in the inbox.
        took = self._clock.monotonic() - began
        self._ledger.forgive(max(0.0, took - COUNTED_STEP_S))
        for entry in plan:
            request = self._requests[entry.key]
            self._engine.kv.publish(request.sequence, request.sequence.prompt_len)
            if self._scheduler.computed(entry):
                self._prefilled(request, sampled[request.sequence])
            else:
                self._announce(request, with_handles=False)

    def _prefilled(self, request: PrefillRequest, token: int) -> None:
        request.first_token = token
        sequence = request.sequence
        finish = finish_reason(
            sequence, self._engine.model_config.eos_token_ids, self._limits.max_model_len
        )
        self._report_first_token(request, token, finish)
        if request.reader is None or finish is not None:
            assert finish is not None, "a request without a reader ends with its first token"
            self._announce(request, with_handles=False, finished=True)
            self._end(request, None)
            return
        self._announce(request, with_handles=False)
        request.state = PrefillState.LEASED
        self._engine.kv.release(sequence)

    def _report_first_token(
        self, request: PrefillRequest, token: int, finish: FinishReason | None
    ) -> None:
        sequence = request.sequence
        report = PrefillReport(
            cached_tokens=sequence.num_cached,
            computed_tokens=sequence.num_forwarded,
            queue_s=request.started_at - request.submitted_at,
            compute_s=self._clock.monotonic() - request.started_at,
        )
        record = OutputRecord(
            key=request.key, position=0, tokens=(token,), finish=finish, prefill=report
        )
        self._effects.record(request.router_id, record)

    # --- announcements and ends ---

    def _announce(
        self, request: PrefillRequest, *, with_handles: bool, finished: bool = False
    ) -> None:
        """Say how far blocks are readable. On a CPU a step's writes are done when it returns."""
        if request.reader is None:
            return
        if request.state is PrefillState.WAITING:
            status = LeaseStatus(key=request.key, state=LeaseState.NOT_YET)
            self._effects.statuses.append((request.reader, status))
            return
        if request.first_token is not None:
            request.readable_tokens = request.sequence.prompt_len
        else:
            size = self._engine.block_size
            request.readable_tokens = request.sequence.num_computed // size * size
        handles = request.handles if with_handles else ()
        status = LeaseStatus(
            key=request.key,
            state=LeaseState.OPEN,
            slots=tuple(handle.slot for handle in handles),
            generations=tuple(handle.generation for handle in handles),
            readable_tokens=request.readable_tokens,
            first_token=request.first_token,
            finished=finished,
            cached_tokens=request.sequence.num_cached,
        )
        self._effects.statuses.append((request.reader, status))

    def _end(self, request: PrefillRequest, error: BatonError | None) -> None:
        """The request is over here: nothing of it stays but its ending and cached blocks."""
        self._intake.forget(request.key)
        self._scheduler.remove(request.key)
        self._ledger.end(request.key)
        self._engine.kv.release(request.sequence)
        if error is None:
            return
        if not isinstance(error, Cancelled) and request.first_token is None:
            self._effects.record(request.router_id, OutputRecord(key=request.key, error=error))
        if request.reader is not None:
            ended = LeaseStatus(key=request.key, state=LeaseState.ENDED, error=error)
            self._effects.statuses.append((request.reader, ended))

    def _load(self, now: float) -> LoadReport:
        leased = {slot for lease in self._ledger for slot in lease.slots}
        waiting = [self._requests[key].sequence.num_pending for key in self._scheduler.waiting()]
        running = [
            request.sequence.num_pending
            for request in self._requests.values()
            if request.state is PrefillState.RUNNING
        ]
        return LoadReport(
            blocks_total=self._engine.num_blocks,
            blocks_free=self._engine.pool.num_free,
            blocks_cached=self._engine.prefix.num_evictable,
            blocks_leased=len(leased),
            requests_running=self._scheduler.num_running,
            requests_waiting=self._scheduler.num_waiting,
            tokens_pending=sum(waiting) + sum(running),
            draining=self._intake.is_draining,
            leases=self._ledger.rows(self._identity, now=now),
        )


def _job_refusal(submit: Submit) -> BatonError | None:
    if not isinstance(submit.job, PrefillJob):
        return InvalidRequest("a prefill worker takes prefill jobs", field="job")
    if submit.job.reader is None and submit.sampling.max_tokens > 1:
        return InvalidRequest("a request of more than one token needs a reader", field="reader")
    return None
