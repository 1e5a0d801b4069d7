"""What simulations of whole clusters found in the cores, each as small as it can be told."""

from pathlib import Path

from support.core_mesh import CoreMesh, D, E
from support.oracle import Oracle

from baton.common.ids import RequestKey, TransferId
from baton.common.messages import DecodeJob

PROMPT = list(range(10, 140))


def test_a_move_waits_for_a_sequence_that_is_still_being_computed(tiny_llama: Path) -> None:
    """A preempted sequence that has blocks again runs, and has more than its newest token to feed.

    The move of one took the engine thread with it.
    """
    mesh = CoreMesh(tiny_llama, decodes=(D, E), budget=32)
    key = RequestKey(TransferId(bytes(16)), 1)
    mesh.send(D, mesh.job(key, PROMPT, 40, DecodeJob(None)))
    mesh.exchange()
    assert mesh.tokens(key) == [], "130 tokens take more than one step of 32"
    to = mesh.move(key, PROMPT, 40, known=[])
    mesh.advance(8)
    known = mesh.tokens(key)
    assert len(known) < 40, "the rest was decoded elsewhere"
    assert mesh.tokens(to, known) == Oracle(tiny_llama).greedy([PROMPT], 40)[0]
    (joined,) = [r for r in mesh.records if r.key == to and r.handover is not None]
    assert joined.handover is not None
    assert joined.handover.pulled_blocks > 0
    mesh.expect_rest()
