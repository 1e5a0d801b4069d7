"""Where the K and V of a block table lie in the arena `[slots, K, layers, 2, block_size, D]`.

The torch references gather whole blocks; the kernels work out the offset of each token. Offsets are
int64: arenas pass 2^31 elements.
"""

import torch

from baton.kernels.jit import jit, tl


def gather_rows(block_table_SN: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
    """Rows of layer 0, for `gather`, in the order k|v, row, KV head, block: K and V come out as
    matrices. `[2 * S * K * N]`, int64 as the table."""
    _, num_kv_heads, num_layers, _, _, _ = arena.shape
    device = arena.device
    head = torch.arange(num_kv_heads, device=device) * (num_layers * 2)
    start = torch.arange(2, device=device)[:, None, None, None] + head[:, None]
    return (block_table_SN[None, :, None] * (num_kv_heads * num_layers * 2) + start).view(-1)


def gather(arena: torch.Tensor, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """`[len(rows), block_size * D]`. Picking whole rows of a flat view copies 8 times as fast as
    indexing the six-dimensional arena."""
    block_size, head_dim = arena.shape[-2:]
    return arena.view(-1, block_size * head_dim)[2 * layer :].index_select(0, rows)


def layer_view(arena: torch.Tensor, layer: int) -> torch.Tensor:
    """The flat arena from the first K of `layer` on.

    A kernel that gets it needs no layer, so that no layer compiles it anew.
    """
    assert arena.is_contiguous(), "blocks are found by arithmetic"
    block_size, head_dim = arena.shape[-2:]
    return arena.view(-1)[layer * 2 * block_size * head_dim :]


@jit
def load_slots(table_row, token, end, BLOCK_SIZE: tl.constexpr):
    """The slot of each of `token`, of its shape; 0, and no read of the table, from `end` on."""
    return tl.load(table_row + token // BLOCK_SIZE, mask=token < end, other=0)


@jit
def token_offsets(slot, token, slot_stride, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offset of each token's K from the first K of its layer and head, int64 of token's shape."""
    return slot.to(tl.int64) * slot_stride + (token % BLOCK_SIZE) * HEAD_DIM


@jit
def load_tokens(
    source, offset, seen, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """`[len(offset), DIM_PADDED]`; 0 past HEAD_DIM and, when MASKED, where not `seen`.

    0 times what lies behind a context may be NaN, so that unseen V must be 0.
    """
    dim = tl.arange(0, DIM_PADDED)
    place = source + offset[:, None] + dim[None, :]
    mask = None
    if HEAD_DIM != DIM_PADDED:
        mask = (dim < HEAD_DIM)[None, :]
    if MASKED:
        mask = seen[:, None] if mask is None else mask & seen[:, None]
    return tl.load(place) if mask is None else tl.load(place, mask=mask, other=0.0)
