"""Digests of published blocks: a flipped bit is noticed before its block is used again."""

import pytest
import torch
from support.oracle_model import write_oracle_model

from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.arena import Arena, ArenaLayout, GenerationTable
from baton.engine.device import InlineDevice
from baton.engine.digests import DigestTable
from baton.engine.engine import Engine
from baton.engine.engine_config import EngineConfig
from baton.engine.oracle import oracle_answer
from baton.engine.sequence import Chunk, Sequence

BLOCK = 4
NUM_BLOCKS = 16
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = list(range(50, 50 + 4 * BLOCK + 2))


class Table:
    """A small arena with random bytes and its digests."""

    def __init__(self) -> None:
        layout = ArenaLayout(
            num_kv_heads=2, num_layers=3, block_size=4, head_dim=8, dtype=torch.bfloat16
        )
        self.arena = Arena(layout, 6)
        self.bytes = self.arena.tensor.view(torch.uint8)
        generator = torch.Generator().manual_seed(0)
        self.bytes.copy_(
            torch.randint(256, self.bytes.shape, generator=generator, dtype=torch.uint8)
        )
        self.generations = GenerationTable(6, SeededRandomness(0))
        self.digests = DigestTable(self.arena, self.generations)


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def engine(tmp_path):
    folder = write_oracle_model(tmp_path, tokenizer=False)
    config = EngineConfig(
        model=folder,
        block_size=BLOCK,
        num_blocks=NUM_BLOCKS,
        kv_digest=True,
        check_invariants=True,
    )
    return Engine(config, SeededRandomness(2), device=InlineDevice())


def flip(engine: Engine, slot: int, byte: int = 77) -> None:
    engine.arena.tensor.view(torch.uint8)[slot].view(-1)[byte] ^= 4


def run(engine: Engine, prompt: list[int] = PROMPT) -> tuple[list[int], int, Sequence]:
    """Prefill and decode as a worker does: output, cached tokens, the released sequence."""
    sequence = engine.new_sequence(prompt, GREEDY, b"t")
    assert engine.kv.reserve(sequence, len(prompt) + GREEDY.max_tokens, len(prompt) - 1)
    while sequence.num_output < GREEDY.max_tokens:
        engine.step([Chunk(sequence, sequence.num_pending)])
        engine.kv.publish(sequence, sequence.num_computed)
    engine.kv.release(sequence)
    engine.check(sequences=[])
    return sequence.tokens[len(prompt) :], sequence.num_cached, sequence


def test_recorded_digests_are_those_of_the_bytes(table):
    table.digests.record([3, 1])
    assert table.digests.of([1, 3]) == table.digests.digests_now([1, 3])
    assert table.digests.mismatches([3, 1]) == []
    assert len(set(table.digests.digests_now(range(6)))) == 6
    table.bytes[1, 1, 2, 0, 3, 5] ^= 1
    assert table.digests.mismatches([3, 1]) == [1]
    assert table.digests.verify([1, 3], table.digests.of([1, 3])) == [0]
    assert table.digests.of([1]) != table.digests.digests_now([1])


def test_a_digest_ends_with_the_generation(table):
    table.digests.record([2, 4])
    table.generations.raise_words([2])
    assert table.digests.knows([4])
    assert not table.digests.knows([2, 4])
    with pytest.raises(AssertionError, match="no digest of this generation"):
        table.digests.of([4, 2])
    with pytest.raises(AssertionError, match="no digest of this generation"):
        table.digests.mismatches([2])
    table.digests.record([2])
    assert table.digests.mismatches([2, 4]) == []


def test_what_was_adopted_is_not_recorded_over(table):
    """A bit that flips between the pull and the publication is still found."""
    told = table.digests.digests_now([5])
    table.digests.adopt([5], told)
    table.bytes[5, 0, 0, 0, 0, 0] ^= 128
    table.digests.record([5])
    assert table.digests.of([5]) == told
    assert table.digests.mismatches([5]) == [0]


def test_nothing_asked_nothing_found(table):
    assert table.digests.digests_now([]) == table.digests.of([]) == []
    assert table.digests.mismatches([]) == table.digests.verify([], []) == []
    table.digests.record([])


def test_a_partial_block_crosses_with_all_its_bytes(table):
    """Rows behind the prompt are whatever they were: the copy has the same."""
    other = Table()
    [digest] = table.digests.digests_now([2])
    other.bytes[4] = table.bytes[2]
    assert other.digests.verify([4], [digest]) == []
    other.bytes[4, 1, 2, 1, 3, 15] ^= 1
    assert other.digests.verify([4], [digest]) == [0]


def test_published_blocks_have_digests_also_duplicates(engine):
    first = engine.new_sequence(PROMPT, GREEDY, b"t")
    second = engine.new_sequence(PROMPT, GREEDY, b"t")
    for sequence in (first, second):
        assert engine.kv.reserve(sequence, len(PROMPT), len(PROMPT) - 1)
    engine.step([Chunk(first, len(PROMPT)), Chunk(second, len(PROMPT))])
    for sequence in (first, second):
        engine.kv.publish(sequence, len(PROMPT))
    assert len(engine.prefix) == 4
    assert engine.digests.of(first.slots[:4]) == engine.digests.of(second.slots[:4])
    assert not engine.digests.knows(first.slots[4:]), "the block is not full"


