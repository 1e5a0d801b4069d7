"""Small random models of each family, made by transformers, with a tokenizer of our own."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from baton.models.random_model import write_random_model

VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # Wide enough that greedy choices are clear and differ from prompt to prompt.
    "initializer_range": 0.2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=48)),
}


def write_family(family: str, folder: Path) -> tuple[Path, PreTrainedModel]:
    """A model folder that Baton can serve, and the same model in transformers, fp32."""
    torch.manual_seed(len(family))
    model = FAMILIES[family]().eval()
    path = folder / family
    model.save_pretrained(path)
    words = write_random_model(
        folder / "words",
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=16,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(words / name, path / name)
    return path, model


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers continues with."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
