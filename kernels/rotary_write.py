"""Rotating Q and K and writing K and V into the arena, in one pass over the output of qkv.

    q[t], k[t]  ->  optional norm of each head (Qwen3)  ->  rotary.py's rotation at positions[t]
    arena[slots[t], head, layer, k|v, offsets[t]] = k[t, head], v[t, head]

T tokens, H query heads, K KV heads, D head_dim; `qkv` is `[T, (H + 2 K) * D]`: all Q heads, all K
heads, all V heads. The arena is `[slots, K, layers, 2, block_size, D]`.
"""

import torch

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
    triton,
)
from baton.kernels.rms_norm import head_rms_norm
from baton.kernels.rotary import apply_rotary_

# Pairs of a program's tile, whose rows are heads, at most MAX_BLOCK_HEADS of one token. Two rows
# per thread keep the registers low enough for as many programs as fill the memory's pipe.
TILE = 2048
MAX_BLOCK_HEADS = 8
NUM_WARPS = 4


def rotary_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    q_out: torch.Tensor | None = None,
    qk_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotated Q: `q_out` `[T, H, D]`, or where it lies in `qkv`, whose Q is then changed.

    `cos` and `sin` are tables `[max_positions, D / 2]` in fp32 or the dtype of `qkv`, as views of
    any row stride; `positions`, `slots` and `offsets` are int32 or int64 `[T]`. A token with a
    negative slot is padding and writes nothing into the arena; its position must be in the tables
    all the same. No two tokens share a place. `qk_norm` `[H + K, D]` holds the weights of the norm.
    """
    kv_heads, head_dim = arena.shape[1], arena.shape[-1]
    num_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    qkv_THD = qkv.unflatten(1, (num_heads + 2 * kv_heads, head_dim))
    qk_THD = qkv_THD[:, : num_heads + kv_heads].clone()
    if qk_norm is not None:
        qk_THD = head_rms_norm(qk_THD, qk_norm, eps)
    rows = positions.long()
    c = cos.index_select(0, rows)[:, None, None].to(qkv.dtype)
    s = sin.index_select(0, rows)[:, None, None].to(qkv.dtype)
    apply_rotary_(qk_THD, c, torch.cat((-s, s), dim=2))
    kept = (slots >= 0).nonzero()[:, 0]
    places = (slots[kept].long(), slice(None), layer)
    for kind, values in enumerate((qk_THD[:, num_heads:], qkv_THD[:, num_heads + kv_heads :])):
        arena[*places, kind, offsets[kept].long()] = values[kept]
    q_THD = qkv_THD[:, :num_heads] if q_out is None else q_out
    return q_THD.copy_(qk_THD[:, :num_heads])


def rotary_write_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    q_out: torch.Tensor | None = None,
    qk_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`rotary_write`, computed in fp32 and rounded once. K and V stay in `qkv` as they were."""
    _, kv_heads, num_layers, _, block_size, head_dim = arena.shape
    num_tokens, num_heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    q_in_qkv = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    q_THD = q_in_qkv if q_out is None else q_out
    assert q_THD.shape == (num_tokens, num_heads, head_dim), "Q as it comes"
    assert q_THD.stride()[1:] == (head_dim, 1), "heads of a token follow each other"
    assert qkv.stride(1) == 1, "heads of a token follow each other"
    assert arena.is_contiguous(), "places are counted"
    assert head_dim % 2 == 0, "a head has two halves"
    assert cos.shape[1:] == sin.shape[1:] == (head_dim // 2,), "an angle for each pair"
    assert cos.stride(1) == sin.stride(1) == 1, "angles of a position follow each other"
    assert 0 <= layer < num_layers, "a layer of the arena"
    for per_token in (positions, slots, offsets):
        assert per_token.shape == (num_tokens,), "one for each token"
        assert per_token.is_contiguous(), "tokens follow each other"
    if qk_norm is not None:
        assert qk_norm.shape == (num_heads + kv_heads, head_dim), "a weight for each feature"
        assert qk_norm.is_contiguous(), "heads follow each other"
    if num_tokens == 0:
        return q_THD
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(MAX_BLOCK_HEADS, next_power_of_2(kv_heads))
    block_tokens = max(1, TILE // (block_half * block_heads))
    groups = cdiv(num_heads, block_heads) + 2 * cdiv(kv_heads, block_heads)
    pdl = can_overlap_launches(qkv)
    _rotary_write_kernel[(cdiv(num_tokens, block_tokens) * groups,)](
        qkv,
        cos,
        sin,
        positions,
        slots,
        offsets,
        arena,
        q_THD,
        qk_norm,
        num_tokens,
        layer,
        qkv.stride(0),
        q_THD.stride(0),
        cos.stride(0),
        sin.stride(0),
        eps,
        Q_HEADS=num_heads,
        KV_HEADS=kv_heads,
        LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_HALF=block_half,
        BLOCK_T=block_tokens,
        BLOCK_HEADS=block_heads,
        HAS_QK_NORM=qk_norm is not None,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )
    return q_THD


@jit
def _rotated(
    a,
    b,
    mask,
    of_cos,
    of_sin,
    qk_norm,
    in_qkv,
    eps,
    HEAD_DIM: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
):
    """The halves `[rows, BLOCK_HALF]` of heads, normed if asked to and rotated."""
    c = tl.load(of_cos, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(of_sin, mask=mask, other=0.0).to(tl.float32)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if HAS_QK_NORM:
        mean = tl.sum(x * x + y * y, axis=1, keep_dims=True) / HEAD_DIM
        scale = tl.rsqrt(mean + eps)
        of_weight = qk_norm + in_qkv
        weight = tl.load(of_weight, mask=mask, other=0.0)
        x = x * scale * weight.to(tl.float32)
        weight = tl.load(of_weight + HEAD_DIM // 2, mask=mask, other=0.0)
        y = y * scale * weight.to(tl.float32)
    return (x * c - y * s).to(a.dtype), (y * c + x * s).to(b.dtype)


@triton.jit(do_not_specialize=["num_tokens", "layer"])
def _rotary_write_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    offsets,
    arena,
    q_out,
    qk_norm,
    num_tokens,
    layer,
    qkv_stride,
    q_stride,
    cos_stride,
    sin_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: BLOCK_T tokens by BLOCK_HEADS heads of Q, of K or of V.

    Tiles are `[BLOCK_T * BLOCK_HEADS, BLOCK_HALF]`, two for the halves of each head. All kinds of
    some tokens are neighbours in the grid, so that whole rows of `qkv` are read at about one time.
    Every head loads its token's angles anew: they come from the L1 cache, and in no other layout.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_GROUPS: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_GROUPS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    HEAD_STRIDE: tl.constexpr = LAYERS * 2 * BLOCK_SIZE * HEAD_DIM
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    group = tl.program_id(0) % (Q_GROUPS + 2 * KV_GROUPS)
    tile = tl.program_id(0) // (Q_GROUPS + 2 * KV_GROUPS)
    is_q = group < Q_GROUPS
    is_v = group >= Q_GROUPS + KV_GROUPS
    first_head = tl.where(is_q, group, (group - Q_GROUPS) % KV_GROUPS) * BLOCK_HEADS
    first_of_kind = tl.where(is_q, 0, tl.where(is_v, Q_HEADS + KV_HEADS, Q_HEADS))

    row = tl.arange(0, BLOCK_T * BLOCK_HEADS)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    token = tile * BLOCK_T + row // BLOCK_HEADS
    head = first_head + row % BLOCK_HEADS
    exists = (token < num_tokens) & (head < tl.where(is_q, Q_HEADS, KV_HEADS))
    mask = exists[:, None] & (half < HALF)
    # Every number that an address needs is asked for at once, before what it waits for.
    position = tl.load(positions + token, mask=exists, other=0).to(tl.int64)
    slot = tl.load(slots + token, mask=exists & ~is_q, other=-1).to(tl.int64)
    offset = tl.load(offsets + token, mask=exists & ~is_q, other=0).to(tl.int64)
    in_row = (first_of_kind + head) * HEAD_DIM
    of_half = qkv + (token.to(tl.int64) * qkv_stride + in_row)[:, None] + half
    a = tl.load(of_half, mask=mask, other=0.0)
    b = tl.load(of_half + HALF, mask=mask, other=0.0)

    if not is_v:
        of_cos = cos + (position * cos_stride)[:, None] + half
        of_sin = sin + (position * sin_stride)[:, None] + half
        in_qkv = in_row[:, None] + half
        a, b = _rotated(a, b, mask, of_cos, of_sin, qk_norm, in_qkv, eps, HEAD_DIM, HAS_QK_NORM)

    if is_q:
        to_half = q_out + (token.to(tl.int64) * q_stride + head * HEAD_DIM)[:, None] + half
        writes = mask
    else:
        of_kind = (layer * 2 + tl.where(is_v, 1, 0)) * (BLOCK_SIZE * HEAD_DIM)
        of_head = head.to(tl.int64) * HEAD_STRIDE + of_kind
        place = slot * (KV_HEADS * HEAD_STRIDE) + of_head + offset * HEAD_DIM
        to_half = arena + place[:, None] + half
        writes = mask & (slot >= 0)[:, None]
    tl.store(to_half, a, mask=writes)
    tl.store(to_half + HALF, b, mask=writes)
