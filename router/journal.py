"""What the router remembers of a request from acceptance to its one end.

    QUEUED → PREFILLING → HANDING_OVER → DECODING → FINISHED | FAILED | CANCELLED

Every state that can wait has a deadline; the three ends are final.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from baton.common.errors import BatonError
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import HandoverReport, PrefillReport
from baton.common.sampling import FinishReason, Mode
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
    RequestState.PREFILLING: {RequestState.HANDING_OVER} | _ENDS,
    RequestState.HANDING_OVER: {RequestState.DECODING} | _ENDS,
    RequestState.DECODING: set(_ENDS),
}

# Seconds without progress in a state before the request fails; its own deadline may come first.
STATE_DEADLINE_S: Final = {
    RequestState.QUEUED: 30.0,
    RequestState.PREFILLING: 300.0,
    RequestState.HANDING_OVER: 300.0,
    RequestState.DECODING: 60.0,
}


@dataclass(slots=True, kw_only=True, eq=False)
class JournalEntry:
    """One request. Times are monotonic seconds."""

    key: RequestKey
    spec: GenerationSpec
    prefill: WorkerIdentity
    # None when the request ends with its first token.
    decode: WorkerIdentity | None
    accepted_at: float
    progress_at: float
    state: RequestState = RequestState.QUEUED
    num_emitted: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    prefill_report: PrefillReport | None = None
    handover_report: HandoverReport | None = None
    forwarded_tokens: int = 0
    error: BatonError | None = field(default=None, repr=False)

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDS

    @property
    def workers(self) -> list[WorkerIdentity]:
        return [self.prefill] if self.decode is None else [self.prefill, self.decode]

    @property
    def expires_at(self) -> float:
        """When the request fails unless something happens first."""
        own = self.accepted_at + self.spec.timeout_s
        return min(own, self.progress_at + STATE_DEADLINE_S[self.state])

    def move(self, state: RequestState, now: float) -> None:
        assert state in _NEXT.get(self.state, ()), f"no way from {self.state} to {state}"
        self.state = state
        self.progress_at = now

    def emitted(self, count: int, now: float) -> None:
        """`count` further tokens reached the client."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        self.progress_at = now
        self.num_emitted += count

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.spec.prompt_tokens),
            completion_tokens=self.num_emitted,
            cached_tokens=self._cached_tokens(),
        )

    def report(self) -> Report:
        """`mode` is disagg only if the worker that decoded got the prompt's KV and computed none.

        A sequence that was preempted and computed again on the decode worker counts as local.
        """
        handover = self.handover_report
        was_recomputed = self.forwarded_tokens > max(0, self.num_emitted - 1)
        return Report(
            request_id=self.spec.request_id,
            mode=Mode.LOCAL if handover is None or was_recomputed else Mode.DISAGG,
            prefill_worker=str(self.prefill),
            decode_worker="" if self.decode is None or handover is None else str(self.decode),
            kv_bytes=handover.pulled_bytes if handover else 0,
            kv_blocks=handover.pulled_blocks if handover else 0,
            transport=handover.transport if handover else "",
            ttft_s=(self.first_token_at or self.accepted_at) - self.accepted_at,
            tpot_s=self._seconds_per_token(),
            prefill_computed_tokens=len(self.spec.prompt_tokens) - self._cached_tokens(),
            decode_forwarded_tokens=self.forwarded_tokens,
            decode_cached_tokens=handover.cached_tokens if handover else 0,
            attempts=self.key.attempt,
        )

    def last_event(self, tokens: list[int], finish: FinishReason) -> TokenEvent:
        return TokenEvent(tokens, finish, self.usage(), self.report())

    def _cached_tokens(self) -> int:
        """As the prefill worker reported, or the decode worker, whose stream may be faster."""
        if self.prefill_report is not None:
            return self.prefill_report.cached_tokens
        return self.handover_report.owner_cached_tokens if self.handover_report else 0

    def _seconds_per_token(self) -> float:
        if self.num_emitted < 2 or self.first_token_at is None or self.last_token_at is None:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (self.num_emitted - 1)
