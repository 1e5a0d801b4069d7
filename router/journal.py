"""What the router remembers of a request from acceptance to its one end.

    QUEUED ⇄ PREFILLING → HANDING_OVER → DECODING → FINISHED | FAILED | CANCELLED

A recovery leads from every state that waits back to QUEUED, and from there to PREFILLING at once
when somebody is there. The three ends are final.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from baton.common.ids import RequestKey, TransferId, WorkerIdentity
from baton.common.messages import HandoverReport, PrefillReport
from baton.common.sampling import FinishReason, Mode, Role
from baton.common.timing import Timing
from baton.router.attempt import Attempt, AttemptHistory, RunningMove
from baton.router.generation import GenerationSpec, Report, TokenEvent, Usage


class RequestState(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing over"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDS: Final = frozenset({RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED})
_NEXT: Final = {
    RequestState.QUEUED: {RequestState.PREFILLING} | _ENDS,
    # Straight to DECODING where the decode worker computes the prompt itself.
    RequestState.PREFILLING: {
        RequestState.HANDING_OVER,
        RequestState.DECODING,
        RequestState.QUEUED,
        *_ENDS,
    },
    RequestState.HANDING_OVER: {RequestState.DECODING, RequestState.QUEUED} | _ENDS,
    RequestState.DECODING: {RequestState.QUEUED} | _ENDS,
}


def state_deadlines(timing: Timing) -> dict[RequestState, float]:
    """Seconds without progress in each state that waits before something is done about it."""
    return {
        RequestState.QUEUED: timing.queued_deadline_s,
        RequestState.PREFILLING: timing.prefill_deadline_s,
        RequestState.HANDING_OVER: timing.handover_deadline_s,
        RequestState.DECODING: timing.decode_deadline_s,
    }


@dataclass(slots=True)
class Handling:
    """What workers said of the current attempt, with the moves that followed it."""

    prefill: WorkerIdentity | None = None
    prefill_report: PrefillReport | None = None
    handover_report: HandoverReport | None = None
    # By the attempt that moved; a new stream tells it again.
    moves: dict[int, HandoverReport] = field(default_factory=dict)
    forwarded_tokens: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class JournalEntry:
    """One request. Times are monotonic seconds.

    `tokens` are all that were emitted; an emitted token is never taken back. `attempt` is None
    while no worker has the request.
    """

    transfer_id: TransferId
    spec: GenerationSpec
    accepted_at: float
    progress_at: float
    state: RequestState = RequestState.QUEUED
    tokens: "array[int]" = field(default_factory=lambda: array("I"), repr=False)
    first_token_at: float | None = None
    last_token_at: float | None = None
    # Prompt tokens in the cache of the first worker that said so: later ones find our own.
    cached_tokens: int | None = None
    attempt: Attempt | None = None
    move: RunningMove | None = None
    # The highest attempt number so far, and how many of them were no moves.
    last_attempt: int = 0
    num_attempts: int = 0
    history: AttemptHistory = field(default_factory=AttemptHistory)
    handling: Handling = field(default_factory=Handling)

    @property
    def num_emitted(self) -> int:
        return len(self.tokens)

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDS

    @property
    def ends_at(self) -> float:
        """The client's deadline."""
        return self.accepted_at + self.spec.timeout_s

    @property
    def current(self) -> Attempt:
        """The attempt of an entry that some worker has."""
        assert self.attempt is not None, f"no worker has {self.transfer_id.hex()}"
        return self.attempt

    def next_key(self) -> RequestKey:
        """A key that no worker has seen."""
        self.last_attempt += 1
        return RequestKey(self.transfer_id, self.last_attempt)

    def enter(self, state: RequestState, now: float) -> None:
        assert state in _NEXT.get(self.state, ()), f"no way from {self.state} to {state}"
        self.state = state
        self.progress_at = now

    def begin(self, attempt: Attempt, now: float) -> None:
        """A new attempt computes the rest of the answer."""
        self.attempt = attempt
        self.num_attempts += 1
        self.history.tries += 1
        self.history.failed_targets.clear()
        self.handling = Handling(prefill=attempt.prefill)
        self.enter(RequestState.PREFILLING, now)

    def advance(
        self, worker: WorkerIdentity, *, has_tokens: bool, joined: bool, now: float
    ) -> None:
        """`worker` of the current attempt reported tokens or its join."""
        if worker == self.current.decode and (has_tokens or joined):
            if self.state in (RequestState.PREFILLING, RequestState.HANDING_OVER):
                self.enter(RequestState.DECODING, now)
        elif has_tokens and self.state is RequestState.PREFILLING:
            self.enter(RequestState.HANDING_OVER, now)

    def runs_on(self, worker: WorkerIdentity) -> Role | None:
        """As what `worker` computes for this request at present, if it does."""
        attempt = self.attempt
        if attempt is None:
            return None
        if self.state is RequestState.PREFILLING:
            return Role.PREFILL if worker == (attempt.prefill or attempt.decode) else None
        return Role.DECODE if worker == attempt.decode else None

    def reported(self, prefill: PrefillReport | None, handover: HandoverReport | None) -> None:
        """What a worker of the current attempt says of its work, perhaps once more."""
        attempt, handling = self.current, self.handling
        if prefill is not None:
            handling.prefill_report = prefill
            if self.cached_tokens is None:
                self.cached_tokens = prefill.cached_tokens
        if handover is None:
            return
        if attempt.source is not None:
            handling.moves[attempt.key.attempt] = handover
            return
        handling.handover_report = handover
        if self.cached_tokens is None:
            self.cached_tokens = handover.owner_cached_tokens

    def emitted(self, tokens: tuple[int, ...], role: Role, now: float) -> None:
        """Further tokens reached the client, from a worker of that role."""
        assert tokens, "no tokens are no progress"
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        self.progress_at = now
        self.tokens.extend(tokens)
        self.history.progressed(role)

    def natural_end(self) -> FinishReason | None:
        """Why the emitted tokens are a whole answer, if they are one (`engine.finish`)."""
        sampling = self.spec.sampling
        if self.num_emitted > sampling.min_tokens:
            last = self.tokens[-1]
            if last in self.spec.end_token_ids or last in sampling.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.num_emitted >= sampling.max_tokens else None

    # --- what the client is told ---

    def last_event(self, tokens: list[int], finish: FinishReason) -> TokenEvent:
        return TokenEvent(tokens, finish, self.usage(), self.report())

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.spec.prompt_tokens),
            completion_tokens=self.num_emitted,
            cached_tokens=min(len(self.spec.prompt_tokens), self.cached_tokens or 0),
        )

    def report(self) -> Report:
        """Of the last attempt that was no move, and of the moves after it.

        `mode` is disagg only if the worker that decoded got the prompt's KV and computed none. A
        sequence that was preempted and computed again on the decode worker counts as local.
        """
        attempt, handling = self.attempt, self.handling
        handover = handling.handover_report
        decode = attempt.decode if attempt is not None else None
        joined = handover is not None or handling.prefill is None
        crossings = [*([] if handover is None else [handover]), *handling.moves.values()]
        return Report(
            request_id=self.spec.request_id,
            mode=Mode.LOCAL if handover is None or self._was_recomputed() else Mode.DISAGG,
            prefill_worker="" if handling.prefill is None else str(handling.prefill),
            decode_worker=str(decode) if decode is not None and joined else "",
            kv_bytes=sum(each.pulled_bytes for each in crossings),
            kv_blocks=sum(each.pulled_blocks for each in crossings),
            transport=crossings[-1].transport if crossings else "",
            ttft_s=(self.first_token_at or self.accepted_at) - self.accepted_at,
            tpot_s=self._seconds_per_token(),
            prefill_computed_tokens=self._prefill_computed_tokens(),
            decode_forwarded_tokens=handling.forwarded_tokens,
            decode_cached_tokens=handover.cached_tokens if handover else 0,
            attempts=self.num_attempts,
        )

    def decoded_since_join(self) -> int:
        """Tokens that the decode worker forwarded if it computed none a second time."""
        if self.attempt is None or self.handling.handover_report is None:
            return 0
        return max(0, self.num_emitted - self.attempt.position_at_join)

    def _was_recomputed(self) -> bool:
        return self.handling.forwarded_tokens > self.decoded_since_join()

    def _prefill_computed_tokens(self) -> int:
        """By the prefill worker, which computes the emitted tokens as well when it resumes."""
        report = self.handling.prefill_report
        if self.handling.prefill is None:
            return 0
        if report is not None:
            return report.computed_tokens
        return len(self.spec.prompt_tokens) - self.usage().cached_tokens

    def _seconds_per_token(self) -> float:
        if self.num_emitted < 2 or self.first_token_at is None or self.last_token_at is None:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (self.num_emitted - 1)


