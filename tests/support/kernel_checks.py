"""What every kernel test needs: where kernels run here, fresh inputs, poisoned outputs, errors.

Without a GPU Triton's interpreter runs the kernels on the CPU; tests/conftest.py turns it on. Its
bf16 dot is wrong (triton 3.6), so bf16 is tested where kernels are compiled.
"""

import math

import pytest
import torch
from support.interpreted_loops import allow_loaded_bounds

from baton.kernels.jit import HAS_TRITON

HAS_GPU = torch.cuda.is_available()
if HAS_TRITON and not HAS_GPU:
    allow_loaded_bounds()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if HAS_GPU else [])
# ‖out − ref‖ / ‖ref‖ against fp64 on the same rounded inputs, one rounding of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="runs compiled on a GPU alone")


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output that was not written shows: NaN, or the lowest integer."""
    bad = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, bad, dtype=dtype, device=DEVICE)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal numbers on the device that kernels run on."""
    return (torch.randn(*shape, dtype=torch.float32) * scale).to(dtype).to(DEVICE)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in fp64; infinite where anything was left poisoned."""
    difference = (out.double().cpu() - reference.double().cpu()).norm()
    error = float(difference / reference.double().cpu().norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf
