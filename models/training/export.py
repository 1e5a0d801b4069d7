"""A trained network as a Hugging Face folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from baton.models.training.network import Network
from baton.models.training.tokens import BEGIN, BEGIN_ID, CHAT_TEMPLATE, END, END_ID


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bf16, config, tokenizer, template and generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = network.shape
    _write(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.max_position,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "rope_theta": shape.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BEGIN_ID,
            "eos_token_id": END_ID,
            "dtype": "bfloat16",
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": shape.max_position,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "do_sample": True, "top_k": 1},
    )


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
