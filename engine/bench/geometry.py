"""The model that the figures are of: Llama-3.1-8B in bf16, with seeded random weights."""

import json
from pathlib import Path
from typing import Any, Final

from baton.engine.model_config import ModelConfig

LLAMA_8B: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}


def write_geometry(folder: Path) -> Path:
    """A model folder without weights, for load_format "dummy"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B, indent=2), encoding="utf-8")
    return folder


def linear_elements(config: ModelConfig) -> int:
    """Elements of all matrices of the layers, without embedding and head."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = (heads + config.num_heads) * config.head_dim * config.hidden_size
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def weight_bytes(config: ModelConfig) -> int:
    """What a step reads of the weights: the layers and the head."""
    elements = linear_elements(config) + config.vocab_size * config.hidden_size
    return elements * config.torch_dtype.itemsize


def kv_bytes(config: ModelConfig, num_tokens: int) -> int:
    """K and V of so many tokens in all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return num_tokens * per_token * config.torch_dtype.itemsize


def prefill_operations(config: ModelConfig, num_prompts: int, prompt_len: int) -> float:
    """Two per element of the layers' matrices and token, and those of causal attention."""
    pairs = prompt_len * (prompt_len + 1) / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return num_prompts * (2 * linear_elements(config) * prompt_len + attention)
