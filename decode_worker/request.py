"""A request on the decode worker, and its life cycle.

    handed over   CLAIMING → QUEUED → PULLING → RUNNING
    computed here WAITING → RUNNING
    preempted     RUNNING → WAITING
    moved away    RUNNING → MOVING → gone, or RUNNING again

A WAITING sequence holds nothing; what of it is cached here needs no computing.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import (
    DecodeJob,
    HandoverReport,
    LeaseStatus,
    Move,
    PrefillReport,
    Submit,
)
from baton.decode_worker.pull import Pull
from baton.engine.sequence import Sequence


class DecodeState(Enum):
    CLAIMING = "claiming"
    QUEUED = "queued"
    PULLING = "pulling"
    RUNNING = "running"
    WAITING = "waiting"
    MOVING = "moving"


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeRequest:
    """Times are monotonic seconds of this worker. Without an owner all is computed here."""

    key: RequestKey
    router_id: RouterId
    request_id: str
    sequence: Sequence
    owner: WorkerIdentity | None
    owner_address: str
    grant_key: bytes = field(repr=False)
    submitted_at: float
    accepted_at: float
    deadline: float
    renew_at: float
    # Output tokens that came with the submit: the router has them.
    num_submitted: int
    state: DecodeState
    # The newest word of the owner; handles are merged in from the status that carried them.
    status: LeaseStatus | None = None
    pull: Pull | None = None
    # What the router was told with the first record; told again to a router that attaches anew.
    handover: HandoverReport | None = None
    prefill: PrefillReport | None = None
    # A move that was asked for, and that has begun once the state is MOVING.
    move: Move | None = None
    started_at: float = 0.0
    # Seconds of the engine that went into it so far.
    engine_s: float = 0.0

    @classmethod
    def of(
        cls,
        submit: Submit,
        job: DecodeJob,
        router_id: RouterId,
        sequence: Sequence,
        *,
        now: float,
        claim_again_s: float,
    ) -> Self:
        """The request that a submit asks for, before anything was done for it."""
        return cls(
            key=submit.key,
            router_id=router_id,
            request_id=submit.request_id,
            sequence=sequence,
            owner=job.owner,
            owner_address=job.owner_link_address,
            grant_key=job.grant_key,
            submitted_at=now,
            accepted_at=now - submit.age_s,
            deadline=now + submit.time_left_s,
            renew_at=now + claim_again_s,
            num_submitted=len(submit.output_tokens),
            state=DecodeState.WAITING if job.owner is None else DecodeState.CLAIMING,
        )

    @property
    def has_joined(self) -> bool:
        """From here on the owner is nothing to the request."""
        return self.state in (DecodeState.RUNNING, DecodeState.WAITING, DecodeState.MOVING)
