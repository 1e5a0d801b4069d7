"""Prefill: many queries per row, causal grouped-query attention (arXiv:2305.13245) over a paged
arena (arXiv:2309.06180).

    o[t] = sum_c softmax_c(scale q[t] . k[c]) v[c]      c in (p - window, p], p the position of t

The queries of a row are the last ones of its context: query i of Q sits at position C - Q + i.
`prefill_attention` is the torch reference, of one row. `prefill_attention_triton` takes all rows of
a step, tile by tile (arXiv:2307.08691). What does not depend on the layer is planned once per step.

Legend: S rows, T tokens, Q queries of a row, C its context, H query heads, K KV heads, D head_dim,
N blocks. The arena is `[slots, K, layers, 2, block_size, D]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baton.kernels.attention_arguments import check_attention_arguments
from baton.kernels.jit import (
    can_overlap_launches,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
    triton,
)
from baton.kernels.paged_gather import (
    gather,
    gather_rows,
    layer_view,
    load_slots,
    load_tokens,
    token_offsets,
)
from baton.kernels.prefill_work import PrefillWork
from baton.kernels.softmax_state import LOG2_E, finish, update


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Many queries of one row. Blocks that the window hides from all of them are left out."""

    # As in `DecodePlan`: `[2 * K * N]`.
    rows: torch.Tensor
    # Tokens in those blocks up to the end of the context.
    num_keys: int
    # `[Q, num_keys]` of 0 and -inf; None when it is the plain causal triangle.
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """How the kernel runs; results are the same but for rounding."""

    # Keys per iteration.
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3


DEFAULT_TUNING = PrefillTuning()


