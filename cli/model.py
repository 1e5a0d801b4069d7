"""`baton model`: what a model folder holds, before it is served."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from baton.cli.config_flags import convert_bytes
from baton.cli.flags import JsonFlag
from baton.cli.model_folder import resolve_model, shipped_model
from baton.cli.serve import ModelArgument
from baton.cli.terminal import human_bytes, show_json, show_table
from baton.common.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Counts in tokens and elements, memory in bytes."""

    folder: str
    architecture: str
    dtype: str
    # None when the weights are not here: they are not fetched to be counted.
    parameters: int | None
    weight_bytes: int | None
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    block_size: int
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    kv_memory: int
    # What fits in `kv_memory`.
    num_blocks: int
    num_tokens: int


def inspect(
    model: ModelArgument = None,
    /,
    *,
    revision: Annotated[str | None, Parameter(help="of ORG/NAME on the hub")] = None,
    dtype: Annotated[str, Parameter(help="auto, float32, float16 or bfloat16")] = "auto",
    max_model_len: Annotated[int | None, Parameter(help="longest prompt plus output")] = None,
    block_size: Annotated[int, Parameter(help="tokens per KV block")] = 32,
    kv_memory: Annotated[
        int | None, Parameter(converter=convert_bytes, help="such as 512M or 2G [default: 256M]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """What MODEL is, what its KV takes, and how much of it fits in --kv-memory.

    Without one, it is baton-tiny, which ships with Baton.
    """
    facts = _facts(
        model or str(shipped_model()), revision, dtype, max_model_len, block_size, kv_memory
    )
    if as_json:
        show_json(facts)
        return
    show_table(
        ("", ""),
        [
            ("folder", facts.folder),
            ("architecture", facts.architecture),
            ("parameters", _or_absent(facts.parameters, "{:,}".format)),
            ("weights", _or_absent(facts.weight_bytes, human_bytes)),
            ("dtype", facts.dtype),
            ("layers", facts.num_layers),
            ("hidden size", facts.hidden_size),
            ("heads", f"{facts.num_heads}, {facts.num_kv_heads} of KV, {facts.head_dim} wide"),
            ("vocabulary", f"{facts.vocab_size:,}"),
            ("longest sequence", f"{facts.max_model_len:,} tokens"),
            ("KV per token", human_bytes(facts.kv_bytes_per_token)),
            ("KV per block", f"{human_bytes(facts.kv_bytes_per_block)}, {block_size} tokens"),
            (
                f"in {human_bytes(facts.kv_memory)}",
                f"{facts.num_blocks:,} blocks, {facts.num_tokens:,} tokens",
            ),
        ],
    )


def _facts(
    model: str,
    revision: str | None,
    dtype: str,
    max_model_len: int | None,
    block_size: int,
    kv_memory: int | None,
) -> ModelFacts:
    try:
        from baton.engine.assembly import DEFAULT_KV_MEMORY_BYTES
        from baton.engine.model_config import load_model_config
        from baton.engine.runner import arena_layout
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`baton model inspect` needs the engine's packages, and {error.name} is not "
            "installed; pip install torch, then 'kvbaton[cpu]'"
        ) from error
    if block_size < 1:
        raise ConfigError(f"--block-size is {block_size}; it must be at least 1")
    folder = resolve_model(model, revision, with_weights=False)
    config = load_model_config(folder, dtype=dtype, max_model_len=max_model_len)
    block_bytes = arena_layout(config, block_size).block_bytes
    memory = DEFAULT_KV_MEMORY_BYTES if kv_memory is None else kv_memory
    shapes = _tensor_shapes(folder)
    return ModelFacts(
        folder=str(folder),
        architecture=config.architecture,
        dtype=config.dtype,
        parameters=sum(prod(shape) for shape in shapes) if shapes else None,
        weight_bytes=sum(path.stat().st_size for path in _shards(folder)) if shapes else None,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        block_size=block_size,
        kv_bytes_per_token=block_bytes // block_size,
        kv_bytes_per_block=block_bytes,
        kv_memory=memory,
        num_blocks=memory // block_bytes,
        num_tokens=memory // block_bytes * block_size,
    )


def _or_absent(count: int | None, show: Callable[[int], str]) -> str:
    return "not fetched" if count is None else show(count)


def _shards(folder: Path) -> list[Path]:
    if not any(folder.glob("*.safetensors")):
        return []
    from baton.engine.checkpoint import shard_paths

    return shard_paths(folder)


def _tensor_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Of all tensors in the folder's safetensors files, from their headers alone."""
    shapes: list[tuple[int, ...]] = []
    for path in _shards(folder):
        try:
            with path.open("rb") as file:
                num_header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(num_header_bytes))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            shapes.extend(tuple(entry["shape"]) for entry in entries)
            num_bytes = max((entry["data_offsets"][1] for entry in entries), default=0)
            if path.stat().st_size != 8 + num_header_bytes + num_bytes:
                raise ValueError("the file is shorter or longer than its header says")
        except (LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
            raise ModelError(f"{path}: no safetensors file, or a truncated one") from error
    return shapes