def test_a_partial_block_that_is_filled_further_gets_another_digest(engine):
    """Handed over with the digest of its first rows, it must not keep that when it is full."""
    sequence = engine.new_sequence(PROMPT, GREEDY, b"t")
    assert engine.kv.reserve(sequence, len(PROMPT) + 8, len(PROMPT) - 1)
    engine.step([Chunk(sequence, len(PROMPT))])
    engine.digests.adopt(sequence.slots[:5], engine.digests.digests_now(sequence.slots[:5]))
    for _ in range(3):
        engine.step([Chunk(sequence, 1)])
    engine.kv.publish(sequence, sequence.num_computed)
    assert sequence.num_published == 5
    assert engine.digests.mismatches(sequence.slots[:5]) == []
    engine.kv.release(sequence)
    _, cached, _ = run(engine, sequence.tokens)
    assert cached == 5 * BLOCK
    assert engine.kv.num_digest_mismatches == 0


def test_right_hits_are_used(engine):
    first, _, _ = run(engine)
    second, cached, _ = run(engine)
    assert first == second == oracle_answer(PROMPT, 8, 512)
    assert cached == 4 * BLOCK
    assert engine.kv.num_digest_mismatches == 0


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_flipped_bit_ends_the_hits_before_it_and_is_computed_again(engine, block):
    run(engine)
    slots = {each.hash: each.slot for each in engine.prefix.blocks()}
    hashes = engine.new_sequence(PROMPT, GREEDY, b"t").full_hashes(len(PROMPT), BLOCK)
    flip(engine, slots[hashes[block]])
    output, cached, _ = run(engine)
    assert output == oracle_answer(PROMPT, 8, 512)
    assert cached == block * BLOCK
    assert engine.kv.num_digest_mismatches == 1
    again, cached, _ = run(engine)
    assert (again, cached) == (output, 4 * BLOCK)
    assert engine.kv.num_digest_mismatches == 1


def test_without_digests_the_same_flip_changes_the_answer(tmp_path):
    """That the test above can fail."""
    folder = write_oracle_model(tmp_path, tokenizer=False)
    config = EngineConfig(model=folder, block_size=BLOCK, num_blocks=NUM_BLOCKS)
    engine = Engine(config, SeededRandomness(2), device=InlineDevice())
    run(engine)
    flip(engine, next(iter(engine.prefix.blocks())).slot)
    output, cached, _ = run(engine)
    assert cached == 4 * BLOCK
    assert output != oracle_answer(PROMPT, 8, 512)


def test_a_wrong_block_that_is_held_leaves_the_cache_and_is_not_published_again(engine):
    holder = engine.new_sequence(PROMPT, GREEDY, b"t")
    assert engine.kv.reserve(holder, len(PROMPT) + 8, len(PROMPT) - 1)
    engine.step([Chunk(holder, len(PROMPT))])
    engine.kv.publish(holder, holder.num_computed)
    flip(engine, holder.slots[1])
    other = engine.new_sequence(PROMPT, GREEDY, b"t")
    assert engine.kv.reserve(other, len(PROMPT), len(PROMPT) - 1)
    assert other.num_cached == BLOCK
    assert len(engine.prefix) == 1
    for _ in range(3):
        engine.step([Chunk(holder, 1)])
    engine.kv.publish(holder, holder.num_computed)
    assert len(engine.prefix) == 1
    engine.step([Chunk(other, other.num_pending)])
    engine.kv.publish(other, len(PROMPT))
    assert len(engine.prefix) == 4
    engine.check(sequences=[holder, other])
    for sequence in (holder, other):
        engine.kv.release(sequence)
    engine.check(sequences=[])
    output, cached, _ = run(engine)
    assert (output, cached) == (oracle_answer(PROMPT, 8, 512), 4 * BLOCK)


def test_when_the_lost_hits_do_not_fit_nothing_is_reserved(engine):
    """All hits but one gone, and no room to compute them again."""
    run(engine)
    rest = engine.new_sequence(list(range(100, 160)), GREEDY, b"t")
    first = {each.parent: each.slot for each in engine.prefix.blocks()}[None]
    assert engine.kv.reserve(rest, 10 * BLOCK, 0)
    assert first in {each.slot for each in engine.prefix.blocks()}
    pinned = engine.new_sequence(PROMPT, GREEDY, b"t")
    assert engine.kv.reserve(pinned, 4 * BLOCK, 4 * BLOCK - 1)
    before = engine.kv.available
    flip(engine, first)
    wanted = engine.new_sequence(PROMPT, GREEDY, b"t")
    size = (4 + before) * BLOCK
    assert engine.kv.fits(wanted, size - BLOCK, len(PROMPT) - 1)
    assert not engine.kv.reserve(wanted, size - BLOCK, len(PROMPT) - 1)
    assert (wanted.slots, wanted.num_cached) == ([], 0)
    assert engine.kv.num_digest_mismatches == 1
    engine.check(sequences=[rest, pinned])
