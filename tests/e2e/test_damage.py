"""One flipped bit in a KV block, wherever it happens, is seen before a token depends on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.core_mesh import GRANT, CoreMesh, D, P
from support.oracle import Oracle

from baton.common import metric_names as names
from baton.common.ids import RequestKey, Slot, WorkerIdentity
from baton.common.messages import DecodeJob, PrefillJob

PROMPT = list(range(10, 140))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    return Oracle(tiny_llama).greedy([PROMPT], 40)[0]


def flip(mesh: CoreMesh, who: WorkerIdentity, slot: Slot) -> None:
    """One bit of one byte in the middle of a block."""
    block = mesh.engines[who].arena.tensor[slot].view(-1)
    words = block.view(torch.int32)
    words[len(words) // 2] ^= 1 << 9


def flip_at_owner(mesh: CoreMesh) -> None:
    """After the owner has sampled its token and before the reader asks for a block."""
    while not mesh.records:
        mesh.prefill.step()
        mesh.deliver(P)
    flip(mesh, P, mesh.prefill._owner.leased[0][0])


def flip_at_reader(mesh: CoreMesh) -> None:
    """After the fence of the first block has passed, before the join."""
    while True:
        mesh.exchange()
        for request in mesh.decode._requests.values():
            if request.pull is not None and request.pull.pulled_bytes:
                flip(mesh, D, request.sequence.slots[0])
                return


@pytest.mark.parametrize("damage", [flip_at_owner, flip_at_reader])
def test_a_flipped_bit_is_found_before_the_join_and_leaves_both_caches(
    damage: Callable[[CoreMesh], None], tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama, budget=32, kv_digest=True)
    key = mesh.submit(PROMPT, 40)
    damage(mesh)
    mesh.advance(3)
    assert mesh.errors(key) == ["digest_mismatch"]
    assert mesh.tokens(key)[1:] == [], "no token depends on the block"
    assert mesh.decode._integrity.counters[names.DIGEST_MISMATCHES] == 1
    assert mesh.prefill._integrity.counters[names.DIGEST_MISMATCHES] == 1
    assert mesh.engines[P].prefix.num_evictable == 0, "the block and all behind it are dropped"
    assert mesh.engines[D].prefix.num_evictable == 0
    mesh.expect_rest()
    again = RequestKey(key.transfer_id, 2)
    first = mesh.tokens(key)
    mesh.send(P, mesh.job(again, PROMPT, 40, PrefillJob(D, GRANT), output=first))
    mesh.send(D, mesh.job(again, PROMPT, 40, DecodeJob(P, "", GRANT), output=first))
    mesh.advance(6)
    assert mesh.tokens(again, first) == expected
    mesh.expect_rest()


def test_the_owner_samples_nothing_from_a_block_that_changed(tiny_llama: Path) -> None:
    """Its later chunks read the earlier ones from memory: the first token depends on them."""
    mesh = CoreMesh(tiny_llama, budget=32, kv_digest=True)
    key = mesh.submit(PROMPT, 40)
    mesh.prefill.step()
    flip(mesh, P, next(iter(mesh.prefill._requests.values())).sequence.slots[0])
    mesh.advance(3)
    assert mesh.tokens(key) == []
    assert "digest_mismatch" in mesh.errors(key)
    assert mesh.prefill._integrity.counters[names.DIGEST_MISMATCHES] == 1
    assert mesh.engines[P].prefix.num_evictable == 0
    mesh.expect_rest()


@pytest.mark.parametrize("who", [P, D])
def test_a_cached_block_that_changed_is_no_hit(
    who: WorkerIdentity, tiny_llama: Path, expected: list[int]
) -> None:
    mesh = CoreMesh(tiny_llama, kv_digest=True)
    first = mesh.submit(PROMPT, 40)
    mesh.advance(6)
    (cached, *_) = mesh.engines[who].prefix.blocks()
    flip(mesh, who, cached.slot)
    second = mesh.submit(PROMPT, 40)
    mesh.advance(6)
    assert mesh.tokens(first) == mesh.tokens(second) == expected
    assert mesh.engines[who].kv.num_digest_mismatches == 1
    mesh.expect_rest()


def test_without_digests_the_same_bit_changes_the_answer(
    tiny_llama: Path, expected: list[int]
) -> None:
    """What the digests are for: the fence alone sees reused slots, not broken memory."""
    mesh = CoreMesh(tiny_llama, budget=32)
    key = mesh.submit(PROMPT, 40)
    mesh.prefill.step()
    block = mesh.engines[P].arena.tensor[
        next(iter(mesh.prefill._requests.values())).sequence.slots[0]
    ]
    block.neg_()
    mesh.advance(6)
    assert mesh.errors(key) == []
    assert mesh.tokens(key) != expected
