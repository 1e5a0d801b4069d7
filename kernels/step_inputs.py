"""What a step is told: its tokens, some of which only the device knows, and where all of it lies.

    tokens[t] = source[t] if source[t] >= 0 else sampled[-1 - source[t]]

A step is launched before the one ahead of it has ended, so its host side knows where a token will
be, not what it is. A captured step reads from fixed places; `stage_decode` puts there what came in
one copy from the host.

These kernels begin a step, and are launched in full order: what follows may take for granted, even
before its own wait, that the step before has ended.
"""

from dataclasses import dataclass

import torch

from baton.kernels.jit import cdiv, jit, tl, triton

BLOCK = 256
# Sources, positions, slots and offsets.
PER_TOKEN = 4


def resolve_tokens(
    source: torch.Tensor, sampled: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """int32 `[T]` of sources int32 `[T]` and what the step before `sampled`, int32 `[S]`."""
    place = (-1 - source).clamp_min(0).long()
    known = source >= 0
    promised = sampled[torch.where(known, 0, place)] if len(sampled) else source
    tokens = torch.where(known, source, promised)
    return tokens if out is None else out.copy_(tokens)


def resolve_tokens_triton(
    source: torch.Tensor, sampled: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`resolve_tokens`; `out` may be `source` itself. The kernel does not look whether a place
    lies in `sampled`."""
    out = torch.empty_like(source) if out is None else out
    assert source.dtype == sampled.dtype == out.dtype == torch.int32, "tokens are int32"
    assert source.is_contiguous(), "tokens follow each other"
    assert sampled.is_contiguous(), "tokens follow each other"
    assert out.is_contiguous(), "tokens follow each other"
    assert out.shape == source.shape, "a token for each source"
    num_tokens = len(source)
    if not num_tokens:
        return out
    _resolve_kernel[(cdiv(num_tokens, BLOCK),)](
        source, sampled, out, num_tokens, BLOCK=BLOCK, num_warps=2
    )
    return out


@jit
def _resolve_kernel(source, sampled, out, num_tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    value = tl.load(source + token, mask=mask, other=0)
    promised = tl.load(sampled - 1 - value, mask=mask & (value < 0), other=0)
    tl.store(out + token, tl.where(value < 0, promised, value), mask=mask)


@dataclass(frozen=True, slots=True)
class StagedStep:
    """Where a captured decode step reads; int32."""

    # `[PER_TOKEN, R]`, of which a step has the first columns: tokens, positions, slots, offsets.
    per_token: torch.Tensor
    # `[R, N]`
    table: torch.Tensor
    # `[L]`: the lists of work of its attention.
    lists: torch.Tensor


def stage_decode(
    per_token: torch.Tensor,
    table: torch.Tensor,
    lists: torch.Tensor,
    sampled: torch.Tensor,
    into: StagedStep,
) -> None:
    """Write `per_token` `[PER_TOKEN, S]` with its sources resolved, `table` `[D, W]` of the first D
    rows, and `lists` `[L]`, into the corners of `into`."""
    num_rows, (num_tables, width) = per_token.shape[1], table.shape
    into.per_token[:, :num_rows] = per_token
    resolve_tokens(per_token[0], sampled, out=into.per_token[0, :num_rows])
    into.table[:num_tables, :width] = table
    into.lists.copy_(lists)


def stage_decode_triton(
    per_token: torch.Tensor,
    table: torch.Tensor,
    lists: torch.Tensor,
    sampled: torch.Tensor,
    into: StagedStep,
) -> None:
    """`stage_decode` in one launch."""
    num_rows, (num_tables, width) = per_token.shape[1], table.shape
    for tensor in (per_token, table, lists, sampled, into.table, into.lists):
        assert tensor.is_contiguous(), "numbers follow each other"
        assert tensor.dtype == torch.int32, "numbers are int32"
    assert per_token.shape[0] == into.per_token.shape[0] == PER_TOKEN, "four numbers for a token"
    assert num_tables <= num_rows <= into.per_token.shape[1], "rows fit"
    assert width <= into.table.shape[1], "tables fit"
    assert lists.shape == into.lists.shape, "a graph has lists of one length"
    _stage_kernel[(num_rows + cdiv(len(lists), BLOCK),)](
        per_token, table, lists, sampled, into.per_token, into.table, into.lists,
        num_rows, num_tables, width, into.per_token.stride(0), into.table.stride(0), len(lists),
        BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_rows", "num_tables", "width", "to_stride", "table_stride", "num_list"]
)
def _stage_kernel(
    per_token, table, lists, sampled, to_token, to_table, to_lists,
    num_rows, num_tables, width, to_stride, table_stride, num_list,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of the rows first, then those of the lists."""
    row = tl.program_id(0)
    nth = tl.arange(0, BLOCK)
    if row < num_rows:
        source = tl.load(per_token + row)
        promised = tl.load(sampled - 1 - source, mask=source < 0, other=0)
        tl.store(to_token + row, tl.where(source < 0, promised, source))
        for kind in tl.static_range(1, 4):
            tl.store(to_token + kind * to_stride + row, tl.load(per_token + kind * num_rows + row))
        if row < num_tables:
            for first in range(0, width, BLOCK):
                mask = first + nth < width
                slots = tl.load(table + row * width + first + nth, mask=mask, other=0)
                tl.store(to_table + row * table_stride + first + nth, slots, mask=mask)
    else:
        entry = (row - num_rows) * BLOCK + nth
        mask = entry < num_list
        tl.store(to_lists + entry, tl.load(lists + entry, mask=mask, other=0), mask=mask)
