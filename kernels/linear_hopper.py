"""`linear` for few tokens on Hopper: weights stream through shared memory at the memory's rate.

    out[M, N] = x[M, K] @ weight[N, K].T (+ bias[N])             M <= 64, fp16 or bf16

A program owns a tile of BN weight rows and one of `splits` ranges of K:

    producer warp    | W0 .. W(STAGES-1) | wait for the kernel before | x0 .. | W x | W x | ...
    consumer warps                                       | W0 x0 | W1 x1 | ...           | epilogue

1. The weight tile is the left operand of the tensor core (64 rows an instruction) and the few
   tokens are the right one, so that 8 tokens cost no more than the memory gives.
2. All programs are resident at once and do equal work: whoever shares a saturated memory evenly
   ends together, whatever the number of programs per multiprocessor.
3. Weights depend on no other kernel, so the ring is filled before `griddepcontrol.wait`: with
   programmatic dependent launch the next kernel's weights flow while this one drains.
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

from baton.kernels.jit import cdiv, next_power_of_2

MAX_TOKENS: Final = 64
BLOCK_K: Final = 64
# One program on each multiprocessor of an H100 or H200.
RESIDENT: Final = 132
MAX_TILES: Final = 4096
MAX_PARTIALS: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How one shape is cut: weight rows per program, ranges of K, depth of the ring."""

    block_n: int
    splits: int
    stages: int
    num_warps: int = 4
    max_registers: int | None = None


@gluon.jit
def _gdc_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _gdc_launch_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _produce(w_desc, x_desc, w_ring, x_ring, full, empty, first_row, first_k, num_steps):
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    BYTES: gl.constexpr = w_desc.block_type.nbytes + x_desc.block_type.nbytes
    ahead = gl.minimum(num_steps, STAGES)
    for step in range(ahead):
        bar = full.index(step)
        mbarrier.expect(bar, BYTES)
        k = (first_k + step) * BLOCK_K
        tma.async_copy_global_to_shared(w_desc, [first_row, k], bar, w_ring.index(step))
    _gdc_wait()
    for step in range(ahead):
        k = (first_k + step) * BLOCK_K
        tma.async_copy_global_to_shared(x_desc, [0, k], full.index(step), x_ring.index(step))
    for step in range(STAGES, num_steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        k = (first_k + step) * BLOCK_K
        tma.async_copy_global_to_shared(w_desc, [first_row, k], bar, w_ring.index(stage))
        tma.async_copy_global_to_shared(x_desc, [0, k], bar, x_ring.index(stage))


@gluon.jit
def _consume(w_ring, x_ring, full, empty, num_steps, acc):
    STAGES: gl.constexpr = w_ring.shape[0]
    for step in range(num_steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        acc = warpgroup_mma(
            w_ring.index(stage), x_ring.index(stage).permute((1, 0)), acc, is_async=True
        )
        # One product stays in flight; the stage of the one before it is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        before = gl.maximum(step - 1, 0) % STAGES
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
    STAGES: gl.constexpr,
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
        _gdc_launch_dependents()
    tile = gl.program_id(0)
    split = gl.program_id(1)
    first = split * num_steps // splits
    steps = (split + 1) * num_steps // splits - first

    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)

    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 16]
    )
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    (acc,) = gl.warp_specialize(
        [
            (_consume, (w_ring, x_ring, full, empty, steps, acc)),
            (_produce, (w_desc, x_desc, w_ring, x_ring, full, empty, tile * BLOCK_N, first, steps)),
        ],
        [1],
        [24],
    )

    is_last = True
    if HAS_SPLITS:
        of_tile = partials + tile * (splits * BLOCK_N * BLOCK_M)
        cell = _thread_order(BLOCK_N, BLOCK_M, mma)
        gl.store(of_tile + split * (BLOCK_N * BLOCK_M) + cell, acc)
        gl.thread_barrier()
        before = gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        is_last = before == splits - 1
        if is_last:
            acc = gl.load(of_tile + cell, cache_modifier=".cg")
            for other in range(1, splits):
                at = of_tile + other * (BLOCK_N * BLOCK_M) + cell
                acc += gl.load(at, cache_modifier=".cg")
            gl.store(counters + tile, 0)
    if is_last:
        # Rows of `out` run along weight rows, so a thread takes 8 of them: 16 bytes.
        lanes: gl.constexpr = gl.constexpr(min(BLOCK_N // 8, 16))
        rows: gl.constexpr = gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, num_warps], [0, 1])
        value = gl.convert_layout(acc.to(dtype), rows)
        n = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, rows))
        m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, rows))
        if HAS_BIAS:
            added = gl.load(bias + n, mask=n < width, other=0.0)
            value = (value.to(gl.float32) + added[:, None].to(gl.float32)).to(dtype)
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
        and x.shape[1] % 8 == 0
        and x.is_contiguous()
        and weight.is_contiguous()
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
    block_m = max(8, next_power_of_2(num_tokens))
    tiles = cdiv(width, config.block_n)
    assert tiles <= MAX_TILES or config.splits == 1, "a counter for each tile"
    assert config.splits == 1 or (
        tiles * config.splits * config.block_n * block_m <= MAX_PARTIALS
    ), "the workspace holds all partial sums"
    box: Any = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_desc = TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK_K], box)
    x_desc = TensorDescriptor.from_tensor(x, [block_m, BLOCK_K], box)
    _linear_kernel[(tiles, config.splits)](
        w_desc, x_desc, out, bias if bias is not None else out, workspace.partials,
        workspace.counters, num_tokens, width, cdiv(depth, BLOCK_K), config.splits,
        STAGES=config.stages, HAS_SPLITS=config.splits > 1, HAS_BIAS=bias is not None, PDL=True,
        num_warps=config.num_warps, maxnreg=config.max_registers, launch_pdl=True,
    )  # fmt: skip
    return out


def choose_config(num_tokens: int, width: int, depth: int) -> LinearConfig:
    """One program on each multiprocessor with all its shared memory as a ring, as was measured to
    be fastest: bytes in flight count, not programs. Few tiles are split over K to fill the chip."""
    tiles = cdiv(width, 64)
    splits = max(1, min(RESIDENT // tiles, cdiv(depth, BLOCK_K) // 4))
    return LinearConfig(64, splits, 12 if num_tokens > 16 else 16)
