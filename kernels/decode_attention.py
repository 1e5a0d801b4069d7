"""Decode: one query per row, causal grouped-query attention (arXiv:2305.13245) over a paged arena
(arXiv:2309.06180).

    o[s] = sum_c softmax_c(scale q[s] . k[c]) v[c]      c in [C - window, C), the query is the last

`decode_attention` is the torch reference. `decode_attention_triton` gives programs whole rows or
parts of them (arXiv:2311.01282) and merges the pieces; decode_work.py lists them. How a row is
spread does not change its bits.

Legend: S rows, C context, H query heads, K KV heads, G = H / K query heads per KV head, D head_dim,
N blocks. The arena is `[slots, K, layers, 2, block_size, D]`.
"""

from dataclasses import dataclass

import torch

from baton.kernels.attention_arguments import check_attention_arguments
from baton.kernels.decode_merge import fold_block, load_entry, merge_kernel
from baton.kernels.decode_work import SETTLED, DecodeWork
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
from baton.kernels.softmax_state import LOG2_E, begin, finish, fold, nothing

# A merge has the loads of so many pieces under way while it folds as many before them.
MERGE_AHEAD = 16
_SETTLED = tl.constexpr(SETTLED)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One query per row, all rows in one batch, padded to the longest block table."""

    # Rows of the arena seen as `[-1, block_size * D]` for layer 0: `[2 * S * K * N]`.
    rows: torch.Tensor
    # 0 where a query sees a token, else -inf: fp32 `[S * K, 1, N * block_size]`.
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the kernel runs; results are the same but for rounding, which a row's bits show."""

    num_warps: int = 4
    # One more than the tiles of K and V in shared memory: with 2, loads wait for the dots before.
    num_stages: int = 4
    # A limit that lets another program on a multiprocessor; None is the compiler's choice.
    max_registers: int | None = None


DEFAULT_TUNING = DecodeTuning()


def plan_decode(
    block_table_SN: torch.Tensor,
    context_lens_S: torch.Tensor,
    arena: torch.Tensor,
    window: int | None = None,
) -> DecodePlan:
    """Tables are int64, padded with any slot whose bytes are finite numbers."""
    num_rows, num_blocks = block_table_SN.shape
    num_kv_heads, block_size = arena.shape[1], arena.shape[4]
    position_C = torch.arange(num_blocks * block_size, device=arena.device)
    hidden_SC = position_C >= context_lens_S[:, None]
    if window is not None:
        hidden_SC |= position_C < context_lens_S[:, None] - window
    bias_SC = torch.zeros(hidden_SC.shape, device=arena.device).masked_fill_(hidden_SC, -torch.inf)
    bias = bias_SC[:, None].expand(-1, num_kv_heads, -1).reshape(num_rows * num_kv_heads, 1, -1)
    return DecodePlan(gather_rows(block_table_SN, arena), bias)


