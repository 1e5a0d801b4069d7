"""What a model folder's config.json says, checked and in one vocabulary for all families.

Supported: Llama (arXiv:2307.09288), Mistral (arXiv:2310.06825), Qwen2 (arXiv:2407.10671) and Qwen3
(arXiv:2505.09388): decoder-only, pre-norm, grouped-query attention, SwiGLU.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import torch

from baton.common.block_hash import HASH_VERSION
from baton.common.errors import ModelError
from baton.common.fingerprint import LAYOUT_VERSION
from baton.engine.config_file import ConfigFile
from baton.engine.rope_config import RopeConfig, read_rope

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LLAMA: Final = "LlamaForCausalLM"
MISTRAL: Final = "MistralForCausalLM"
QWEN2: Final = "Qwen2ForCausalLM"
QWEN3: Final = "Qwen3ForCausalLM"
# No transformer: see `baton.engine.oracle`. For tests, so no error message offers it.
ORACLE: Final = "BatonOracle"
ARCHITECTURES: Final = (LLAMA, MISTRAL, QWEN2, QWEN3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer; lengths in tokens, sizes in elements."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    # RMSNorm on each head of q and k before they are rotated.
    qk_norm: bool
    # One entry per layer: how many tokens a query sees, itself included; None is all.
    sliding_window: tuple[int | None, ...]
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    # A key of `DTYPES`: of weights, activations and KV.
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5)

    def fingerprint_fields(self, block_size: int, weights_id: str) -> dict[str, str]:
        """Everything that decides the bytes of a block, for `baton.common.fingerprint`.

        The vocabulary is among it because dummy weights are drawn in order, embedding first.
        """
        geometry = (
            self.hidden_size,
            self.num_heads,
            self.intermediate_size,
            self.vocab_size,
            self.tie_word_embeddings,
            self.rms_norm_eps,
            self.qkv_bias,
            self.o_bias,
            self.mlp_bias,
            self.qk_norm,
            self.sliding_window,
        )
        return {
            "architecture": self.architecture,
            "geometry": blake2b(repr(geometry).encode(), digest_size=16).hexdigest(),
            "num_layers": str(self.num_layers),
            "num_kv_heads": str(self.num_kv_heads),
            "head_dim": str(self.head_dim),
            "rope": blake2b(repr(astuple(self.rope)).encode(), digest_size=16).hexdigest(),
            "dtype": self.dtype,
            "block_size": str(block_size),
            "layout_version": str(LAYOUT_VERSION),
            "hash_version": str(HASH_VERSION),
            "weights": weights_id,
        }


def load_model_config(
    folder: Path, *, dtype: str = "auto", max_model_len: int | None = None
) -> ModelConfig:
    """Read `folder/config.json`; `dtype` "auto" keeps the checkpoint's.

    Raises `ModelError`, naming file and field, for whatever is missing, malformed or unsupported,
    and for a `max_model_len` beyond what the model was made for.
    """
    config = ConfigFile.read(folder / "config.json")
    architecture = _read_architecture(config)
    if config.has("quantization_config"):
        raise config.error("quantization_config", "quantized weights are not supported")
    if config.text("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", "not supported; supported is silu")
    hidden_size = config.size("hidden_size")
    num_layers = config.size("num_hidden_layers")
    num_heads = config.size("num_attention_heads")
    # Qwen3's heads are 128 wide unless said otherwise, whatever hidden_size is.
    default_head_dim = 128 if architecture == QWEN3 else max(hidden_size // num_heads, 1)
    max_position_embeddings = config.size("max_position_embeddings")
    rope = read_rope(config, max_position_embeddings)
    attention_bias = architecture in (LLAMA, QWEN3) and config.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_read_kv_heads(config, num_heads),
        head_dim=_read_head_dim(config, default_head_dim),
        intermediate_size=config.size("intermediate_size"),
        vocab_size=config.size("vocab_size"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        max_model_len=_bounded_len(
            config, max_model_len, rope.stretched_len(max_position_embeddings)
        ),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == QWEN2,
        o_bias=attention_bias,
        mlp_bias=architecture == LLAMA and config.flag("mlp_bias", False),
        qk_norm=architecture == QWEN3,
        sliding_window=_read_windows(config, architecture, num_layers),
        rope=rope,
        eos_token_ids=_read_eos(folder, config),
        dtype=_read_dtype(config, dtype),
    )


def _read_architecture(config: ConfigFile) -> str:
    names = config.raw("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in (*ARCHITECTURES, ORACLE):
        return str(names[0])
    raise config.error("architectures", f"not supported; supported are {', '.join(ARCHITECTURES)}")


def _read_kv_heads(config: ConfigFile, num_heads: int) -> int:
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide the {num_heads} attention heads")
    return num_kv_heads


def _read_head_dim(config: ConfigFile, default: int) -> int:
    head_dim = config.size("head_dim", default)
    if head_dim % 2:
        raise config.error("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    return head_dim


def _bounded_len(config: ConfigFile, wanted: int | None, limit: int) -> int:
    if wanted is None:
        return limit
    if not 0 < wanted <= limit:
        raise ModelError(
            f"max_model_len {wanted} is outside 1..{limit}, what {config.path} was made for "
            "(max_position_embeddings and its rope scaling); choose a smaller one",
            field="max_model_len",
        )
    return wanted


def _read_windows(config: ConfigFile, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == MISTRAL:
        # Absent means 4096 here, only an explicit null is "no window".
        explicit_null = config.is_null("sliding_window")
        window = None if explicit_null else config.size("sliding_window", 4096)
        return (window,) * num_layers
    if architecture == LLAMA or not config.flag("use_sliding_window", False):
        return (None,) * num_layers
    if config.is_null("sliding_window"):
        return (None,) * num_layers
    window = config.size("sliding_window", 4096)
    types = config.raw("layer_types")
    if types is None:
        first = config.whole("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers or not known.keys() >= set(types):
        raise config.error(
            "layer_types", f"must be {num_layers} entries of {', '.join(sorted(known))}"
        )
    return tuple(known[kind] for kind in types)


def _read_eos(folder: Path, config: ConfigFile) -> tuple[int, ...]:
    """generation_config.json wins: chat models list their end-of-turn tokens only there."""
    sources = [config]
    if (folder / "generation_config.json").exists():
        sources.insert(0, ConfigFile.read(folder / "generation_config.json"))
    for source in sources:
        value = source.raw("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise source.error("eos_token_id", "must be a token id or a list of them")
        return tuple(ids)
    return ()


def _read_dtype(config: ConfigFile, wanted: str) -> str:
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ModelError(
                f"dtype {wanted} is not supported; choose auto, {', '.join(DTYPES)}", field="dtype"
            )
        return wanted
    field = "dtype" if config.has("dtype") else "torch_dtype"
    found = config.text(field, "float32")
    if found not in DTYPES:
        raise config.error(field, f"not supported; supported are {', '.join(DTYPES)}")
    return found
