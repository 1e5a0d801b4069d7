"""Paged prefill attention on Hopper: tensor copies, two consumer warpgroups, one persistent grid.

The function of `prefill_attention_triton`, for fp16 and bf16, head dims 64 and 128 and blocks of a
power of two up to 128 tokens. A program is one multiprocessor; it runs through its share of the
tiles, 128 queries of one head each:

    producer warp     Q | K V | K V | ...        tensor copies of arena blocks into a ring of two
    warpgroup 0, 1    64 queries each            S_j = Q K_j  while  O += P_(j-1) V_(j-1)
                                                 softmax of S_j while the product with V runs

Key tiles are taken from the last to the first, so that only the first few need the causal mask.
One warpgroup's softmax hides behind its own product with V and behind the other's products.
The shape is that of FlashAttention-3 (arXiv:2407.08608), made for a paged arena: a key tile of 128
tokens is put together from blocks of the arena, each copied as a box of `[block_size, 64]`.

Bytes behind a context in its last block, and before a window in its first, are weighted with 0:
they must be finite numbers.
"""

from typing import Any, Final

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels.attention_arguments import check_attention_arguments
from baton.kernels.jit import num_multiprocessors
from baton.kernels.prefill_copies_hopper import item_of_turn, num_turns, produce
from baton.kernels.prefill_work import PrefillWork
from baton.kernels.softmax_state import LOG2_E

BLOCK_M: Final = 128
# Elements in a row of a swizzled shared tile: 128 bytes.
HALF: Final = 64
# Key tiles in the ring; three were no faster.
STAGES: Final = 2


@gluon.jit
def _masked(s, first_position, first_key, window, HAS_WINDOW: gl.constexpr):
    """Hide the keys behind each query and before its window.

    -2^100 instead of -inf: a row may see nothing of the tile that it meets first, and -inf less
    -inf is no number. A power of two, because its product with the scale must be the same rounded,
    in the maximum, and not, inside the exponent.
    """
    layout: gl.constexpr = s.type.layout
    position = first_position + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, layout))
    key = first_key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    visible = key[None, :] <= position[:, None]
    if HAS_WINDOW:
        visible = visible & (key[None, :] > position[:, None] - window)
    return gl.where(visible, s, -1267650600228229401496703205376.0)


@gluon.jit
def _first_weights(s, first_position, first_key, scale_log2, window, HAS_WINDOW: gl.constexpr):
    """Scaled maxima and weights of the tile that a row meets first. A row that sees nothing of it,
    and will see a key in the next, weighs all of it with 0."""
    s = _masked(s, first_position, first_key, window, HAS_WINDOW)
    m = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - m[:, None])
    sees = m > -633825300114114700748351602688.0 * scale_log2
    return m, gl.where(sees[:, None], p, 0.0)


