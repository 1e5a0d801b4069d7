"""silu(gate) * up against fp64."""

import pytest
import torch
from support.kernel_checks import DTYPES, TOLERANCE, needs_triton, normal, poisoned, relative_error

from baton.kernels.activation import silu_and_mul, silu_and_mul_triton

SHAPES = [(1, 1), (3, 20), (5, 1023), (2, 1025), (7, 4096)]


def exact(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = normal(shape[0], 2 * shape[1], dtype=dtype)
    # Two roundings, after silu and after the product.
    assert relative_error(silu_and_mul(gate_up), exact(gate_up)) < 2 * TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = normal(shape[0], 2 * shape[1], dtype=dtype)
    out = silu_and_mul_triton(gate_up, poisoned(*shape, dtype=dtype))
    assert relative_error(out, exact(gate_up)) < TOLERANCE[dtype]


@needs_triton
def test_no_tokens_are_no_work() -> None:
    assert silu_and_mul_triton(poisoned(0, 8, dtype=torch.float32)).shape == (0, 4)
