"""`linear` for few tokens on Hopper: weights stream through shared memory at the memory's rate.

    out[M, N] = x[M, K] @ weight[N, K].T (+ bias[N])             M <= 64, fp16 or bf16

A program owns a tile of BN weight rows and one of `splits` ranges of K:

    a producer warp      | W0 W1 .. until its ring is full ..................... | W | W | ...
    another              | wait for the kernel before | x0 x1 .. | x | x | ...
    consumer warps                                        | W0 x0 | W1 x1 | ...  | epilogue

1. The weight tile is the left operand of the tensor core (64 rows an instruction) and the few
   tokens are the right one, so that 8 tokens cost no more than the memory gives.
2. A program takes a multiprocessor with nearly all of its shared memory: bytes in flight are what
   counts. Where tiles are fewer than multiprocessors, K is split until they are not.
3. Weights depend on no other kernel, so the ring is filled before `griddepcontrol.wait`: with
   programmatic dependent launch the next kernel's weights flow while this one drains. Whoever
   changes weights synchronises before the next product.
4. With several splits each program leaves its fp32 tile in the workspace; the last one of a tile
   adds them in the order of the splits, so the result does not depend on who was last.

Gluon, because Triton has no way to start a load before a wait and use it after.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels.jit import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2
from baton.kernels.linear import check_linear_arguments

MAX_TOKENS: Final = 64
# One program on each multiprocessor of an H100 or H200.
RESIDENT: Final = 132
MAX_TILES: Final = 4096
MAX_PARTIALS: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How one shape is cut: weight rows and K of a stage, ranges of K, stages of both rings."""

    block_n: int
    block_k: int
    splits: int
    w_stages: int
    x_stages: int
    num_warps: int = 4


# By tokens (a power of two), weight rows and depth.
# fmt: off
MEASURED: Final[dict[tuple[int, int, int], LinearConfig]] = {
    (8, 6144, 4096): LinearConfig(128, 128, 2, 6, 6),
    (8, 4096, 4096): LinearConfig(128, 128, 4, 6, 6),
    (8, 28672, 4096): LinearConfig(128, 128, 1, 6, 4),
    (8, 4096, 14336): LinearConfig(128, 128, 4, 6, 6),
    (16, 6144, 4096): LinearConfig(64, 128, 1, 10, 10),
    (16, 4096, 4096): LinearConfig(64, 128, 2, 10, 10),
    (16, 28672, 4096): LinearConfig(128, 128, 1, 6, 4),
    (16, 4096, 14336): LinearConfig(64, 128, 2, 10, 10),
    (64, 6144, 4096): LinearConfig(64, 64, 1, 13, 13),
    (64, 4096, 4096): LinearConfig(64, 64, 2, 13, 13),
    (64, 28672, 4096): LinearConfig(128, 64, 1, 9, 9),
    (64, 4096, 14336): LinearConfig(64, 64, 2, 13, 13),
}
# fmt: on
# Weight rows and K of a stage, stages of weights and of tokens.
USUAL: Final = {
    8: (128, 128, 6, 4),
    16: (128, 64, 12, 8),
    32: (64, 64, 16, 10),
    64: (64, 64, 13, 13),
}


@gluon.jit
def _depth_of(step, tile, first_k, num_steps, BLOCK_K: gl.constexpr):
    """Where a step reads along K. Programs begin in different places: in lockstep all of them would
    ask the same few banks of the L2 for the same tokens."""
    return (first_k + (step + tile) % num_steps) * BLOCK_K


@gluon.jit
def _stream_weights(w_desc, w_ring, w_full, empty, tile, first_k, num_steps):
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    for step in range(num_steps):
        stage = step % STAGES
        # Passes at once in the first round, in which every stage is empty.
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = w_full.index(stage)
        mbarrier.expect(bar, w_desc.block_type.nbytes)
        k = _depth_of(step, tile, first_k, num_steps, BLOCK_K)
        at = [tile * w_desc.block_type.shape[0], k]
        tma.async_copy_global_to_shared(w_desc, at, bar, w_ring.index(stage))


