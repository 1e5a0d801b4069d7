"""The journey of requests as a state machine: submits and cancels out, records in, events out.

1. `submit` places the request and sends it to P and to D at once.
2. Records carry (attempt, position): each position is emitted once, in order, from whoever brings
   it first. P brings the first token, D repeats it with its first frame and brings the rest.
3. When an attempt fails, the next one gets the prompt and all emitted tokens, and goes on from
   there; what the old one still sends is late, and its workers are told to forget it.
4. A finish, an error that no further attempt can mend, a deadline or a cancel ends the request
   exactly once, and whoever may still work on it is told.

No I/O here: `take_effects` hands out what is to be sent and what clients are to see.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    ExceedsKvCapacity,
    InternalError,
    NoCapacity,
    NoWorker,
    QueueFull,
    SlowReader,
    UnknownRequest,
    WorkerLost,
)
from baton.common.ids import TransferId, WorkerIdentity
from baton.common.messages import LiveRequest, OutputRecord
from baton.common.metric_names import RECORDS_LATE, RECOVERIES, RECOVERIES_REFUSED, SLOW_CLIENTS
from baton.common.randomness import Randomness, transfer_id
from baton.common.sampling import FinishReason, Role
from baton.common.timing import Timing
from baton.router.assignment import Assigner, Send
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import Journal, JournalEntry, RequestState, state_deadlines
from baton.router.moves import Moves
from baton.router.placement import Candidate, Placement
from baton.router.recovery import (
    RecoveryPolicy,
    blame_error,
    blame_loss,
    blame_silence,
    has_crashed_too_often,
    is_recoverable,
)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DispatchEffects:
    """Messages for workers and events for clients, in order."""

    sends: list[Send] = field(default_factory=list)
    events: list[tuple[TransferId, TokenEvent | BatonError]] = field(default_factory=list)


class Dispatch:
    """All requests of this router that have not ended."""

    def __init__(
        self,
        placement: Placement,
        *,
        candidates: Callable[[str], list[Candidate]],
        link_address: Callable[[WorkerIdentity], str],
        clock: Clock,
        randomness: Randomness,
        timing: Timing,
        max_requests: int,
    ) -> None:
        self._clock = clock
        self._randomness = randomness
        self._timing = timing
        self._state_deadlines = state_deadlines(timing)
        self._max_requests = max_requests
        self._journal = Journal()
        self._counters: Counter[str] = Counter()
        self._assigner = Assigner(
            self._journal,
            placement,
            candidates=candidates,
            link_address=link_address,
            clock=clock,
            randomness=randomness,
        )
        self._moves = Moves(
            self._journal, self._assigner, clock=clock, timing=timing, counters=self._counters
        )
        self._policy = RecoveryPolicy(timing)
        self._events: list[tuple[TransferId, TokenEvent | BatonError]] = []
        self._draining = False

    @property
    def num_requests(self) -> int:
        return len(self._journal)

    @property
    def counters(self) -> Mapping[str, int]:
        """By the names of `common.metric_names`; one that is absent is 0."""
        return self._counters

    def num_requests_on(self, worker: WorkerIdentity) -> int:
        """Requests that `worker` may work on, a prefill worker's until the join."""
        return self._journal.num_held_by(worker)

    def knows(self, request: TransferId) -> bool:
        """Whether the request has not ended."""
        return request in self._journal

    def take_effects(self) -> DispatchEffects:
        events, self._events = self._events, []
        return DispatchEffects(self._assigner.take_sends(), events)

    def drain(self) -> None:
        """Accept no further requests; those of the journal may end."""
        self._draining = True

    # --- clients ---

    def submit(self, spec: GenerationSpec) -> JournalEntry:
        """Accept a request. Raises NoCapacity or ExceedsKvCapacity; then nothing stays."""
        if self._draining:
            raise NoCapacity("the router is shutting down; ask another one", retry_after_s=1.0)
        if len(self._journal) >= self._max_requests:
            raise QueueFull(
                f"the router holds {self._max_requests} requests already", retry_after_s=1.0
            )
        now = self._clock.monotonic()
        entry = JournalEntry(
            transfer_id=transfer_id(self._randomness), spec=spec, accepted_at=now, progress_at=now
        )
        self._assigner.begin(entry)
        self._journal.add(entry)
        self._policy.accepted(now)
        return entry

    def cancel(self, entry: JournalEntry) -> None:
        """The client went away; no event follows. Ended requests are no error."""
        if not entry.has_ended:
            self._end(entry, RequestState.CANCELLED)

    def give_up_slow(self, entry: JournalEntry, error: SlowReader) -> None:
        """The client does not read: it gets the error if it ever does. Ended is no error."""
        if not entry.has_ended:
            self._counters[SLOW_CLIENTS] += 1
            self._fail(entry, error)

    def finish_early(self, entry: JournalEntry) -> TokenEvent:
        """End the request because a stop string was found; returns its last event.

        The answer is complete, so whatever the workers reported since does not matter.
        """
        if not entry.has_ended:
            entry.handling.forwarded_tokens = entry.decoded_since_join()
            self._end(entry, RequestState.FINISHED)
        return entry.last_event([], FinishReason.STOP)

    # --- workers ---

    def record(self, worker: WorkerIdentity, record: OutputRecord) -> None:
        """One record of a step frame.

        Late ones change nothing: of requests that ended, of attempts and workers that were left.
        """
        entry = self._journal.get(record.key.transfer_id)
        if entry is None or not self._admit(entry, worker, record):
            self._counters[RECORDS_LATE] += 1
            return
        if record.error is not None:
            self._broken(entry, worker, record.error)
            return
        if record.position > entry.num_emitted:
            self._fail(
                entry,
                InternalError(
                    f"{worker} sent position {record.position} after {entry.num_emitted}"
                ),
            )
            return
        self._take(entry, worker, record)

    def worker_gone(self, worker: WorkerIdentity) -> None:
        """A worker's stream is gone past its grace: what needs it goes on elsewhere."""
        self._moves.gone(worker)
        error = WorkerLost(f"{worker} was lost; try again")
        for entry in self._journal:
            role = entry.history.suspects.get(worker)
            if role is not None:
                self._confirm_crash(entry, worker, role)
        for entry in self._journal.held_by(worker):
            if entry.move is not None and worker == entry.move.target:
                self._move_failed(entry, "it was lost", told=(worker,))
                continue
            blame_loss(entry, worker)
            if entry.move is not None:
                self._moves.source_lost(entry, error)
            else:
                self._recover(entry, error, told=(worker,))

    def worker_joined(self, worker: WorkerIdentity) -> None:
        """A worker is ready, or is back: who waits for one is tried again."""
        for entry in self._journal:
            entry.history.excluded.pop(worker, None)
            if entry.state is RequestState.QUEUED:
                self._retry(entry)

    def worker_draining(self, worker: WorkerIdentity) -> None:
        """A load report says that `worker` drains: what decodes there moves away. Idempotent."""
        self._moves.draining(worker)

    def live_on(self, worker: WorkerIdentity) -> tuple[LiveRequest, ...]:
        """What `worker` is to go on with on a new stream, from which position."""
        live = []
        for entry in self._journal.held_by(worker):
            attempt = entry.current
            if entry.move is not None and worker == entry.move.target:
                attempt = entry.move.attempt
            live.append(LiveRequest(attempt.key, entry.num_emitted))
        return tuple(live)

    def sweep(self) -> None:
        """See to every deadline that passed, and to who waits for a worker."""
        now = self._clock.monotonic()
        for entry in self._journal:
            if now >= entry.ends_at:
                self._fail(entry, self._too_late(entry, now))
                continue
            if entry.move is not None and now >= entry.move.ends_at:
                self._move_failed(entry, "it did not join in time")
            if entry.state is RequestState.QUEUED:
                self._retry(entry)
            elif not entry.has_ended and self._is_stuck(entry, now):
                error = self._too_late(entry, now)
                blame_silence(entry)
                self._recover(entry, error)

    # --- inside: an attempt and its end ---

    def _admit(self, entry: JournalEntry, worker: WorkerIdentity, record: OutputRecord) -> bool:
        """Whether the record is of the current attempt, perhaps because this one makes it that."""
        move, attempt = entry.move, entry.attempt
        if move is not None and record.key == move.attempt.key and worker == move.target:
            if record.error is None:
                self._moves.won(entry)
            return True
        if attempt is None or record.key != attempt.key or worker not in attempt.workers:
            return False
        # Once D has joined, P's failures are nothing to the request.
        is_past = worker == attempt.prefill and entry.state is RequestState.DECODING
        return not (is_past and record.error is not None)

    def _take(self, entry: JournalEntry, worker: WorkerIdentity, record: OutputRecord) -> None:
        now = self._clock.monotonic()
        # The first token of whoever works alone ends a prefill, as one of P does.
        role = entry.runs_on(worker) or Role.DECODE
        entry.reported(record.prefill, record.handover)
        entry.advance(
            worker, has_tokens=bool(record.tokens), joined=record.handover is not None, now=now
        )
        if entry.state is RequestState.DECODING:
            self._assigner.prefill_is_done(entry)
        fresh = record.tokens[entry.num_emitted - record.position :]
        if fresh:
            entry.emitted(fresh, role, now)
        if record.finish is not None:
            entry.handling.forwarded_tokens = record.forwarded_tokens
            self._finish(entry, list(fresh), record.finish, told=(worker,))
        elif fresh:
            self._emit(entry, TokenEvent(list(fresh), None, None, None))

    def _broken(self, entry: JournalEntry, worker: WorkerIdentity, error: BatonError) -> None:
        """A worker of the current attempt, or the target of a move, reported an error."""
        cause = error
        told: tuple[WorkerIdentity, ...] = (worker,)
        if isinstance(error, UnknownRequest):
            # The submit may still be on its way; and to the client the request is well known.
            cause, told = WorkerLost(f"{worker} does not have the request; try again"), ()
        if entry.move is not None and worker == entry.move.target:
            self._move_failed(entry, error.reason, told)
            return
        if not is_recoverable(error):
            self._fail(entry, error, told)
            return
        blame_error(entry, worker, error, self._timing, self._clock.monotonic())
        if entry.move is not None:
            self._moves.source_lost(entry, cause)
        else:
            self._recover(entry, cause, told)

    def _move_failed(
        self, entry: JournalEntry, why: str, told: tuple[WorkerIdentity, ...] = ()
    ) -> None:
        cause = self._moves.failed(entry, why, told)
        if cause is not None:
            self._recover(entry, cause)

    def _confirm_crash(self, entry: JournalEntry, worker: WorkerIdentity, role: Role) -> None:
        """A worker whose peer had lost it is gone indeed, and it had been running the request."""
        entry.history.crashed(worker, role)
        if has_crashed_too_often(entry):
            self._recover(entry, WorkerLost(f"{worker} was lost; try again"))

    # --- inside: another attempt ---

    def _recover(
        self, entry: JournalEntry, cause: BatonError, told: tuple[WorkerIdentity, ...] = ()
    ) -> None:
        """Leave the current attempt and begin the next one, unless the request ends here."""
        now = self._clock.monotonic()
        finish = entry.natural_end()
        if finish is not None:
            entry.handling.forwarded_tokens = entry.decoded_since_join()
            self._finish(entry, [], finish, told=told)
            return
        if now >= entry.ends_at:
            self._fail(entry, self._too_late(entry, now), told=told)
            return
        refusal = self._policy.refusal(entry, cause, now)
        if refusal is not None:
            self._counters[RECOVERIES_REFUSED] += 1
            self._fail(entry, refusal, told=told)
            return
        left = entry.current
        self._counters[RECOVERIES] += 1
        self._assigner.leave(entry, told)
        entry.attempt = None
        entry.enter(RequestState.QUEUED, now)
        log.info(
            "request %s: attempt %s on %s failed after %d tokens: %s",
            entry.spec.request_id,
            left.key,
            left,
            entry.num_emitted - left.first_position,
            cause.reason,
        )
        self._retry(entry)

    def _retry(self, entry: JournalEntry) -> None:
        """Begin an attempt at an entry that waits for a worker, if somebody is there for it."""
        try:
            attempt = self._assigner.begin(entry)
        except (NoCapacity, ExceedsKvCapacity) as nobody:
            if self._is_stuck(entry, self._clock.monotonic()):
                error = f"nobody was there to go on with the request: {nobody.message}"
                self._fail(entry, NoWorker(error, retry_after_s=1.0))
            return
        log.info(
            "request %s goes on as attempt %s on %s", entry.spec.request_id, attempt.key, attempt
        )

    # --- inside: the one end ---

    def _is_stuck(self, entry: JournalEntry, now: float) -> bool:
        return now >= entry.progress_at + self._state_deadlines[entry.state]

    def _too_late(self, entry: JournalEntry, now: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"no progress for {now - entry.progress_at:.1f} s while {entry.state.value} "
            f"(deadline of the request: {entry.spec.timeout_s:.0f} s)"
        )

    def _finish(
        self,
        entry: JournalEntry,
        tokens: list[int],
        finish: FinishReason,
        told: tuple[WorkerIdentity, ...],
    ) -> None:
        self._end(entry, RequestState.FINISHED, told)
        self._emit(entry, entry.last_event(tokens, finish))

    def _fail(
        self, entry: JournalEntry, error: BatonError, told: tuple[WorkerIdentity, ...] = ()
    ) -> None:
        log.info("request %s failed: %s", entry.spec.request_id, error.reason)
        state = RequestState.CANCELLED if isinstance(error, Cancelled) else RequestState.FAILED
        self._end(entry, state, told)
        self._emit(entry, error)

    def _end(
        self, entry: JournalEntry, state: RequestState, told: tuple[WorkerIdentity, ...] = ()
    ) -> None:
        """The one end of a request; workers that do not know of it yet (`told` do) are told."""
        self._assigner.leave(entry, told)
        entry.enter(state, self._clock.monotonic())
        self._journal.remove(entry)

    def _emit(self, entry: JournalEntry, event: TokenEvent | BatonError) -> None:
        self._events.append((entry.transfer_id, event))