@gluon.jit
def _step(
    q, k_ring, v_ring, k_bars, v_bars, state, key_tile, has_next, first_position,
    scale_log2, window, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Issue S = Q K of the next tile and O += P V of the last one; turn S into P meanwhile."""
    o, p16, m, total, count = state
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    dtype: gl.constexpr = k_ring.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = o.type.layout
    v_stage = count % STAGES
    k_stage = (count + 1) % STAGES
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    s_token = warpgroup_mma(
        q, k_ring.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    mbarrier.wait(v_bars.index(v_stage), (count // STAGES) & 1)
    o_token = warpgroup_mma(p16, v_ring.index(v_stage), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(k_bars.index(STAGES + k_stage))
    if MASKED:
        s = _masked(s, first_position, key_tile * BLOCK_N, window, HAS_WINDOW)
    m_next = gl.maximum(m, gl.max(s, 1) * scale_log2)
    alpha = gl.exp2(m - m_next)
    p = gl.exp2(s * scale_log2 - m_next[:, None])
    total = total * alpha + gl.sum(p, 1)
    # The next step's keys. Waiting for them here keeps the assembler from moving the wait for the
    # product in front of the exponentials, which are there to run beside it.
    next_k = count + 2
    mbarrier.wait(k_bars.index(next_k % STAGES), (next_k // STAGES) & 1, pred=has_next)
    o, p16 = warpgroup_mma_wait(0, deps=[o_token, p16])
    mbarrier.arrive(v_bars.index(STAGES + v_stage))
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    p_next = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
    return o, p_next, m_next, total, count + 1


@gluon.jit
def _consume(
    GROUP: gl.constexpr, shared, results, work, scores,
    NUM_HEADS: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    q_smem, k_ring, v_ring, q_bars, k_bars, v_bars = shared
    tiles, num_items, num_programs = work
    out, lse = results
    scale_log2, window = scores
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    dtype: gl.constexpr = k_ring.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    turns = num_turns(num_items, num_programs)
    mbarrier.wait(q_bars.index(0), 0)
    mbarrier.wait(k_bars.index(0), 0)
    s = warpgroup_mma(q_smem.index(GROUP), k_ring.index(0).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_bars.index(STAGES))
    count = 0
    for turn in range(turns):
        item = item_of_turn(turn, num_programs)
        tile = tiles + (item // NUM_HEADS) * 6
        first_position = gl.load(tile + 3) + GROUP * 64
        first_tile = gl.load(tile + 5) // BLOCK_N
        last_tile = (gl.load(tile + 4) + BLOCK_N - 1) // BLOCK_N - 1

        # S of the last keys is there; there is no P yet.
        q = q_smem.index(turn % 2 * 2 + GROUP)
        last_key = last_tile * BLOCK_N
        m, p = _first_weights(s, first_position, last_key, scale_log2, window, HAS_WINDOW)
        total = gl.sum(p, 1)
        p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
        o = gl.zeros([64, D], gl.float32, layout=o_layout)
        state = (o, p16, m, total, count)
        next_k = count + 1
        has_more = last_tile > first_tile
        mbarrier.wait(k_bars.index(next_k % STAGES), (next_k // STAGES) & 1, pred=has_more)

        # Tiles that this group sees whole are [first_tile, seen), unless a window cuts them.
        seen = gl.maximum(gl.minimum((first_position + 1) // BLOCK_N, last_tile), first_tile)
        for index in range(seen, last_tile):
            key_tile = seen + last_tile - 1 - index
            state = _step(
                q, k_ring, v_ring, k_bars, v_bars, state, key_tile, key_tile > first_tile,
                first_position, scale_log2, window, True, HAS_WINDOW,
            )  # fmt: skip
        for index in range(first_tile, seen):
            key_tile = first_tile + seen - 1 - index
            state = _step(
                q, k_ring, v_ring, k_bars, v_bars, state, key_tile, key_tile > first_tile,
                first_position, scale_log2, window, HAS_WINDOW, HAS_WINDOW,
            )  # fmt: skip
        o, p16, m, total, count = state

        # The last product with V, and S of the next item beside it: tensor cores idle as little as
        # may be while results are stored. After the last item S is made of old bytes, for nobody.
        mbarrier.arrive(q_bars.index(2 + turn % 2))
        v_stage = count % STAGES
        mbarrier.wait(v_bars.index(v_stage), (count // STAGES) & 1)
        o_token = warpgroup_mma(p16, v_ring.index(v_stage), o, is_async=True)
        then = turn + 1
        has_item = then < turns
        count += 1
        k_stage = count % STAGES
        mbarrier.wait(q_bars.index(then % 2), (then // 2) & 1, pred=has_item)
        mbarrier.wait(k_bars.index(k_stage), (count // STAGES) & 1, pred=has_item)
        s_token = warpgroup_mma(
            q_smem.index(then % 2 * 2 + GROUP), k_ring.index(k_stage).permute((1, 0)), zeros,
            use_acc=False, is_async=True,
        )  # fmt: skip
        o, p16 = warpgroup_mma_wait(1, deps=[o_token, p16])
        mbarrier.arrive(v_bars.index(STAGES + v_stage))
        _store(tile, item % NUM_HEADS, o, m, total, out, lse, dtype, GROUP, NUM_HEADS, HAS_LSE)
        s = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(k_bars.index(STAGES + k_stage), pred=has_item)


@gluon.jit
def _store(
    tile, head, o, m, total, out, lse, dtype: gl.constexpr, GROUP: gl.constexpr,
    NUM_HEADS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """o / total as `[T, H, D]` and the natural-log LSE as `[T, H]`, of the tile's queries alone."""
    D: gl.constexpr = o.shape[1]
    stat: gl.constexpr = m.type.layout
    first_token = gl.load(tile + 1) + GROUP * 64
    num_queries = gl.load(tile + 2) - GROUP * 64
    o = o / gl.convert_layout(total, gl.SliceLayout(1, o.type.layout))[:, None]
    # A thread's registers hold 4 bytes here and there; by way of shared memory it gets 16 in a row.
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, rows))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    at = ((first_token + row).to(gl.int64) * NUM_HEADS + head) * D
    value = gl.convert_layout(o.to(dtype), rows)
    gl.store(out + at[:, None] + column[None, :], value, mask=(row < num_queries)[:, None])
    if HAS_LSE:
        query = gl.arange(0, 64, layout=stat)
        natural = (m + gl.log2(total)) * 0.6931471805599453
        at_lse = (first_token + query).to(gl.int64) * NUM_HEADS + head
        gl.store(lse + at_lse, natural, mask=query < num_queries)