def plan_prefill(
    slots_N: torch.Tensor,
    query_len: int,
    context_len: int,
    arena: torch.Tensor,
    window: int | None = None,
) -> PrefillPlan:
    """`slots_N` (int64) covers the context."""
    block_size = arena.shape[4]
    first_query = context_len - query_len
    first_seen = 0 if window is None else max(first_query - window + 1, 0)
    first_block = first_seen // block_size
    num_blocks = -(-context_len // block_size)
    rows = gather_rows(slots_N[None, first_block:num_blocks], arena)
    first_key = first_block * block_size
    if query_len == context_len and (window is None or window >= context_len):
        return PrefillPlan(rows, context_len, None)
    position_Q = torch.arange(first_query, context_len, device=arena.device)
    position_C = torch.arange(first_key, context_len, device=arena.device)
    distance_QC = position_Q[:, None] - position_C
    hidden_QC = distance_QC < 0
    if window is not None:
        hidden_QC |= distance_QC >= window
    bias = torch.zeros(hidden_QC.shape, dtype=arena.dtype, device=arena.device)
    bias.masked_fill_(hidden_QC, -torch.inf)
    return PrefillPlan(rows, context_len - first_key, bias)


def prefill_attention(
    q_QHD: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    plan: PrefillPlan,
    *,
    scale: float,
    lse_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[Q, H, D]` in q's dtype. `lse_out` fp32 `[Q, H]` gets the natural-log sum of the
    exponentials, at the cost of computing the scores once more."""
    num_kv_heads, head_dim = arena.shape[1], arena.shape[5]
    kv = gather(arena, layer, plan.rows).view(2, 1, num_kv_heads, -1, head_dim)
    k_KCD, v_KCD = kv[:, :, :, : plan.num_keys]
    q_HQD = q_QHD.transpose(0, 1)[None]
    attended = F.scaled_dot_product_attention(
        q_HQD,
        k_KCD,
        v_KCD,
        attn_mask=plan.bias,
        is_causal=plan.bias is None,
        scale=scale,
        enable_gqa=True,
    )
    if lse_out is not None:
        lse_out.copy_(_prefill_lse(q_QHD, k_KCD[0], plan.bias, scale))
    return attended[0].transpose(0, 1)


def _prefill_lse(
    q_QHD: torch.Tensor, k_KCD: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """fp32 `[Q, H]`."""
    num_queries, num_heads, _ = q_QHD.shape
    k_HCD = k_KCD.float().repeat_interleave(num_heads // k_KCD.shape[0], dim=0)
    scores_HQC = torch.bmm(q_QHD.transpose(0, 1).float(), k_HCD.transpose(1, 2)) * scale
    if bias is None:
        bias = scores_HQC.new_full((num_queries, num_queries), -torch.inf).triu(1)
    return (scores_HQC + bias.float()).logsumexp(-1).T


def prefill_attention_triton(
    q_THD: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    block_table_SN: torch.Tensor,
    work: PrefillWork,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    tuning: PrefillTuning = DEFAULT_TUNING,
) -> torch.Tensor:
    """`[T, H, D]` of all rows of `work` after each other, over int32 `block_table_SN`; entries past
    a context are never read. `lse_out` fp32 `[T, H]` gets the natural-log sum of the exponentials.

    Heads of `q_THD` follow each other, its tokens may be a slice of wider ones; `scale` is
    positive.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads, block_size = arena.shape[1], arena.shape[4]
    out = q_THD.new_empty(q_THD.shape) if out is None else out
    check_attention_arguments(q_THD, arena, block_table_SN, scale, out, lse_out)
    if len(work.tiles) == 0:
        return out
    pdl = can_overlap_launches(q_THD)
    _prefill_kernel[(len(work.tiles) * num_heads,)](
        q_THD, layer_view(arena, layer), block_table_SN, work.tiles, out, lse_out,
        q_THD.stride(0), block_table_SN.stride(0), arena.stride(0), arena.stride(1),
        scale * LOG2_E, work.window or 0,
        NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim,
        DIM_PADDED=max(16, next_power_of_2(head_dim)), BLOCK_SIZE=block_size,
        BLOCK_M=work.block_m, BLOCK_N=tuning.block_n,
        WINDOWED=work.window is not None, HAS_LSE=lse_out is not None,
        PDL=pdl, num_warps=tuning.num_warps, num_stages=tuning.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill_kernel(
    q, layer_kv, table, tiles, out, lse_out,
    q_stride, table_stride, slot_stride, head_stride, scale_log2, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program i: tile i // H for query head i % H; the heads of a KV head run side by side."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0) % NUM_HEADS
    tile = tiles + 6 * (tl.program_id(0) // NUM_HEADS)
    row = tl.load(tile).to(tl.int64)
    first_token = tl.load(tile + 1).to(tl.int64)
    num_queries = tl.load(tile + 2)
    first_position = tl.load(tile + 3)
    end = tl.load(tile + 4)
    nth = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PADDED)
    token = first_token + nth
    mask = (nth < num_queries)[:, None] & (dim < HEAD_DIM)[None, :]
    q_MD = tl.load(
        q + token[:, None] * q_stride + head * HEAD_DIM + dim[None, :], mask=mask, other=0.0
    )
    position_M = first_position + nth
    kv_head = head // GROUP
    head_kv = layer_kv + kv_head.to(tl.int64) * head_stride
    table_row = table + row * table_stride

    # Keys that some queries do not see yet because of the window; that all see; the diagonal.
    start = tl.load(tile + 5)
    state = (
        tl.zeros([BLOCK_M, DIM_PADDED], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    if WINDOWED:
        seen_by_all = start + tl.cdiv(tl.maximum(end - window - start, 0), BLOCK_N) * BLOCK_N
        state = _attend_masked(
            q_MD, state, head_kv, table_row, start, seen_by_all, end, position_M, window,
            slot_stride, scale_log2, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, WINDOWED,
        )  # fmt: skip
        start = seen_by_all
    diagonal = start + tl.maximum(first_position + 1 - start, 0) // BLOCK_N * BLOCK_N
    state = _attend_all(
        q_MD, state, head_kv, table_row, start, diagonal, end,
        slot_stride, scale_log2, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip
    attended, row_max, row_sum = _attend_masked(
        q_MD, state, head_kv, table_row, diagonal, end, end, position_M, window,
        slot_stride, scale_log2, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, WINDOWED,
    )  # fmt: skip
    o_MD, lse = finish(attended, row_max, row_sum)
    place = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out + place, o_MD.to(out.dtype.element_ty), mask=mask)
    if HAS_LSE:
        tl.store(lse_out + token * NUM_HEADS + head, lse, mask=nth < num_queries)


@jit
def _attend_all(
    q_MD, state, head_kv, table_row, start, stop, end, slot_stride, scale_log2,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys `[start, stop)`, whole tiles that every query sees, into the softmax state."""
    attended, row_max, row_sum = state
    nth = tl.arange(0, BLOCK_N)
    v_offset: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    # Slots are loaded an iteration ahead: the pipeline would halve the tiles in flight if the place
    # of a load came from a load of the same iteration.
    slot = load_slots(table_row, start + nth, end, BLOCK_SIZE)
    for key in range(start, stop, BLOCK_N):
        next_slot = load_slots(table_row, key + BLOCK_N + nth, end, BLOCK_SIZE)
        offset = token_offsets(slot, key + nth, slot_stride, BLOCK_SIZE, HEAD_DIM)
        k_ND = load_tokens(head_kv, offset, True, False, HEAD_DIM, DIM_PADDED)
        v_ND = load_tokens(head_kv + v_offset, offset, True, False, HEAD_DIM, DIM_PADDED)
        scores = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        weights, shrink, row_max, row_sum = update(scores, scale_log2, row_max, row_sum)
        attended = tl.dot(
            weights.to(v_ND.dtype), v_ND, attended * shrink[:, None], input_precision="ieee"
        )
        slot = next_slot
    return attended, row_max, row_sum


@jit
def _attend_masked(
    q_MD, state, head_kv, table_row, start, stop, end, position_M, window, slot_stride, scale_log2,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Fold tiles over `[start, stop)` whose keys some queries do not see, none from `end` on."""
    attended, row_max, row_sum = state
    nth = tl.arange(0, BLOCK_N)
    v_offset: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    for key in tl.range(start, stop, BLOCK_N, num_stages=1):
        key_N = key + nth
        slot = load_slots(table_row, key_N, end, BLOCK_SIZE)
        offset = token_offsets(slot, key_N, slot_stride, BLOCK_SIZE, HEAD_DIM)
        k_ND = load_tokens(head_kv, offset, key_N < end, True, HEAD_DIM, DIM_PADDED)
        v_ND = load_tokens(head_kv + v_offset, offset, key_N < end, True, HEAD_DIM, DIM_PADDED)
        scores = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        seen = key_N[None, :] <= position_M[:, None]
        if WINDOWED:
            seen = seen & (key_N[None, :] > position_M[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, row_max, row_sum = update(scores, scale_log2, row_max, row_sum)
        attended = tl.dot(
            weights.to(v_ND.dtype), v_ND, attended * shrink[:, None], input_precision="ieee"
        )
    return attended, row_max, row_sum
