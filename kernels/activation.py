"""The gate of SwiGLU (arXiv:2002.05202): silu(gate) * up."""

import torch
import torch.nn.functional as F

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)

# Features per program, of which the one that wastes the least of the last program is taken.
BLOCKS = (2048, 4096, 1024)
# A thread holds so many features: 32 bytes of both gate and up in flight in bf16.
ELEMENTS_PER_THREAD = 16


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate_up` is `[T, 2 F]`, gate before up; the result is `[T, F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_and_mul_triton(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_and_mul` in one pass, computed in fp32; both tensors are contiguous."""
    num_tokens, doubled = gate_up.shape
    width = doubled // 2
    if out is None:
        out = gate_up.new_empty(num_tokens, width)
    assert gate_up.is_contiguous(), "rows follow each other"
    assert out.is_contiguous(), "rows follow each other"
    assert out.shape == (num_tokens, width), "a gate and an up for each output"
    if num_tokens == 0:
        return out
    block = min(min(BLOCKS, key=lambda block: cdiv(width, block) * block), next_power_of_2(width))
    num_blocks = cdiv(width, block)
    pdl = can_overlap_launches(gate_up)
    _silu_and_mul_kernel[(num_tokens * num_blocks,)](
        gate_up,
        out,
        WIDTH=width,
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // (32 * ELEMENTS_PER_THREAD)),
        launch_pdl=pdl,
    )
    return out


@jit
def _silu_and_mul_kernel(
    gate_up,
    out,
    WIDTH: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program t NUM_BLOCKS + b: features `[b BLOCK, (b + 1) BLOCK)` of token t."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    feature = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < WIDTH
    gate = tl.load(gate_up + token * (2 * WIDTH) + feature, mask=mask, other=0.0)
    up = tl.load(gate_up + token * (2 * WIDTH) + WIDTH + feature, mask=mask, other=0.0)
    gate = gate.to(tl.float32)
    value = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(out + token * WIDTH + feature, value.to(out.dtype.element_ty), mask=mask)
