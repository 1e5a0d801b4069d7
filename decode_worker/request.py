"""A request on the decode worker, and its life cycle.

    CLAIMING → QUEUED → PULLING → RUNNING ⇄ PREEMPTED

A preempted sequence lost its blocks to an older one; it is computed again here, from its own cached
blocks as far as they are left.
"""

from dataclasses import dataclass
from enum import Enum

from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import LeaseStatus
from baton.decode_worker.pull import Pull
from baton.engine.sequence import Sequence


class DecodeState(Enum):
    CLAIMING = "claiming"
    QUEUED = "queued"
    PULLING = "pulling"
    RUNNING = "running"
    PREEMPTED = "preempted"


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeRequest:
    """Times are monotonic seconds of this worker."""

    key: RequestKey
    router_id: RouterId
    sequence: Sequence
    owner: WorkerIdentity
    accepted_at: float
    deadline: float
    renew_at: float
    state: DecodeState = DecodeState.CLAIMING
    # The newest word of the owner; handles are merged in from the status that carried them.
    status: LeaseStatus | None = None
    pull: Pull | None = None

    @property
    def has_joined(self) -> bool:
        """From here on the owner is nothing to the request."""
        return self.state in (DecodeState.RUNNING, DecodeState.PREEMPTED)