@gluon.jit
def _stream_tokens(x_desc, x_ring, x_full, empty, tile, first_k, num_steps):
    """A step empties a stage of both rings, and says so once: on the barrier of the weights."""
    STAGES: gl.constexpr = x_ring.shape[0]
    W_STAGES: gl.constexpr = empty.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    gdc_wait()
    for step in range(num_steps):
        emptied = gl.maximum(step - STAGES, 0)
        is_round = step >= STAGES
        mbarrier.wait(empty.index(emptied % W_STAGES), (emptied // W_STAGES) & 1, pred=is_round)
        bar = x_full.index(step % STAGES)
        mbarrier.expect(bar, x_desc.block_type.nbytes)
        k = _depth_of(step, tile, first_k, num_steps, BLOCK_K)
        tma.async_copy_global_to_shared(x_desc, [0, k], bar, x_ring.index(step % STAGES))


@gluon.jit
def _consume(w_ring, x_ring, w_full, x_full, empty, num_steps, acc):
    W_STAGES: gl.constexpr = w_ring.shape[0]
    X_STAGES: gl.constexpr = x_ring.shape[0]
    for step in range(num_steps):
        mbarrier.wait(x_full.index(step % X_STAGES), (step // X_STAGES) & 1)
        mbarrier.wait(w_full.index(step % W_STAGES), (step // W_STAGES) & 1)
        x_tile = x_ring.index(step % X_STAGES).permute((1, 0))
        acc = warpgroup_mma(w_ring.index(step % W_STAGES), x_tile, acc, is_async=True)
        # One product stays in flight; the stages of the one before it are free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        before = gl.maximum(step - 1, 0) % W_STAGES
        mbarrier.arrive(empty.index(before), pred=step > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return (acc,)


@gluon.jit
def _thread_order(BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, mma: gl.constexpr):
    """Where an accumulator's elements go so that a warp stores 256 bytes in a row.

    A warp holds 8 rows x 8 columns in a pair of registers, four lanes a row; the pairs of a thread
    lie `num_warps * 64` elements apart.
    """
    num_warps: gl.constexpr = gl.num_warps()
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))[:, None]
    column = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))[None, :]
    pair = ((row // (16 * num_warps)) * (BLOCK_M // 8) + column // 8) * 2 + (row // 8) % 2
    warp = (row // 16) % num_warps
    return (pair * num_warps + warp) * 64 + (row % 8) * 8 + column % 8


@gluon.jit(do_not_specialize=["num_tokens", "num_steps", "splits"])
def _linear_kernel(
    w_desc,
    x_desc,
    out,
    bias,
    partials,
    counters,
    num_tokens,
    width,
    num_steps,
    splits,
    W_STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    HAS_SPLITS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    num_warps: gl.constexpr = gl.num_warps()
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    dtype: gl.constexpr = w_desc.dtype
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0)
    split = gl.program_id(1)
    first = split * num_steps // splits
    steps = (split + 1) * num_steps // splits - first

    w_ring = gl.allocate_shared_memory(dtype, [W_STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [X_STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(stage), count=1)

    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 16]
    )
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    (acc,) = gl.warp_specialize(
        [
            (_consume, (w_ring, x_ring, w_full, x_full, empty, steps, acc)),
            (_stream_weights, (w_desc, w_ring, w_full, empty, tile, first, steps)),
            (_stream_tokens, (x_desc, x_ring, x_full, empty, tile, first, steps)),
        ],
        [1, 1],
        [24, 24],
    )
    is_last = True
    if HAS_SPLITS:
        acc, is_last = _reduce(acc, partials, counters, tile, split, splits)
    if is_last:
        _store(acc, out, bias, tile, num_tokens, width, dtype, HAS_BIAS)


@gluon.jit
def _reduce(acc, partials, counters, tile, split, splits):
    """The sum over all splits, in their order, in the last program of a tile to come here."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    of_tile = partials + tile * (splits * SIZE)
    mma: gl.constexpr = acc.type.layout
    cell = _thread_order(acc.shape[0], acc.shape[1], mma)
    gl.store(of_tile + split * SIZE + cell, acc)
    gl.thread_barrier()
    before = gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    is_last = before == splits - 1
    if is_last:
        acc = gl.load(of_tile + cell, cache_modifier=".cg")
        for other in range(1, splits):
            acc += gl.load(of_tile + other * SIZE + cell, cache_modifier=".cg")
        gl.store(counters + tile, 0)
    return acc, is_last


@gluon.jit
def _store(acc, out, bias, tile, num_tokens, width, dtype: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Rows of `out` run along weight rows, so a thread takes 8 of them: 16 bytes."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    LANES: gl.constexpr = gl.constexpr(min(BLOCK_N // 8, 16))
    rows: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, gl.num_warps()], [0, 1])
    n = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, rows))
    m = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, rows))
    if HAS_BIAS:
        row = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + row, mask=row < width, other=0.0).to(gl.float32)[:, None]
    value = gl.convert_layout(acc.to(dtype), rows)
    mask = (n[:, None] < width) & (m[None, :] < num_tokens)
    gl.store(out + m[None, :].to(gl.int64) * width + n[:, None], value, mask=mask)


class LinearWorkspace:
    """Room for the partial sums of one stream's products, on one device. Counters rest at 0."""

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(MAX_PARTIALS, dtype=torch.float32, device=device)
        self.counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def can_stream(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear_hopper` takes these; all else is for `linear`."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype == weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and 0 < x.shape[0] <= MAX_TOKENS
        and weight.numel() > 0
        and x.is_contiguous()
        and weight.is_contiguous()
        # Tensor copies start at multiples of 16 bytes.
        and x.shape[1] % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def linear_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    workspace: LinearWorkspace,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`[M, N]` of x `[M, K]`, weight `[N, K]`, bias `[N]`, summed in fp32, for what `can_stream`.

    The result is a function of the arguments and the config alone, and the config of the shapes.
    """
    assert can_stream(x, weight), "another kernel serves these shapes"
    num_tokens, depth = x.shape
    width = weight.shape[0]
    if out is None:
        out = x.new_empty(num_tokens, width)
    if config is None:
        config = choose_config(num_tokens, width, depth)
    check_linear_arguments(x, weight, bias, out)
    block_m = max(8, next_power_of_2(num_tokens))
    tiles = cdiv(width, config.block_n)
    num_steps = cdiv(depth, config.block_k)
    assert config.splits <= num_steps, "each program has a step, and waits for its tokens"
    assert config.x_stages <= config.w_stages, "tokens may not be two rounds behind their barrier"
    assert tiles <= MAX_TILES or config.splits == 1, "a counter for each tile"
    assert config.splits == 1 or (
        tiles * config.splits * config.block_n * block_m <= MAX_PARTIALS
    ), "the workspace holds all partial sums"
    box: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # A single row may have any stride.
    strides = [depth, 1]
    w_box, x_box = [config.block_n, config.block_k], [block_m, config.block_k]
    w_desc = TensorDescriptor(weight, [width, depth], strides, w_box, box)
    x_desc = TensorDescriptor(x, [num_tokens, depth], strides, x_box, box)
    _linear_kernel[(tiles, config.splits)](
        w_desc, x_desc, out, bias if bias is not None else out, workspace.partials,
        workspace.counters, num_tokens, width, num_steps, config.splits,
        W_STAGES=config.w_stages, X_STAGES=config.x_stages,
        HAS_SPLITS=config.splits > 1, HAS_BIAS=bias is not None, PDL=True,
        num_warps=config.num_warps, launch_pdl=True,
    )  # fmt: skip
    return out


def choose_config(num_tokens: int, width: int, depth: int) -> LinearConfig:
    """As measured for the shapes of Llama-3.1-8B; elsewhere what was best for most of them."""
    block_m = max(8, next_power_of_2(num_tokens))
    config = MEASURED.get((block_m, width, depth))
    if config is not None:
        return config
    block_n, block_k, w_stages, x_stages = USUAL[block_m]
    tiles = cdiv(width, block_n)
    splits = max(1, min(RESIDENT // tiles, cdiv(depth, block_k) // 2))
    return LinearConfig(block_n, block_k, splits, w_stages, x_stages)
