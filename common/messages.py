"""Facts that cross between router, control stream, engine thread and peer: plain data, no protobuf.

`common.control_codec` and `kvtransfer.link_codec` turn them into protobuf and back at the edge;
state machines see only these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from baton.common.errors import BatonError
from baton.common.ids import Generation, RequestKey, RouterId, Slot, WorkerIdentity
from baton.common.sampling import FinishReason, Role, SamplingParams


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """`reader` may claim the lease; None when the request ends with its next token.

    `grant_key` is known to the router, the owner and the reader of this attempt alone.
    """

    reader: WorkerIdentity | None
    grant_key: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """`owner` has the KV of the prompt; None: this worker computes it itself."""

    owner: WorkerIdentity | None
    owner_link_address: str = ""
    grant_key: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One attempt at a request, for one worker. Durations, never absolute times, cross hosts.

    `output_tokens` were emitted by earlier attempts: they are output, so penalties, min_tokens,
    positions and usage see the original boundary.
    """

    key: RequestKey
    prompt_tokens: list[int] = field(repr=False)
    output_tokens: list[int] = field(default_factory=list, repr=False)
    sampling: SamplingParams
    tenant_key: bytes
    age_s: float
    time_left_s: float
    job: PrefillJob | DecodeJob
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    key: RequestKey


@dataclass(frozen=True, slots=True)
class Move:
    """Stop `key` at the next step boundary and lease its KV, as attempt `to`, to `reader`."""

    key: RequestKey
    to: RequestKey
    reader: WorkerIdentity
    grant_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stay:
    """The move of `key` came to nothing: decode on."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class SetDraining:
    draining: bool


@dataclass(frozen=True, slots=True)
class Reap:
    """An operator ends these leases at once; their readers hear of it."""

    keys: tuple[RequestKey, ...]


RouterMessage = Submit | Cancel | Move | Stay | SetDraining | Reap


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that a router waits for, and the first output position that it does not have."""

    key: RequestKey
    next_position: int


@dataclass(frozen=True, slots=True)
class RouterHello:
    """Opens an Attach stream; `live` are the requests that the router still waits for."""

    router_id: RouterId
    router_epoch: int
    live: tuple[LiveRequest, ...] = ()


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
    request_id: str = ""
    why: str = ""
    router: str = ""


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
    # Steps of the model since the start; seconds since the engine's loop last came round.
    steps: int = 0
    stalled_s: float = 0.0
    # Bytes of slots that are pinned although no request, lease or read holds them: 0, or a bug.
    pinned_unowned_bytes: int = 0
    # Monotonic counters by the names of `common.metric_names`.
    counters: Mapping[str, int] = field(default_factory=dict)


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
    """`mac` shows that the router granted this reader this lease (`kvtransfer.grant`)."""

    key: RequestKey
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class LeaseRenew:
    keys: tuple[RequestKey, ...]


@dataclass(frozen=True, slots=True)
class LeaseRelease:
    """The reader needs the blocks no longer.

    `joined`: their bytes are with it and passed the fence; otherwise it gave up. `bad_slots` gave
    other bytes than their digest says: the owner drops them from its cache.
    """

    key: RequestKey
    joined: bool = False
    bad_slots: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """What the owner says of a lease; cumulative, so that the newest replaces the older ones.

    `slots` and `generations` are the handles of all blocks in order, `mac` shows that the owner
    made them; all three may be empty when the reader was told them before. Readable is
    `[0, readable_tokens)`: whole blocks until all `kv_tokens` are. `output_tokens`, the first of
    them at `output_position`, follow that KV; they come with the last announcement. `digests` are
    those of blocks `[first_digest, ..)`, where both sides keep them.
    """

    key: RequestKey
    state: LeaseState
    slots: tuple[Slot, ...] = field(default=(), repr=False)
    generations: tuple[Generation, ...] = field(default=(), repr=False)
    mac: bytes = field(default=b"", repr=False)
    kv_tokens: int = 0
    readable_tokens: int = 0
    output_position: int = 0
    output_tokens: tuple[int, ...] = field(default=(), repr=False)
    finished: bool = False
    cached_tokens: int = 0
    first_digest: int = 0
    digests: tuple[int, ...] = field(default=(), repr=False)
    error: BatonError | None = None
