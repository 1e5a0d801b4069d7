"""Requests that decode on a draining worker move away with their KV, or stay, or are recomputed."""

from dataclasses import replace

import pytest
from support.router_desk import PREFILLED, PROMPT, Desk, first, identity, join, record

from baton.common.errors import BatonError, InternalError, PeerLost, QueueFull, UnknownRequest
from baton.common.ids import WorkerIdentity
from baton.common.messages import Cancel, DecodeJob, LiveRequest, Move, OutputRecord, Stay
from baton.common.metric_names import MOVES, MOVES_FAILED, RECORDS_LATE, RECOVERIES
from baton.common.sampling import FinishReason, Mode
from baton.common.timing import DEFAULT_TIMING
from baton.router.attempt import RunningMove
from baton.router.journal import JournalEntry, RequestState
from baton.router.moves import MAX_MOVES_PER_SOURCE

P0, D0, D1, D2 = identity("p0"), identity("d0"), identity("d1"), identity("d2")
PATIENT_S = 1e6


def running(desk: Desk, *, max_tokens: int = 8) -> JournalEntry:
    """A request that has decoded three tokens on D0, the only decode worker so far."""
    entry = desk.submit(timeout_s=PATIENT_S, max_tokens=max_tokens)
    desk.play(entry, (P0, first()), (D0, join()), (D0, record(1, 1, 2)))
    assert entry.state is RequestState.DECODING
    return entry


def moving(*targets: WorkerIdentity) -> tuple[Desk, JournalEntry, RunningMove]:
    desk = Desk(P0, D0)
    entry = running(desk)
    desk.join(*targets)
    desk.forget()
    desk.drain(D0)
    assert entry.move is not None
    return desk, entry, entry.move


def frame(move: RunningMove, position: int, *tokens: int, **rest: object) -> OutputRecord:
    """A frame of the move's target."""
    return replace(record(position, *tokens, **rest), key=move.attempt.key)


def test_a_move_is_announced_to_both() -> None:
    desk, entry, move = moving(D1)
    assert entry.attempt is not None
    (to_source, told), (to_target, submit) = desk.sends[0], desk.submits[0]
    secret = move.attempt.grant_key
    assert (to_source, told) == (D0, Move(entry.attempt.key, move.attempt.key, D1, secret))
    assert (to_target, submit.key) == (D1, move.attempt.key)
    assert submit.job == DecodeJob(D0, "d0:7000", secret)
    assert (submit.prompt_tokens, submit.output_tokens) == (PROMPT, [0, 1, 2])
    assert move.attempt.key.attempt == entry.attempt.key.attempt + 1
    assert desk.dispatch.num_requests_on(D1) == 1
    desk.drain(D0)
    assert len(desk.sends) == 2, "said again, done once"


@pytest.mark.parametrize(("source", "target"), [("u0", "u1"), ("u0", "d1"), ("d0", "u1")])
def test_whoever_decodes_takes_moves_from_whoever_decodes(source: str, target: str) -> None:
    at, to = identity(source), identity(target)
    desk = Desk(at)
    entry = desk.submit(timeout_s=PATIENT_S)
    desk.play(entry, (at, record(0, 0, 1, prefill=PREFILLED)))
    desk.join(P0, to)
    desk.forget()
    desk.drain(at)
    [(receiver, submit)] = desk.submits
    assert receiver == to, "never the prefill worker"
    assert isinstance(submit.job, DecodeJob)
    assert submit.job.owner == at
    assert submit.output_tokens == [0, 1]


