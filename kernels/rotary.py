"""Rotary position embedding (arXiv:2104.09864) on half-split heads.

x = [a, b]   ->   [a cos - b sin, b cos + a sin]            a, b: the halves of a head
"""

import torch


def apply_rotary_(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `x` `[T, H, D]` in place; the last dimension must be contiguous.

    `cos` is `[T, 1, 1, D / 2]`; `sin` is `[T, 1, 2, D / 2]` with its first half negated, so that
    one multiplication serves both halves.
    """
    halves = x_THD.view(*x_THD.shape[:2], 2, -1)
    swapped = halves.flip(2)
    halves.mul_(cos).addcmul_(swapped, sin)
