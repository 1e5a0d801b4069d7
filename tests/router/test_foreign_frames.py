"""Frames count from the workers of an attempt alone, whatever key they name."""

from dataclasses import replace

import pytest
from support.router_desk import Desk, first, identity, join, record

from baton.common.errors import InternalError, LeaseLost
from baton.common.ids import WorkerIdentity
from baton.common.messages import OutputRecord, Submit
from baton.common.metric_names import MOVES, RECORDS_LATE
from baton.common.sampling import FinishReason

P0, P1, D0, D1 = identity("p0"), identity("p1"), identity("d0"), identity("d1")
REBORN = identity("d1", epoch=2)
TOLD = [
    record(3, 70, 71),
    record(3, 70, finish=FinishReason.STOP),
    record(0, error=InternalError("not mine to say")),
    replace(join(3), tokens=(70,)),
]


@pytest.mark.parametrize("told", TOLD, ids=["tokens", "finish", "error", "join"])
@pytest.mark.parametrize("sender", [P0, D0, P1, REBORN], ids=str)
def test_nobody_but_its_target_wins_a_move(sender: WorkerIdentity, told: OutputRecord) -> None:
    """Not the source, which knows the key and the grant, nor a later life of the target."""
    desk = Desk(P0, D0)
    entry = desk.submit()
    desk.play(entry, (P0, first()), (D0, join()), (D0, record(1, 1, 2)))
    desk.join(P1, D1)
    desk.drain(D0)
    attempt, move = entry.attempt, entry.move
    assert move is not None
    assert move.target == D1
    desk.forget()
    desk.play(entry, (sender, replace(told, key=move.attempt.key)))
    assert (entry.attempt, entry.move) == (attempt, move)
    assert (desk.sends, desk.events) == ([], [])
    assert desk.dispatch.counters == {RECORDS_LATE: 1}
    desk.play(entry, (D0, record(3, 3)))
    assert desk.tokens == [3], "the source's own attempt goes on"
    desk.play(entry, (D1, replace(join(3), tokens=(3, 4), key=move.attempt.key)))
    assert desk.tokens == [3, 4]
    assert desk.dispatch.counters[MOVES] == 1


@pytest.mark.parametrize("num_emitted", [1, 3])
def test_every_worker_of_a_retry_is_given_all_that_was_emitted(num_emitted: int) -> None:
    desk = Desk(P0, P1, D0, D1)
    entry = desk.submit()
    assert entry.attempt is not None
    p, d = entry.attempt.workers
    frames = [(d, join())] if num_emitted == 1 else [(d, join()), (d, record(1, 1, 2))]
    desk.play(entry, (p, first()), *frames)
    desk.forget()
    desk.play(entry, (d, record(0, error=LeaseLost("the end"))))
    submits = [message for _, message in desk.sends if isinstance(message, Submit)]
    assert [submit.output_tokens for submit in submits] == [list(range(num_emitted))] * 2
    assert {submit.key.attempt for submit in submits} == {2}
