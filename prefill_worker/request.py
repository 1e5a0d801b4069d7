"""A request on the prefill worker, and its life cycle: WAITING → RUNNING → LEASED."""

from dataclasses import dataclass
from enum import Enum

from baton.common.errors import BatonError, InvalidRequest
from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import PrefillJob, PrefillReport, Submit
from baton.engine.sequence import Sequence


class PrefillState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    LEASED = "leased"


@dataclass(slots=True, kw_only=True, eq=False)
class PrefillRequest:
    """`num_tokens`: the prompt with what earlier attempts emitted, all of it computed here."""

    key: RequestKey
    router_id: RouterId
    sequence: Sequence
    num_tokens: int
    reader: WorkerIdentity | None
    submitted_at: float
    deadline: float
    state: PrefillState = PrefillState.WAITING
    started_at: float = 0.0
    # With the token that was sampled here; until then the request has no answer.
    report: PrefillReport | None = None
    # Seconds of the engine that went into it so far.
    engine_s: float = 0.0


def job_refusal(submit: Submit) -> BatonError | None:
    """What a prefill worker has against the job, or None."""
    if not isinstance(submit.job, PrefillJob):
        return InvalidRequest("a prefill worker takes prefill jobs", field="job")
    num_left = submit.sampling.max_tokens - len(submit.output_tokens)
    if submit.job.reader is None and num_left > 1:
        return InvalidRequest("a request of more than one token needs a reader", field="reader")
    return None
