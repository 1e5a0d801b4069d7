"""A request on the prefill worker, and its life cycle: WAITING → RUNNING → LEASED."""

from dataclasses import dataclass, field
from enum import Enum

from baton.common.ids import BlockHandle, RequestKey, RouterId, WorkerIdentity
from baton.engine.sequence import Sequence


class PrefillState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    LEASED = "leased"


@dataclass(slots=True, kw_only=True, eq=False)
class PrefillRequest:
    key: RequestKey
    router_id: RouterId
    sequence: Sequence
    reader: WorkerIdentity | None
    submitted_at: float
    deadline: float
    state: PrefillState = PrefillState.WAITING
    started_at: float = 0.0
    handles: tuple[BlockHandle, ...] = field(default=(), repr=False)
    readable_tokens: int = 0
    first_token: int | None = None
