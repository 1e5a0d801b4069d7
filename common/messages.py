"""Facts that cross between router, control stream, engine thread and peer: plain data, no protobuf.

`common.codec` turns them into protobuf and back at the edge; state machines see only these.
"""

from dataclasses import dataclass, field
from enum import Enum

from baton.common.errors import BatonError
from baton.common.ids import Generation, RequestKey, RouterId, Slot, WorkerIdentity
from baton.common.sampling import FinishReason, Role, SamplingParams


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """`reader` may claim the lease; None when the request ends with its first token."""

    reader: WorkerIdentity | None


@dataclass(frozen=True, slots=True)
class DecodeJob:
    owner: WorkerIdentity
    owner_link_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One request for one worker. Durations, never absolute times, cross between hosts."""

    key: RequestKey
    prompt_tokens: list[int]
    sampling: SamplingParams
    tenant_key: bytes
    age_s: float
    time_left_s: float
    job: PrefillJob | DecodeJob


@dataclass(frozen=True, slots=True)
class Cancel:
    key: RequestKey


@dataclass(frozen=True, slots=True)
class RouterHello:
    """Opens an Attach stream; `live` are the requests that the router still waits for."""

    router_id: RouterId
    router_epoch: int
    live: tuple[RequestKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    name: str
    path: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRow:
    """One row of `baton admin leases`."""

    key: RequestKey
    owner: str
    reader: str
    blocks: int
    num_bytes: int
    age_s: float
    expires_in_s: float
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a worker has and does, once a second."""

    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_leased: int = 0
    blocks_quarantined: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    tokens_pending: int = 0
    preemptions: int = 0
    draining: bool = False
    leases: tuple[LeaseRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """The worker's first message on an Attach stream."""

    identity: WorkerIdentity
    role: Role
    model: ModelInfo
    link_address: str
    pid: int
    load: LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    cached_tokens: int
    computed_tokens: int
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverReport:
    """What D pulled before it joined.

    `pulled_bytes` is the transport's own count; `cached_tokens` were found here and not pulled,
    `owner_cached_tokens` were found by the prefill worker and not computed.
    """

    pulled_blocks: int
    pulled_bytes: int
    transport: str
    cached_tokens: int
    owner_cached_tokens: int
    pull_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRecord:
    """Tokens of one request from one step; `position` is that of the first, counted from 0."""

    key: RequestKey
    position: int = 0
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    prefill: PrefillReport | None = None
    handover: HandoverReport | None = None
    error: BatonError | None = None
    forwarded_tokens: int = 0


class LeaseState(Enum):
    """NOT_YET → OPEN → ENDED; a lease never goes back."""

    NOT_YET = "not_yet"
    OPEN = "open"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    key: RequestKey


@dataclass(frozen=True, slots=True)
class LeaseRenew:
    keys: tuple[RequestKey, ...]


@dataclass(frozen=True, slots=True)
class LeaseRelease:
    key: RequestKey


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """What the owner says of a lease; cumulative, so that the newest replaces the older ones.

    `slots` and `generations` are the handles of all prompt blocks in order; they may be empty
    when the reader was told them before. Readable is `[0, readable_tokens)`: whole blocks until
    the prompt is done.
    """

    key: RequestKey
    state: LeaseState
    slots: tuple[Slot, ...] = field(default=(), repr=False)
    generations: tuple[Generation, ...] = field(default=(), repr=False)
    readable_tokens: int = 0
    first_token: int | None = None
    finished: bool = False
    cached_tokens: int = 0
    error: BatonError | None = None