@gluon.jit(do_not_specialize=["table_stride", "num_items", "num_programs", "layer", "window"])
def _prefill_kernel(
    q_desc, kv_desc, out, lse, tiles, tables, table_stride, num_items, num_programs,
    layer, num_layers, scale_log2, window,
    D: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = 128
    dtype: gl.constexpr = q_desc.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [4, 64, D], wide)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], wide)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], wide)
    # Of each pair the first half says full, the second empty.
    q_bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_bars.index(i), count=1)
        mbarrier.init(q_bars.index(2 + i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(i), count=1)
        mbarrier.init(v_bars.index(i), count=1)
        mbarrier.init(k_bars.index(STAGES + i), count=2)
        mbarrier.init(v_bars.index(STAGES + i), count=2)
    shared = (q_smem, k_ring, v_ring, q_bars, k_bars, v_bars)
    work = (tiles, num_items, num_programs)
    arena = (tables, table_stride, layer, num_layers)
    results = (out, lse)
    scores = (scale_log2, window)
    gl.warp_specialize(
        [
            (_consume, (0, shared, results, work, scores, NUM_HEADS, HAS_WINDOW, HAS_LSE)),
            (_consume, (1, shared, results, work, scores, NUM_HEADS, HAS_WINDOW, HAS_LSE)),
            (produce, (q_desc, kv_desc, shared, work, arena, NUM_HEADS, NUM_KV_HEADS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def can_attend(q_THD: torch.Tensor, arena: torch.Tensor) -> bool:
    """Whether `prefill_attention_hopper` takes these; `prefill_attention_triton` takes all."""
    block_size, head_dim = arena.shape[4:]
    return (
        q_THD.is_cuda
        and torch.cuda.get_device_capability(q_THD.device)[0] == 9
        and q_THD.dtype == arena.dtype
        and arena.dtype in (torch.float16, torch.bfloat16)
        and head_dim in (64, 128)
        and block_size in (8, 16, 32, 64, 128)
        and q_THD.stride()[1:] == (head_dim, 1)
        # Tensor copies start at multiples of 16 bytes.
        and q_THD.stride(0) % 8 == 0
        and q_THD.data_ptr() % 16 == 0
        and arena.data_ptr() % 16 == 0
        and arena.numel() // head_dim < 2**31
    )


def prefill_attention_hopper(
    q_THD: torch.Tensor,
    arena: torch.Tensor,
    layer: int,
    block_table_SN: torch.Tensor,
    work: PrefillWork,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    lse_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `prefill_attention_triton`, for what `can_attend`; `work` was planned for tiles of 128.

    Heads of a token follow each other in `q_THD`; rows of queries may have any stride.
    """
    assert can_attend(q_THD, arena), "another kernel serves these shapes"
    assert work.block_m == BLOCK_M, "tiles are planned for this kernel"
    num_tokens, num_heads, head_dim = q_THD.shape
    _, num_kv_heads, num_layers, _, block_size, _ = arena.shape
    if out is None:
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    check_attention_arguments(q_THD, arena, block_table_SN, scale, out, lse_out)
    if len(work.tiles) == 0:
        return out
    box: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_desc = TensorDescriptor(
        q_THD, [num_tokens, num_heads * head_dim], [q_THD.stride(0), 1], [64, HALF], box
    )
    rows = arena.numel() // head_dim
    kv_desc = TensorDescriptor(arena, [rows, head_dim], [head_dim, 1], [block_size, HALF], box)
    num_items = len(work.tiles) * num_heads
    num_programs = min(num_multiprocessors(q_THD.device), num_items)
    _prefill_kernel[(num_programs,)](
        q_desc, kv_desc, out, lse_out if lse_out is not None else out,
        work.tiles, block_table_SN, block_table_SN.stride(0), num_items, num_programs,
        layer, num_layers, scale * LOG2_E, work.window or 0,
        D=head_dim, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, STAGES=STAGES,
        HAS_WINDOW=work.window is not None, HAS_LSE=lse_out is not None,
        num_warps=4,
    )  # fmt: skip
    return out
