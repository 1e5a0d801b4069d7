"""Root-mean-square norm (arXiv:1910.07467): y = x / sqrt(mean(x²) + eps) * weight."""

import torch
import torch.nn.functional as F


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
