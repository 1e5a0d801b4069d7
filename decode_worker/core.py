"""The decode role as a state machine. Life of a request here:

1. CLAIMING, QUEUED, PULLING: the hand-over (`handover.py`). Nothing is held here before the owner
   has all that it needs, so nothing waits in a circle.
2. RUNNING: the sequence is in the batch (`decoding.py`); the loss of its owner is nothing to it.
3. WAITING: it is to be computed here, in whole or because older ones took its blocks.
4. MOVING: another worker pulls it (`moving.py`).
"""

from collections import Counter
from dataclasses import replace

from baton.common import metric_names as names
from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    UnknownRequest,
)
from baton.common.failpoints import reach
from baton.common.ids import RouterId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    LoadReport,
    Move,
    OutputRecord,
    PrefillReport,
    Reap,
    SetDraining,
    Stay,
    Submit,
)
from baton.common.timing import Timing
from baton.decode_worker.decoding import Decoding
from baton.decode_worker.handover import Handovers, Outward
from baton.decode_worker.moving import Moves
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.conservation import check_conservation
from baton.engine.engine import Engine
from baton.engine.finish import finish_reason
from baton.kvtransfer.events import (
    FromOwner,
    FromReader,
    LinkClosed,
    LinkOpened,
    PeerConnected,
    PeerDisconnected,
)
from baton.kvtransfer.owner import LeaseOwner
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
from baton.worker.intake import Intake
from baton.worker.integrity import Integrity
from baton.worker.pace import IDLE_WAIT_S, POLL_WAIT_S, Pace
from baton.worker.reconciler import Reconciler


