"""The journey of a request without I/O: every token once, in order, and exactly one end."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.clock import ManualClock
from baton.common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    ExceedsKvCapacity,
    FenceFailed,
    InternalError,
    NoWorker,
    QueueFull,
    WorkerLost,
)
from baton.common.ids import Epoch, RequestKey, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    HandoverReport,
    LoadReport,
    OutputRecord,
    PrefillJob,
    PrefillReport,
    Submit,
)
from baton.common.randomness import SeededRandomness
from baton.common.sampling import FinishReason, Mode, Role, SamplingParams
from baton.router.dispatch import Dispatch
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import STATE_DEADLINE_S, JournalEntry, RequestState
from baton.router.placement import Candidate, LeastLoaded

P = WorkerIdentity(WorkerId("p0"), Epoch(1), "a")
D = WorkerIdentity(WorkerId("d0"), Epoch(1), "b")
STRANGER = WorkerIdentity(WorkerId("p9"), Epoch(1), "z")
PREFILLED = PrefillReport(cached_tokens=2, computed_tokens=1, queue_s=0.1, compute_s=0.2)
HANDED_OVER = HandoverReport(
    pulled_blocks=1,
    pulled_bytes=4096,
    transport="nixl",
    cached_tokens=0,
    owner_cached_tokens=0,
    pull_s=0.1,
)
TIMEOUT_S = 20.0


def candidate(identity: WorkerIdentity, role: Role, *, blocks: int = 100) -> Candidate:
    return Candidate(
        identity=identity,
        role=role,
        fingerprint="same",
        block_size=32,
        load=LoadReport(blocks_total=blocks, blocks_free=blocks),
        in_flight=0,
    )


BOTH = [candidate(P, Role.PREFILL), candidate(D, Role.DECODE)]


class Desk:
    """A dispatcher, its clock, and everything that it sent and said."""

    def __init__(self, *, max_requests: int = 10) -> None:
        self.clock = ManualClock(50.0)
        self.dispatch = Dispatch(
            LeastLoaded(SeededRandomness(1)),
            link_address=lambda worker: f"{worker.worker_id}:7000",
            clock=self.clock,
            randomness=SeededRandomness(2),
            max_requests=max_requests,
        )
        self.sends: list[tuple[WorkerIdentity, Submit | Cancel]] = []
        self.events: list[tuple[RequestKey, TokenEvent | BatonError]] = []

    def submit(
        self, *, max_tokens: int = 8, candidates: list[Candidate] | None = None
    ) -> JournalEntry:
        spec = GenerationSpec(
            request_id="req-1",
            model="tiny",
            prompt_tokens=[5, 6, 7],
            sampling=SamplingParams(max_tokens=max_tokens),
            stop=(),
            tenant_key=b"tenant",
            timeout_s=TIMEOUT_S,
        )
        return self.dispatch.submit(spec, BOTH if candidates is None else candidates)

    def play(self, entry: JournalEntry, *steps: tuple[WorkerIdentity, OutputRecord]) -> None:
        for worker, record in steps:
            self.dispatch.record(worker, replace(record, key=entry.key))
        self.look()

    def look(self) -> None:
        effects = self.dispatch.take_effects()
        self.sends += effects.sends
        self.events += effects.events

    @property
    def tokens(self) -> list[int]:
        return [
            token
            for _, event in self.events
            if isinstance(event, TokenEvent)
            for token in event.token_ids
        ]

    @property
    def errors(self) -> list[BatonError]:
        return [event for _, event in self.events if isinstance(event, BatonError)]

    @property
    def last(self) -> TokenEvent:
        event = self.events[-1][1]
        assert isinstance(event, TokenEvent)
        return event

    @property
    def cancelled_on(self) -> list[WorkerIdentity]:
        return [worker for worker, message in self.sends if isinstance(message, Cancel)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


NO_KEY = RequestKey(TransferId(bytes(16)), 0)


def record(position: int, *tokens: int, **rest: object) -> OutputRecord:
    """A record whose key `Desk.play` fills in."""
    return OutputRecord(key=NO_KEY, position=position, tokens=tokens, **rest)  # type: ignore[arg-type]


FIRST = record(0, 0, prefill=PREFILLED)
JOIN = record(0, 0, handover=HANDED_OVER)


def test_both_workers_hear_of_it_at_once(desk: Desk) -> None:
    desk.clock.advance(1.0)
    entry = desk.submit()
    desk.look()
    (to_p, for_p), (to_d, for_d) = desk.sends
    assert (to_p, to_d) == (P, D)
    assert isinstance(for_p, Submit)
    assert isinstance(for_d, Submit)
    assert (for_p.job, for_d.job) == (PrefillJob(D), DecodeJob(P, "p0:7000"))
    assert for_p.key == for_d.key == entry.key
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
    assert entry.prefill_report == PREFILLED


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


def test_records_of_strangers_are_ignored(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (STRANGER, FIRST), (STRANGER, record(0, error=FenceFailed("not mine"))))
    assert (desk.events, entry.state) == ([], RequestState.PREFILLING)


def test_a_workers_error_is_the_requests_error(desk: Desk) -> None:
    entry = desk.submit()
    error = FenceFailed("2 of 3 blocks changed")
    desk.play(entry, (P, FIRST), (D, record(0, error=error)))
    assert desk.errors == [error]
    assert desk.cancelled_on == [P]
    assert entry.state is RequestState.FAILED


def test_the_loss_of_p_before_the_join_fails_the_request(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST))
    desk.dispatch.worker_gone(P)
    desk.look()
    assert [type(error) for error in desk.errors] == [WorkerLost]
    assert desk.cancelled_on == [D]


def test_the_loss_of_p_after_the_join_is_nothing(desk: Desk) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), (D, JOIN))
    desk.dispatch.worker_gone(P)
    desk.play(entry, (D, record(1, 1, finish=FinishReason.STOP, forwarded_tokens=1)))
    assert (desk.tokens, desk.errors) == ([0, 1], [])


@pytest.mark.parametrize("joined", [False, True])
def test_the_loss_of_d_fails_the_request(desk: Desk, joined: bool) -> None:
    entry = desk.submit()
    desk.play(entry, (P, FIRST), *([(D, JOIN)] if joined else []))
    desk.dispatch.worker_gone(D)
    desk.look()
    assert [type(error) for error in desk.errors] == [WorkerLost]
    assert desk.cancelled_on == [P]


def test_a_lost_worker_takes_only_its_own_requests(desk: Desk) -> None:
    alone = desk.submit(max_tokens=1)
    both = desk.submit()
    desk.dispatch.worker_gone(D)
    desk.look()
    assert [key for key, _ in desk.events] == [both.key]
    assert desk.dispatch.num_requests_on(P) == 1
    assert not alone.has_ended


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


@pytest.mark.parametrize("state", [state for state in RequestState if state in STATE_DEADLINE_S])
def test_every_state_that_waits_has_a_deadline(state: RequestState) -> None:
    entry = Desk().submit()
    entry.state = state
    patient = replace(entry.spec, timeout_s=1e9)
    entry.spec = patient
    assert entry.expires_at == entry.progress_at + STATE_DEADLINE_S[state]


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
    desk.play(entry, (P, FIRST), (D, JOIN), (D, record(1, error=FenceFailed("late"))))
    assert desk.dispatch.finish_early(entry).finish is FinishReason.STOP


def test_a_full_router_refuses_and_keeps_nothing() -> None:
    desk = Desk(max_requests=1)
    first = desk.submit()
    with pytest.raises(QueueFull) as refused:
        desk.submit()
    assert refused.value.retry_after_s is not None
    desk.dispatch.cancel(first)
    assert desk.submit().key != first.key


@pytest.mark.parametrize(
    ("candidates", "error"),
    [
        ([], NoWorker),
        (BOTH[:1], NoWorker),
        ([candidate(P, Role.PREFILL), candidate(D, Role.DECODE, blocks=0)], ExceedsKvCapacity),
    ],
)
def test_a_request_that_nobody_can_take_leaves_nothing(
    desk: Desk, candidates: list[Candidate], error: type[BatonError]
) -> None:
    with pytest.raises(error):
        desk.submit(candidates=candidates)
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
    desk = Desk()
    entry = desk.submit(max_tokens=count)
    stream = [(D, frame) for frame in frames_of_d(cuts, count)]
    for index in repeats:
        stream.insert(1 + index % len(stream), stream[index % len(stream)])
    stream = in_order(stream)
    stream.insert(min(turn_of_p, len(stream)), (P, FIRST))
    for turn, step in enumerate(stream):
        if turn == p_is_lost_at and entry.state is RequestState.DECODING:
            desk.dispatch.worker_gone(P)
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


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_request_ends_once_whatever_happens(data: st.DataObject) -> None:
    """Records, losses, cancels and time in any order: at most one end, and never a word after."""
    desk = Desk()
    entry = desk.submit(max_tokens=4)
    for _ in range(data.draw(st.integers(1, 12))):
        worker = data.draw(st.sampled_from([P, D]))
        match data.draw(st.sampled_from(["record", "finish", "error", "gone", "cancel", "wait"])):
            case "record":
                start = data.draw(st.integers(0, 3))
                desk.play(entry, (worker, record(start, start)))
            case "finish":
                finish = record(entry.num_emitted, entry.num_emitted, finish=FinishReason.STOP)
                desk.play(entry, (worker, finish))
            case "error":
                desk.play(entry, (worker, record(0, error=FenceFailed("moved"))))
            case "gone":
                desk.dispatch.worker_gone(worker)
            case "cancel":
                desk.dispatch.cancel(entry)
            case "wait":
                desk.clock.advance(7.0)
                desk.dispatch.sweep()
    desk.look()
    ends = [
        index
        for index, (_, event) in enumerate(desk.events)
        if isinstance(event, BatonError) or event.finish is not None
    ]
    assert len(ends) <= 1
    assert all(index == len(desk.events) - 1 for index in ends)
    assert entry.has_ended == (desk.dispatch.num_requests == 0)
    assert bool(ends) == (entry.state in (RequestState.FINISHED, RequestState.FAILED))
    assert desk.tokens == list(range(len(desk.tokens)))
