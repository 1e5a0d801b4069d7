"""config.json of all families, in the old and the new spelling, and what is refused in it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.common.errors import ModelError
from baton.common.fingerprint import differing_fields, fingerprint
from baton.engine.model_config import load_model_config
from baton.engine.rope import RotaryTable, inverse_frequencies

VALUES: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def write(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**VALUES, **changes}))
    return folder


def test_plain_llama(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path))
    assert (config.head_dim, config.num_kv_heads, config.max_model_len) == (8, 2, 128)
    assert (config.dtype, config.torch_dtype) == ("bfloat16", torch.bfloat16)
    assert config.eos_token_ids == (2,)
    assert config.sliding_window == (None,) * 4
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)
    assert load_model_config(tmp_path, dtype="float32", max_model_len=50).max_model_len == 50


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "o_bias", "qk_norm", "head_dim"),
    [
        ("LlamaForCausalLM", False, False, False, 8),
        ("MistralForCausalLM", False, False, False, 8),
        ("Qwen2ForCausalLM", True, False, False, 8),
        ("Qwen3ForCausalLM", False, False, True, 128),
    ],
)
def test_what_differs_between_families(
    architecture: str, qkv_bias: bool, o_bias: bool, qk_norm: bool, head_dim: int, tmp_path: Path
) -> None:
    config = load_model_config(write(tmp_path, architectures=[architecture]))
    assert (config.qkv_bias, config.o_bias) == (qkv_bias, o_bias)
    assert (config.qk_norm, config.head_dim) == (qk_norm, head_dim)


@pytest.mark.parametrize("parameters", [LLAMA3, YARN])
@pytest.mark.parametrize("kind_name", ["type", "rope_type"])
def test_old_and_new_rope_spelling_say_the_same(
    parameters: dict[str, float], kind_name: str, tmp_path: Path
) -> None:
    kind = "llama3" if parameters is LLAMA3 else "yarn"
    old = write(tmp_path, rope_theta=5e5, rope_scaling={kind_name: kind, **parameters})
    first = load_model_config(old).rope
    new = write(tmp_path, rope_parameters={"rope_theta": 5e5, "rope_type": kind, **parameters})
    assert load_model_config(new).rope == first
    assert first.theta == 5e5


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
        {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    ],
)
def test_frequencies_equal_hugging_face(parameters: dict[str, object], tmp_path: Path) -> None:
    parameters = {"rope_theta": 12345.0, **parameters}
    rope = load_model_config(write(tmp_path, head_dim=64, rope_parameters=parameters)).rope
    reference = LlamaConfig(head_dim=64, max_position_embeddings=256, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](reference)
    frequencies, our_factor = inverse_frequencies(rope, 64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)


def test_rotary_table_grows_and_keeps_its_values(tmp_path: Path) -> None:
    rope = load_model_config(write(tmp_path)).rope
    table = RotaryTable(rope, 8, 5000, torch.float32)
    cos, sin = table.rows(torch.tensor([1000]), 1000)
    assert table.num_positions == 1024
    far, _ = table.rows(torch.tensor([1000, 4999]), 4999)
    assert table.num_positions == 5000
    assert torch.equal(far[:1], cos)
    angle = 1000 * torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(cos.flatten(), angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[0, 0, 1], angle.sin(), rtol=0, atol=1e-4)


def test_yarn_stretches_the_longest_context(tmp_path: Path) -> None:
    folder = write(tmp_path, rope_scaling={"type": "yarn", **YARN})
    assert load_model_config(folder).max_model_len == 256


def test_sliding_windows(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert load_model_config(write(tmp_path, **mistral)).sliding_window == (4096,) * 4
    none = load_model_config(write(tmp_path, **mistral, sliding_window=None))
    assert none.sliding_window == (None,) * 4
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "max_window_layers": 3}
    assert load_model_config(write(tmp_path, **qwen)).sliding_window == (None,) * 4
    on = load_model_config(write(tmp_path, **qwen, use_sliding_window=True))
    assert on.sliding_window == (None, None, None, 9)
    types = ["sliding_attention", "full_attention"] * 2
    listed = load_model_config(write(tmp_path, **qwen, use_sliding_window=True, layer_types=types))
    assert listed.sliding_window == (9, None, 9, None)


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model_config(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_model_config(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", None),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", float("inf")),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "float8_e4m3fn"),
        ("eos_token_id", "two"),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", "linear"),
        ("rope_theta", 0),
    ],
)
def test_refusals_name_file_and_field(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model_config(write(tmp_path, **{field: value}))
    assert str(tmp_path / "config.json") in caught.value.message
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"type": "dynamic", "factor": 2.0}, "rope_scaling.type"),
        ({"rope_type": "longrope"}, "rope_scaling.rope_type"),
        ({"rope_type": "linear"}, "rope_scaling.factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_scaling.high_freq_factor"),
    ],
)
def test_rope_refusals_name_the_nested_field(
    rope: dict[str, object], field: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        load_model_config(write(tmp_path, rope_scaling=rope))
    assert caught.value.field == field


@pytest.mark.parametrize("content", [None, "", "{", "[1]", b"\xff\xfe\x00"])
def test_missing_or_broken_file(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        load_model_config(tmp_path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("max_model_len", [0, -1, 129])
def test_max_model_len_beyond_the_model(max_model_len: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"1\.\.128"):
        load_model_config(write(tmp_path), max_model_len=max_model_len)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float8"):
        load_model_config(write(tmp_path), dtype="float8")


def test_fingerprint_follows_what_decides_the_bytes(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path))
    fields = config.fingerprint_fields(32, "w")
    other_end = load_model_config(write(tmp_path, eos_token_id=5), max_model_len=64)
    assert other_end.fingerprint_fields(32, "w") == fields
    changes = {
        "rope": {"rope_theta": 1e6},
        "geometry": {"vocab_size": 101},
        "dtype": {"torch_dtype": "float16"},
        "num_layers": {"num_hidden_layers": 5, "sliding_window": None},
    }
    for name, change in changes.items():
        other = load_model_config(write(tmp_path, **change)).fingerprint_fields(32, "w")
        assert fingerprint(other) != fingerprint(fields)
        assert any(line.startswith(f"{name}:") for line in differing_fields(fields, other))
    assert fingerprint(config.fingerprint_fields(16, "w")) != fingerprint(fields)
    assert fingerprint(config.fingerprint_fields(32, "v")) != fingerprint(fields)
