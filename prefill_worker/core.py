"""The prefill role as a state machine. Life of a request here:

1. WAITING: accepted; holds nothing.
2. RUNNING: all blocks of the prompt are reserved (cached ones pinned) and the lease for the decode
   worker is open; chunks are computed, each announced as far as whole blocks reach.
3. LEASED: the token sampled here went to the router and, with the last announcement, to the decode
   worker; only the lease holds the blocks now, until release, expiry or cancel.

Space is taken here before the decode worker takes any, and admission counts what was not pulled
yet: that is the back-pressure. A block is announced only after the step that wrote it has ended.
"""

import logging
from collections import Counter
from dataclasses import replace

from baton.common import metric_names as names
from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    DigestMismatch,
    LeaseLost,
)
from baton.common.failpoints import reach
from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    LeaseRelease,
    LoadReport,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    Reap,
    SetDraining,
    Submit,
)
from baton.common.sampling import FinishReason
from baton.common.timing import Timing
from baton.engine.conservation import check_conservation
from baton.engine.engine import Engine
from baton.engine.finish import finish_reason
from baton.kvtransfer.events import FromReader, LinkClosed, LinkOpened
from baton.kvtransfer.ledger import LeaseEnd
from baton.kvtransfer.owner import LeaseOwner, Offer
from baton.prefill_worker.request import PrefillRequest, PrefillState, job_refusal
from baton.prefill_worker.scheduler import PlannedChunk, PrefillScheduler
from baton.worker.admission import Limits
from baton.worker.core import (
    Drain,
    Effects,
    Event,
    FromRouter,
    LoopCameRound,
    RouterAttached,
    RouterGone,
    RouterPaused,
    RouterResumed,
)
from baton.worker.flight import Flight
from baton.worker.intake import Intake
from baton.worker.integrity import Integrity
from baton.worker.pace import IDLE_WAIT_S, POLL_WAIT_S, Pace
from baton.worker.reconciler import Reconciler

