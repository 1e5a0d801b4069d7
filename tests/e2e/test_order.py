"""What comes before what: space on P before space on D, the event before the announcement, the
fence before the cache, the word before the bytes. Two real cores on a manual clock."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.core_mesh import GRANT, CoreMesh, D, P
from support.fault_transport import FaultScript, FaultyReader
from support.faults import Hold, Interpose, Kind, LocalBlocks
from support.oracle import Oracle

from baton.common.ids import RequestKey, Slot, TransferId
from baton.common.messages import DecodeJob, PrefillJob
from baton.common.timing import DEFAULT_TIMING
from baton.engine.device import ManualDevice
from baton.engine.sequence import Chunk
from baton.kvtransfer.events import PeerConnected
from baton.kvtransfer.transport.base import MemoryRegion, Read

# Five blocks of 32.
PROMPT = list(range(10, 140))
# 8 blocks, and 4 more for its answer.
HOG = list(range(200, 455))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    return Oracle(tiny_llama).greedy([PROMPT], 40)[0]


def scripted(mesh: CoreMesh) -> FaultScript:
    """Reads of D from P go wrong by the script from now on."""
    script, arena = FaultScript(), mesh.engines[D].arena
    region = MemoryRegion(arena.base_address, arena.num_bytes, arena)
    (peer,) = mesh.decode.handovers.peers.values()
    faulty = FaultyReader(peer, LocalBlocks(region, arena.block_bytes), script)
    mesh.decode.handle(PeerConnected(P, faulty))
    return script


def until(mesh: CoreMesh, holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        mesh.exchange()
    raise AssertionError("it never came to that")


def test_who_waits_for_a_lease_holds_nothing(tiny_llama: Path, expected: list[int]) -> None:
    """Space is taken on P first: else two prompts, one holding P and one D, wait for each other."""
    mesh = CoreMesh(tiny_llama)
    key = RequestKey(TransferId(bytes(16)), 1)
    mesh.send(D, mesh.job(key, PROMPT, 40, DecodeJob(P, "nowhere", GRANT)))
    mesh.advance(1)
    assert mesh.engines[D].pool.num_free == mesh.engines[D].num_blocks
    mesh.send(P, mesh.job(key, PROMPT, 40, PrefillJob(D, GRANT)))
    mesh.advance(DEFAULT_TIMING.renew_every_s + 6)
    assert mesh.tokens(key) == expected
    mesh.expect_rest()


def test_prompts_that_fill_both_pools_do_not_wait_in_a_circle(
    tiny_llama: Path, expected: list[int]
) -> None:
    """D hears of the second prompt first, P of the first: with one pool's room for one each."""
    mesh = CoreMesh(tiny_llama, prefill_blocks=5, decode_blocks=7)
    keys = [RequestKey(TransferId(bytes([number]) * 16), 1) for number in (1, 2)]
    prompts = [PROMPT, PROMPT[::-1]]
    for key, prompt in zip(keys, prompts, strict=True):
        mesh.send(P, mesh.job(key, prompt, 40, PrefillJob(D, GRANT)))
    for key, prompt in reversed(list(zip(keys, prompts, strict=True))):
        mesh.send(D, mesh.job(key, prompt, 40, DecodeJob(P, "nowhere", GRANT)))
    mesh.advance(40)
    assert [mesh.errors(key) for key in keys] == [[], []]
    assert mesh.tokens(keys[0]) == expected
    assert len(mesh.tokens(keys[1])) == 40
    mesh.expect_rest()


def test_who_waits_for_room_holds_not_even_its_hits(tiny_llama: Path) -> None:
    """Cached blocks that waiting ones pin are room that nobody can be given."""
    mesh = CoreMesh(tiny_llama, decode_blocks=14)
    warm = mesh.submit(PROMPT, 2)
    mesh.advance(3)
    assert len(mesh.tokens(warm)) == 2
    assert mesh.engines[D].prefix.num_evictable == 4
    hog = mesh.submit(HOG, 128)
    until(mesh, lambda: len(mesh.tokens(hog)) > 1)
    waiting = mesh.submit([*PROMPT[:-1], 5], 40)
    mesh.advance(3)
    assert len(mesh.tokens(waiting)) == 1, "only P's own token is out"
    held = {slot for request in mesh.decode._requests.values() for slot in request.sequence.slots}
    running = mesh.decode._requests[hog].sequence.slots
    assert held == set(running)
    mesh.advance(30)
    assert mesh.decode._decoding.num_preemptions == 0
    assert (len(mesh.tokens(hog)), len(mesh.tokens(waiting))) == (128, 40)
    mesh.expect_rest()


