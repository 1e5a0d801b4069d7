"""One forward of a decoder-only transformer on a GPU, over the flattened tokens of a step.

    x = norm(embed(tokens))                                        [T, hidden]
    per layer:  q = rotate and write(qkv(x))                       K and V go into the arena
                x = norm(residual += o(attention(q)))
                x = norm(residual += down(silu(gate(x)) * up(x)))
    logits = lm_head(x[last])                                      [L, vocab]

The same kernels run one by one, or captured in a CUDA graph: nothing here looks at the device.
Legend: T tokens, H query heads, K KV heads, D head_dim.
"""

from typing import TYPE_CHECKING

import torch

from baton.engine.cuda.inputs import StepInputs
from baton.engine.model_config import ModelConfig
from baton.engine.rope import inverse_frequencies
from baton.engine.weights import ModelWeights
from baton.kernels.activation import silu_and_mul_triton
from baton.kernels.decode_attention import decode_attention_triton
from baton.kernels.embedding import embedding_triton
from baton.kernels.linear import linear_cuda
from baton.kernels.prefill_attention import prefill_attention_triton
from baton.kernels.rms_norm import (
    add_rms_norm_triton,
    rms_norm_triton,
)
from baton.kernels.rotary_write import rotary_write_triton

if TYPE_CHECKING:
    pass


class CudaModel:
    """Weights on one device, matrices `[out, in]`, and the forward; keeps no state of requests."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, device: torch.device) -> None:
        # Not imported above: a Hopper's dialect, which only a GPU needs.
        from baton.kernels.linear_hopper import LinearWorkspace
        from baton.kernels.prefill_attention_hopper import can_attend, prefill_attention_hopper

        self.config = config
        self.device = device
        self._weights = weights
        self._workspace: LinearWorkspace = LinearWorkspace(device)
        self._cos, self._sin = _angles(config, device)
        self._can_attend, self._prefill_on_hopper = can_attend, prefill_attention_hopper

    def forward(self, step: StepInputs, arena: torch.Tensor) -> torch.Tensor | None:
        """Write the KV of all tokens into `arena` `[slots, K, layers, 2, block_size, D]`; the
        logits `[L, vocab]` after the tokens of `last`, or None when nothing is sampled."""
        weights, eps = self._weights, self.config.rms_norm_eps
        residual = embedding_triton(step.token_ids, weights.embedding)
        x = rms_norm_triton(residual, weights.layers[0].input_norm, eps)
        final = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            q_THD = self._rotated_q(x, index, step, arena)
            if index == final and step.last is not None:
                if not len(step.last):
                    return None
                # After the last attention no other token is needed.
                attended = self._attend(q_THD, index, step, arena).index_select(0, step.last)
                residual = residual.index_select(0, step.last)
            else:
                attended = self._attend(q_THD, index, step, arena)
            projected = self._linear(attended, layer.o, layer.o_bias)
            x = add_rms_norm_triton(projected, residual, layer.post_norm, eps, out=projected)
            gated = silu_and_mul_triton(self._linear(x, layer.gate_up, layer.gate_up_bias))
            down = self._linear(gated, layer.down, layer.down_bias)
            norm = weights.norm if index == final else weights.layers[index + 1].input_norm
            x = add_rms_norm_triton(down, residual, norm, eps, out=down)
        return self._linear(x, weights.lm_head, None)

    def _rotated_q(
        self, x: torch.Tensor, index: int, step: StepInputs, arena: torch.Tensor
    ) -> torch.Tensor:
        """`[T, H, D]`; also writes the layer's K and V."""
        layer = self._weights.layers[index]
        qkv = self._linear(x, layer.qkv, layer.qkv_bias)
        return rotary_write_triton(
            qkv, self._cos, self._sin, step.positions, step.slots, step.offsets, arena, index,
            qk_norm=layer.qk_norm, eps=self.config.rms_norm_eps,
        )  # fmt: skip

    def _attend(
        self, q_THD: torch.Tensor, index: int, step: StepInputs, arena: torch.Tensor
    ) -> torch.Tensor:
        """`[T, H * D]`."""
        window, scale = self.config.sliding_window[index], self.config.attention_scale
        out_THD = q_THD.new_empty(q_THD.shape)
        num_decode = step.num_decode
        if num_decode:
            decode_attention_triton(
                q_THD[:num_decode], arena, index, step.decode_table, step.decode_works[window],
                scale=scale, out=out_THD[:num_decode],
            )  # fmt: skip
        if num_decode < len(q_THD):
            q, out = q_THD[num_decode:], out_THD[num_decode:]
            on_hopper = self._can_attend(q, arena)
            attend = self._prefill_on_hopper if on_hopper else prefill_attention_triton
            attend(
                q, arena, index, step.prefill_table, step.prefill_works[window],
                scale=scale, out=out,
            )  # fmt: skip
        return out_THD.view(len(q_THD), -1)

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return linear_cuda(x, weight, self._workspace, bias=bias)


def _angles(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, fp32 `[max_model_len, D / 2]`."""
    inv_freq, factor = inverse_frequencies(config.rope, config.head_dim)
    positions = torch.arange(config.max_model_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inv_freq.to(device))
    return angles.cos() * factor, angles.sin() * factor
