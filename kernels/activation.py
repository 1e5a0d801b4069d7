"""The gate of SwiGLU (arXiv:2002.05202): silu(gate) * up."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate_up` is `[T, 2 F]`, gate before up; the result is `[T, F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
