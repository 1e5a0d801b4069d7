"""The weights of a model: read from safetensors, or drawn from a seed when there are none.

q, k and v are fused into one matrix, gate and up into another; each tensor of the file is copied
into its place, so that no more than one of them is in memory twice.

On a CPU matrices are `[in, out]`, the transpose of the file's, since few rows multiply faster so;
on a GPU they are `[out, in]`, as its kernels stream them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from baton.common.progress import Progress, no_progress
from baton.engine.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, LoadFormat
from baton.engine.model_config import ModelConfig

DUMMY_SEED: Final = 0
DUMMY_STD: Final = 0.02
CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """D head_dim, H query heads, K KV heads, F intermediate size. Shapes are a CPU's."""

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
    """`embedding` is `[vocab, hidden]`, `lm_head` a matrix from hidden to vocab: when tied, a view
    of the embedding."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor


# Fills the given tensor with the weights of that name, or raises.
Source = Callable[[str, torch.Tensor], None]


def load_weights(
    folder: Path,
    config: ModelConfig,
    load_format: LoadFormat = "safetensors",
    *,
    device: torch.device = CPU,
    progress: Progress = no_progress,
) -> ModelWeights:
    """Every tensor that `config` calls for, in its dtype, on `device`.

    Raises `ModelError`, naming file and tensor, when one is missing, misshapen or not called for,
    and when a file is missing, truncated or broken.
    """
    if load_format == "dummy":
        return _Assembly(_dummy_source(device), config, device, progress).model()
    with ExitStack() as open_files:
        checkpoint = Checkpoint(folder, config, open_files)
        weights = _Assembly(checkpoint.fill, config, device, progress).model()
        checkpoint.refuse_leftovers()
    return weights


class _Assembly:
    """Makes the tensors of a model out of one source."""

    def __init__(
        self, source: Source, config: ModelConfig, device: torch.device, progress: Progress
    ) -> None:
        self._source = source
        self._config = config
        self._device = device
        self._progress = progress

    def model(self) -> ModelWeights:
        config = self._config
        embedding = self._empty(config.vocab_size, config.hidden_size)
        self._source(EMBEDDING, embedding)
        lm_head = embedding.T if self._is_transposed else embedding
        if not config.tie_word_embeddings:
            lm_head = self._fused({LM_HEAD: config.vocab_size}, config.hidden_size)
        return ModelWeights(
            embedding=embedding,
            layers=tuple(self._nth_layer(index) for index in range(config.num_layers)),
            norm=self._joined({"model.norm.weight": config.hidden_size}),
            lm_head=lm_head,
        )

    @property
    def _is_transposed(self) -> bool:
        return self._device.type == "cpu"

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._config.torch_dtype, device=self._device)

    def _nth_layer(self, index: int) -> LayerWeights:
        layer = self._layer(f"model.layers.{index}.")
        self._progress("loading weights", index + 1, self._config.num_layers)
        return layer

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
        """`[in, sum of outs]` from the named `[out, in]` matrices, side by side; on a GPU
        `[sum of outs, in]`."""
        width = sum(parts.values())
        whole = self._empty(in_size, width) if self._is_transposed else self._empty(width, in_size)
        rows = whole.T if self._is_transposed else whole
        first = 0
        for name, out_size in parts.items():
            self._source(name, rows[first : first + out_size])
            first += out_size
        return whole

    def _joined(self, parts: dict[str, int]) -> torch.Tensor:
        """The named vectors, end to end."""
        whole = self._empty(sum(parts.values()))
        first = 0
        for name, size in parts.items():
            self._source(name, whole[first : first + size])
            first += size
        return whole


def _dummy_source(device: torch.device) -> Source:
    """Norms are one, all else is normal with deviation 0.02: the same for the same config on the
    same kind of device."""
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)

    def fill(name: str, place: torch.Tensor) -> None:
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        else:
            drawn = torch.empty(place.shape, dtype=torch.float32, device=device)
            place.copy_(drawn.normal_(0.0, DUMMY_STD, generator=generator))

    return fill
