"""The arena's layout is a contract with every peer: strides in bytes, alignment, scratch slot."""

import ctypes
import mmap

import numpy as np
import pytest
import torch

from baton.common.errors import ConfigError
from baton.common.ids import Slot
from baton.common.randomness import SeededRandomness, SystemRandomness
from baton.engine.arena import Arena, ArenaLayout, GenerationTable

LAYOUT = ArenaLayout(num_kv_heads=3, num_layers=5, block_size=16, head_dim=8, dtype=torch.bfloat16)


def test_strides_are_those_of_the_contract() -> None:
    """arena[slot][kv_head][layer][k|v][token][head_dim]."""
    arena = Arena(LAYOUT, 7)
    tensor = arena.tensor
    assert tensor.shape == (8, 3, 5, 2, 16, 8)
    assert tensor.is_contiguous()
    item = 2
    token = 8 * item
    kind = 16 * token
    layer = 2 * kind
    head = 5 * layer
    slot = 3 * head
    assert [stride * item for stride in tensor.stride()] == [slot, head, layer, kind, token, item]
    assert LAYOUT.block_bytes == arena.block_bytes == slot
    assert arena.num_bytes == 8 * slot == tensor.nbytes


def test_a_slot_is_one_range_of_bytes_and_a_head_one_range_in_it() -> None:
    arena = Arena(LAYOUT, 4)
    arena.tensor[2, 1].fill_(1.0)
    raw = arena.tensor.view(torch.uint8).flatten()
    touched = raw.nonzero().flatten()
    head_bytes = LAYOUT.block_bytes // 3
    first = 2 * LAYOUT.block_bytes + head_bytes
    assert touched.min() >= first
    assert touched.max() == first + head_bytes - 1
    assert arena.tensor[2].data_ptr() == arena.base_address + 2 * LAYOUT.block_bytes


def test_arena_starts_on_a_page_zeroed_with_a_scratch_slot() -> None:
    arena = Arena(LAYOUT, 4)
    assert arena.base_address % mmap.PAGESIZE == 0
    assert not arena.tensor.any()
    assert (arena.num_slots, arena.scratch_slot) == (4, 4)
    assert arena.tensor.shape[0] == 5


def test_the_tensor_keeps_the_memory() -> None:
    tensor = Arena(LAYOUT, 4).tensor
    tensor.fill_(2.0)
    assert tensor.float().mean() == 2.0


def test_more_memory_than_there_is_names_the_bytes() -> None:
    huge = ArenaLayout(
        num_kv_heads=1 << 12, num_layers=1 << 10, block_size=32, head_dim=128, dtype=torch.float32
    )
    with pytest.raises(ConfigError, match=r"cannot map \d+ bytes"):
        Arena(huge, 1 << 24)


def test_generations_start_at_random_62_bit_numbers() -> None:
    first = GenerationTable(300, SystemRandomness())
    second = GenerationTable(300, SystemRandomness())
    words = {first.word(Slot(slot)) for slot in range(300)}
    assert len(words) == 300
    assert max(words) < 1 << 62
    assert max(words) > 1 << 58
    assert not words & {second.word(Slot(slot)) for slot in range(300)}


def test_generations_are_the_same_for_the_same_seed() -> None:
    tables = [GenerationTable(5, SeededRandomness(1)) for _ in range(2)]
    assert [tables[0].word(Slot(s)) for s in range(5)] == [
        tables[1].word(Slot(s)) for s in range(5)
    ]


def test_raising_changes_exactly_the_named_words() -> None:
    table = GenerationTable(10, SeededRandomness(1))
    before = [table.word(Slot(slot)) for slot in range(10)]
    assert table.raise_word(Slot(3)) == before[3] + 1
    table.raise_words([Slot(5), Slot(7), Slot(5)])
    table.raise_words([])
    after = [table.word(Slot(slot)) for slot in range(10)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [
        0, 0, 0, 1, 0, 1, 0, 1, 0, 0,
    ]  # fmt: skip


def test_words_are_little_endian_u64_on_a_page() -> None:
    table = GenerationTable(6, SeededRandomness(1))
    assert table.base_address % mmap.PAGESIZE == 0
    assert table.num_bytes == 48
    pointer = np.ctypeslib.as_array((ctypes.c_uint64 * 6).from_address(table.base_address))
    table.raise_word(Slot(4))
    assert pointer.tolist() == [table.word(Slot(slot)) for slot in range(6)]
