"""Writing a step's K and V into the arena.

    arena[slot[t], head, layer, k|v, offset[t]] = kv[t, k|v, head]

Where they go does not depend on the layer but for a constant, so the places are worked out once per
step. T tokens, H KV heads, D head_dim; the arena is `[slots, H, layers, 2, block_size, D]`.
"""

from collections.abc import Sequence

import torch


def kv_write_rows(
    slots_T: torch.Tensor, offsets_T: torch.Tensor, arena: torch.Tensor
) -> torch.Tensor:
    """Rows of the arena seen as `[-1, D]` for layer 0, int64 `[T * 2 * H]` in the order of `kv`."""
    _, num_heads, num_layers, _, block_size, _ = arena.shape
    head = torch.arange(num_heads, device=arena.device) * (num_layers * 2 * block_size)
    kind = torch.arange(2, device=arena.device) * block_size
    of_slot = (kind[:, None] + head).view(1, -1)
    start_T = slots_T * (num_heads * num_layers * 2 * block_size) + offsets_T
    return (start_T[:, None] + of_slot).view(-1)


def write_kv(kv: torch.Tensor, arena: torch.Tensor, layer: int, rows: torch.Tensor) -> None:
    """Store `kv` `[T, 2 * H, D]`, all K heads before all V heads, at `rows` of `kv_write_rows`."""
    block_size, head_dim = arena.shape[-2:]
    of_layer = arena.view(-1, head_dim)[layer * 2 * block_size :]
    of_layer.index_copy_(0, rows, kv.reshape(-1, head_dim))


def clear_slots(arena: torch.Tensor, slots: Sequence[int]) -> None:
    """Zero whole `slots`.

    A block that starts and stays partly filled keeps nothing of its slot's last owner: attention
    weighs what lies behind the context with 0, and 0 times a leftover NaN or infinity is NaN.
    """
    for slot in slots:
        arena[slot].zero_()
