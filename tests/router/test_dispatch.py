"""The journey of a request without I/O: every token once, in order, and exactly one end."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.router_desk import (
    PREFILLED,
    TIMEOUT_S,
    Desk,
    candidate,
    first,
    identity,
    join,
    record,
)

from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    ExceedsKvCapacity,
    FenceFailed,
    InternalError,
    InvalidRequest,
    NoCapacity,
    NoWorker,
    QueueFull,
)
from baton.common.ids import WorkerIdentity
from baton.common.messages import DecodeJob, OutputRecord, PrefillJob, Submit
from baton.common.metric_names import RECORDS_LATE
from baton.common.sampling import FinishReason, Mode
from baton.router.journal import RequestState

P, D, STRANGER = identity("p0"), identity("d0"), identity("p9")
FIRST, JOIN = first(), join()


@pytest.fixture
def desk() -> Desk:
    return Desk(P, D)


def test_both_workers_hear_of_it_at_once(desk: Desk) -> None:
    desk.clock.advance(1.0)
    entry = desk.submit()
    desk.look()
    (to_p, for_p), (to_d, for_d) = desk.sends
    assert (to_p, to_d) == (P, D)
    assert isinstance(for_p, Submit)
    assert isinstance(for_d, Submit)
    assert isinstance(for_p.job, PrefillJob)
    secret = for_p.job.grant_key
    assert (for_p.job, for_d.job) == (PrefillJob(D, secret), DecodeJob(P, "p0:7000", secret))
    assert len(secret) == 32
    assert entry.attempt is not None
    assert for_p.key == for_d.key == entry.attempt.key
    assert (for_p.key.transfer_id, for_p.key.attempt) == (entry.transfer_id, 1)
    assert (for_p.output_tokens, for_p.request_id) == ([], "req-1")
    assert (for_p.age_s, for_p.time_left_s, for_p.tenant_key) == (0.0, TIMEOUT_S, b"tenant")
    assert entry.state is RequestState.PREFILLING


def test_a_request_of_one_token_goes_to_the_prefill_worker_alone(desk: Desk) -> None:
    entry = desk.submit(max_tokens=1)
    desk.play(entry, (P, record(0, 0, finish=FinishReason.LENGTH, prefill=PREFILLED)))
    assert [worker for worker, _ in desk.sends] == [P]
    assert (desk.tokens, desk.last.finish) == ([0], FinishReason.LENGTH)
    report = desk.last.report
    assert report is not None
    assert (report.mode, report.decode_worker, report.kv_bytes) == (Mode.LOCAL, "", 0)


def test_the_first_token_comes_from_whoever_is_first(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST))
    assert (desk.tokens, entry.state) == ([0], RequestState.HANDING_OVER)
    desk.play(entry, (D, JOIN))
    assert (desk.tokens, entry.state) == ([0], RequestState.DECODING), "emitted once"
    desk.play(entry, (D, record(1, 1, 2)), (D, record(3, 3)))
    assert desk.tokens == [0, 1, 2, 3]


def test_a_join_may_overtake_the_prefill_workers_word(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (D, JOIN), (D, record(1, 1)), (P, FIRST))
    assert (desk.tokens, entry.state) == ([0, 1], RequestState.DECODING)
    assert entry.handling.prefill_report == PREFILLED


def test_a_record_that_overlaps_adds_what_is_new(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), (D, replace(JOIN, tokens=(0, 1, 2))))
    assert desk.tokens == [0, 1, 2]


def test_a_gap_is_a_bug_and_ends_the_request(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), (D, record(2, 2)))
    assert [type(error) for error in desk.errors] == [InternalError]
    assert desk.cancelled_on == [P, D]
    assert desk.dispatch.num_requests == 0


def test_the_last_event_tells_what_happened(desk: Desk) -> None:
    entry = desk.submit()
    desk.clock.advance(0.5)
    desk.play(entry, (P, FIRST), (D, JOIN))
    desk.clock.advance(0.3)
    finish = record(1, 1, 2, 3, finish=FinishReason.STOP, forwarded_tokens=3)
    desk.play(entry, (D, finish))
    usage, report = desk.last.usage, desk.last.report
    assert usage is not None
    assert report is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 2)
    assert (report.mode, report.prefill_worker, report.decode_worker) == (
        Mode.DISAGG,
        "p0@1",
        "d0@1",
    )
    assert (report.kv_bytes, report.kv_blocks, report.transport) == (4096, 1, "nixl")
    assert (report.ttft_s, report.tpot_s) == (pytest.approx(0.5), pytest.approx(0.1))
    assert (report.prefill_computed_tokens, report.decode_forwarded_tokens) == (1, 3)
    assert (report.attempts, report.request_id) == (1, "req-1")
    assert desk.cancelled_on == [P], "D knows that it is over"


def test_a_prompt_computed_again_is_not_called_handed_over(desk: Desk) -> None:
    entry = desk.submit()
    finish = record(1, 1, finish=FinishReason.LENGTH, forwarded_tokens=5)
    desk.play(entry, (P, FIRST), (D, JOIN), (D, finish))
    assert desk.last.report is not None
    assert desk.last.report.mode is Mode.LOCAL


def test_records_of_an_ended_request_are_late(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, record(0, 0, finish=FinishReason.STOP, prefill=PREFILLED)))
    seen = len(desk.events)
    desk.play(entry, (D, JOIN), (D, record(1, 1)), (P, record(0, error=FenceFailed("late"))))
    assert len(desk.events) == seen
    assert desk.cancelled_on == [D]
    assert desk.dispatch.counters[RECORDS_LATE] == 3
    assert not desk.dispatch.knows(entry.transfer_id)


def test_records_of_strangers_are_ignored(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (STRANGER, FIRST), (STRANGER, record(0, error=FenceFailed("not mine"))))
    assert (desk.events, entry.state) == ([], RequestState.PREFILLING)


def test_an_error_that_comes_again_anywhere_is_the_requests_error(desk: Desk) -> None:
    entry = desk.submit()
    error = InvalidRequest("this model has no such token")
    desk.play(entry, (P, FIRST), (D, record(0, error=error)))
    assert desk.errors == [error]
    assert desk.cancelled_on == [P]
    assert entry.state is RequestState.FAILED


def test_who_holds_a_request_is_counted_until_the_join(desk: Desk) -> None:
    alone, both = desk.submit(max_tokens=1), desk.submit()
    counts = desk.dispatch.num_requests_on
    assert (counts(P), counts(D)) == (2, 1)
    desk.play(both, (P, FIRST), (D, JOIN))
    assert (counts(P), counts(D)) == (1, 1), "once D has joined, P has nothing to do with it"
    desk.play(both, (D, record(1, 1, finish=FinishReason.STOP)))
    desk.dispatch.cancel(alone)
    assert (counts(P), counts(D)) == (0, 0)


def test_with_decode_workers_alone_one_of_them_computes_the_prompt() -> None:
    desk = Desk(D)
    entry = desk.submit()
    desk.look()
    assert [(worker, submit.job) for worker, submit in desk.submits] == [(D, DecodeJob(None))]
    desk.play(entry, (D, first()))
    assert (desk.tokens, entry.state) == ([0], RequestState.DECODING)
    desk.play(entry, (D, record(1, 1, finish=FinishReason.STOP, forwarded_tokens=4)))
    report = desk.last.report
    assert report is not None
    assert (report.mode, report.prefill_worker, report.decode_worker) == (Mode.LOCAL, "", "d0@1")


def test_the_clients_deadline_ends_it_on_both_workers(desk: Desk) -> None:
    desk.submit()
    desk.clock.advance(TIMEOUT_S - 0.001)
    desk.dispatch.sweep()
    desk.look()
    assert desk.events == []
    desk.clock.advance(0.001)
    desk.dispatch.sweep()
    desk.look()
    assert [type(error) for error in desk.errors] == [DeadlineExceeded]
    assert desk.cancelled_on == [P, D]


def test_a_cancel_says_nothing_more(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST))
    desk.dispatch.cancel(entry)
    desk.dispatch.cancel(entry)
    desk.play(entry, (D, JOIN))
    assert (desk.tokens, desk.errors) == ([0], [])
    assert desk.cancelled_on == [P, D]
    assert entry.state is RequestState.CANCELLED


def test_a_worker_that_cancels_ends_it_as_cancelled(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, record(0, error=Cancelled("the router is gone"))))
    assert entry.state is RequestState.CANCELLED
    assert [type(error) for error in desk.errors] == [Cancelled]


def test_a_stop_string_ends_it_early(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), (D, JOIN), (D, record(1, 1, 2)))
    event = desk.dispatch.finish_early(entry)
    desk.look()
    assert (event.token_ids, event.finish) == ([], FinishReason.STOP)
    assert event.usage is not None
    assert event.report is not None
    assert (event.usage.completion_tokens, event.report.decode_forwarded_tokens) == (3, 2)
    assert event.report.mode is Mode.DISAGG
    assert desk.cancelled_on == [P, D]


def test_a_stop_string_wins_over_whatever_came_meanwhile(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), (D, JOIN), (D, record(1, error=InternalError("late"))))
    assert desk.dispatch.finish_early(entry).finish is FinishReason.STOP


def test_a_full_router_refuses_and_keeps_nothing() -> None:
    desk = Desk(P, D, max_requests=1)
    taken = desk.submit()
    with pytest.raises(QueueFull) as refused:
        desk.submit()
    assert refused.value.retry_after_s is not None
    desk.dispatch.cancel(taken)
    assert desk.submit().transfer_id != taken.transfer_id


def test_a_router_that_drains_refuses(desk: Desk) -> None:
    entry = desk.submit()
    desk.dispatch.drain()
    with pytest.raises(NoCapacity):
        desk.submit()
    desk.play(entry, (P, record(0, 0, finish=FinishReason.STOP, prefill=PREFILLED)))
    assert desk.tokens == [0], "what it has may end"


@pytest.mark.parametrize(
    ("sizes", "error"), [({}, NoWorker), ({P: 100}, NoWorker), ({D: 0}, ExceedsKvCapacity)]
)
def test_a_request_that_nobody_can_take_leaves_nothing(
    sizes: dict[WorkerIdentity, int], error: type[BatonError]
) -> None:
    desk = Desk()
    desk.ready = {worker: candidate(worker, blocks=blocks) for worker, blocks in sizes.items()}
    with pytest.raises(error):
        desk.submit()
    desk.look()
    assert (desk.sends, desk.events, desk.dispatch.num_requests) == ([], [], 0)


def frames_of_d(cuts: list[int], count: int) -> list[OutputRecord]:
    """What D sends for tokens 0 to count - 1: the join, then frames cut anywhere."""
    bounds = [1, *sorted({cut for cut in cuts if 1 < cut < count}), count]
    frames = [record(start, *range(start, end)) for start, end in pairwise(bounds)]
    frames[-1] = replace(frames[-1], finish=FinishReason.LENGTH, forwarded_tokens=count - 1)
    return [JOIN, *frames]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(2, 12),
    cuts=st.lists(st.integers(2, 11), max_size=5),
    turn_of_p=st.integers(0, 20),
    repeats=st.lists(st.integers(0, 11), max_size=3),
    p_is_lost_at=st.integers(0, 20),
)
def test_any_interleaving_gives_every_token_once(
    count: int, cuts: list[int], turn_of_p: int, repeats: list[int], p_is_lost_at: int
) -> None:
    """P's record lands anywhere among D's, frames come twice, P may be lost after the join."""
    desk = Desk(P, D)
    entry = desk.submit(max_tokens=count)
    stream = [(D, frame) for frame in frames_of_d(cuts, count)]
    for index in repeats:
        stream.insert(1 + index % len(stream), stream[index % len(stream)])
    stream = in_order(stream)
    stream.insert(min(turn_of_p, len(stream)), (P, FIRST))
    for turn, step in enumerate(stream):
        if turn == p_is_lost_at and entry.state is RequestState.DECODING:
            desk.lose(P)
        desk.play(entry, step)
    assert desk.tokens == list(range(count))
    assert desk.errors == []
    finishes = [event for _, event in desk.events if getattr(event, "finish", None)]
    assert len(finishes) == 1
    assert finishes[0] is desk.events[-1][1]
    assert desk.cancelled_on == [P]
    assert desk.dispatch.num_requests == 0


def in_order(
    stream: list[tuple[WorkerIdentity, OutputRecord]],
) -> list[tuple[WorkerIdentity, OutputRecord]]:
    """One worker's stream is ordered: repeats stand beside their original."""
    return sorted(stream, key=lambda step: (step[1].handover is None, step[1].position))
