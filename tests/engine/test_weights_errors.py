"""Broken model folders: each is refused with the file and the tensor or field that is at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from baton.common.errors import ModelError
from baton.engine.checkpoint import weights_id
from baton.engine.model_config import load_model_config
from baton.engine.weights import load_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same small model in one file and in shards."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    root = tmp_path_factory.mktemp("models")
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    return root / "single", root / "shards"


@pytest.fixture
def single(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "single"))


@pytest.fixture
def shards(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[1], tmp_path / "shards"))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(folder, load_model_config(folder))
    return caught.value.message


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_tensor(single: Path) -> None:
    change_tensors(single, lambda tensors: tensors.pop(Q_PROJ))
    message = refusal(single)
    assert Q_PROJ in message
    assert str(single) in message


def test_misshapen_tensor(single: Path) -> None:
    change_tensors(single, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 31)}))
    message = refusal(single)
    assert message.startswith(f"{single / 'model.safetensors'}: {Q_PROJ} is [32, 31]")
    assert "[32, 32]" in message


def test_quantized_tensor(single: Path) -> None:
    integers = torch.zeros(32, 32, dtype=torch.int8)
    change_tensors(single, lambda tensors: tensors.update({Q_PROJ: integers}))
    assert f"{Q_PROJ} is torch.int8" in refusal(single)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"]
)
def test_tensor_that_no_layer_wants(single: Path, name: str) -> None:
    change_tensors(single, lambda tensors: tensors.update({name: torch.zeros(32)}))
    message = refusal(single)
    assert name in message
    assert "model.safetensors" in message


def test_rotary_buffers_of_old_checkpoints_are_ignored(single: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_tensors(single, lambda tensors: tensors.update(buffer))
    assert len(load_weights(single, load_model_config(single)).layers) == 2


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_truncated_file(single: Path, kept_bytes: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    message = refusal(single)
    assert str(path) in message
    assert "truncated" in message


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(single)


def test_missing_shard(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refusal(shards)


def test_broken_index(shards: Path) -> None:
    (shards / INDEX).write_text('{"weight_map": {')
    assert str(shards / INDEX) in refusal(shards)
    (shards / INDEX).write_text("{}")
    assert "weight_map" in refusal(shards)


@pytest.mark.parametrize("name", ["../single/model.safetensors", "/etc/passwd", "."])
def test_index_cannot_lead_out_of_the_folder(shards: Path, name: str) -> None:
    change_index(shards, lambda weight_map: weight_map.update({Q_PROJ: name}))
    assert "file" in refusal(shards)


def test_tied_embedding_may_be_kept_under_either_name(single: Path) -> None:
    config_path = single / "config.json"
    config_path.write_text(
        config_path.read_text().replace(
            '"tie_word_embeddings": false', '"tie_word_embeddings": true'
        )
    )
    config = load_model_config(single)
    embedding = load_file(single / "model.safetensors")["model.embed_tokens.weight"].clone()
    change_tensors(single, lambda tensors: tensors.pop("lm_head.weight"))
    first = load_weights(single, config)
    change_tensors(
        single,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
        ),
    )
    second = load_weights(single, config)
    assert torch.equal(first.embedding, embedding)
    assert torch.equal(second.embedding, embedding)
    assert first.lm_head.data_ptr() == first.embedding.data_ptr()


def test_weights_outlive_the_file(single: Path) -> None:
    weights = load_weights(single, load_model_config(single))
    before = weights.layers[0].down.clone()
    path = single / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(0)
        file.write(bytes(path.stat().st_size))
    assert torch.equal(weights.layers[0].down, before)


def test_weights_id_is_of_the_content_not_the_path(single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "elsewhere"))
    assert weights_id(single) == weights_id(copy)
    change_tensors(copy, lambda tensors: tensors[Q_PROJ][0, 0].add_(1.0))
    assert weights_id(single) != weights_id(copy)
    assert weights_id(single, "dummy") == weights_id(copy, "dummy") != weights_id(single)


def test_weights_id_of_a_broken_file_names_it(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="header claims"):
        weights_id(single)
    path.write_bytes((4).to_bytes(8, "little") + b"{{{{")
    with pytest.raises(ModelError, match="truncated or broken"):
        weights_id(single)
