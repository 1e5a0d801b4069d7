"""Writes a small Hugging Face model folder with random weights: for tests, demos and benchmarks.

The folder is complete (weights, config, tokenizer, chat template) and loads unchanged in Hugging
Face transformers, which is the oracle for its tokens. The weights are scaled so that attention
looks around and greedy text keeps changing, because a model that repeats one token hides wrong KV.
Equal arguments give equal bytes.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from baton.common.errors import ConfigError

Family = Literal["llama", "qwen2", "qwen3"]

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
BEGIN_ID, END_ID = 0, 1

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The byte alphabet and the special tokens; merges come on top.
_SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- '<|user|>' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

_SENTENCES = (
    "The runner hands the baton to the next runner, and nobody runs with the wrong one.",
    "A relay team wins when the exchange is smooth, not when one leg is fast.",
    "She counted the stations on the old railway line: seven, eight, nine, ten.",
    "Where does the water go when the tide leaves the harbour?",
    "def total(prices):\n    return sum(price for price in prices if price > 0)\n",
    "Le garçon a mangé une crêpe près de l'église, où il pleuvait déjà.",
    "Die Größe der Brücke überraschte die Schüler aus München völlig.",
    "El niño soñó con montañas, ríos y pingüinos pequeños.",
    "今日は天気がいいので、公園まで歩いて行きましょう。",
    "Вчера вечером мы долго читали новую книгу вслух.",
    "Ein Lächeln 🙂, ein Stern ⭐ und ein Zug 🚆 im Regen 🌧️.",
    "Numbers such as 3.14159, 2,718 and 1e-9 need their own tokens.",
    '{"name": "baton", "legs": 4, "finished": true, "splits": [10.2, 9.8, 10.0, 9.9]}',
    "If the first answer is late, ask again; if it is wrong, nothing else matters.",
    "Bread, butter and honey were on the table before the sun was over the hill.",
    "The library opens at nine and closes when the last reader has gone home.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int


def write_random_model(
    folder: Path,
    *,
    family: Family = "llama",
    hidden_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 8,
    num_kv_heads: int = 4,
    head_dim: int = 32,
    intermediate_size: int = 688,
    vocab_size: int = 512,
    max_model_len: int = 4096,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write the model to `folder`, which appears whole or not at all, and return it.

    An existing folder is replaced if it holds a `config.json` (or nothing). The tokenizer has at
    most `vocab_size` tokens, fewer when the training sentences run out of merges.

    Raises ConfigError for an impossible shape or a folder that holds something else.
    """
    shape = _Shape(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_model_len,
    )
    _validate(folder, family, shape, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        _write_json(made / "config.json", _config(family, shape, dtype))
        _write_json(made / "generation_config.json", _generation_config())
        _write_tokenizer(made, vocab_size, max_model_len)
        tensors = _weights(family, shape, _DTYPES[dtype], seed)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    return folder


def _validate(folder: Path, family: str, shape: _Shape, dtype: str) -> None:
    if family not in _ARCHITECTURES:
        raise ConfigError(f"model family {family!r} is unknown; use one of {list(_ARCHITECTURES)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {list(_DTYPES)}")
    for name, value in asdict(shape).items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ConfigError(
            f"{shape.num_attention_heads} heads cannot share {shape.num_key_value_heads} KV heads "
            "evenly; use a divisor"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"head_dim {shape.head_dim} is odd; rotary embedding needs an even one")
    if shape.vocab_size < _SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size {shape.vocab_size} is too small: bytes and special tokens take "
            f"{_SMALLEST_VOCAB}"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds something that is not a model; choose another folder")


def _config(family: str, shape: _Shape, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **asdict(shape),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "torch_dtype": dtype,
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    return config


def _generation_config() -> dict[str, Any]:
    return {"bos_token_id": BEGIN_ID, "eos_token_id": [END_ID], "do_sample": False}


def _weights(family: str, shape: _Shape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Tensors under Hugging Face names, drawn in this order from one seeded generator."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float, mean: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(*size, generator=generator, dtype=torch.float32)
        return (drawn * std + mean).to(dtype)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    # Queries and keys are large, so that attention is sharp enough to tell contexts apart.
    projections = {
        "self_attn.q_proj": (query, hidden, 2.0),
        "self_attn.k_proj": (key_value, hidden, 2.0),
        "self_attn.v_proj": (key_value, hidden, 1.0),
        "self_attn.o_proj": (hidden, query, 1.0),
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, 1.0),
    }
    tensors = {"model.embed_tokens.weight": normal(shape.vocab_size, hidden, std=1.0)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, gain) in projections.items():
            weight = normal(rows, columns, std=gain / columns**0.5)
            tensors[f"{prefix}.{name}.weight"] = weight
            if family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}.{name}.bias"] = normal(rows, std=0.1)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if family == "qwen3":
            norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
        for name, size in norms.items():
            tensors[f"{prefix}.{name}.weight"] = normal(size, std=0.1, mean=1.0)
    tensors["model.norm.weight"] = normal(hidden, std=0.1, mean=1.0)
    tensors["lm_head.weight"] = normal(shape.vocab_size, hidden, std=2.0 / hidden**0.5)
    return tensors


def _write_tokenizer(folder: Path, vocab_size: int, max_model_len: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BEGIN_ID],
            "eos_token": SPECIAL_TOKENS[END_ID],
            "model_max_length": max_model_len,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