def test_the_targets_first_frame_wins() -> None:
    desk, entry, move = moving(D1)
    old = entry.attempt
    assert old is not None
    desk.play(entry, (D0, record(3, 3, 4)))
    assert desk.tokens == [3, 4], "until then the source's records count"
    desk.forget()
    handed = join(3).handover
    desk.play(entry, (D1, frame(move, 3, 3, 4, 5, handover=handed)))
    assert (desk.tokens, desk.sends) == ([5], [(D0, Cancel(old.key))])
    assert (entry.attempt, entry.move) == (move.attempt, None)
    desk.play(entry, (D1, frame(move, 5, 5, handover=handed)))
    desk.play(entry, (D0, replace(record(5, 50, 60), key=old.key)))
    assert desk.tokens == [5], "the source's are late from now on"
    assert desk.dispatch.counters == {MOVES: 1, RECORDS_LATE: 1}
    assert (desk.dispatch.num_requests_on(D0), desk.dispatch.num_requests_on(D1)) == (0, 1)
    end = frame(move, 6, 6, 7, finish=FinishReason.LENGTH, forwarded_tokens=3)
    desk.play(entry, (D1, end))
    assert list(entry.tokens) == list(range(8))
    report = desk.last.report
    assert report is not None
    assert (report.mode, report.attempts) == (Mode.DISAGG, 1), "a move is no further try"
    assert (report.prefill_worker, report.decode_worker) == ("p0@1", "d1@1")
    assert report.kv_bytes == 2 * 4096, "a report that a new stream repeats counts once"


@pytest.mark.parametrize("how", ["error", "lost", "late"])
def test_a_move_that_fails_leaves_the_request_where_it_is(how: str) -> None:
    desk, entry, move = moving(D1)
    assert entry.attempt is not None
    key = entry.attempt.key
    desk.forget()
    if how == "error":
        desk.play(entry, (D1, frame(move, 0, error=QueueFull("no room"))))
    elif how == "lost":
        desk.lose(D1)
    else:
        desk.wait(DEFAULT_TIMING.move_deadline_s)
    cancelled = [(D1, Cancel(move.attempt.key))] if how == "late" else []
    assert desk.sends == [*cancelled, (D0, Stay(key))]
    assert (entry.move, entry.attempt.key) == (None, key)
    assert desk.dispatch.counters == {MOVES_FAILED: 1}
    assert desk.dispatch.num_requests_on(D1) == 0
    desk.play(entry, (D1, frame(move, 3, 70)), (D0, record(3, 3)))
    assert desk.tokens == [3], "the target is late, the source goes on"


def test_other_targets_come_first_and_three_moves_are_the_last() -> None:
    desk, entry, _ = moving(D1, D2)
    targets = []
    while entry.move is not None:
        targets.append(entry.move.target)
        answer = frame(entry.move, 0, error=QueueFull("no room"))
        desk.play(entry, (entry.move.target, answer))
        assert entry.move is None, "the next try waits for the next report"
        desk.drain(D0)
    assert targets[0] != targets[1]
    assert len(targets) == 3
    assert desk.dispatch.counters[MOVES_FAILED] == 3
    desk.lose(D0)
    assert entry.state is RequestState.PREFILLING, "what is left is computed again"


def test_what_has_not_joined_yet_goes_on_and_moves_then() -> None:
    desk = Desk(P0, D0)
    entry = desk.submit(timeout_s=PATIENT_S)
    desk.join(D1)
    desk.drain(D0)
    desk.play(entry, (P0, first()))
    desk.drain(D0)
    assert entry.move is None
    desk.play(entry, (D0, join()))
    desk.drain(D0)
    assert entry.move is not None


def test_a_whole_answer_moves_nowhere() -> None:
    """Its finish is on its way."""
    desk = Desk(P0, D0)
    entry = running(desk, max_tokens=3)
    desk.join(D1)
    desk.drain(D0)
    assert entry.move is None
    desk.play(entry, (D0, record(3, finish=FinishReason.LENGTH)))
    assert desk.last.finish is FinishReason.LENGTH


def test_without_a_target_nothing_moves() -> None:
    desk = Desk(P0, D0)
    entry = running(desk)
    desk.forget()
    desk.drain(D0)
    assert (entry.move, desk.sends) == (None, [])


