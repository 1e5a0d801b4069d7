"""The random model folder is complete, repeatable, and worth testing with."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.common.errors import ConfigError
from baton.models.random_model import write_random_model

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_arguments_give_equal_bytes(tmp_path):
    first = files(write_random_model(tmp_path / "a", **SMALL))
    second = files(write_random_model(tmp_path / "b", **SMALL))
    other = files(write_random_model(tmp_path / "c", **SMALL, seed=1))
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_loads_in_transformers_and_writes_varied_text(tmp_path, family):
    folder = write_random_model(tmp_path / "m", family=family, **SMALL)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    prompt = torch.tensor([[5, 6, 7]])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert len(set(tokens[0, 3:].tolist())) > 25


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_the_folder(tmp_path, dtype):
    folder = write_random_model(tmp_path / "m", dtype=dtype, **SMALL)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)


def test_tokenizer_keeps_every_text_and_renders_chats(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_random_model(tmp_path / "m", **SMALL))
    for text in ("The runner", " two  spaces\n", "Größe", "今日は", "🙂🌧️", "\x00\u202e"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == 1
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Why?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>Hi<|assistant|>Yes<|end|><|user|>Why?<|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids[0] == 0
    assert ids.count(2) == 2


def test_replaces_a_model_but_nothing_else(tmp_path):
    folder = write_random_model(tmp_path / "m", **SMALL)
    before = files(folder)
    assert files(write_random_model(folder, **SMALL, seed=2)) != before
    other = tmp_path / "letters"
    other.mkdir()
    (other / "love.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not a model"):
        write_random_model(other, **SMALL)
    assert files(other) == {"love.txt": b"keep me"}


@pytest.mark.parametrize(
    "options",
    [
        {"family": "gpt2"},
        {"dtype": "int8"},
        {"num_kv_heads": 3},
        {"head_dim": 15},
        {"vocab_size": 100},
        {"num_layers": 0},
    ],
)
def test_impossible_shapes_are_refused(tmp_path, options):
    with pytest.raises(ConfigError):
        write_random_model(tmp_path / "m", **{**SMALL, **options})
    assert not list(tmp_path.iterdir())
