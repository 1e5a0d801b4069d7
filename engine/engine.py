"""One model on one rank, assembled: weights, arena, pool, prefix cache, runner, sampler.

The engine runs what it is told to; which chunks make a step is the business of a scheduler. All of
it belongs to one thread.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from baton.common.block_hash import root_hash
from baton.common.errors import ConfigError
from baton.common.fingerprint import fingerprint
from baton.common.ids import Slot
from baton.common.randomness import Randomness
from baton.common.sampling import SamplingParams
from baton.engine.arena import Arena, GenerationTable
from baton.engine.block_pool import BlockPool
from baton.engine.checkpoint import weights_id
from baton.engine.conservation import check_conservation
from baton.engine.kv_cache import KvCache
from baton.engine.model import Model
from baton.engine.model_config import load_model_config
from baton.engine.prefix_cache import PrefixCache, PrefixListener
from baton.engine.runner import ModelRunner, arena_layout
from baton.engine.sampler import Sampler
from baton.engine.sequence import Chunk, Sequence
from baton.engine.weights import load_weights

DEFAULT_KV_MEMORY_BYTES: Final = 256 * 2**20


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
    """Size of the arena in bytes, rounded down to blocks; 256 MiB if neither is given."""
    max_model_len: int | None = None
    """Longest sequence in tokens; the model's own limit if not given."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"auto" reads safetensors; "dummy" fills seeded random weights."""
    num_threads: int | None = None
    """Threads of one operation on a CPU, for the whole process; torch's choice if not given."""
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
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", field=name)


class Engine:
    """A loaded model and its KV. `randomness` only starts the generations; sampling is seeded.

    Raises ModelError when the model folder cannot be used, ConfigError when the arena cannot be
    made.
    """

    def __init__(
        self,
        config: EngineConfig,
        randomness: Randomness,
        prefix_listener: PrefixListener | None = None,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        load_format: Literal["safetensors", "dummy"] = (
            "dummy" if config.load_format == "dummy" else "safetensors"
        )
        self.model_config = load_model_config(
            config.model, dtype=config.dtype, max_model_len=config.max_model_len
        )
        self.block_size = config.block_size
        layout = arena_layout(self.model_config, config.block_size)
        self.num_blocks = _num_blocks(config, layout.block_bytes)
        self.fingerprint_fields = self.model_config.fingerprint_fields(
            config.block_size, weights_id(config.model, load_format)
        )
        self.fingerprint = fingerprint(self.fingerprint_fields)
        self.arena = Arena(layout, self.num_blocks)
        self.generations = GenerationTable(self.num_blocks, randomness)
        self.pool = BlockPool(self.num_blocks, self.generations)
        self.prefix = PrefixCache(self.pool, prefix_listener)
        self.kv = KvCache(self.pool, self.prefix, config.block_size)
        weights = load_weights(config.model, self.model_config, load_format)
        self.runner = ModelRunner(Model(self.model_config, weights), self.arena)
        self.sampler = Sampler(self.model_config.eos_token_ids)
        self._check_invariants = config.check_invariants

    def new_sequence(
        self, prompt: list[int], sampling: SamplingParams, tenant_key: bytes
    ) -> Sequence:
        """A sequence without blocks. Its blocks are shared within `tenant_key` alone."""
        return Sequence(
            tokens=list(prompt),
            prompt_len=len(prompt),
            sampling=sampling,
            tenant_key=tenant_key,
            root=root_hash(tenant_key, self.fingerprint),
        )

    def step(self, chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
        """Forward the chunks; sample and append one token for each that is its sequence's last.

        Publishing, finishing and releasing are left to the caller.
        """
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        logits = self.runner.forward(chunks)
        sampled = list(zip(last, self.sampler.sample(logits, last), strict=True))
        for sequence, token in sampled:
            sequence.tokens.append(token)
        return sampled

    def check(
        self,
        *,
        sequences: Iterable[Sequence],
        leased: Iterable[Collection[Slot]] = (),
        receiving: Iterable[Collection[Slot]] = (),
        quarantined: Iterable[Collection[Slot]] = (),
        retiring: Iterable[Collection[Slot]] = (),
    ) -> None:
        """`check_conservation` of this engine's slots, if its config asks for it."""
        if self._check_invariants:
            check_conservation(
                self.pool,
                self.prefix,
                sequences=sequences,
                leased=leased,
                receiving=receiving,
                quarantined=quarantined,
                retiring=retiring,
            )


def _num_blocks(config: EngineConfig, block_bytes: int) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory_bytes is None:
        return max(1, DEFAULT_KV_MEMORY_BYTES // block_bytes)
    if config.kv_memory_bytes < block_bytes:
        raise ConfigError(
            f"kv_memory_bytes {config.kv_memory_bytes} holds no block: one of "
            f"{config.block_size} tokens takes {block_bytes} bytes; give more memory",
            field="kv_memory_bytes",
        )
    return config.kv_memory_bytes // block_bytes
