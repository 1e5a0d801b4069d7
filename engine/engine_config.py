"""What an engine is built from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.common.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is built from. Raises ConfigError for values that cannot work."""

    model: Path
    """A Hugging Face model folder."""
    dtype: str = "auto"
    """Of weights, activations and KV; "auto" is the checkpoint's."""
    block_size: int = 32
    """Tokens per block."""
    num_blocks: int | None = None
    """Size of the arena in blocks; excludes `kv_memory_bytes`."""
    kv_memory_bytes: int | None = None
    """Size of the arena in bytes, rounded down to blocks. If neither is given: 256 MiB on a CPU; on
    a GPU what is free once weights and workspace are there."""
    max_model_len: int | None = None
    """Longest sequence in tokens; the model's own limit if not given."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"auto" reads safetensors; "dummy" fills seeded random weights."""
    num_threads: int | None = None
    """Threads of one operation on a CPU, for the whole process; torch's choice if not given."""
    kv_digest: bool = False
    """Keep a digest of each published block and check it before the block is used again."""
    device: str = "cpu"
    """Where the model runs and its arena lies: "cpu", "cuda[:ordinal]", or "auto" for a GPU where
    there is one."""
    max_num_seqs: int = 256
    """Sequences of one step. What follows is for a GPU, which is set up for it."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step."""
    gpu_memory_share: float = 1.0
    """Of the GPU's memory, for this engine with its weights; the rest is left to others."""
    cuda_graphs: bool = True
    """Capture decode steps at the start, and replay them."""
    check_invariants: bool = False
    """Let `Engine.check` recount every slot: for tests, it costs O(slots)."""

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.kv_memory_bytes is not None:
            raise ConfigError("num_blocks and kv_memory_bytes are both given; give one of them")
        sizes = {
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "kv_memory_bytes": self.kv_memory_bytes,
            "max_model_len": self.max_model_len,
            "num_threads": self.num_threads,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", field=name)
