"""Paged attention against a plain softmax over the contiguous context, and the KV write."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from baton.kernels.attention import (
    decode_attention,
    plan_decode,
    plan_prefill,
    prefill_attention,
)
from baton.kernels.kv_write import clear_slots, kv_write_rows, write_kv

NUM_LAYERS = 3
NUM_SLOTS = 64
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


SHAPES = [Shape(8, 4, 32, 32), Shape(6, 1, 20, 5), Shape(3, 3, 16, 8)]


def make_arena(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(
        NUM_SLOTS + 1, shape.num_kv_heads, NUM_LAYERS, 2, shape.block_size, shape.head_dim,
        dtype=dtype,
    )  # fmt: skip


def make_rows(
    shape: Shape, arena: torch.Tensor, context_lens: Sequence[int], layer: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random contexts `[2, C, K, D]` written into shuffled slots; the tables."""
    slots = torch.randperm(NUM_SLOTS)
    contexts, tables = [], []
    for length in context_lens:
        num_blocks = -(-length // shape.block_size)
        table, slots = slots[:num_blocks], slots[num_blocks:]
        context = torch.randn(2, length, shape.num_kv_heads, shape.head_dim).to(arena.dtype)
        positions = torch.arange(length)
        places = table[positions // shape.block_size], positions % shape.block_size
        kv = context.transpose(0, 1).reshape(length, -1, shape.head_dim)
        clear_slots(arena, table.tolist())
        write_kv(kv, arena, layer, kv_write_rows(*places, arena))
        contexts.append(context)
        tables.append(table)
    return contexts, tables


def plain_attention(
    q_QHD: torch.Tensor, context: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query by query, head by head, in fp64: `[Q, H, D]` and the natural-log LSE `[Q, H]`."""
    num_queries, num_heads, _ = q_QHD.shape
    context_len, num_kv_heads = context.shape[1:3]
    attended = torch.zeros(q_QHD.shape, dtype=torch.float64)
    lse = torch.zeros(num_queries, num_heads, dtype=torch.float64)
    for query in range(num_queries):
        end = context_len - num_queries + query + 1
        first = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            k, v = context[:, first:end, head * num_kv_heads // num_heads].double()
            scores = k @ q_QHD[query, head].double() * scale
            lse[query, head] = scores.logsumexp(0)
            attended[query, head] = scores.softmax(0) @ v
    return attended, lse


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_plain_attention(
    shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    arena = make_arena(shape, dtype)
    context_lens = [1, 17, 64, 33, 5]
    contexts, tables = make_rows(shape, arena, context_lens, layer=1)
    width = max(len(table) for table in tables)
    table_SN = torch.full((len(tables), width), NUM_SLOTS)
    for row, table in enumerate(tables):
        table_SN[row, : len(table)] = table
    q_SHD = torch.randn(len(tables), shape.num_heads, shape.head_dim).to(dtype)
    plan = plan_decode(table_SN, torch.tensor(context_lens), arena, window)
    lse = torch.empty(len(tables), shape.num_heads)
    scale = 1 / math.sqrt(shape.head_dim)
    result = decode_attention(q_SHD, arena, 1, plan, scale=scale, lse_out=lse)
    assert result.dtype == dtype
    for row, context in enumerate(contexts):
        expected, expected_lse = plain_attention(q_SHD[row : row + 1], context, scale, window)
        assert (result[row] - expected[0]).abs().max() < TOLERANCE[dtype]
        assert (lse[row] - expected_lse[0]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("query_len", "context_len"), [(17, 17), (12, 45), (2, 33), (40, 40)])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_equals_plain_attention(
    shape: Shape, query_len: int, context_len: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    arena = make_arena(shape, dtype)
    [context], [table] = make_rows(shape, arena, [context_len], layer=2)
    q_QHD = torch.randn(query_len, shape.num_heads, shape.head_dim).to(dtype)
    plan = plan_prefill(table, query_len, context_len, arena, window)
    lse = torch.empty(query_len, shape.num_heads)
    scale = 1 / math.sqrt(shape.head_dim)
    result = prefill_attention(q_QHD, arena, 2, plan, scale=scale, lse_out=lse)
    expected, expected_lse = plain_attention(q_QHD, context, scale, window)
    assert result.dtype == dtype
    assert (result - expected).abs().max() < TOLERANCE[dtype]
    assert (lse - expected_lse).abs().max() < 1e-5


def test_a_window_leaves_out_the_blocks_that_no_query_sees() -> None:
    arena = make_arena(SHAPES[2], torch.float32)
    plan = plan_prefill(torch.arange(8), 4, 64, arena, window=10)
    # Queries at 60..63 see from 51 on: blocks 6 and 7 of 8 tokens.
    assert plan.num_keys == 64 - 6 * 8
    assert len(plan.rows) == 2 * SHAPES[2].num_kv_heads * 2


def test_kv_lands_at_slot_offset_and_layer_and_nowhere_else() -> None:
    shape = SHAPES[1]
    arena = make_arena(shape, torch.float32)
    slots, offsets = torch.tensor([5, 2, 5]), torch.tensor([0, 4, 3])
    kv = torch.randn(3, 2 * shape.num_kv_heads, shape.head_dim)
    write_kv(kv, arena, 1, kv_write_rows(slots, offsets, arena))
    expected = make_arena(shape, torch.float32)
    for token in range(3):
        k, v = kv[token].view(2, shape.num_kv_heads, shape.head_dim)
        expected[slots[token], :, 1, 0, offsets[token]] = k
        expected[slots[token], :, 1, 1, offsets[token]] = v
    assert torch.equal(arena, expected)


def test_what_lies_behind_the_context_cannot_poison_a_row() -> None:
    shape = SHAPES[0]
    arena = make_arena(shape, torch.float32)
    arena.fill_(torch.nan)
    arena[NUM_SLOTS].zero_()
    [context, _], tables = make_rows(shape, arena, [3, 40], layer=0)
    table_SN = torch.tensor([[tables[0][0], NUM_SLOTS], tables[1].tolist()])
    q_SHD = torch.randn(2, shape.num_heads, shape.head_dim)
    plan = plan_decode(table_SN, torch.tensor([3, 40]), arena)
    result = decode_attention(q_SHD, arena, 0, plan, scale=0.2)
    expected, _ = plain_attention(q_SHD[:1], context, 0.2, None)
    assert (result[0] - expected[0]).abs().max() < 2e-6
