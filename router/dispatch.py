"""The journey of requests as a state machine: submits and cancels out, records in, events out.

1. `submit` places the request and sends it to P and to D at once.
2. Records carry (attempt, position): each position is emitted once, in order, from whoever brings
   it first. P brings the first token, D repeats it with its first frame and brings the rest.
3. A finish, an error, a lost worker, a deadline or a cancel ends the request exactly once, and
   whoever may still work on it is told.

No I/O here: `take_effects` hands out what is to be sent and what clients are to see.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.common.clock import Clock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NoCapacity,
    QueueFull,
    WorkerLost,
)
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import Cancel, DecodeJob, OutputRecord, PrefillJob, Submit
from baton.common.randomness import Randomness, transfer_id
from baton.common.sampling import FinishReason
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry, RequestState
from baton.router.placement import Candidate, Placement

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DispatchEffects:
    """Messages for workers and events for clients, in order."""

    sends: list[tuple[WorkerIdentity, Submit | Cancel]] = field(default_factory=list)
    events: list[tuple[RequestKey, TokenEvent | BatonError]] = field(default_factory=list)


class Dispatch:
    """All requests of this router that have not ended."""

    def __init__(
        self,
        placement: Placement,
        *,
        link_address: Callable[[WorkerIdentity], str],
        clock: Clock,
        randomness: Randomness,
        max_requests: int,
    ) -> None:
        self._placement = placement
        self._link_address = link_address
        self._clock = clock
        self._randomness = randomness
        self._max_requests = max_requests
        self._journal: dict[RequestKey, JournalEntry] = {}
        # Requests of the journal per worker, so that placement need not count them.
        self._in_flight: Counter[WorkerIdentity] = Counter()
        self._effects = DispatchEffects()
        self._draining = False

    @property
    def num_requests(self) -> int:
        return len(self._journal)

    def num_requests_on(self, worker: WorkerIdentity) -> int:
        return self._in_flight[worker]

    def take_effects(self) -> DispatchEffects:
        effects, self._effects = self._effects, DispatchEffects()
        return effects

    def drain(self) -> None:
        """Accept no further requests; those of the journal may end."""
        self._draining = True

    # --- clients ---

    def submit(self, spec: GenerationSpec, candidates: list[Candidate]) -> JournalEntry:
        """Accept a request. Raises NoCapacity or ExceedsKvCapacity; then nothing stays."""
        if self._draining:
            raise NoCapacity("the router is shutting down; ask another one", retry_after_s=1.0)
        if len(self._journal) >= self._max_requests:
            raise QueueFull(
                f"the router holds {self._max_requests} requests already", retry_after_s=1.0
            )
        choice = self._placement.choose(
            candidates,
            prompt_len=len(spec.prompt_tokens),
            max_tokens=spec.sampling.max_tokens,
        )
        now = self._clock.monotonic()
        entry = JournalEntry(
            key=RequestKey(transfer_id(self._randomness), 1),
            spec=spec,
            prefill=choice.prefill,
            decode=choice.decode,
            accepted_at=now,
            progress_at=now,
        )
        self._journal[entry.key] = entry
        self._in_flight.update(entry.workers)
        self._send(entry, choice.prefill, PrefillJob(choice.decode), now)
        if choice.decode is not None:
            job = DecodeJob(choice.prefill, self._link_address(choice.prefill))
            self._send(entry, choice.decode, job, now)
        entry.move(RequestState.PREFILLING, now)
        return entry

    def cancel(self, entry: JournalEntry) -> None:
        """The client went away; no event follows. Ended requests are no error."""
        if not entry.has_ended:
            self._end(entry, RequestState.CANCELLED, told=())

    def finish_early(self, entry: JournalEntry) -> TokenEvent:
        """End the request because a stop string was found; returns its last event.

        The answer is complete, so whatever the workers reported since does not matter.
        """
        if not entry.has_ended:
            if entry.handover_report is not None:
                entry.forwarded_tokens = entry.num_emitted - 1
            self._end(entry, RequestState.FINISHED, told=())
        return entry.last_event([], FinishReason.STOP)

    # --- workers ---

    def record(self, worker: WorkerIdentity, record: OutputRecord) -> None:
        """One record of a step frame. Those of ended or unknown requests are late: ignored."""
        entry = self._journal.get(record.key)
        if entry is None or worker not in entry.workers:
            return
        if record.error is not None:
            self._fail(entry, record.error, told=(worker,))
            return
        now = self._clock.monotonic()
        if record.prefill is not None:
            entry.prefill_report = record.prefill
        if record.handover is not None:
            entry.handover_report = record.handover
        fresh = record.tokens[max(0, entry.num_emitted - record.position) :]
        if record.position > entry.num_emitted:
            self._fail(
                entry,
                InternalError(
                    f"{worker} sent position {record.position} after {entry.num_emitted}"
                ),
                told=(),
            )
            return
        self._advance(entry, record, now)
        if fresh:
            entry.emitted(len(fresh), now)
        if record.finish is not None:
            entry.forwarded_tokens = record.forwarded_tokens
            self._end(entry, RequestState.FINISHED, told=(worker,))
            self._emit(entry, entry.last_event(list(fresh), record.finish))
        elif fresh:
            self._emit(entry, TokenEvent(list(fresh), None, None, None))

    def worker_gone(self, worker: WorkerIdentity) -> None:
        """A worker's stream is gone: what needs it fails."""
        for entry in list(self._journal.values()):
            if worker not in entry.workers:
                continue
            # Once D reported the join, the loss of P is nothing to the request.
            if worker == entry.prefill and entry.state is RequestState.DECODING:
                continue
            self._fail(entry, WorkerLost(f"{worker} was lost; try again"), told=(worker,))

    def sweep(self) -> None:
        """Fail what is past its deadline."""
        now = self._clock.monotonic()
        for entry in list(self._journal.values()):
            if now >= entry.expires_at:
                waited = now - entry.progress_at
                self._fail(
                    entry,
                    DeadlineExceeded(
                        f"no progress for {waited:.1f} s while {entry.state.value} "
                        f"(deadline of the request: {entry.spec.timeout_s:.0f} s)"
                    ),
                    told=(),
                )

    # --- inside ---

    def _advance(self, entry: JournalEntry, record: OutputRecord, now: float) -> None:
        if entry.state is RequestState.PREFILLING and record.tokens:
            entry.move(RequestState.HANDING_OVER, now)
        if entry.state is RequestState.HANDING_OVER and record.handover is not None:
            entry.move(RequestState.DECODING, now)

    def _send(
        self,
        entry: JournalEntry,
        worker: WorkerIdentity,
        job: PrefillJob | DecodeJob,
        now: float,
    ) -> None:
        age_s = now - entry.accepted_at
        submit = Submit(
            key=entry.key,
            prompt_tokens=entry.spec.prompt_tokens,
            sampling=entry.spec.sampling,
            tenant_key=entry.spec.tenant_key,
            age_s=age_s,
            time_left_s=entry.spec.timeout_s - age_s,
            job=job,
        )
        self._effects.sends.append((worker, submit))

    def _fail(
        self, entry: JournalEntry, error: BatonError, *, told: tuple[WorkerIdentity, ...]
    ) -> None:
        log.info("request %s failed: %s", entry.spec.request_id, error.reason)
        state = RequestState.CANCELLED if isinstance(error, Cancelled) else RequestState.FAILED
        self._end(entry, state, told=told)
        self._emit(entry, error)

    def _end(
        self, entry: JournalEntry, state: RequestState, *, told: tuple[WorkerIdentity, ...]
    ) -> None:
        """The one end of a request; workers that do not know of it yet (`told` do) are told."""
        entry.move(state, self._clock.monotonic())
        del self._journal[entry.key]
        for worker in entry.workers:
            self._in_flight[worker] -= 1
            if not self._in_flight[worker]:
                del self._in_flight[worker]
            if worker not in told:
                self._effects.sends.append((worker, Cancel(entry.key)))

    def _emit(self, entry: JournalEntry, event: TokenEvent | BatonError) -> None:
        self._effects.events.append((entry.key, event))
