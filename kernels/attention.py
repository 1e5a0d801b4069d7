"""Causal grouped-query attention (arXiv:2305.13245) over a paged arena (arXiv:2309.06180).

    o[t] = sum_c softmax_c(scale q[t] . k[c]) v[c]      c in (p - window, p], p the position of t

The queries of a row are the last ones of its context: query i of Q sits at position C - Q + i.
What does not depend on the layer (which arena rows to gather, what is masked) is planned once per
step, then every layer runs on the plan. Offsets are int64: arenas pass 2^31 elements.

Legend: S rows, T tokens, Q queries of a row, C its context, H query heads, K KV heads, G = H / K
query heads per KV head, D head_dim, N blocks. The arena is `[slots, K, layers, 2, block_size, D]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One query per row, all rows in one batch, padded to the longest block table."""

    # Rows of the arena seen as `[-1, block_size * D]` for layer 0: `[2 * S * K * N]`.
    rows: torch.Tensor
    # 0 where a query sees a token, else -inf: fp32 `[S * K, 1, N * block_size]`.
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Many queries of one row. Blocks that the window hides from all of them are left out."""

    # As in `DecodePlan`: `[2 * K * N]`.
    rows: torch.Tensor
    # Tokens in those blocks up to the end of the context.
    num_keys: int
    # `[Q, num_keys]` of 0 and -inf; None when it is the plain causal triangle.
    bias: torch.Tensor | None


def plan_decode(
    block_table_SN: torch.Tensor,
    context_lens_S: torch.Tensor,
    arena: torch.Tensor,
    window: int | None = None,
) -> DecodePlan:
    """Tables are int64, padded with any slot whose bytes are finite numbers."""
    num_rows, num_blocks = block_table_SN.shape
    num_kv_heads, block_size = arena.shape[1], arena.shape[4]
    position_C = torch.arange(num_blocks * block_size)
    hidden_SC = position_C >= context_lens_S[:, None]
    if window is not None:
        hidden_SC |= position_C < context_lens_S[:, None] - window
    bias_SC = torch.zeros(hidden_SC.shape).masked_fill_(hidden_SC, -torch.inf)
    bias = bias_SC[:, None].expand(-1, num_kv_heads, -1).reshape(num_rows * num_kv_heads, 1, -1)
    return DecodePlan(_gather_rows(block_table_SN, arena), bias)


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
    kv = _gather(arena, layer, plan.rows).view(2, batch, -1, head_dim)
    if kv.dtype != torch.float32:
        kv = kv.float()
    q = q_SHD.reshape(batch, -1, head_dim).to(kv.dtype)
    scores = torch.baddbmm(plan.bias, q, kv[0].transpose(1, 2), alpha=scale)
    if lse_out is not None:
        lse_out.copy_(scores.logsumexp(-1).view(num_rows, num_heads))
    attended = torch.bmm(scores.softmax(-1), kv[1])
    return attended.view(num_rows, num_heads, head_dim).to(q_SHD.dtype)


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
    rows = _gather_rows(slots_N[None, first_block:num_blocks], arena)
    first_key = first_block * block_size
    if query_len == context_len and (window is None or window >= context_len):
        return PrefillPlan(rows, context_len, None)
    distance_QC = torch.arange(first_query, context_len)[:, None] - torch.arange(
        first_key, context_len
    )
    hidden_QC = distance_QC < 0
    if window is not None:
        hidden_QC |= distance_QC >= window
    bias = torch.zeros(hidden_QC.shape, dtype=arena.dtype).masked_fill_(hidden_QC, -torch.inf)
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
    kv = _gather(arena, layer, plan.rows).view(2, 1, num_kv_heads, -1, head_dim)
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
        bias = torch.full((num_queries, num_queries), -torch.inf).triu(1)
    return (scores_HQC + bias.float()).logsumexp(-1).T


def _gather_rows(block_table_SN: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
    """Rows of layer 0 in the order k|v, row, KV head, block: K and V come out as matrices."""
    _, num_kv_heads, num_layers, _, _, _ = arena.shape
    head = torch.arange(num_kv_heads) * (num_layers * 2)
    start = torch.arange(2)[:, None, None, None] + head[:, None]
    return (block_table_SN[None, :, None] * (num_kv_heads * num_layers * 2) + start).view(-1)


def _gather(arena: torch.Tensor, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """`[len(rows), block_size * D]`. Picking whole rows of a flat view copies 8 times as fast as
    indexing the six-dimensional arena."""
    block_size, head_dim = arena.shape[-2:]
    return arena.view(-1, block_size * head_dim)[2 * layer :].index_select(0, rows)