def test_nothing_is_readable_before_the_step_that_wrote_it_has_ended(
    tiny_llama: Path, expected: list[int]
) -> None:
    device = ManualDevice()
    mesh = CoreMesh(tiny_llama, budget=64, devices={P: device})
    key = mesh.submit(PROMPT, 40)
    readable = []
    while not mesh.tokens(key):
        mesh.advance(0.3)
        request = mesh.decode._requests[key]
        assert request.status is not None, "the lease is open before a chunk is computed"
        readable.append(request.status.readable_tokens)
        (peer,) = mesh.decode.handovers.peers.values()
        assert peer.blocks_read == readable[-1] // 32, "what is announced is read at once"
        assert len(mesh.engines[P].prefix) == readable[-1] // 32
        assert device.run_next(), "a step is in flight"
        mesh.exchange()
    assert readable == [0, 64, 128]
    while device.run_all() or mesh.prefill.num_requests:
        mesh.exchange()
    mesh.advance(6)
    assert mesh.tokens(key) == expected
    mesh.expect_rest()


def test_blocks_that_did_not_pass_their_fence_are_in_no_cache(
    tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama)
    script = scripted(mesh)

    def reuse(read: Read) -> None:
        mesh.engines[P].generations.raise_words([read.remote_slots[2]])

    script.next(Interpose(before_words=reuse))
    key = mesh.submit(PROMPT, 40)
    mesh.advance(1)
    assert mesh.errors(key) == ["fence_failed"]
    assert len(mesh.engines[D].prefix) == 0
    again = mesh.submit(PROMPT, 40)
    mesh.advance(6)
    assert mesh.tokens(again) == expected
    mesh.expect_rest()


@pytest.fixture
def late(tiny_llama: Path) -> tuple[CoreMesh, Hold, list[Slot]]:
    """D has read its blocks and not yet their words when the lease ends, unknown to it.

    With the slots that D read; P's pool has no others.
    """
    mesh = CoreMesh(tiny_llama, prefill_blocks=5)
    script, words = scripted(mesh), Hold(kind=Kind.WORDS)
    script.next(words)
    key = mesh.submit(PROMPT, 40)
    until(mesh, lambda: bool(words.reads))
    (slots,) = mesh.prefill._owner.leased
    mesh.prefill._owner.reap(key)
    mesh.prefill.take_effects()
    assert mesh.prefill.num_requests == 0
    return mesh, words, slots


def test_a_slot_that_was_used_again_is_noticed_whoever_used_it(
    late: tuple[CoreMesh, Hold, list[Slot]],
) -> None:
    """A request that P answers alone opens no lease; its blocks are other blocks all the same."""
    mesh, words, slots = late
    (key,) = mesh.decode._requests
    alone = RequestKey(TransferId(bytes(16)), 1)
    mesh.send(P, mesh.job(alone, PROMPT[::-1], 1, PrefillJob(None)))
    until(mesh, lambda: mesh.prefill.num_requests == 0)
    assert len(slots) == mesh.engines[P].num_blocks, "there was no other place for it"
    words.release()
    mesh.advance(1)
    assert mesh.errors(key) == ["fence_failed"]
    mesh.expect_rest()


def test_a_slot_that_nobody_used_again_is_as_good_as_leased(
    late: tuple[CoreMesh, Hold, list[Slot]], expected: list[int]
) -> None:
    """Safety rests on the words alone, so a lease that ended costs nothing if they stand."""
    mesh, words, _ = late
    (key,) = mesh.decode._requests
    words.release()
    mesh.advance(6)
    assert mesh.tokens(key) == expected
    mesh.expect_rest()


@pytest.mark.parametrize(
    "step_s", [DEFAULT_TIMING.lease_first_term_s + 1, DEFAULT_TIMING.lease_term_s + 1]
)
def test_a_step_longer_than_a_lease_costs_no_lease(
    step_s: float, tiny_llama: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening is told after the step; the renewal that answers it cannot come before."""
    mesh = CoreMesh(tiny_llama, budget=64)
    quick = mesh.engines[P].launch
    num_steps = 0

    def slow(chunks: list[Chunk]) -> None:
        nonlocal num_steps
        num_steps += 1
        mesh.clock.advance(step_s)
        quick(chunks)

    monkeypatch.setattr(mesh.engines[P], "launch", slow)
    key = mesh.submit(PROMPT, 40)
    mesh.advance(8)
    assert num_steps == 3
    assert mesh.errors(key) == []
    assert mesh.tokens(key) == expected
    mesh.expect_rest()
