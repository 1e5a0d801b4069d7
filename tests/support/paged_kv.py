"""Contexts in a paged arena, and attention query by query in fp64 to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from support.kernel_checks import DEVICE

NUM_LAYERS = 3


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def num_blocks(context_lens: Sequence[int], block_size: int) -> int:
    return sum(-(-length // block_size) for length in context_lens)


def make_arena(shape: Shape, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere: what a kernel reads outside its context shows."""
    sizes = num_slots, shape.num_kv_heads, NUM_LAYERS, 2, shape.block_size, shape.head_dim
    return torch.full(sizes, torch.nan, dtype=dtype, device=DEVICE)


def write_contexts(
    shape: Shape, arena: torch.Tensor, context_lens: Sequence[int], layer: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random contexts `[2, C, K, D]` in shuffled slots, and the table int32 `[S, N]` on the CPU.

    Tokens of a block behind the context stay as they are; the table is padded with a slot that is
    not there.
    """
    slots = torch.randperm(len(arena))
    width = max(1, *(num_blocks([length], shape.block_size) for length in context_lens))
    table_SN = torch.full((len(context_lens), width), 2**30, dtype=torch.int32)
    contexts = []
    for row, length in enumerate(context_lens):
        count = num_blocks([length], shape.block_size)
        table, slots = slots[:count], slots[count:]
        table_SN[row, :count] = table
        context = torch.randn(2, length, shape.num_kv_heads, shape.head_dim).to(arena.dtype)
        position = torch.arange(length)
        slot, offset = table[position // shape.block_size], position % shape.block_size
        arena[slot.to(DEVICE), :, layer, :, offset.to(DEVICE)] = context.permute(1, 2, 0, 3).to(
            DEVICE
        )
        contexts.append(context)
    return contexts, table_SN


def plain_attention(
    q_QHD: torch.Tensor, context: torch.Tensor, scale: float, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query by query, head by head, in fp64 on the CPU: `[Q, H, D]` and the natural-log LSE
    `[Q, H]`. The queries are the last ones of the context; 0 and -inf where it is empty."""
    num_queries, num_heads, _ = q_QHD.shape
    context_len, num_kv_heads = context.shape[1:3]
    q_QHD, context = q_QHD.double().cpu(), context.double().cpu()
    attended = torch.zeros(q_QHD.shape, dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -torch.inf, dtype=torch.float64)
    if context_len == 0:
        return attended, lse
    for query in range(num_queries):
        end = context_len - num_queries + query + 1
        first = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            k, v = context[:, first:end, head * num_kv_heads // num_heads]
            scores = k @ q_QHD[query, head] * scale
            lse[query, head] = scores.logsumexp(0)
            attended[query, head] = scores.softmax(0) @ v
    return attended, lse
