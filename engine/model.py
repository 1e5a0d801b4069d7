"""One forward of a decoder-only transformer over the flattened tokens of a batch.

    x = embed(tokens)                                              [T, hidden]
    per layer:  x += o(attention(rope(qkv(norm(x)))))              only this step knows rows
                x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = lm_head(norm(x[last]))                                [num_last, vocab]

Legend: T tokens, H query heads, K KV heads, D head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baton.engine.batch import Batch, DecodeRows, PrefillRow
from baton.engine.model_config import ModelConfig
from baton.engine.rope import RotaryTable
from baton.engine.weights import LayerWeights, ModelWeights
from baton.kernels.activation import silu_and_mul
from baton.kernels.decode_attention import DecodePlan, decode_attention, plan_decode
from baton.kernels.kv_write import clear_slots, kv_write_rows, write_kv
from baton.kernels.prefill_attention import PrefillPlan, plan_prefill, prefill_attention
from baton.kernels.rms_norm import add_rms_norm_, head_rms_norm, rms_norm
from baton.kernels.rotary import apply_rotary_


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How all rows of a step attend, for the layers of one sliding window."""

    decode: tuple[tuple[DecodeRows, DecodePlan], ...]
    prefill: tuple[tuple[PrefillRow, PrefillPlan], ...]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one forward shares."""

    arena: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    kv_rows: torch.Tensor
    plans: dict[int | None, AttentionPlan]


class Model:
    """Weights and the forward; keeps no state of requests."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._weights = weights
        self._rotary = RotaryTable(
            config.rope, config.head_dim, config.max_model_len, config.torch_dtype
        )

    def forward(self, batch: Batch, arena: torch.Tensor) -> torch.Tensor:
        """Write the KV of all tokens of `batch` into `arena` and return the logits after its
        `last_tokens`, fp32 `[num_last, vocab]`.

        The arena is `[slots, K, layers, 2, block_size, D]` in the config's dtype.
        """
        with torch.inference_mode():
            step = self._prepare(batch, arena)
            residual = F.embedding(batch.token_ids, self._weights.embedding)
            final = len(self._weights.layers) - 1
            for index in range(final):
                self._layer(index, residual, step)
            residual = self._layer(final, residual, step, keep=batch.last_tokens)
            normed = rms_norm(residual, self._weights.norm, self.config.rms_norm_eps)
            return torch.mm(normed, self._weights.lm_head).float()

    def _prepare(self, batch: Batch, arena: torch.Tensor) -> StepContext:
        clear_slots(arena, batch.begun_slots)
        cos, sin = self._rotary.rows(batch.positions, batch.highest_position)
        return StepContext(
            arena=arena,
            cos=cos,
            sin=sin,
            kv_rows=kv_write_rows(batch.slots, batch.offsets, arena),
            plans={w: _plan(batch, arena, w) for w in set(self.config.sliding_window)},
        )

    def _layer(
        self,
        index: int,
        residual: torch.Tensor,
        step: StepContext,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the layer to `residual` `[T, hidden]` in place and return it.

        With `keep` only those tokens come back: after the last attention no other is needed.
        """
        weights, eps = self._weights.layers[index], self.config.rms_norm_eps
        attended = self._attend(index, rms_norm(residual, weights.input_norm, eps), step)
        if keep is not None and len(keep) < len(residual):
            attended, residual = attended.index_select(0, keep), residual.index_select(0, keep)
        projected = _linear(attended, weights.o, weights.o_bias)
        normed = add_rms_norm_(projected, residual, weights.post_norm, eps)
        gated = silu_and_mul(_linear(normed, weights.gate_up, weights.gate_up_bias))
        return residual.add_(_linear(gated, weights.down, weights.down_bias))

    def _attend(self, index: int, normed: torch.Tensor, step: StepContext) -> torch.Tensor:
        """`[T, H * D]`; also writes the layer's K and V."""
        config = self.config
        weights: LayerWeights = self._weights.layers[index]
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = _linear(normed, weights.qkv, weights.qkv_bias)
        qkv_THD = qkv.view(len(qkv), -1, config.head_dim)
        qk_THD = qkv_THD[:, :num_rotated]
        if weights.qk_norm is not None:
            qk_THD.copy_(head_rms_norm(qk_THD, weights.qk_norm, config.rms_norm_eps))
        apply_rotary_(qk_THD, step.cos, step.sin)
        write_kv(qkv_THD[:, config.num_heads :], step.arena, index, step.kv_rows)
        q_THD = qkv_THD[:, : config.num_heads]
        plan = step.plans[config.sliding_window[index]]
        attended_THD = _attention(q_THD, step.arena, index, plan, config.attention_scale)
        return attended_THD.view(len(qkv), -1)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[T, out]` of x `[T, in]` and weight `[in, out]`."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _plan(batch: Batch, arena: torch.Tensor, window: int | None) -> AttentionPlan:
    decode = tuple(
        (rows, plan_decode(rows.block_table, rows.context_lens, arena, window))
        for rows in batch.decode
    )
    prefill = tuple(
        (row, plan_prefill(row.slots, row.query_len, row.context_len, arena, window))
        for row in batch.prefill
    )
    return AttentionPlan(decode, prefill)


def _attention(
    q_THD: torch.Tensor, arena: torch.Tensor, layer: int, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Contiguous `[T, H, D]`."""
    if plan.decode and plan.decode[0][0].token_rows is None:
        return decode_attention(q_THD, arena, layer, plan.decode[0][1], scale=scale)
    attended_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    for row, prefill_plan in plan.prefill:
        tokens = slice(row.first_token, row.first_token + row.query_len)
        attended_THD[tokens] = prefill_attention(
            q_THD[tokens], arena, layer, prefill_plan, scale=scale
        )
    for rows, decode_plan in plan.decode:
        assert rows.token_rows is not None, "a group of all tokens is the only one"
        q_SHD = q_THD.index_select(0, rows.token_rows)
        decoded_SHD = decode_attention(q_SHD, arena, layer, decode_plan, scale=scale)
        attended_THD.index_copy_(0, rows.token_rows, decoded_SHD)
    return attended_THD
