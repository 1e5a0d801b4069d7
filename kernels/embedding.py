"""Rows of the embedding table."""

import torch
import torch.nn.functional as F

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)

# Features per program, 64 bytes per thread in bf16.
MAX_BLOCK = 4096
ELEMENTS_PER_THREAD = 32


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows `[T, D]` of the `table` `[vocab, D]` for `token_ids` int32 or int64 `[T]`.

    Zeros for a negative id: a sampler's word for "no token is possible", which may be fed on before
    the host has seen it.
    """
    rows = F.embedding(token_ids.clamp_min(0), table)
    return rows.masked_fill_((token_ids < 0)[:, None], 0.0)


def embedding_triton(
    token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`embedding`; all tensors are contiguous.

    The kernel does not look whether an id is below the vocabulary's size: ids of a prompt are
    checked where the request comes in, and a sampler draws no others.
    """
    width = table.shape[1]
    if out is None:
        out = table.new_empty(len(token_ids), width)
    assert token_ids.device == table.device, "ids lie where the table is"
    assert token_ids.dtype in (torch.int32, torch.int64), "ids are whole numbers"
    assert token_ids.is_contiguous(), "ids follow each other"
    assert table.is_contiguous(), "rows follow each other"
    assert out.is_contiguous(), "rows follow each other"
    assert out.shape == (len(token_ids), width), "a row for each token"
    if len(token_ids) == 0:
        return out
    block = min(next_power_of_2(width), MAX_BLOCK)
    num_blocks = cdiv(width, block)
    pdl = can_overlap_launches(table)
    _embedding_kernel[(len(token_ids) * num_blocks,)](
        token_ids,
        table,
        out,
        WIDTH=width,
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // (32 * ELEMENTS_PER_THREAD)),
        launch_pdl=pdl,
    )
    return out


@jit
def _embedding_kernel(
    token_ids,
    table,
    out,
    WIDTH: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program t NUM_BLOCKS + b: features `[b BLOCK, (b + 1) BLOCK)` of token t."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) // NUM_BLOCKS
    feature = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < WIDTH
    row = tl.load(token_ids + token).to(tl.int64)
    value = tl.load(table + row * WIDTH + feature, mask=mask & (row >= 0), other=0.0)
    tl.store(out + token.to(tl.int64) * WIDTH + feature, value, mask=mask)
