"""A client's name for its request is for logs: nothing of the request is decided by it."""

from dataclasses import replace

from support.router_desk import Desk, first, identity, join, record

from baton.common.ids import TransferId
from baton.common.sampling import FinishReason
from baton.router.generation import TokenEvent

P, D = identity("p0"), identity("d0")


def tokens_of(desk: Desk, transfer: TransferId) -> list[int]:
    """What the client of one request got."""
    return [
        token
        for request, event in desk.events
        if request == transfer and isinstance(event, TokenEvent)
        for token in event.token_ids
    ]


def test_fifty_requests_of_one_name_are_fifty_requests() -> None:
    desk = Desk(P, D)
    entries = [desk.submit() for _ in range(50)]
    assert {entry.spec.request_id for entry in entries} == {"req-1"}
    assert len({entry.transfer_id for entry in entries}) == 50
    desk.look()
    assert len(desk.submits) == 100
    for number, entry in enumerate(entries):
        own = [100 + number, 200 + number]
        prefilled = replace(first(), tokens=(own[0],))
        joined = replace(join(), tokens=(own[0],))
        desk.play(entry, (P, prefilled), (D, joined))
        desk.play(entry, (D, record(1, own[1], finish=FinishReason.STOP, forwarded_tokens=1)))
        assert tokens_of(desk, entry.transfer_id) == own
    assert desk.dispatch.num_requests == 0


def test_a_cancel_takes_one_of_two_requests_of_one_name() -> None:
    desk = Desk(P, D)
    kept, cancelled = desk.submit(), desk.submit()
    desk.dispatch.cancel(cancelled)
    desk.play(kept, (P, first()), (D, join()))
    assert tokens_of(desk, kept.transfer_id) == [0]
    assert desk.dispatch.knows(kept.transfer_id)
    assert not desk.dispatch.knows(cancelled.transfer_id)