def decode_attention(
    q_SHD: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    plan: DecodePlan,
    *,
    scale: float,
    lse_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[S, H, D]` in q's dtype, computed in fp32. `lse_out` fp32 `[S, H]` gets the natural-log
    sum of the exponentials."""
    num_rows, num_heads, head_dim = q_SHD.shape
    batch = plan.bias.shape[0]
    kv = gather(arena, layer, plan.rows).view(2, batch, -1, head_dim)
    if kv.dtype != torch.float32:
        kv = kv.float()
    q = q_SHD.reshape(batch, -1, head_dim).to(kv.dtype)
    scores = torch.baddbmm(plan.bias, q, kv[0].transpose(1, 2), alpha=scale)
    if lse_out is not None:
        lse_out.copy_(scores.logsumexp(-1).view(num_rows, num_heads))
    attended = torch.bmm(scores.softmax(-1), kv[1])
    return attended.view(num_rows, num_heads, head_dim).to(q_SHD.dtype)


def decode_attention_triton(
    q_SHD: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    block_table_SN: torch.Tensor,
    work: DecodeWork,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
    tuning: DecodeTuning = DEFAULT_TUNING,
) -> torch.Tensor:
    """`decode_attention` over int32 `block_table_SN`; entries past a context are never read.

    Heads of `q_SHD` follow each other, its rows may be a slice of wider ones. An empty row is 0,
    its lse -inf (the reference has NaN); rows that the plan does not know, such as a graph's
    padding, are not written. `scale` is positive.
    """
    num_rows, num_heads, head_dim = q_SHD.shape
    num_kv_heads, block_size = arena.shape[1], arena.shape[4]
    out = q_SHD.new_empty(q_SHD.shape) if out is None else out
    check_attention_arguments(q_SHD, arena, block_table_SN, scale, out, lse_out)
    assert work.pieces.shape[1:] == (num_heads, head_dim), "planned for these heads"
    if num_rows == 0 or work.num_items == 0:
        return out
    group = num_heads // num_kv_heads
    pdl = can_overlap_launches(q_SHD)
    shared = {
        "HEAD_DIM": head_dim, "DIM_PADDED": max(16, next_power_of_2(head_dim)),
        "HAS_LSE": lse_out is not None, "PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": False,
    }  # fmt: skip
    _decode_kernel[(work.num_items * num_kv_heads,)](
        q_SHD, layer_view(arena, layer), block_table_SN, work.lists, out, lse_out,
        work.pieces, work.piece_max, work.piece_sum,
        q_SHD.stride(0), block_table_SN.stride(0), arena.stride(0), arena.stride(1),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, GROUP_PADDED=max(16, next_power_of_2(group)),
        BLOCK_SIZE=block_size, BLOCK_N=work.block, SEGMENT=work.segment,
        WINDOWED=work.window is not None,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages, maxnreg=tuning.max_registers,
        **shared,
    )  # fmt: skip
    if work.num_merges:
        merge_kernel[(num_heads, work.num_merges)](
            work.lists, out, lse_out, work.pieces, work.piece_max, work.piece_sum,
            1 + work.num_items,
            NUM_HEADS=num_heads, SEGMENT_BLOCKS=work.segment // work.block, AHEAD=MERGE_AHEAD,
            num_warps=1, **shared,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q, layer_kv, table, lists, out, lse_out, pieces, piece_max, piece_sum,
    q_stride, table_stride, slot_stride, head_stride, scale_log2,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, SEGMENT: tl.constexpr, WINDOWED: tl.constexpr,
    HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program j: item j // K for KV head j % K. The G query heads of a KV head are the rows of the
    tile, padded to the 16 of an MMA.

    All KV but that of a row's newest token was complete before the step began. The first block of
    an item is therefore on its way before the kernels ahead have ended.
    """
    if PDL:
        gdc_launch_dependents()
    job = tl.program_id(0)
    num_items = tl.load(lists)
    row, first, end, piece = load_entry(lists + 4 + 4 * (job // NUM_KV_HEADS))
    is_used = job < num_items * NUM_KV_HEADS
    is_settled = row >= _SETTLED
    row = tl.where(is_settled, row - _SETTLED, row).to(tl.int64)
    piece = piece.to(tl.int64)
    kv_head = job % NUM_KV_HEADS
    head_kv = layer_kv + kv_head.to(tl.int64) * head_stride
    table_row = table + row * table_stride
    has_lead = is_used & (is_settled | (end - first > BLOCK_N)) & (end - first >= BLOCK_N)
    if WINDOWED:
        has_lead &= first % BLOCK_N == 0
    lead_end = tl.where(has_lead, first + BLOCK_N, first)
    k_ND, v_ND = _load_lead(
        head_kv, table_row, first, lead_end, slot_stride, HEAD_DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N
    )
    if PDL:
        gdc_wait()
    if is_used:
        member = tl.arange(0, GROUP_PADDED)
        dim = tl.arange(0, DIM_PADDED)
        mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        head = kv_head * GROUP + member
        place = head[:, None] * HEAD_DIM + dim[None, :]
        q_GD = tl.load(q + row * q_stride + place, mask=mask, other=0.0)
        merged = nothing(GROUP_PADDED, DIM_PADDED)
        part = nothing(GROUP_PADDED, DIM_PADDED)
        if has_lead:
            block = _attend_block(q_GD, k_ND, v_ND, scale_log2)
            merged, part = fold_block(merged, part, block, lead_end, SEGMENT)
        attended, row_max, row_sum = _attend(
            q_GD, (merged, part), head_kv, table_row, lead_end, end, slot_stride, scale_log2,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, SEGMENT, WINDOWED,
        )  # fmt: skip
        width: tl.constexpr = NUM_KV_HEADS * GROUP
        if piece < 0:
            o_GD, lse = finish(attended, row_max, row_sum)
            result = o_GD.to(out.dtype.element_ty)
            tl.store(out + row * (width * HEAD_DIM) + place, result, mask=mask)
            if HAS_LSE:
                tl.store(lse_out + row * width + head, lse, mask=member < GROUP)
        else:
            tl.store(pieces + piece * (width * HEAD_DIM) + place, attended, mask=mask)
            tl.store(piece_max + piece * width + head, row_max, mask=member < GROUP)
            tl.store(piece_sum + piece * width + head, row_sum, mask=member < GROUP)


@jit
def _load_lead(
    head_kv, table_row, first, end, slot_stride,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """K and V of the whole block `[first, end)`; nothing is read where that is empty."""
    nth = tl.arange(0, BLOCK_N)
    seen = first + nth < end
    slot = tl.load(table_row + (first + nth) // BLOCK_SIZE, mask=seen, other=0)
    offset = token_offsets(slot, first + nth, slot_stride, BLOCK_SIZE, HEAD_DIM)
    v_offset: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    k_ND = load_tokens(head_kv, offset, seen, True, HEAD_DIM, DIM_PADDED)
    v_ND = load_tokens(head_kv + v_offset, offset, seen, True, HEAD_DIM, DIM_PADDED)
    return k_ND, v_ND


@jit
def _attend_block(q_GD, k_ND, v_ND, scale_log2):
    """The state of a whole block."""
    scores = tl.dot(q_GD, k_ND.T, input_precision="ieee")
    weights, block_max, block_sum = begin(scores, scale_log2)
    values = tl.dot(weights.to(v_ND.dtype), v_ND, input_precision="ieee")
    return values, block_max, block_sum


@jit
def _attend(
    q_GD, state, head_kv, table_row, first, end, slot_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The softmax state of the tokens `[first, end)` behind `state`: blocks fold into segments,
    those into the row. Whether a block is whole, and thus how it is computed, is the row's affair,
    not the item's: items end inside a block only where the row does."""
    DIM_PADDED: tl.constexpr = q_GD.shape[1]
    row, part = state
    nth = tl.arange(0, BLOCK_N)
    v_offset: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    start = first
    if WINDOWED:
        start = first // BLOCK_N * BLOCK_N
        if start < first:
            block = _attend_block_in_part(
                q_GD, head_kv, table_row, start, first, end, slot_stride, scale_log2,
                HEAD_DIM, BLOCK_SIZE, BLOCK_N,
            )  # fmt: skip
            row, part = fold_block(row, part, block, start + BLOCK_N, SEGMENT)
            start += BLOCK_N
    full_end = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    # Slots are loaded an iteration ahead: the pipeline would halve the tiles in flight if the place
    # of a load came from a load of the same iteration.
    slot = _load_slots_of_block(table_row, start, end, BLOCK_SIZE, BLOCK_N)
    for token in range(start, full_end, BLOCK_N):
        next_slot = _load_slots_of_block(table_row, token + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        # Blocks begin where slots do if their sizes divide: the place in a slot is a constant.
        place = nth if BLOCK_N % BLOCK_SIZE == 0 else token + nth
        offset = token_offsets(slot, place, slot_stride, BLOCK_SIZE, HEAD_DIM)
        k_ND = load_tokens(head_kv, offset, True, False, HEAD_DIM, DIM_PADDED)
        v_ND = load_tokens(head_kv + v_offset, offset, True, False, HEAD_DIM, DIM_PADDED)
        block = _attend_block(q_GD, k_ND, v_ND, scale_log2)
        row, part = fold_block(row, part, block, token + BLOCK_N, SEGMENT)
        slot = next_slot
    if full_end < end:
        block = _attend_block_in_part(
            q_GD, head_kv, table_row, full_end, full_end, end, slot_stride, scale_log2,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        row, part = fold_block(row, part, block, full_end + BLOCK_N, SEGMENT)
    return fold(row, part)


@jit
def _load_slots_of_block(table_row, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slots of the tokens from `start`, a multiple of BLOCK_N, on; 0 from `end` on."""
    nth = tl.arange(0, BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:
        return load_slots(table_row + start // BLOCK_SIZE, nth, end - start, BLOCK_SIZE)
    return load_slots(table_row, start + nth, end, BLOCK_SIZE)


@jit
def _attend_block_in_part(
    q_GD, head_kv, table_row, start, first, end, slot_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state of the block at `start`, of its tokens `[first, end)`."""
    token = start + tl.arange(0, BLOCK_N)
    seen = (token >= first) & (token < end)
    slot = tl.load(table_row + token // BLOCK_SIZE, mask=seen, other=0)
    offset = token_offsets(slot, token, slot_stride, BLOCK_SIZE, HEAD_DIM)
    v_offset: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    k_ND = load_tokens(head_kv, offset, seen, True, HEAD_DIM, q_GD.shape[1])
    v_ND = load_tokens(head_kv + v_offset, offset, seen, True, HEAD_DIM, q_GD.shape[1])
    scores = tl.dot(q_GD, k_ND.T, input_precision="ieee")
    scores = tl.where(seen[None, :], scores, float("-inf"))
    weights, block_max, block_sum = begin(scores, scale_log2)
    values = tl.dot(weights.to(v_ND.dtype), v_ND, input_precision="ieee")
    return values, block_max, block_sum