log = logging.getLogger(__name__)


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
        timing: Timing,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._effects = Effects()
        self._intake: Intake[PrefillRequest] = Intake(limits, clock, timing, end=self._end)
        self._requests = self._intake.requests
        self._owner = LeaseOwner(
            engine.kv,
            identity=identity,
            word=engine.generations.word,
            block_bytes=engine.arena.block_bytes,
            timing=timing,
            clock=clock,
            endings=self._intake.endings,
            send=lambda *status: self._effects.statuses.append(status),
            ended=self._lease_ended,
        )
        self._integrity = Integrity(engine)
        self._flight: Flight[PrefillRequest] = Flight(engine, clock)
        self._reconciler = Reconciler(engine)
        self._pace = Pace(clock, timing)
        self._counters: Counter[str] = Counter()

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
            case FromRouter(_, SetDraining(draining)):
                self._intake.is_draining = draining
            case FromRouter(_, Reap(keys)):
                for key in keys:
                    self._owner.reap(key)
            case FromRouter(_, message):
                log.warning("a router sent %s to a prefill worker", type(message).__name__)
            case FromReader() | LinkOpened() | LinkClosed():
                self._owner.handle(event)
            case RouterAttached(router_id, live):
                for request, position in self._intake.router_attached(
                    router_id, live, self._effects
                ):
                    self._resume(request, position)
            case RouterGone(router_id):
                self._intake.abort_router(router_id, keep=frozenset())
            case Drain():
                self._intake.is_draining = True
            case LoopCameRound():
                self._pace.heard(self._clock.monotonic())
            case RouterPaused() | RouterResumed():
                pass  # One token per request: nothing worth pausing.
            case _:
                raise AssertionError(f"a prefill worker gets no {type(event).__name__}")

    def step(self) -> None:
        now = self._clock.monotonic()
        self._owner.forgive(self._pace.lost_s(now))
        self._collect()
        self._sweep(now)
        self._admit(now)
        if self._engine.can_launch:
            self._launch()
            self._collect()
        if self._pace.is_report_due(now):
            self._effects.load = self._load(now)

    def wait_s(self) -> float:
        if self._engine.in_flight:
            return POLL_WAIT_S
        return 0.0 if self._scheduler.num_running else IDLE_WAIT_S

    @property
    def has_urgent_effects(self) -> bool:
        return self._effects.is_urgent

    @property
    def step_in_flight(self) -> int | None:
        return self._engine.runner.steps if self._engine.in_flight else None

    def take_effects(self) -> Effects:
        effects, self._effects = self._effects, Effects()
        return effects

    def close(self) -> None:
        self._engine.close()

    def check_invariants(self) -> None:
        check_conservation(
            self._engine.pool,
            self._engine.prefix,
            sequences=[request.sequence for request in self._requests.values()],
            leased=self._owner.leased,
            retiring=self._engine.retiring,
        )

    # --- what routers send ---

    def _submit(self, router_id: RouterId, submit: Submit) -> None:
        now = self._clock.monotonic()
        num_tokens = len(submit.prompt_tokens) + len(submit.output_tokens)
        if not self._intake.takes(
            router_id,
            submit,
            self._effects,
            kv_tokens=num_tokens,
            role_refusal=job_refusal(submit),
        ):
            return
        assert isinstance(submit.job, PrefillJob), "other jobs were refused"
        self._requests[submit.key] = PrefillRequest(
            key=submit.key,
            router_id=router_id,
            sequence=self._engine.new_sequence(
                submit.prompt_tokens, submit.sampling, submit.tenant_key, submit.output_tokens
            ),
            num_tokens=num_tokens,
            reader=submit.job.reader,
            submitted_at=now,
            deadline=now + submit.time_left_s,
        )
        self._scheduler.add(submit.key, accepted_at=now - submit.age_s)
        if submit.job.reader is not None:
            self._owner.offer(
                Offer(
                    key=submit.key,
                    reader=submit.job.reader,
                    grant_key=submit.job.grant_key,
                    router_id=router_id,
                    request_id=submit.request_id,
                    why="prefill",
                )
            )
        reach("p.submitted")

    def _resume(self, request: PrefillRequest, position: int) -> None:
        """The router's stream is a new one; it may lack the token that was sampled here."""
        if request.report is not None and position < request.sequence.num_output:
            self._report(request, request.report, None)

    # --- deadlines and leases ---

    def _sweep(self, now: float) -> None:
        self._owner.sweep(now)
        for request in list(self._requests.values()):
            if now >= request.deadline and request.state is not PrefillState.LEASED:
                self._end(request, DeadlineExceeded("the deadline passed during prefill"))

    def _lease_ended(self, key: RequestKey, how: LeaseEnd, release: LeaseRelease | None) -> None:
        request = self._requests[key]
        if release is not None and release.bad_slots:
            self._integrity.drop(key, release.bad_slots)
        if how is LeaseEnd.JOINED and request.state is PrefillState.LEASED:
            self._end(request, None)
        elif release is not None:
            self._end(request, Cancelled("its reader gave the request up"))
        else:
            self._end(request, LeaseLost(f"the lease of {request.reader} ended: {how.value}"))

    # --- the iteration ---

    def _admit(self, now: float) -> None:
        while (key := self._scheduler.head()) is not None:
            request = self._requests[key]
            sequence = request.sequence
            # One token must be forwarded to get logits, so the last one is never a hit.
            limit = request.num_tokens - 1
            if not self._engine.kv.reserve(sequence, request.num_tokens, limit):
                return
            self._scheduler.admit(key, num_tokens=sequence.num_pending)
            request.state = PrefillState.RUNNING
            request.started_at = now
            if request.reader is not None:
                reach("p.before_lease")
                self._owner.open(
                    key,
                    sequence.slots,
                    kv_tokens=request.num_tokens,
                    cached_tokens=sequence.num_cached,
                )
                self._announce(request)
                reach("p.after_lease")

    def _launch(self) -> None:
        plan = self._scheduler.plan()
        self._flight.launch([(self._requests[entry.key], entry.num_tokens) for entry in plan])

    def _collect(self) -> None:
        """What the last step wrote is final once it has ended, and not before."""
        for landed in self._flight.collect():
            request = landed.request
            self._engine.kv.publish(request.sequence, request.num_tokens)
            if self._scheduler.computed(PlannedChunk(request.key, landed.num_tokens)):
                assert landed.is_sampled, "the last chunk gives a token"
                self._prefilled(request)
            else:
                self._announce(request)
                reach("p.mid_prefill")

    def _prefilled(self, request: PrefillRequest) -> None:
        sequence = request.sequence
        finish = finish_reason(
            sequence, self._engine.model_config.eos_token_ids, self._limits.max_model_len
        )
        reach("p.before_first_token")
        if self._is_damaged(request):
            return
        request.report = PrefillReport(
            cached_tokens=sequence.num_cached,
            computed_tokens=sequence.num_forwarded,
            queue_s=request.started_at - request.submitted_at,
            compute_s=self._clock.monotonic() - request.started_at,
        )
        self._report(request, request.report, finish)
        self._owner.complete(
            request.key,
            output_position=sequence.num_output - 1,
            output_tokens=sequence.tokens[-1:],
            finished=finish is not None,
            digests=self._digests_of(request, request.num_tokens),
        )
        if request.reader is None or finish is not None:
            assert finish is not None, "a request without a reader ends with its next token"
            self._end(request, None)
            return
        request.state = PrefillState.LEASED
        self._engine.kv.release(sequence)
        reach("p.after_first_token")

    def _is_damaged(self, request: PrefillRequest) -> bool:
        """Whether a block that the token depends on changed; then the request is ended."""
        slots = request.sequence.slots[: request.num_tokens // self._engine.block_size]
        bad = self._integrity.changed(slots)
        if bad:
            self._integrity.drop(request.key, bad)
            self._end(request, DigestMismatch(f"{len(bad)} KV blocks changed during prefill"))
        return bool(bad)

    def _report(
        self, request: PrefillRequest, report: PrefillReport, finish: FinishReason | None
    ) -> None:
        record = OutputRecord(
            key=request.key,
            position=request.sequence.num_output - 1,
            tokens=tuple(request.sequence.tokens[-1:]),
            finish=finish,
            prefill=report,
        )
        self._effects.record(request.router_id, record)

    # --- announcements and ends ---

    def _announce(self, request: PrefillRequest) -> None:
        """Say how far whole blocks are readable."""
        if request.reader is None:
            return
        size = self._engine.block_size
        num_tokens = request.sequence.num_computed // size * size
        self._owner.readable(request.key, num_tokens, self._digests_of(request, num_tokens))

    def _digests_of(self, request: PrefillRequest, num_tokens: int) -> list[int]:
        """Of the blocks of `[0, num_tokens)` that were not announced yet; none if not kept."""
        if request.reader is None:
            return []
        first = self._owner.num_digests(request.key)
        slots = request.sequence.slots[first : self._engine.kv.num_blocks(num_tokens)]
        return self._integrity.digests(slots)

    def _end(self, request: PrefillRequest, error: BatonError | None) -> None:
        """The request is over here: nothing of it stays but its ending and cached blocks."""
        self._intake.forget(request.key)
        self._scheduler.remove(request.key)
        self._owner.end(request.key, error)
        self._engine.kv.release(request.sequence)
        if error is not None:
            self._counters[names.WASTED_ENGINE_MS] += round(1000 * request.engine_s)
            if not isinstance(error, Cancelled) and request.report is None:
                self._effects.record(request.router_id, OutputRecord(key=request.key, error=error))

    def _load(self, now: float) -> LoadReport:
        requests = self._requests.values()
        report = self._reconciler.report(
            now,
            self._owner,
            sequences=[request.sequence for request in requests],
            counters=(self._counters, self._owner.counters, self._integrity.counters),
        )
        return replace(
            report,
            requests_running=self._scheduler.num_running,
            requests_waiting=self._scheduler.num_waiting,
            tokens_pending=sum(
                request.sequence.num_pending
                for request in requests
                if request.state is not PrefillState.LEASED
            ),
            draining=self._intake.is_draining,
        )