class DecodeCore:
    """Implements `WorkerCore` for the decode role."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        limits: Limits,
        *,
        identity: WorkerIdentity,
        transport_name: str,
        max_num_batched_tokens: int,
        clock: Clock,
        timing: Timing,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._renew_every_s = timing.renew_every_s
        self._effects = Effects()
        self._intake: Intake[DecodeRequest] = Intake(limits, clock, timing, end=self._end)
        self._requests = self._intake.requests
        self._integrity = Integrity(engine)
        self.handovers = Handovers(
            engine,
            scheduler,
            self._requests,
            limits,
            Outward(
                send=lambda *message: self._effects.messages.append(message),
                dial=lambda *dial: self._effects.dials.append(dial),
                hang_up=lambda owner: self._effects.hangups.append(owner),
                end=self._end,
            ),
            self._integrity,
            identity=identity,
            transport_name=transport_name,
            clock=clock,
            timing=timing,
        )
        self._decoding = Decoding(
            engine,
            scheduler,
            self._requests,
            paused_routers=self._intake.paused_routers,
            max_num_batched_tokens=max_num_batched_tokens,
            clock=clock,
        )
        self._owner = LeaseOwner(
            engine.kv,
            identity=identity,
            word=engine.generations.word,
            block_bytes=engine.arena.block_bytes,
            timing=timing,
            clock=clock,
            endings=self._intake.endings,
            send=lambda *status: self._effects.statuses.append(status),
            ended=lambda key, how, release: self._moves.lease_ended(key, how, release),
        )
        self._moves = Moves(
            engine, scheduler, self._requests, self._owner, self._integrity, end=self._end
        )
        self._reconciler = Reconciler(engine)
        self._pace = Pace(clock, timing)
        self._counters: Counter[str] = Counter()

    # --- WorkerCore ---

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def handle(self, event: Event) -> None:
        match event:
            case FromRouter(router_id, message):
                self._from_router(router_id, message)
            case FromOwner(owner, status):
                self.handovers.status(owner, status)
            case PeerConnected(owner, peer):
                self.handovers.connected(owner, peer)
            case PeerDisconnected(owner, error):
                self.handovers.disconnected(owner, error)
            case FromReader() | LinkOpened() | LinkClosed():
                self._owner.handle(event)
            case RouterAttached(router_id, live):
                for request, position in self._intake.router_attached(
                    router_id, live, self._effects
                ):
                    self._resume(request, position)
            case RouterGone(router_id):
                self._intake.abort_router(router_id, keep=frozenset())
            case RouterPaused(router_id):
                self._intake.paused_routers.add(router_id)
            case RouterResumed(router_id):
                self._intake.paused_routers.discard(router_id)
            case Drain():
                self._intake.is_draining = True
            case LoopCameRound():
                self._pace.heard(self._clock.monotonic())
            case _:
                raise AssertionError(f"a decode worker gets no {type(event).__name__}")

    def step(self) -> None:
        now = self._clock.monotonic()
        self._owner.forgive(self._pace.lost_s(now))
        self._collect()
        self.handovers.tick(now)
        self._owner.sweep(now)
        self._end_late(now)
        self._admit(now)
        for request in self.handovers.advance(now):
            self._joined(request)
        self._moves.begin()
        if self._engine.can_launch:
            self._decoding.launch()
            self._collect()
        if self._pace.is_report_due(now):
            self._effects.load = self._load(now)

    def wait_s(self) -> float:
        if self._engine.in_flight:
            return POLL_WAIT_S
        if self._decoding.is_runnable:
            return 0.0
        return POLL_WAIT_S if self.handovers.reads else IDLE_WAIT_S

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
        self.handovers.close()
        self._engine.close()

    def check_invariants(self) -> None:
        check_conservation(
            self._engine.pool,
            self._engine.prefix,
            sequences=[request.sequence for request in self._requests.values()],
            leased=self._owner.leased,
            receiving=self.handovers.reads.receiving,
            quarantined=self.handovers.reads.quarantined,
            retiring=self._engine.retiring,
        )

    # --- what routers send ---

    def _from_router(self, router_id: RouterId, message: object) -> None:
        match message:
            case Submit():
                self._submit(router_id, message)
            case Cancel(key):
                self._intake.cancel(key)
            case Move():
                self._moves.ask(message)
            case Stay(key):
                if not self._moves.stay(key):
                    # Its target joined and was lost before the router heard of it.
                    unknown = UnknownRequest("the request has left this worker")
                    self._effects.record(router_id, OutputRecord(key=key, error=unknown))
            case SetDraining(draining):
                self._intake.is_draining = draining
            case Reap(keys):
                for key in keys:
                    self._owner.reap(key)

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
        reach("d.submitted")
        sequence = self._engine.new_sequence(
            submit.prompt_tokens, submit.sampling, submit.tenant_key, submit.output_tokens
        )
        request = DecodeRequest.of(
            submit, submit.job, router_id, sequence, now=now, claim_again_s=self._renew_every_s / 2
        )
        self._requests[submit.key] = request
        if request.owner is None:
            self._scheduler.add(request.key, accepted_at=request.accepted_at)
        else:
            self.handovers.start(request)

    def _resume(self, request: DecodeRequest, position: int) -> None:
        """The router's stream is a new one: tell what it lacks, and what it may not know yet."""
        output = request.sequence.tokens[request.sequence.prompt_len :]
        is_told = request.handover is not None or request.prefill is not None
        if request.has_joined and is_told and position <= len(output):
            record = OutputRecord(
                key=request.key,
                position=position,
                tokens=tuple(output[position:]),
                handover=request.handover,
                prefill=request.prefill,
            )
            self._effects.record(request.router_id, record)

    def _end_late(self, now: float) -> None:
        for request in list(self._requests.values()):
            if now >= request.deadline:
                self._end(request, DeadlineExceeded("the deadline passed during decode"))

    # --- the iteration ---

    def _admit(self, now: float) -> None:
        while (key := self._scheduler.head()) is not None:
            request = self._requests[key]
            sequence = request.sequence
            if request.state is DecodeState.QUEUED:
                assert request.status is not None, "a queued request knows its handles"
                # Pulled KV needs no forward; what is computed here ends in a token to feed.
                num_tokens = limit = request.status.kv_tokens
            else:
                num_tokens = len(sequence.tokens)
                limit = num_tokens - 1
            if not self._decoding.has_room(request, num_tokens=num_tokens, limit_tokens=limit):
                return
            # The reservation may find fewer hits than it looked for: damaged blocks are none.
            if not self._engine.kv.reserve(sequence, num_tokens, limit):
                return
            request.started_at = request.started_at or now
            if request.state is DecodeState.QUEUED:
                self._scheduler.admit(key)
                self.handovers.start_pull(request, now)
            else:
                self._scheduler.resume(key)
                request.state = DecodeState.RUNNING

    def _joined(self, request: DecodeRequest) -> None:
        sequence = request.sequence
        record = OutputRecord(
            key=request.key,
            position=request.num_submitted,
            tokens=tuple(sequence.tokens[sequence.prompt_len + request.num_submitted :]),
            handover=request.handover,
        )
        self._effects.record(request.router_id, record)
        reach("d.after_join")

    def _collect(self) -> None:
        for request in self._decoding.collect():
            self._sampled(request)

    def _sampled(self, request: DecodeRequest) -> None:
        sequence = request.sequence
        finish = finish_reason(
            sequence, self._engine.model_config.eos_token_ids, self._limits.max_model_len
        )
        is_first = request.owner is None and request.prefill is None
        if is_first:
            request.prefill = PrefillReport(
                cached_tokens=sequence.num_cached,
                computed_tokens=sequence.num_forwarded,
                queue_s=request.started_at - request.submitted_at,
                compute_s=self._clock.monotonic() - request.started_at,
            )
        record = OutputRecord(
            key=request.key,
            position=sequence.num_output - 1,
            tokens=tuple(sequence.tokens[-1:]),
            finish=finish,
            prefill=request.prefill if is_first else None,
            forwarded_tokens=sequence.num_forwarded if finish is not None else 0,
        )
        self._effects.record(request.router_id, record)
        reach("d.after_emit")
        if finish is not None:
            self._end(request, None)

    # --- ends ---

    def _end(self, request: DecodeRequest, error: BatonError | None) -> None:
        """The request is over here: its blocks go, what is in flight stays in quarantine."""
        self._intake.forget(request.key)
        self._scheduler.remove(request.key)
        self._moves.forget(request)
        self.handovers.give_up(request)
        sequence = request.sequence
        if request.has_joined:
            self._engine.kv.publish(sequence, sequence.num_computed)
        self._engine.kv.release(sequence)
        if error is not None:
            self._counters[names.WASTED_ENGINE_MS] += round(1000 * request.engine_s)
            if not isinstance(error, Cancelled):
                self._effects.record(request.router_id, OutputRecord(key=request.key, error=error))

    def _load(self, now: float) -> LoadReport:
        reads = self.handovers.reads
        report = self._reconciler.report(
            now,
            self._owner,
            sequences=[request.sequence for request in self._requests.values()],
            receiving=reads.receiving,
            quarantined=reads.quarantined,
            counters=(
                self._counters,
                self._owner.counters,
                self.handovers.counters,
                self._integrity.counters,
            ),
        )
        return replace(
            report,
            requests_running=self._scheduler.num_running,
            requests_waiting=len(self._requests) - self._scheduler.num_running,
            preemptions=self._decoding.num_preemptions,
            draining=self._intake.is_draining,
        )
