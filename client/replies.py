"""What a router answers, as plain data: no protobuf type leaves this package."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.common.sampling import FinishReason, Mode


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is what the model's template knows: system, user, assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How an answer ended and what it took; bytes, tokens and seconds."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    # Prompt tokens that the prefill worker did not compute again.
    cached_tokens: int
    request_id: str
    mode: Mode
    prefill_worker: str
    decode_worker: str
    kv_bytes: int
    kv_blocks: int
    # Empty when nothing crossed.
    transport: str
    ttft_s: float
    # Mean seconds per output token after the first; 0 with fewer than two tokens.
    tpot_s: float
    prefill_computed_tokens: int
    decode_forwarded_tokens: int
    decode_cached_tokens: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; `finish` comes with the last one alone.

    `text` may be empty while a character is incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker as its router sees it; `id` and `epoch` name one life of it.

    `state` is connecting, ready, reconnecting, suspect, stalled, draining, drained or gone.
    """

    id: str
    epoch: int
    incarnation: str
    role: str
    state: str
    address: str
    link_address: str
    pid: int
    model: str
    # Requests that this router has there.
    requests: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_leased: int
    blocks_quarantined: int
    requests_running: int
    requests_waiting: int
    tokens_pending: int
    # Workers exchange KV only if their fingerprints are equal.
    fingerprint: str
    block_size: int
    preemptions: int = 0
    # It was told to drain: it gets nothing new, and what it runs is moved away.
    draining: bool = False
    # Steps of the model since it started; seconds since its engine's loop last came round.
    steps: int = 0
    stalled_s: float = 0.0
    # Bytes of KV that are pinned although nobody holds them: 0, or a bug.
    pinned_unowned_bytes: int = 0
    # Since it started, by the names of `baton.common.metric_names`.
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def life(self) -> str:
        """As leases and reports name it."""
        return f"{self.id}@{self.epoch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who pins which bytes for whom; `transfer_id` in hexadecimal."""

    transfer_id: str
    attempt: int
    owner: str
    reader: str
    blocks: int
    bytes: int
    age_s: float
    expires_in_s: float
    state: str
    # The client's name for the request, and the router that it is of; empty if the owner was told
    # none.
    request_id: str = ""
    router: str = ""
    # What the lease is for, in the owner's words.
    why: str = ""

    @property
    def id(self) -> str:
        """What `baton admin leases reap` takes, whole or its beginning."""
        return f"{self.transfer_id}/{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an engine; `number` counts from its start.

    `took_s` is from its launch, or from the end of the step before it if that came later.
    `replayed`: a CUDA graph, rather than kernel by kernel; None on a host.
    """

    number: int
    # Since its launch.
    age_s: float
    took_s: float
    rows: int
    tokens: int
    # Of the tokens, those that are of prompts.
    prompt_tokens: int
    replayed: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """Of steps in a row: `window_s` from the beginning of the first to the end of the last, of
    which `busy_s` were steps."""

    steps: int
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    window_s: float
    busy_s: float
    tokens: int
    prompt_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHistory:
    """What the engine of one life of a worker did last, the oldest step first."""

    worker: str
    summary: StepSummary
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`path` is on the worker's host; there is no file before it is whole."""

    worker: str
    path: str
    is_written: bool
