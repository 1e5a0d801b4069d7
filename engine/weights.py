"""The weights of a model: read from safetensors, or drawn from a seed when there are none.

q, k and v are fused into one matrix, gate and up into another; each tensor of the file is copied
into its place, so that no more than one of them is in memory twice.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from baton.engine.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, LoadFormat
from baton.engine.model_config import ModelConfig

DUMMY_SEED: Final = 0
DUMMY_STD: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Matrices are `[in, out]`, the transpose of the file's: on a CPU few rows multiply faster so.

    D head_dim, H query heads, K KV heads, F intermediate size.
    """

    input_norm: torch.Tensor
    # `[hidden, (H + 2 K) D]`: q, then k, then v.
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    # `[H + K, D]`: the norm weight of each q head, then of each k head.
    qk_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    # `[hidden, 2 F]`: gate, then up.
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """`embedding` is `[vocab, hidden]`, `lm_head` `[hidden, vocab]`: when tied, a view of it."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor


# Fills the given tensor with the weights of that name, or raises.
Source = Callable[[str, torch.Tensor], None]


def load_weights(
    folder: Path, config: ModelConfig, load_format: LoadFormat = "safetensors"
) -> ModelWeights:
    """Every tensor that `config` calls for, in its dtype.

    Raises `ModelError`, naming file and tensor, when one is missing, misshapen or not called for,
    and when a file is missing, truncated or broken.
    """
    if load_format == "dummy":
        return _Assembly(_dummy_source(), config).model()
    with ExitStack() as open_files:
        checkpoint = Checkpoint(folder, config, open_files)
        weights = _Assembly(checkpoint.fill, config).model()
        checkpoint.refuse_leftovers()
    return weights


class _Assembly:
    """Makes the tensors of a model out of one source."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self._source = source
        self._config = config

    def model(self) -> ModelWeights:
        config = self._config
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=config.torch_dtype)
        self._source(EMBEDDING, embedding)
        lm_head = embedding.T
        if not config.tie_word_embeddings:
            lm_head = self._fused({LM_HEAD: config.vocab_size}, config.hidden_size)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(self._layer(f"model.layers.{i}.") for i in range(config.num_layers)),
            norm=self._joined({"model.norm.weight": config.hidden_size}),
            lm_head=lm_head,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        config, fused, joined = self._config, self._fused, self._joined
        hidden, intermediate = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
        gate_up = {"mlp.gate_proj": intermediate, "mlp.up_proj": intermediate}
        o, down = {"self_attn.o_proj": hidden}, {"mlp.down_proj": hidden}

        def weights(parts: dict[str, int]) -> dict[str, int]:
            return {f"{prefix}{name}.weight": size for name, size in parts.items()}

        def biases(parts: dict[str, int], present: bool) -> torch.Tensor | None:
            named = {f"{prefix}{name}.bias": size for name, size in parts.items()}
            return joined(named) if present else None

        return LayerWeights(
            input_norm=joined(weights({"input_layernorm": hidden})),
            qkv=fused(weights(qkv), hidden),
            qkv_bias=biases(qkv, config.qkv_bias),
            qk_norm=self._qk_norm(prefix) if config.qk_norm else None,
            o=fused(weights(o), q_size),
            o_bias=biases(o, config.o_bias),
            post_norm=joined(weights({"post_attention_layernorm": hidden})),
            gate_up=fused(weights(gate_up), hidden),
            gate_up_bias=biases(gate_up, config.mlp_bias),
            down=fused(weights(down), intermediate),
            down_bias=biases(down, config.mlp_bias),
        )

    def _qk_norm(self, prefix: str) -> torch.Tensor:
        config = self._config
        parts = {f"{prefix}self_attn.{name}_norm.weight": config.head_dim for name in "qk"}
        q_norm, k_norm = self._joined(parts).chunk(2)
        return torch.cat(
            (q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1))
        )

    def _fused(self, parts: dict[str, int], in_size: int) -> torch.Tensor:
        """`[in, sum of outs]` from the named `[out, in]` matrices, side by side."""
        whole = torch.empty(in_size, sum(parts.values()), dtype=self._config.torch_dtype)
        first = 0
        for name, out_size in parts.items():
            self._source(name, whole[:, first : first + out_size].T)
            first += out_size
        return whole

    def _joined(self, parts: dict[str, int]) -> torch.Tensor:
        """The named vectors, end to end."""
        whole = torch.empty(sum(parts.values()), dtype=self._config.torch_dtype)
        first = 0
        for name, size in parts.items():
            self._source(name, whole[first : first + size])
            first += size
        return whole


def _dummy_source() -> Source:
    """Norms are one, all else is normal with deviation 0.02: the same for the same config."""
    generator = torch.Generator().manual_seed(DUMMY_SEED)

    def fill(name: str, place: torch.Tensor) -> None:
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        else:
            drawn = torch.empty(place.shape, dtype=torch.float32)
            place.copy_(drawn.normal_(0.0, DUMMY_STD, generator=generator))

    return fill
