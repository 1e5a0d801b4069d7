"""Rotary position embedding (arXiv:2104.09864): frequencies of each kind, and the table of angles.

inv_freq[i] = theta ** (-2 i / head_dim)            i in [0, head_dim / 2)

linear    all frequencies divided by `factor`
llama3    long wavelengths divided by `factor`, short ones kept, a linear blend in between
yarn      NTK-by-parts and attention temperature, arXiv:2309.00071
"""

import math

import torch

from baton.engine.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per token, fp32 `[head_dim / 2]`, and the factor for both cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    if rope.kind == "default":
        return 1.0 / wavelengths, 1.0
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / wavelengths), 1.0
    assert rope.kind == "yarn", f"read_rope let through {rope.kind}"
    return _yarn(rope, wavelengths, head_dim), _yarn_attention_factor(rope)


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    turns = rope.original_max_len * inv_freq / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1.0 - kept) * inv_freq / rope.factor + kept * inv_freq


def _yarn(rope: RopeConfig, wavelengths: torch.Tensor, head_dim: int) -> torch.Tensor:
    def dimension_of(turns: float) -> float:
        """Where a frequency makes that many turns within the original context."""
        ratio = rope.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of no width would divide by zero.
    width = high - low if high != low else 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    stretched = ramp.clamp(0.0, 1.0)
    return stretched / (rope.factor * wavelengths) + (1.0 - stretched) / wavelengths


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


class RotaryTable:
    """cos and sin of every position, computed in fp32 and kept in `dtype`.

    The table starts small and doubles when a later position is asked for, up to `max_len`.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_len: int, dtype: torch.dtype) -> None:
        self._inv_freq, self._factor = inverse_frequencies(rope, head_dim)
        self._max_len = max_len
        self._dtype = dtype
        self._grow(min(max_len, 1024))

    @property
    def num_positions(self) -> int:
        return int(self._cos.shape[0])

    def rows(self, positions: torch.Tensor, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For `positions` (int64 `[T]`, none above `highest`): cos `[T, 1, 1, head_dim / 2]` and
        sin `[T, 1, 2, head_dim / 2]`, negated in the first half as `apply_rotary` wants it."""
        assert highest < self._max_len, f"position {highest} is beyond {self._max_len}"
        if highest >= self.num_positions:
            self._grow(min(self._max_len, max(2 * self.num_positions, highest + 1)))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self, num_positions: int) -> None:
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, self._inv_freq)[:, None, None, :]
        sin = angles.sin() * self._factor
        self._cos = (angles.cos() * self._factor).to(self._dtype)
        self._sin = torch.cat((-sin, sin), dim=2).to(self._dtype)
