"""Norms of rows, of sums and of chosen rows against fp64."""

import pytest
import torch
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    needs_triton,
    normal,
    poisoned,
    relative_error,
)

from baton.kernels.rms_norm import (
    add_rms_norm_,
    add_rms_norm_triton,
    last_tokens_rms_norm,
    last_tokens_rms_norm_triton,
    rms_norm,
    rms_norm_triton,
)

SHAPES = [(1, 1), (5, 3), (33, 64), (3, 1000), (2, 4096), (1, 8200)]
EPS = 1e-5


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype, scale=3.0), normal(shape[1], dtype=dtype)
    assert relative_error(rms_norm(x, weight, EPS), exact(x, weight)) < 2 * TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype, scale=3.0), normal(shape[1], dtype=dtype)
    out = rms_norm_triton(x, weight, EPS, poisoned(*shape, dtype=dtype))
    assert relative_error(out, exact(x, weight)) < TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_is_rounded_then_normed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    residual = normal(*shape, dtype=dtype, scale=10.0)
    of_reference = residual.clone()
    reference = add_rms_norm_(x, of_reference, weight, EPS)
    out = add_rms_norm_triton(x, residual, weight, EPS, poisoned(*shape, dtype=dtype))
    assert torch.equal(residual, of_reference), "one addition, one rounding"
    assert relative_error(out, exact(residual, weight)) < TOLERANCE[dtype]
    assert relative_error(reference, exact(residual, weight)) < 2 * TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [5, 300, 4096])
def test_only_chosen_rows_are_read(width: int, ids: torch.dtype, with_residual: bool) -> None:
    dtype = torch.float16
    x, weight = normal(7, width, dtype=dtype), normal(width, dtype=dtype)
    residual = normal(7, width, dtype=dtype) if with_residual else None
    rows = torch.tensor([6, 0, 3, 3], dtype=ids, device=DEVICE)
    for unread in (1, 2, 4, 5):
        x[unread] = torch.nan
    before = None if residual is None else residual.clone()
    total = (x if residual is None else x + residual)[rows.long()]
    out = last_tokens_rms_norm_triton(
        x, rows, weight, EPS, residual, poisoned(4, width, dtype=dtype)
    )
    assert relative_error(out, exact(total, weight)) < TOLERANCE[dtype]
    reference = last_tokens_rms_norm(x, rows, weight, EPS, residual)
    assert relative_error(reference, exact(total, weight)) < 2 * TOLERANCE[dtype]
    assert residual is None or torch.equal(residual, before)


@needs_triton
def test_out_may_be_the_input() -> None:
    x, weight = normal(3, 80, dtype=torch.float32), normal(80, dtype=torch.float32)
    expected = exact(x, weight)
    assert rms_norm_triton(x, weight, EPS, x) is x
    assert relative_error(x, expected) < TOLERANCE[torch.float32]


@needs_triton
def test_leading_dimensions_are_rows() -> None:
    x, weight = normal(2, 3, 20, dtype=torch.float32), normal(20, dtype=torch.float32)
    assert relative_error(rms_norm_triton(x, weight, EPS), exact(x, weight)) < 2e-6


@needs_triton
def test_no_rows_are_no_work() -> None:
    weight = normal(8, dtype=torch.float32)
    assert rms_norm_triton(poisoned(0, 8, dtype=torch.float32), weight, EPS).shape == (0, 8)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    x = normal(2, 8, dtype=torch.float32)
    assert last_tokens_rms_norm_triton(x, none, weight, EPS).shape == (0, 8)
