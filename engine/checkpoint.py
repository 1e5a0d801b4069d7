"""The safetensors files of a model folder: opened, checked, and named by what is in them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import torch
from safetensors import SafetensorError, safe_open

from baton.common.errors import ModelError
from baton.engine.config_file import ConfigFile
from baton.engine.model_config import ModelConfig

LoadFormat = Literal["safetensors", "dummy"]

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
# Buffers that old checkpoints carry; we compute them from the config.
IGNORED_SUFFIX: Final = "rotary_emb.inv_freq"
DUMMY_WEIGHTS_ID: Final = "dummy-1"
# Bytes read at the start, the middle and the end of each tensor for the identity.
SAMPLE_BYTES: Final = 256
MAX_HEADER_BYTES: Final = 100_000_000


class Checkpoint:
    """The safetensors files of a folder, opened once; knows which tensors were asked for."""

    def __init__(self, folder: Path, config: ModelConfig, open_files: ExitStack) -> None:
        self._folder = folder
        self._config = config
        self._files: dict[Path, Any] = {}
        self._places: dict[str, Path] = {}
        self._asked: set[str] = set()
        for path in shard_paths(folder):
            with _naming(path):
                file = open_files.enter_context(safe_open(path, framework="pt"))
            self._files[path] = file
            self._places.update(dict.fromkeys(file.keys(), path))

    def fill(self, name: str, place: torch.Tensor) -> None:
        """Copy the tensor called `name` into `place`, which has the shape that it must have."""
        tied = self._config.tie_word_embeddings
        if tied and name == EMBEDDING and name not in self._places:
            # Of two tied tensors a checkpoint may keep either.
            name = LM_HEAD
        path = self._places.get(name)
        if path is None:
            raise ModelError(
                f"{self._folder}: no safetensors file has {name}, which "
                f"{self._config.architecture} needs; the checkpoint is incomplete or its "
                "config.json is another model's"
            )
        self._asked.add(name)
        with _naming(path, name):
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        if tensor.shape != place.shape:
            raise ModelError(
                f"{path}: {name} is {list(tensor.shape)}, config.json calls for {list(place.shape)}"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {name} is {tensor.dtype}; quantized weights are unsupported")
        place.copy_(tensor)

    def refuse_leftovers(self) -> None:
        """A tensor that no layer wants means that the result would not be this model's."""
        known = self._asked | ({LM_HEAD} if self._config.tie_word_embeddings else set())
        for name in sorted(self._places.keys() - known):
            if not name.endswith(IGNORED_SUFFIX):
                raise ModelError(
                    f"{self._places[name]}: {name} is unknown to {self._config.architecture} with "
                    "this config.json; a model that ignored it would answer wrongly"
                )


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, by name. Raises `ModelError`."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        raise ModelError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    index = ConfigFile.read(folder / INDEX_FILE)
    weight_map = index.raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.error("weight_map", "must map each tensor to its file")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{folder / INDEX_FILE}: {name!r} is no file name of this folder")
        if not (folder / name).exists():
            raise ModelError(f"{folder / name}: is missing, although {INDEX_FILE} lists it")
    return [folder / name for name in sorted(names)]


def weights_id(folder: Path, load_format: LoadFormat = "safetensors") -> str:
    """A cheap identity of the weights: 32 hex digits that depend on neither path nor file names.

    blake2b over, for each safetensors file in order of name, its size, its header (names, shapes,
    dtypes and places of all tensors) and 256 bytes from the start, the middle and the end of each
    tensor. Equal weights in other shards have another identity. Raises `ModelError`.
    """
    if load_format == "dummy":
        return DUMMY_WEIGHTS_ID
    digest = blake2b(digest_size=16)
    for path in shard_paths(folder):
        with _naming(path), path.open("rb") as file:
            for part in _identifying_parts(path, file):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
    return digest.hexdigest()


def _identifying_parts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    file_bytes = path.stat().st_size
    yield file_bytes.to_bytes(8, "little")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(file_bytes, MAX_HEADER_BYTES):
        raise ModelError(f"{path}: its header claims {header_bytes} of {file_bytes} bytes")
    header = file.read(header_bytes)
    yield header
    spans = sorted(
        tuple(entry["data_offsets"])
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
    )
    for start, end in spans:
        for place in (start, (start + end) // 2, max(start, end - SAMPLE_BYTES)):
            file.seek(8 + header_bytes + place)
            yield file.read(min(SAMPLE_BYTES, end - place))


@contextmanager
def _naming(path: Path, tensor: str = "the file") -> Iterator[None]:
    """Turn what a broken file causes into a `ModelError` that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: {tensor} cannot be read ({error}); the file is truncated or broken, "
            "download it again"
        ) from error
