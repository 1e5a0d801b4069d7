"""A running sequence goes to another worker, nothing computed twice, or stays where it is."""

from pathlib import Path

import pytest
from support.core_mesh import GRANT, CoreMesh, D, E
from support.oracle import Oracle

from baton.common import metric_names as names
from baton.common.ids import RequestKey
from baton.common.messages import Cancel, DecodeJob, Move, Stay
from baton.common.timing import DEFAULT_TIMING
from baton.kvtransfer.events import LinkClosed

PROMPT = list(range(10, 140))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    return Oracle(tiny_llama).greedy([PROMPT], 60)[0]


def running(mesh: CoreMesh, num_tokens: int) -> tuple[RequestKey, list[int]]:
    """A request that decodes on D, and what the router has of it."""
    key = mesh.submit(PROMPT, 60)
    while len(mesh.tokens(key)) < num_tokens or not any(r.handover for r in mesh.records):
        mesh.exchange()
    return key, mesh.tokens(key)


def finished(mesh: CoreMesh, key: RequestKey) -> int:
    (done,) = [record for record in mesh.records if record.key == key and record.finish]
    return done.forwarded_tokens


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 20, 33])
def test_a_move_computes_nothing_twice(
    num_tokens: int, is_behind: bool, tiny_llama: Path, expected: list[int]
) -> None:
    """The source may have gone on after the router's submit: its tokens come with the lease."""
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, num_tokens)
    if is_behind:
        for _ in range(3):
            mesh.exchange()
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.advance(10)
    emitted = mesh.tokens(to, known)
    assert emitted == expected
    (joined,) = [r for r in mesh.records if r.key == to and r.handover is not None]
    assert joined.handover is not None
    assert joined.handover.pulled_bytes > 0
    at_source = len(mesh.tokens(key))
    assert finished(mesh, to) == 60 - at_source, "each further token was forwarded once"
    assert mesh.decodes[D].take_effects().load is None or mesh.decodes[D].num_requests == 0
    mesh.expect_rest()


def test_tokens_of_the_source_before_the_move_reach_the_router(
    tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 5)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.advance(10)
    assert mesh.tokens(key) == expected[: len(mesh.tokens(key))]
    assert mesh.tokens(to, mesh.tokens(key)) == expected


def test_a_source_that_is_told_to_stay_goes_on(tiny_llama: Path, expected: list[int]) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.decodes[D].step()
    mesh.deliver(D)
    mesh.send(E, Cancel(to))
    mesh.send(D, Stay(key))
    mesh.advance(10)
    assert mesh.tokens(key) == expected
    mesh.expect_rest()


def test_a_move_asked_for_anew_before_it_began_is_one_move(
    tiny_llama: Path, expected: list[int]
) -> None:
    """The first is called off at once; what it left behind must not undo the second."""
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    called_off = RequestKey(key.transfer_id, 2)
    to = RequestKey(key.transfer_id, 3)
    mesh.send(D, Move(key, called_off, E, GRANT))
    mesh.send(D, Stay(key))
    mesh.send(E, mesh.job(to, PROMPT, 60, DecodeJob(D, "nowhere", GRANT), output=known))
    mesh.send(D, Move(key, to, E, GRANT))
    mesh.decodes[D].step()
    mesh.deliver(D)
    mesh.send(D, Cancel(key))
    mesh.advance(8)
    assert mesh.errors(key) == []
    assert mesh.errors(to) == ["lease_lost"], "its source was cancelled"
    assert expected[: len(known)] == known
    mesh.expect_rest()


def test_a_source_that_has_let_go_says_so_when_it_is_told_to_stay(tiny_llama: Path) -> None:
    """The target joined and was lost before its first frame: nobody would bring another token."""
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    mesh.move(key, PROMPT, 60, known=known)
    while mesh.decodes[D].num_requests:
        mesh.exchange()
    mesh.send(D, Stay(key))
    mesh.exchange()
    assert mesh.errors(key) == ["unknown_request"]


def test_a_target_that_never_comes_costs_a_term_and_no_token(
    tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.send(E, Cancel(to))
    mesh.advance(DEFAULT_TIMING.lease_first_term_s + 8)
    assert mesh.tokens(key) == expected
    mesh.expect_rest()


def test_a_target_whose_link_is_lost_leaves_the_source_its_request(
    tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    mesh.move(key, PROMPT, 60, known=known)
    mesh.decodes[D].step()
    mesh.decodes[D].take_effects()
    mesh.decodes[D].handle(LinkClosed(E))
    for _ in range(80):
        mesh.clock.advance(0.2)
        mesh.decodes[D].step()
        mesh.deliver(D)
    assert mesh.tokens(key) == expected


def test_the_block_that_was_shown_is_disowned_before_it_is_written(tiny_llama: Path) -> None:
    """A target that was given up may still be reading: the fence must tell it."""
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.exchange()
    mesh.decodes[D].step()
    shown = [s for _, s in mesh.decodes[D].take_effects().statuses if s.slots]
    sequence = mesh.decodes[D]._requests[key].sequence
    last = sequence.slots[sequence.num_computed // mesh.engines[D].block_size]
    before = mesh.engines[D].generations.word(last)
    mesh.send(D, Stay(key))
    assert mesh.engines[D].generations.word(last) > before
    assert to.attempt == 2
    assert all(status.key == to for status in shown)


def test_a_move_of_what_does_not_run_is_ignored(tiny_llama: Path, expected: list[int]) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key = mesh.submit(PROMPT, 60)
    to = mesh.move(key, PROMPT, 60, known=[])
    mesh.advance(8)
    assert mesh.tokens(key) == expected
    assert mesh.errors(to) == []
    mesh.send(E, Cancel(to))
    mesh.advance(1)
    mesh.expect_rest()


def test_cancelling_both_attempts_in_a_move_leaves_nothing(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.decodes[D].step()
    mesh.deliver(D)
    mesh.send(D, Cancel(key))
    mesh.send(E, Cancel(to))
    mesh.advance(1)
    assert mesh.errors(key) == mesh.errors(to) == []
    mesh.expect_rest()


def test_an_operator_sees_what_the_lease_is_for(tiny_llama: Path) -> None:
    mesh = CoreMesh(tiny_llama, decodes=(D, E))
    key, known = running(mesh, 20)
    to = mesh.move(key, PROMPT, 60, known=known)
    mesh.decodes[D].step()
    (row,) = mesh.decodes[D]._owner.rows(mesh.clock.monotonic())
    assert (row.key, row.owner, row.reader, row.why) == (to, str(D), str(E), "move")
    assert (row.request_id, row.router) == ("test", "router")
    counters = mesh.decodes[D]._owner.counters
    assert counters[names.LEASES_OPENED] == 1
