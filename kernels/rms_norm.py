"""Root-mean-square norm (arXiv:1910.07467): y = x / sqrt(mean(x²) + eps) * weight.

The kernels keep a row in registers from its one load to its one store. Their arithmetic is fp32 and
rounds once, but for the sum with a residual: the norm is taken of the sum that is stored.
"""

import torch
import torch.nn.functional as F

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)

# A thread holds so many elements of a row: 64 bytes of each operand in flight in bf16.
ELEMENTS_PER_THREAD = 32
# Elements of one program's tile: short rows are normed several at a time.
TILE = 2048
MAX_WARPS = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension of `x` `[..., D]`; `weight` is `[D]`, of the same dtype.

    The mean is taken in fp32 whatever the dtype.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`residual += x` in place, then the norm of the sum; all `[..., D]`."""
    return F.rms_norm(residual.add_(x), weight.shape, weight, eps)


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over each head of `x` `[T, H, D]` by itself, with one weight row per head: `[H, D]`."""
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


def last_tokens_rms_norm(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norms `[L, D]` of some `rows` of `x` `[T, D]`, or of `x + residual`.

    `rows` are int32 or int64 `[L]`. Nothing else of `x` is read, and `residual` stays as it is.
    """
    chosen = x.index_select(0, rows)
    if residual is not None:
        chosen.add_(residual.index_select(0, rows))
    return rms_norm(chosen, weight, eps)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`rms_norm`; `out` may be `x` itself. All tensors are contiguous."""
    out = torch.empty_like(x) if out is None else out
    assert out.shape == x.shape, "a norm for each row"
    return _launch(x, None, None, weight, eps, out, write_sum=False)


def add_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`add_rms_norm_`: `residual` is changed in place; `out` may be `x` itself."""
    out = torch.empty_like(x) if out is None else out
    assert out.shape == x.shape, "a norm for each row"
    return _launch(x, residual, None, weight, eps, out, write_sum=True)


def last_tokens_rms_norm_triton(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`last_tokens_rms_norm`; every row must lie in `x`, the kernel does not look."""
    assert x.dim() == 2, "rows of tokens"
    assert rows.is_contiguous(), "row numbers follow each other"
    out = x.new_empty(len(rows), x.shape[1]) if out is None else out
    assert out.shape == (len(rows), x.shape[1]), "a norm for each row"
    return _launch(x, residual, rows, weight, eps, out, write_sum=False)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    write_sum: bool,
) -> torch.Tensor:
    width = x.shape[-1]
    assert weight.shape == (width,), "a weight for each feature"
    assert x.is_contiguous(), "rows follow each other"
    assert weight.is_contiguous(), "weights follow each other"
    assert out.is_contiguous(), "rows follow each other"
    if residual is not None:
        assert residual.is_contiguous(), "rows follow each other"
        assert residual.shape == x.shape, "a residual for each element"
    num_rows = out.numel() // width
    if num_rows == 0:
        return out
    block = next_power_of_2(width)
    rows_per_program = max(1, TILE // block)
    warps = max(1, block * rows_per_program // (32 * ELEMENTS_PER_THREAD))
    pdl = can_overlap_launches(x)
    _rms_norm_kernel[(cdiv(num_rows, rows_per_program),)](
        x,
        residual,
        rows,
        weight,
        out,
        num_rows,
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=rows_per_program,
        HAS_RESIDUAL=residual is not None,
        WRITE_SUM=write_sum,
        GATHER=rows is not None,
        PDL=pdl,
        num_warps=min(warps, MAX_WARPS),
        launch_pdl=pdl,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    residual,
    rows,
    weight,
    out,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_SUM: tl.constexpr,
    GATHER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p: rows `[p ROWS, (p + 1) ROWS)` of the output, whole."""
    feature = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < num_rows) & (feature < WIDTH)
    # Weights are written by no kernel of a step: they may come before the wait.
    scale = tl.load(weight + feature, mask=feature < WIDTH, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = row.to(tl.int64)
    if GATHER:
        source = tl.load(rows + row, mask=row < num_rows, other=0).to(tl.int64)
    value = tl.load(x + source * WIDTH + feature, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + source * WIDTH + feature, mask=mask, other=0.0)
        # Rounded before the norm, which thus is of what the next layer will read.
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        if WRITE_SUM:
            tl.store(residual + source * WIDTH + feature, value, mask=mask)
    value = value.to(tl.float32)
    mean = tl.sum(value * value, axis=1, keep_dims=True) / WIDTH
    normed = value * tl.rsqrt(mean + eps) * scale.to(tl.float32)
    tl.store(out + row.to(tl.int64) * WIDTH + feature, normed.to(out.dtype.element_ty), mask=mask)
