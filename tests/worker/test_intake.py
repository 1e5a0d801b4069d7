"""Which requests a worker takes, knows and ends, whatever its role."""

from dataclasses import dataclass, replace

import pytest

from baton.common.clock import ManualClock
from baton.common.errors import BatonError, InvalidRequest
from baton.common.ids import RequestKey, RouterId, TransferId
from baton.common.messages import LiveRequest, OutputRecord, PrefillJob, Submit
from baton.common.sampling import SamplingParams
from baton.common.timing import DEFAULT_TIMING
from baton.worker.admission import Limits
from baton.worker.core import Effects
from baton.worker.intake import Intake

LIMITS = Limits(max_model_len=100, vocab_size=50, num_blocks=10, block_size=8, max_requests=3)
HERE, THERE = RouterId("here"), RouterId("there")


@dataclass(frozen=True)
class Held:
    key: RequestKey
    router_id: RouterId


class Worker:
    """A role that does nothing but hold requests."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ended: list[tuple[RequestKey, BatonError]] = []
        self.intake: Intake[Held] = Intake(LIMITS, self.clock, DEFAULT_TIMING, end=self.end)

    def end(self, request: Held, error: BatonError) -> None:
        self.ended.append((request.key, error))
        self.intake.forget(request.key)

    def submit(
        self, submit: Submit, router: RouterId = HERE, role_refusal: BatonError | None = None
    ) -> str:
        """Empty when it was taken, else the reason that the router was told, or "silent"."""
        effects = Effects()
        if self.intake.takes(router, submit, effects, kv_tokens=4, role_refusal=role_refusal):
            self.intake.requests[submit.key] = Held(submit.key, router)
            assert not effects, "who is taken hears nothing yet"
            return ""
        errors = [record.error for record in effects.records.get(router, [])]
        return errors[0].reason if errors and errors[0] is not None else "silent"


def request(number: int, attempt: int = 0) -> Submit:
    return Submit(
        key=RequestKey(TransferId(bytes([number]) * 16), attempt),
        prompt_tokens=[1, 2, 3],
        sampling=SamplingParams(max_tokens=2),
        tenant_key=b"",
        age_s=0.0,
        time_left_s=10.0,
        job=PrefillJob(reader=None),
    )


def test_the_first_submit_stays_and_the_second_is_not_answered() -> None:
    worker = Worker()
    assert worker.submit(request(1)) == ""
    assert worker.submit(request(1)) == "silent"
    assert list(worker.intake.requests) == [request(1).key]


def test_a_cancel_that_overtakes_its_submit_wins() -> None:
    worker = Worker()
    worker.intake.cancel(request(1, attempt=2).key)
    assert worker.ended == [], "nobody was held"
    assert worker.submit(request(1, attempt=2)) == "already_exists"
    assert worker.submit(request(1, attempt=1)) == "already_exists", "lower attempts are over too"
    assert worker.submit(request(1, attempt=3)) == ""


def test_an_ending_is_remembered_for_one_lease_time() -> None:
    worker = Worker()
    worker.intake.cancel(request(1).key)
    worker.clock.advance(DEFAULT_TIMING.lease_term_s)
    worker.intake.cancel(request(2).key)
    assert not worker.intake.endings.has_ended(request(1).key)
    assert worker.intake.endings.has_ended(request(2).key)


def test_what_was_refused_has_ended() -> None:
    worker = Worker()
    refused = InvalidRequest("another job", field="job")
    assert worker.submit(request(1), role_refusal=refused) == refused.reason
    assert worker.submit(request(1)) == "already_exists"
    assert worker.submit(replace(request(2), prompt_tokens=[])) == refused.reason


def test_a_router_that_is_gone_takes_its_own_requests_alone() -> None:
    worker = Worker()
    for number, router in ((1, HERE), (2, HERE), (3, THERE)):
        assert worker.submit(request(number), router) == ""
    worker.intake.abort_router(HERE, keep=frozenset({request(2).key}))
    assert [(key, error.reason) for key, error in worker.ended] == [(request(1).key, "worker_lost")]
    assert set(worker.intake.requests) == {request(2).key, request(3).key}
    assert worker.intake.endings.has_ended(request(1).key)


@pytest.mark.parametrize("is_draining", [False, True])
def test_a_worker_that_is_full_or_drains_says_so(is_draining: bool) -> None:
    worker = Worker()
    for number in range(LIMITS.max_requests):
        assert worker.submit(request(number)) == ""
    worker.intake.is_draining = is_draining
    assert worker.submit(request(9)) == ("no_worker" if is_draining else "queue_full")


def test_a_router_that_attaches_anew_hears_of_what_is_not_here() -> None:
    worker = Worker()
    for number, router in ((1, HERE), (2, HERE), (3, THERE)):
        assert worker.submit(request(number), router) == ""
    effects = Effects()
    live = tuple(LiveRequest(request(number).key, 4) for number in (2, 9))
    known = worker.intake.router_attached(HERE, live, effects)
    assert [(held.key, position) for held, position in known] == [(request(2).key, 4)]
    assert [key for key, _ in worker.ended] == [request(1).key], "nobody named it"
    (told,) = effects.records[HERE]
    assert told.error is not None
    assert (told.key, told.error.reason) == (request(9).key, "unknown_request")


def test_what_an_older_stream_was_to_carry_is_dropped() -> None:
    worker, effects = Worker(), Effects()
    assert worker.submit(request(1)) == ""
    for number, router in ((1, HERE), (2, THERE)):
        effects.record(router, OutputRecord(key=request(number).key, tokens=(5,)))
    worker.intake.router_attached(HERE, (LiveRequest(request(1).key, 0),), effects)
    assert list(effects.records) == [THERE]


def test_a_lower_attempt_is_refused_while_a_higher_one_is_here() -> None:
    worker = Worker()
    assert worker.submit(request(1, attempt=2)) == ""
    assert worker.submit(request(1, attempt=1)) == "already_exists"
    assert worker.submit(request(1, attempt=3)) == "", "a move has two of them here"
    assert worker.submit(request(1, attempt=1)) == "already_exists"