class Journal:
    """All entries that have not ended, and who holds which of them."""

    def __init__(self) -> None:
        self._entries: dict[TransferId, JournalEntry] = {}
        self._held: dict[WorkerIdentity, dict[TransferId, JournalEntry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._entries

    def __iter__(self) -> Iterator[JournalEntry]:
        """Over a copy: entries may end meanwhile."""
        return iter(list(self._entries.values()))

    def get(self, transfer_id: TransferId) -> JournalEntry | None:
        return self._entries.get(transfer_id)

    def add(self, entry: JournalEntry) -> None:
        self._entries[entry.transfer_id] = entry

    def remove(self, entry: JournalEntry) -> None:
        """The entry has ended; nobody may hold it any more."""
        del self._entries[entry.transfer_id]

    def hold(self, entry: JournalEntry, worker: WorkerIdentity) -> None:
        """`worker` may work on the entry from now on."""
        self._held.setdefault(worker, {})[entry.transfer_id] = entry

    def release(self, entry: JournalEntry, worker: WorkerIdentity) -> None:
        """`worker` is nothing to the entry any more. Idempotent."""
        held = self._held.get(worker)
        if held is not None and held.pop(entry.transfer_id, None) is not None and not held:
            del self._held[worker]

    def held_by(self, worker: WorkerIdentity) -> list[JournalEntry]:
        return list(self._held.get(worker, {}).values())

    def num_held_by(self, worker: WorkerIdentity) -> int:
        return len(self._held.get(worker, ()))
