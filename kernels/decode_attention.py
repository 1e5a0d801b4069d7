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
from baton.kernels.decode_work import DecodeWork
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
        _merge_kernel[(num_heads, work.num_merges)](
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
    tile, padded to the 16 of an MMA."""
    if PDL:
        gdc_launch_dependents()
    job = tl.program_id(0)
    num_items = tl.load(lists)
    row, first, end, piece = _load_entry(lists + 4 + 4 * (job // NUM_KV_HEADS))
    row, piece = row.to(tl.int64), piece.to(tl.int64)
    if PDL:
        gdc_wait()
    if job < num_items * NUM_KV_HEADS:
        kv_head = job % NUM_KV_HEADS
        member = tl.arange(0, GROUP_PADDED)
        dim = tl.arange(0, DIM_PADDED)
        mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        head = kv_head * GROUP + member
        place = head[:, None] * HEAD_DIM + dim[None, :]
        q_GD = tl.load(q + row * q_stride + place, mask=mask, other=0.0)
        attended, row_max, row_sum = _attend(
            q_GD, layer_kv + kv_head.to(tl.int64) * head_stride, table + row * table_stride,
            first, end, slot_stride, scale_log2,
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
def _attend(
    q_GD, head_kv, table_row, first, end, slot_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The softmax state of the tokens `[first, end)`: blocks fold into segments, those into the
    row. Whether a block is whole, and thus how it is computed, is the row's affair, not the
    item's: items end inside a block only where the row does."""
    GROUP_PADDED: tl.constexpr = q_GD.shape[0]
    DIM_PADDED: tl.constexpr = q_GD.shape[1]
    row = nothing(GROUP_PADDED, DIM_PADDED)
    part = nothing(GROUP_PADDED, DIM_PADDED)
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
            row, part = _fold_block(row, part, block, start + BLOCK_N, SEGMENT)
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
        scores = tl.dot(q_GD, k_ND.T, input_precision="ieee")
        weights, block_max, block_sum = begin(scores, scale_log2)
        values = tl.dot(weights.to(v_ND.dtype), v_ND, input_precision="ieee")
        block = (values, block_max, block_sum)
        row, part = _fold_block(row, part, block, token + BLOCK_N, SEGMENT)
        slot = next_slot
    if full_end < end:
        block = _attend_block_in_part(
            q_GD, head_kv, table_row, full_end, full_end, end, slot_stride, scale_log2,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        row, part = _fold_block(row, part, block, full_end + BLOCK_N, SEGMENT)
    return fold(row, part)


@jit
def _load_slots_of_block(table_row, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slots of the tokens from `start`, a multiple of BLOCK_N, on; 0 from `end` on."""
    nth = tl.arange(0, BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:
        return load_slots(table_row + start // BLOCK_SIZE, nth, end - start, BLOCK_SIZE)
    return load_slots(table_row, start + nth, end, BLOCK_SIZE)


@jit
def _fold_block(row, part, block, end, SEGMENT: tl.constexpr):
    """Fold a block that ends at `end` into its segment, and that into the row where both end."""
    part = fold(part, block)
    if end % SEGMENT == 0:
        row = fold(row, part)
        part = nothing(part[0].shape[0], part[0].shape[1])
    return row, part


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


@triton.jit(do_not_specialize=["merges_at"])
def _merge_kernel(
    lists, out, lse_out, pieces, piece_max, piece_sum, merges_at,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, AHEAD: tl.constexpr, HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (h, i): query head h of merge i, folded piece after piece by one warp."""
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    entry = lists + 4 * (merges_at + tl.program_id(1))
    num_merges = tl.load(lists + 1)
    row, first, count, before = _load_entry(entry)
    if PDL:
        # Also where nothing is merged: whoever waits for this kernel waits for those before it.
        gdc_wait()
    if tl.program_id(1) < num_merges:
        end = first + count
        merged = nothing(1, DIM_PADDED)
        part = nothing(1, DIM_PADDED)
        states = _load_pieces(
            pieces, piece_max, piece_sum, first, end, head, NUM_HEADS, HEAD_DIM, DIM_PADDED, AHEAD
        )
        for start in range(first, end, AHEAD):
            following = _load_pieces(
                pieces, piece_max, piece_sum, start + AHEAD, end, head,
                NUM_HEADS, HEAD_DIM, DIM_PADDED, AHEAD,
            )  # fmt: skip
            if before < 0:
                for nth in tl.static_range(AHEAD):
                    merged = fold(merged, states[nth])
            else:
                done = before + start - first
                for nth in tl.static_range(AHEAD):
                    merged, part = _fold_block(
                        merged, part, states[nth], done + nth + 1, SEGMENT_BLOCKS
                    )
            states = following
        attended, row_max, row_sum = fold(merged, part)
        o, lse = finish(attended, row_max, row_sum)
        dim = tl.arange(0, DIM_PADDED)[None, :]
        place = row.to(tl.int64) * NUM_HEADS + head
        tl.store(out + place * HEAD_DIM + dim, o.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
        if HAS_LSE:
            tl.store(lse_out + place + tl.arange(0, 1), lse)


@jit
def _load_entry(entry):
    """The four numbers of an entry of the lists, which may be read before `gdc_wait()`: a copy from
    the host wrote them, and no kernel starts before that has ended."""
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@jit
def _load_pieces(
    pieces, piece_max, piece_sum, start, end, head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The states of the pieces `[start, start + AHEAD)`; of nothing from `end` on."""
    dim = tl.arange(0, DIM_PADDED)[None, :]
    no_values, no_max, no_sum = nothing(1, DIM_PADDED)
    piece = start + tl.arange(0, 1)
    place = piece.to(tl.int64) * NUM_HEADS + head
    states = ()
    for nth in tl.static_range(AHEAD):
        seen = piece + nth < end
        mask = seen[:, None] & (dim < HEAD_DIM)
        at = place + nth * NUM_HEADS
        values = tl.load(pieces + at[:, None] * HEAD_DIM + dim, mask=mask, other=no_values)
        row_max = tl.load(piece_max + at, mask=seen, other=no_max)
        row_sum = tl.load(piece_sum + at, mask=seen, other=no_sum)
        states += ((values, row_max, row_sum),)  # type: ignore[assignment]
    return states
