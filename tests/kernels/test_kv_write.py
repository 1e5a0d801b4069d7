"""Writing K and V into the arena."""

import torch
from support.kernel_checks import DEVICE, normal
from support.paged_kv import Shape, make_arena

from baton.kernels.kv_write import clear_slots, kv_write_rows, write_kv

SHAPE = Shape(6, 2, 20, 5)


def test_kv_lands_at_slot_offset_and_layer_and_nowhere_else() -> None:
    arena = make_arena(SHAPE, 7, torch.float32).zero_()
    slots = torch.tensor([5, 2, 5], device=DEVICE)
    offsets = torch.tensor([0, 4, 3], device=DEVICE)
    kv = normal(3, 2 * SHAPE.num_kv_heads, SHAPE.head_dim, dtype=torch.float32)
    write_kv(kv, arena, 1, kv_write_rows(slots, offsets, arena))
    expected = make_arena(SHAPE, 7, torch.float32).zero_()
    for token in range(3):
        k, v = kv[token].view(2, SHAPE.num_kv_heads, SHAPE.head_dim)
        expected[slots[token], :, 1, 0, offsets[token]] = k
        expected[slots[token], :, 1, 1, offsets[token]] = v
    assert torch.equal(arena, expected)


def test_cleared_slots_are_zero_and_others_stay() -> None:
    arena = make_arena(SHAPE, 4, torch.float32)
    clear_slots(arena, [1, 3])
    assert not arena[[1, 3]].any()
    assert arena[[0, 2]].isnan().all()
