"""A linear layer: out[M, N] = x[M, K] @ weight[N, K].T (+ bias[N]).

For few tokens the time is that of reading the weight once. `linear_cuda` takes the streaming kernel
of `linear_hopper` for up to 64 tokens on Hopper, where a step's layers in turn are faster by it
(`baton bench kernels`), and cuBLAS for the rest. `linear_triton` is the streaming kernel's twin in
plain Triton: it runs on any device and under the interpreter.
"""

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from baton.kernels.jit import cdiv, jit, next_power_of_2, tl

if TYPE_CHECKING:
    from baton.kernels.linear_hopper import LinearWorkspace

BLOCK_N: Final = 64
BLOCK_K: Final = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[M, N]` in x's dtype of x `[M, K]`, weight `[N, K]` and bias `[N]`."""
    return F.linear(x, weight, bias)


def linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    workspace: "LinearWorkspace",
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` on a GPU: the streaming kernel for what it takes, cuBLAS for the rest.

    `weight` was complete before the kernel ahead of this one was launched: it is read without
    waiting for that kernel (see `linear_hopper`).
    """
    # Not imported above: without a GPU nothing of NVIDIA's dialect is loaded.
    from baton.kernels.linear_hopper import can_stream, linear_hopper

    if can_stream(x, weight) and (out is None or out.is_contiguous()):
        return linear_hopper(x, weight, workspace, bias=bias, out=out)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def check_linear_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """What our kernels take for granted of shapes."""
    assert weight.shape[1] == x.shape[1], "both are as deep"
    assert out.shape == (x.shape[0], weight.shape[0]), "a number for each token and weight row"
    assert out.is_contiguous(), "tokens follow each other"
    if bias is not None:
        assert bias.shape == (weight.shape[0],), "a number for each weight row"
        assert bias.is_contiguous(), "numbers follow each other"


def linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear`, summed in fp32; x and weight are contiguous, M is any number."""
    num_tokens, depth = x.shape
    width = weight.shape[0]
    assert x.is_contiguous(), "rows follow each other"
    assert weight.is_contiguous(), "rows follow each other"
    if out is None:
        out = x.new_empty(num_tokens, width)
    check_linear_arguments(x, weight, bias, out)
    if num_tokens == 0:
        return out
    block_m = min(max(16, next_power_of_2(num_tokens)), 64)
    grid = (cdiv(width, BLOCK_N), cdiv(num_tokens, block_m))
    _linear_kernel[grid](
        x, weight, bias if bias is not None else out, out, num_tokens, width, depth,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=bias is not None,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@jit
def _linear_kernel(
    x, weight, bias, out, num_tokens, width, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program (n, m): tokens `[m BLOCK_M, ...)` of weight rows `[n BLOCK_N, ...)`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m[:, None].to(tl.int64) * depth + k[None, :]
    w_at = weight + n[None, :].to(tl.int64) * depth + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        x_MK = tl.load(x_at + start, mask=(m < num_tokens)[:, None] & inside[None, :], other=0.0)
        w_KN = tl.load(w_at + start, mask=(n < width)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x_MK, w_KN, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < width, other=0.0)[None, :].to(tl.float32)
    mask = (m < num_tokens)[:, None] & (n < width)[None, :]
    out_at = out + m[:, None].to(tl.int64) * width + n[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=mask)