def test_at_most_so_many_move_at_a_time_and_the_next_ones_follow() -> None:
    desk = Desk(P0, D0)
    entries = [running(desk) for _ in range(MAX_MOVES_PER_SOURCE + 2)]
    desk.join(D1, D2)
    desk.drain(D0)
    on_the_way = [entry for entry in entries if entry.move is not None]
    assert len(on_the_way) == MAX_MOVES_PER_SOURCE
    on = desk.dispatch.num_requests_on
    assert on(D1) == on(D2) == MAX_MOVES_PER_SOURCE // 2, "spread over the targets"
    move = on_the_way[0].move
    assert move is not None
    desk.play(on_the_way[0], (move.target, frame(move, 3, 3)))
    assert sum(1 for entry in entries if entry.move is not None) == MAX_MOVES_PER_SOURCE


@pytest.mark.parametrize("how", ["lost", "unknown"])
def test_a_source_that_is_gone_may_have_handed_everything_over(how: str) -> None:
    """A drained worker leaves at once; its stream may end before the target's frame comes."""
    desk, entry, move = moving(D1)
    if how == "lost":
        desk.lose(D0)
    else:
        desk.play(entry, (D0, record(0, error=UnknownRequest("moved out"))))
    assert entry.move is not None
    assert desk.dispatch.live_on(D0) == ()
    desk.play(entry, (D1, frame(move, 3, 3)))
    assert (desk.tokens, entry.attempt) == ([3], move.attempt)
    assert desk.dispatch.counters[RECOVERIES] == 0


@pytest.mark.parametrize("how", ["error", "lost", "late"])
def test_a_lost_source_and_a_failed_target_are_recovered(how: str) -> None:
    desk, entry, move = moving(D1, D2)
    desk.lose(D0)
    desk.forget()
    if how == "error":
        desk.play(entry, (move.target, frame(move, 0, error=PeerLost("the source"))))
    elif how == "lost":
        desk.lose(move.target)
    else:
        desk.wait(DEFAULT_TIMING.move_deadline_s)
    assert entry.state is RequestState.PREFILLING
    assert entry.attempt is not None
    assert entry.attempt.key.attempt == 3
    assert [submit.output_tokens for _, submit in desk.submits] == [[0, 1, 2]] * 2
    assert not any(isinstance(sent, Stay) for _, sent in desk.sends)


def test_a_target_that_does_not_know_the_move_is_told_of_its_end() -> None:
    """Its submit may still be on the way when the hello of a new stream names the move."""
    desk, entry, move = moving(D1)
    desk.forget()
    desk.play(entry, (D1, frame(move, 0, error=UnknownRequest("what move?"))))
    assert (D1, Cancel(move.attempt.key)) in desk.sends
    assert entry.move is None


ENDS: list[tuple[str, BatonError | None]] = [
    ("finish", None),
    ("error", InternalError("a bug")),
    ("cancel", None),
]


@pytest.mark.parametrize(("how", "error"), ENDS)
def test_an_end_during_a_move_reaches_both(how: str, error: BatonError | None) -> None:
    desk, entry, move = moving(D1)
    desk.forget()
    if how == "finish":
        desk.play(entry, (D0, record(3, 3, finish=FinishReason.STOP)))
    elif error is not None:
        desk.play(entry, (D0, record(0, error=error)))
    else:
        desk.dispatch.cancel(entry)
        desk.look()
    assert (D1, Cancel(move.attempt.key)) in desk.sends
    assert (D0 in desk.cancelled_on) == (how == "cancel")
    assert desk.dispatch.num_requests_on(D0) == desk.dispatch.num_requests_on(D1) == 0


def test_both_streams_name_their_own_attempt() -> None:
    desk, entry, move = moving(D1)
    assert entry.attempt is not None
    assert desk.dispatch.live_on(D0) == (LiveRequest(entry.attempt.key, 3),)
    assert desk.dispatch.live_on(D1) == (LiveRequest(move.attempt.key, 3),)


def test_a_moved_request_moves_again() -> None:
    desk, entry, move = moving(D1)
    desk.play(entry, (D1, frame(move, 3, 3)))
    desk.join(D2)
    desk.drain(D1)
    again = entry.move
    assert again is not None
    assert (again.attempt.source, again.target) == (D1, D2)
    assert again.attempt.key.attempt == 3
