"""When an attempt fails: the next one goes on where the client stands, within bounds."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.router_desk import (
    PREFILLED,
    PROMPT,
    TIMEOUT_S,
    Desk,
    first,
    identity,
    join,
    record,
)

from baton.common.errors import (
    BatonError,
    DeadlineExceeded,
    DigestMismatch,
    FenceFailed,
    GrantRefused,
    HandshakeMismatch,
    LeaseLost,
    NoWorker,
    PeerLost,
    QueueFull,
    TransferError,
    TransferTimeout,
    UnknownRequest,
    WorkerLost,
)
from baton.common.ids import WorkerIdentity
from baton.common.messages import Cancel, DecodeJob, LiveRequest, PrefillJob
from baton.common.metric_names import RECORDS_LATE, RECOVERIES, RECOVERIES_REFUSED
from baton.common.sampling import FinishReason, Mode
from baton.common.timing import DEFAULT_TIMING
from baton.router.attempt import Attempt
from baton.router.journal import JournalEntry, RequestState
from baton.router.recovery import MIN_BUDGET, RecoveryBudget

P0, P1, P2 = identity("p0"), identity("p1"), identity("p2")
D0, D1, D2 = identity("d0"), identity("d1"), identity("d2")
U0, U1, U2 = identity("u0"), identity("u1"), identity("u2")
PATIENT_S = 1e6


def attempt_of(entry: JournalEntry) -> Attempt:
    assert entry.attempt is not None
    return entry.attempt


def owner(entry: JournalEntry) -> WorkerIdentity:
    worker = attempt_of(entry).prefill
    assert worker is not None
    return worker


def reader(entry: JournalEntry) -> WorkerIdentity:
    worker = attempt_of(entry).decode
    assert worker is not None
    return worker


def bring_to(desk: Desk, entry: JournalEntry, state: RequestState) -> None:
    """From PREFILLING onwards, with one more token per report."""
    position = entry.num_emitted
    if state is not RequestState.PREFILLING:
        desk.play(entry, (owner(entry), first(position)))
    if state is RequestState.DECODING:
        desk.play(entry, (reader(entry), join(position)))
    assert entry.state is state


@pytest.fixture
def desk() -> Desk:
    return Desk(P0, P1, D0, D1)


PREFILLING, HANDING_OVER, DECODING = (
    RequestState.PREFILLING,
    RequestState.HANDING_OVER,
    RequestState.DECODING,
)


@pytest.mark.parametrize("state", [PREFILLING, HANDING_OVER, DECODING])
@pytest.mark.parametrize("lost", ["p", "d", "both"])
def test_every_loss_in_every_state(desk: Desk, state: RequestState, lost: str) -> None:
    entry = desk.submit(timeout_s=PATIENT_S)
    bring_to(desk, entry, state)
    old, p, d = attempt_of(entry), owner(entry), reader(entry)
    seen = entry.num_emitted
    desk.forget()
    desk.lose(*{"p": [p], "d": [d], "both": [p, d]}[lost])
    if lost == "p" and state is DECODING:
        assert desk.sends == [], "once D has joined, the loss of P is nothing to the request"
        assert attempt_of(entry) == old
        return
    new = attempt_of(entry)
    assert desk.events == []
    assert entry.state is PREFILLING
    assert new.key.attempt > old.key.attempt
    assert new.key.transfer_id == old.key.transfer_id
    assert new.grant_key != old.grant_key
    assert {p, d}.difference(desk.ready).isdisjoint(new.workers), "the lost are not asked again"
    for worker, submit in desk.submits[-2:]:
        assert worker in new.workers
        assert submit.key == new.key
        assert (submit.prompt_tokens, submit.output_tokens) == (PROMPT, list(range(seen)))
        assert submit.sampling.max_tokens == 8, "counted from the original boundary"
    survivors = {p, d}.intersection(desk.ready)
    told = {worker for worker, sent in desk.sends if sent == Cancel(old.key)}
    assert survivors <= told, "who may still hold the old attempt hears of its end"
    finish_from(desk, entry)


def finish_from(desk: Desk, entry: JournalEntry, count: int = 8) -> None:
    """The current attempt brings the rest of the answer."""
    at = entry.num_emitted
    steps = [(owner(entry), first(at)), (reader(entry), join(at))]
    rest = record(at + 1, *range(at + 1, count), finish=FinishReason.LENGTH)
    desk.play(entry, *steps, (reader(entry), rest))
    assert list(entry.tokens) == list(range(count))
    assert desk.last.finish is FinishReason.LENGTH
    assert desk.dispatch.num_requests == 0


def test_the_new_attempt_goes_out_at_once_and_its_time_is_what_is_left(desk: Desk) -> None:
    entry = desk.submit()
    desk.clock.advance(4.0)
    desk.forget()
    desk.lose(reader(entry))
    for _, submit in desk.submits:
        assert (submit.age_s, submit.time_left_s) == (4.0, TIMEOUT_S - 4.0)
    assert len(desk.submits) == 2


@pytest.mark.parametrize("late", ["tokens", "finish", "error", "unknown"])
@pytest.mark.parametrize("sender", ["p", "d"])
def test_the_old_attempt_cannot_touch_the_new_one(desk: Desk, late: str, sender: str) -> None:
    entry = desk.submit(timeout_s=PATIENT_S)
    old, p, d = attempt_of(entry), owner(entry), reader(entry)
    desk.play(entry, (d, record(0, error=LeaseLost("too slow"))))
    new = attempt_of(entry)
    assert new != old
    desk.forget()
    told = {
        "tokens": record(0, 70, 71),
        "finish": record(0, 70, finish=FinishReason.STOP),
        "error": record(0, error=LeaseLost("again")),
        "unknown": record(0, error=UnknownRequest("who?")),
    }[late]
    desk.play(entry, ({"p": p, "d": d}[sender], replace(told, key=old.key)))
    assert (desk.sends, desk.events, attempt_of(entry)) == ([], [], new)
    assert desk.dispatch.counters[RECORDS_LATE] == 1


RECOVERED: list[tuple[Callable[[str], BatonError], str]] = [
    (LeaseLost, ""),
    (FenceFailed, ""),
    (DigestMismatch, ""),
    (UnknownRequest, ""),
    (TransferTimeout, "pair"),
    (TransferError, "pair"),
    # Another life listens there: no other reader will find the one that was meant.
    (HandshakeMismatch, "p"),
    (GrantRefused, "pair"),
    (PeerLost, "p"),
    (WorkerLost, "d"),
    (NoWorker, "d"),
    (QueueFull, "d"),
]


@pytest.mark.parametrize(("kind", "blamed"), RECOVERED)
@pytest.mark.parametrize("state", [PREFILLING, HANDING_OVER, DECODING])
def test_what_the_decode_worker_reports(
    desk: Desk, kind: Callable[[str], BatonError], blamed: str, state: RequestState
) -> None:
    entry = desk.submit(timeout_s=PATIENT_S)
    bring_to(desk, entry, state)
    p, d = owner(entry), reader(entry)
    desk.forget()
    desk.play(entry, (d, record(0, error=kind("it broke"))))
    assert entry.state is PREFILLING
    excluded = entry.history.excluded_at(desk.clock.monotonic())
    assert excluded == {"p": {p}, "d": {d}}.get(blamed, set())
    assert entry.history.excluded_pairs == ({(p, d)} if blamed == "pair" else set())
    assert p in desk.cancelled_on
    assert (d in desk.cancelled_on) == (kind is UnknownRequest), (
        "a worker knows what it said; one that does not know may have the submit before it"
    )
    finish_from(desk, entry)


def test_what_the_prefill_worker_reports_after_the_join_is_nothing(desk: Desk) -> None:
    entry = desk.submit()
    bring_to(desk, entry, DECODING)
    desk.forget()
    desk.play(entry, (owner(entry), record(0, error=LeaseLost("the reader is gone"))))
    assert (desk.sends, desk.events) == ([], [])


@pytest.mark.parametrize(
    ("state", "seconds"),
    [
        (PREFILLING, DEFAULT_TIMING.prefill_deadline_s),
        (HANDING_OVER, DEFAULT_TIMING.handover_deadline_s),
        (DECODING, DEFAULT_TIMING.decode_deadline_s),
    ],
)
def test_a_state_without_progress_blames_who_should_have_made_some(
    desk: Desk, state: RequestState, seconds: float
) -> None:
    entry = desk.submit(timeout_s=PATIENT_S)
    bring_to(desk, entry, state)
    p, d = owner(entry), reader(entry)
    old = attempt_of(entry)
    desk.wait(seconds - 0.1)
    assert attempt_of(entry) == old
    desk.wait(0.1)
    assert attempt_of(entry).key.attempt == 2
    blamed = {PREFILLING: {p: math.inf}, HANDING_OVER: {}, DECODING: {d: math.inf}}[state]
    assert entry.history.excluded == blamed
    assert entry.history.excluded_pairs == ({(p, d)} if state is HANDING_OVER else set())
    assert {p, d} <= set(desk.cancelled_on)


def test_progress_moves_the_deadline_on(desk: Desk) -> None:
    entry = desk.submit(timeout_s=PATIENT_S, max_tokens=100)
    bring_to(desk, entry, DECODING)
    for position in range(1, 6):
        desk.wait(DEFAULT_TIMING.decode_deadline_s - 1.0)
        desk.play(entry, (reader(entry), record(position, position)))
    assert attempt_of(entry).key.attempt == 1


# --- who is left ---


def test_without_another_prefill_worker_a_decode_worker_computes_it() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit()
    bring_to(desk, entry, HANDING_OVER)
    desk.forget()
    desk.lose(P0)
    ((worker, submit),) = desk.submits
    assert (worker, submit.job, submit.output_tokens) == (D0, DecodeJob(None), [0])
    desk.play(entry, (D0, first(1)))
    assert entry.state is DECODING
    desk.play(entry, (D0, record(2, 2, finish=FinishReason.STOP, forwarded_tokens=5)))
    assert list(entry.tokens) == [0, 1, 2]
    report = desk.last.report
    assert report is not None
    assert (report.mode, report.attempts, report.kv_bytes) == (Mode.LOCAL, 2, 0)


def test_when_every_pair_was_late_a_decode_worker_computes_it() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit()
    desk.play(entry, (D0, record(0, error=TransferTimeout("late"))))
    assert attempt_of(entry).workers == [D0]


def test_a_request_with_one_token_left_needs_no_decode_worker(desk: Desk) -> None:
    entry = desk.submit(max_tokens=2)
    bring_to(desk, entry, HANDING_OVER)
    desk.forget()
    desk.lose(D0, D1)
    ((worker, submit),) = desk.submits
    assert isinstance(submit.job, PrefillJob)
    assert submit.job.reader is None
    desk.play(entry, (worker, record(1, 1, finish=FinishReason.LENGTH)))
    assert list(entry.tokens) == [0, 1]


@pytest.mark.parametrize("how", ["a worker joins", "the sweep"])
def test_without_a_decode_worker_the_request_waits_for_one(how: str) -> None:
    desk = Desk(P0, D0)
    entry = desk.submit()
    bring_to(desk, entry, DECODING)
    desk.lose(D0)
    assert (entry.state, desk.tokens, desk.errors) == (RequestState.QUEUED, [0], [])
    assert desk.dispatch.live_on(P0) == ()
    again = identity("d0", epoch=2)
    if how == "a worker joins":
        desk.join(again)
    else:
        desk.ready[again] = Desk(again).ready[again]
        desk.wait(0.25)
    assert attempt_of(entry).workers == [P0, again]
    finish_from(desk, entry)


def test_waiting_has_an_end() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit(timeout_s=PATIENT_S)
    desk.lose(D0)
    desk.wait(DEFAULT_TIMING.queued_deadline_s - 0.1)
    assert not entry.has_ended
    desk.wait(0.1)
    assert desk.error_types == [NoWorker]
    assert desk.dispatch.num_requests == 0


def test_the_clients_deadline_ends_the_wait() -> None:
    desk = Desk(P0, D0)
    desk.submit()
    desk.lose(D0)
    desk.wait(TIMEOUT_S)
    assert desk.error_types == [DeadlineExceeded]


def test_a_life_that_is_back_may_be_asked_again() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit()
    desk.lose(D0)
    desk.wait(0.25)
    assert entry.state is RequestState.QUEUED
    desk.join(D0)
    assert attempt_of(entry).workers == [P0, D0]


def test_who_was_full_is_asked_again_a_little_later() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit()
    desk.play(entry, (D0, record(0, error=QueueFull("no more"))))
    assert entry.state is RequestState.QUEUED
    desk.wait(2 * DEFAULT_TIMING.heartbeat_every_s)
    assert attempt_of(entry).workers == [P0, D0]


# --- bounds ---


def test_three_attempts_without_a_token_are_the_last(desk: Desk) -> None:
    entry = desk.submit()
    for _ in range(3):
        assert not entry.has_ended
        desk.play(entry, (reader(entry), record(0, error=LeaseLost("it broke"))))
    assert desk.error_types == [LeaseLost]
    assert desk.dispatch.counters == {RECOVERIES: 2, RECOVERIES_REFUSED: 1}


def test_the_count_starts_again_with_a_new_token(desk: Desk) -> None:
    entry = desk.submit(max_tokens=100)
    for position in range(6):
        bring_to(desk, entry, HANDING_OVER)
        assert entry.num_emitted == position + 1
        desk.play(entry, (reader(entry), record(0, error=LeaseLost("it broke"))))
    assert entry.state is PREFILLING
    assert attempt_of(entry).key.attempt == 7


def test_a_prompt_that_kills_prefill_workers_gets_no_third_one() -> None:
    desk = Desk(P0, P1, P2, D0)
    entry = desk.submit()
    desk.lose(owner(entry))
    assert not entry.has_ended
    desk.forget()
    desk.lose(owner(entry))
    assert desk.error_types == [WorkerLost]
    assert desk.submits == []


def test_a_request_that_kills_whoever_decodes_it_gets_no_third_one() -> None:
    """The token of the prefill worker between the two does not absolve it."""
    desk = Desk(P0, D0, D1, D2)
    entry = desk.submit()
    bring_to(desk, entry, HANDING_OVER)
    desk.lose(reader(entry))
    bring_to(desk, entry, HANDING_OVER)
    desk.forget()
    desk.lose(reader(entry))
    assert desk.error_types == [WorkerLost]
    assert desk.submits == []


def test_a_request_that_kills_unified_workers_as_they_decode_gets_no_third_one() -> None:
    """Each computes the prompt well and brings one more token; that does not absolve it."""
    desk = Desk(U0, U1, U2)
    entry = desk.submit()
    for position in range(2):
        worker = reader(entry)
        desk.play(entry, (worker, record(position, position, prefill=PREFILLED)))
        assert entry.state is DECODING
        desk.forget()
        desk.lose(worker)
    assert desk.error_types == [WorkerLost]
    assert desk.submits == []


def test_unified_workers_lost_with_a_decoded_token_between_are_bad_luck() -> None:
    desk = Desk(U0, U1, U2)
    entry = desk.submit()
    for position in (0, 2):
        worker = reader(entry)
        desk.play(
            entry,
            (worker, record(position, position, prefill=PREFILLED)),
            (worker, record(position + 1, position + 1)),
        )
        desk.lose(worker)
    assert entry.state is PREFILLING
    assert attempt_of(entry).workers == [({U0, U1, U2} & desk.ready.keys()).pop()]


def test_two_lost_workers_with_progress_between_are_bad_luck() -> None:
    desk = Desk(P0, P1, D0, D1, D2)
    entry = desk.submit()
    desk.lose(owner(entry))
    bring_to(desk, entry, HANDING_OVER)
    desk.lose(reader(entry))
    bring_to(desk, entry, DECODING)
    desk.play(entry, (reader(entry), record(2, 2)))
    desk.lose(reader(entry))
    assert entry.state is PREFILLING
    finish_from(desk, entry)


def test_a_crash_that_the_peer_saw_first_counts_all_the_same() -> None:
    desk = Desk(P0, P1, P2, D0)
    entry = desk.submit()
    for _ in range(2):
        victim = owner(entry)
        desk.play(entry, (D0, record(0, error=PeerLost("the link broke"))))
        assert not entry.has_ended
        desk.lose(victim)
    assert desk.error_types == [WorkerLost]


def test_a_worker_that_was_only_queueing_the_request_does_not_count() -> None:
    desk = Desk(P0, D0, D1, D2)
    entry = desk.submit()
    for _ in range(2):
        desk.lose(reader(entry))
    assert entry.state is PREFILLING, "D had nothing to run yet"


def test_the_first_recovery_is_free_and_the_others_share_a_budget(desk: Desk) -> None:
    """A new token each time, so that only the budget ends it."""
    entries = [desk.submit(max_tokens=100) for _ in range(10)]
    for _ in range(5):
        for entry in entries:
            if not entry.has_ended:
                bring_to(desk, entry, HANDING_OVER)
                desk.play(entry, (reader(entry), record(0, error=LeaseLost("it broke"))))
    assert desk.dispatch.counters[RECOVERIES] == len(entries) + MIN_BUDGET
    assert desk.error_types == [LeaseLost] * desk.dispatch.counters[RECOVERIES_REFUSED]
    assert len(desk.errors) > 0
    desk.clock.advance(DEFAULT_TIMING.recovery_window_s)
    survivors = [desk.submit(timeout_s=PATIENT_S)]
    desk.play(survivors[0], (reader(survivors[0]), record(0, error=LeaseLost("it broke"))))
    assert not survivors[0].has_ended


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 40.0), st.integers(0, 120), st.integers(0, 30))))
def test_the_budget_is_never_exceeded_in_any_minute(
    steps: list[tuple[float, int, int]],
) -> None:
    budget = RecoveryBudget(60.0)
    accepted: list[float] = []
    spent: list[float] = []
    now = 0.0
    for pause, requests, failures in steps:
        now += pause
        for _ in range(requests):
            budget.accepted(now)
            accepted.append(now)
        for _ in range(failures):
            recent = sum(1 for at in spent if at > now - 60.0)
            limit = max(MIN_BUDGET, sum(1 for at in accepted if at > now - 60.0) // 10)
            if budget.take(now):
                assert recent < limit
                spent.append(now)
            else:
                assert recent >= MIN_BUDGET


# --- answers that are whole already ---


@pytest.mark.parametrize(
    ("request_of", "emitted", "finish"),
    [
        ({"max_tokens": 2}, 2, FinishReason.LENGTH),
        ({"stop_token_ids": (1,)}, 2, FinishReason.STOP),
        ({"end_token_ids": frozenset({1})}, 2, FinishReason.STOP),
        ({"end_token_ids": frozenset({1}), "min_tokens": 2}, 2, None),
        ({"stop_token_ids": (0,)}, 2, None),
    ],
)
def test_a_journal_that_ends_is_not_submitted_again(
    desk: Desk, request_of: dict[str, object], emitted: int, finish: FinishReason | None
) -> None:
    entry = desk.submit(**request_of)  # type: ignore[arg-type]
    bring_to(desk, entry, DECODING)
    desk.play(entry, (reader(entry), record(1, *range(1, emitted))))
    desk.forget()
    desk.lose(reader(entry))
    if finish is None:
        assert len(desk.submits) == 2
        return
    assert desk.submits == []
    assert (desk.last.token_ids, desk.last.finish) == ([], finish)
    assert desk.last.usage is not None
    assert desk.last.usage.completion_tokens == emitted


# --- streams that come back ---


def test_a_new_stream_is_told_what_lives_and_from_where(desk: Desk) -> None:
    one, two = desk.submit(), desk.submit()
    bring_to(desk, one, HANDING_OVER)
    bring_to(desk, two, DECODING)
    desk.play(two, (reader(two), record(1, 1, 2)))
    named = {worker: desk.dispatch.live_on(worker) for worker in (P0, P1, D0, D1)}
    live_one, live_two = LiveRequest(attempt_of(one).key, 1), LiveRequest(attempt_of(two).key, 3)
    expected: dict[WorkerIdentity, tuple[LiveRequest, ...]] = dict.fromkeys(named, ())
    expected[owner(one)] += (live_one,)
    expected[reader(one)] += (live_one,)
    expected[reader(two)] += (live_two,)
    assert named == expected, "the prefill worker of a request that decodes is not waited for"


def test_the_report_of_a_resumed_request_is_of_its_last_attempt(desk: Desk) -> None:
    entry = desk.submit(timeout_s=PATIENT_S)
    bring_to(desk, entry, DECODING)
    desk.play(entry, (reader(entry), record(1, 1, 2)))
    desk.lose(reader(entry))
    p, d = owner(entry), reader(entry)
    end = record(4, 4, 5, finish=FinishReason.STOP, forwarded_tokens=2)
    desk.play(entry, (p, first(3)), (d, join(3)), (d, end))
    usage, report = desk.last.usage, desk.last.report
    assert usage is not None
    assert report is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 6, 2)
    assert (report.mode, report.attempts) == (Mode.DISAGG, 2)
    assert (report.prefill_worker, report.decode_worker) == (str(p), str(d))
    assert (report.kv_bytes, report.decode_forwarded_tokens) == (4096, 2)
