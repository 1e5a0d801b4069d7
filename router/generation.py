"""Where the fronts and the dispatcher meet: one request in, a stream of token events out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from baton.common.sampling import FinishReason, Mode, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A validated request. `stop` is for the front alone: no worker ever sees text.

    `end_token_ids` end the answer beside `sampling.stop_token_ids`: those of the model, unless the
    client ignores them.
    """

    request_id: str
    model: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]
    tenant_key: bytes
    timeout_s: float
    end_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Report:
    """What happened to the request; `baton.v1.Report` says what each field means."""

    request_id: str
    mode: Mode
    prefill_worker: str
    decode_worker: str
    kv_bytes: int
    kv_blocks: int
    transport: str
    ttft_s: float
    tpot_s: float
    prefill_computed_tokens: int
    decode_forwarded_tokens: int
    decode_cached_tokens: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens`: prompt tokens that the prefill worker did not compute again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens of one frame, in order. The last event, and only that, has the other three."""

    token_ids: list[int]
    finish: FinishReason | None
    usage: Usage | None
    report: Report | None


class Stream(Protocol):
    """One running request, read by one task.

    Iteration ends after the event that carries `finish`; it raises the request's BatonError.
    """

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def finish_early(self) -> TokenEvent:
        """End the request on its workers because the reader has what it wants.

        Returns a last event without tokens: finish STOP, usage and report so far. Called at most
        once and never after the last event; nothing may be iterated afterwards.
        """
        ...

    async def aclose(self) -> None:
        """Cancel the request unless it has ended. Idempotent."""
        ...


class TokenSource(Protocol):
    """What answers a spec: the dispatcher, or a script."""

    def submit(self, spec: GenerationSpec) -> Stream:
        """Start the request; a BatonError comes from here or from the first read. Never blocks."""
        ...
