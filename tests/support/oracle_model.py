"""Folders of the oracle model (`baton.engine.oracle`), complete enough to be served."""

import json
from pathlib import Path

from support.tiny_model import byte_level_tokenizer, write_model_folder

# "</s>" of the tokenizer below.
EOS_ID = 1


def write_oracle_model(
    folder: Path,
    *,
    vocab_size: int = 512,
    max_model_len: int = 4096,
    num_layers: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 8,
    dtype: str = "float32",
    tokenizer: bool = True,
) -> Path:
    """Config, generation config and tokenizer; there are no weights. 64 bytes per token as it is.

    `tokenizer=False` leaves out what a router alone reads, which takes most of the time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        write_model_folder(folder, tokenizer=byte_level_tokenizer())
    config = {
        "architectures": ["BatonOracle"],
        "model_type": "baton_oracle",
        "vocab_size": vocab_size,
        "max_position_embeddings": max_model_len,
        "eos_token_id": EOS_ID,
        "hidden_size": num_kv_heads * head_dim,
        "intermediate_size": head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_kv_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
    return folder


def words_per_token(
    *, num_layers: int = 1, num_kv_heads: int = 1, head_dim: int = 8, itemsize: int = 4
) -> int:
    """What `oracle_answer` wants to know of a folder: its KV of one token in 8-byte words."""
    return num_kv_heads * num_layers * 2 * head_dim * itemsize // 8
