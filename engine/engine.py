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
from baton.engine.checkpoint import LoadFormat, weights_id
from baton.engine.conservation import check_conservation
from baton.engine.device import Device, InlineDevice, ThreadDevice, Ticket
from baton.engine.digests import DigestTable
from baton.engine.kv_cache import KvCache
from baton.engine.model import Model
from baton.engine.model_config import ORACLE, load_model_config
from baton.engine.oracle import ORACLE_WEIGHTS_ID
from baton.engine.oracle_runner import ORACLE_MAX_DELAY_S, OracleRunner
from baton.engine.prefix_cache import PrefixCache, PrefixListener
from baton.engine.runner import ModelRunner, Runner, arena_layout
from baton.engine.sampler import Sampler
from baton.engine.sequence import Chunk, Sequence
from baton.engine.weights import load_weights

DEFAULT_KV_MEMORY_BYTES: Final = 256 * 2**20
# For those who block on a step: far above the longest legal one, so that a hang has an end.
STEP_DEADLINE_S: Final = 600.0


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
    kv_digest: bool = False
    """Keep a digest of each published block and check it before the block is used again."""
    arena_device: str = "cpu"
    """Where the arena lies: "cpu", or "cuda[:ordinal]" for the oracle model."""
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


@dataclass(frozen=True, slots=True)
class _Row:
    """A chunk as it was launched."""

    chunk: Chunk
    is_last: bool
    num_releases: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step: its chunks, the slots that each may write, its tokens to come."""

    rows: tuple[_Row, ...]
    written: tuple[tuple[Slot, ...], ...]
    ticket: Ticket[list[int]]


class Engine:
    """A loaded model and its KV. `randomness` starts the generations, and paces the device of an
    oracle model; sampling is seeded.

    `device` runs the steps and is closed with the engine: by default in place, for an oracle model
    late on a thread of its own. Raises ModelError when the model folder cannot be used, ConfigError
    when the arena cannot be made.
    """

    def __init__(
        self,
        config: EngineConfig,
        randomness: Randomness,
        prefix_listener: PrefixListener | None = None,
        device: Device | None = None,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        load_format: LoadFormat = "dummy" if config.load_format == "dummy" else "safetensors"
        self.model_config = load_model_config(
            config.model, dtype=config.dtype, max_model_len=config.max_model_len
        )
        if config.arena_device != "cpu" and not self._is_oracle:
            raise ConfigError(
                f"arena_device is {config.arena_device!r}, and {self.model_config.architecture} "
                "runs on the CPU; leave it at cpu",
                field="arena_device",
            )
        self.block_size = config.block_size
        layout = arena_layout(self.model_config, config.block_size)
        self.num_blocks = _num_blocks(config, layout.block_bytes)
        self.fingerprint_fields = self.model_config.fingerprint_fields(
            config.block_size,
            ORACLE_WEIGHTS_ID if self._is_oracle else weights_id(config.model, load_format),
        )
        self.fingerprint = fingerprint(self.fingerprint_fields)
        self.arena = Arena(layout, self.num_blocks, config.arena_device)
        self.generations = GenerationTable(self.num_blocks, randomness)
        self.pool = BlockPool(self.num_blocks, self.generations)
        self.prefix = PrefixCache(self.pool, prefix_listener)
        self.digests = DigestTable(self.arena, self.generations) if config.kv_digest else None
        self.kv = KvCache(self.pool, self.prefix, config.block_size, self.digests)
        self.runner: Runner = self._load_runner(config.model, load_format)
        self.sampler = Sampler(self.model_config.eos_token_ids)
        self.device = self._default_device(randomness) if device is None else device
        self._flight: _Flight | None = None
        self._check_invariants = config.check_invariants

    @property
    def _is_oracle(self) -> bool:
        return self.model_config.architecture == ORACLE

    def _load_runner(self, folder: Path, load_format: LoadFormat) -> Runner:
        if self._is_oracle:
            return OracleRunner(self.model_config, self.arena)
        weights = load_weights(folder, self.model_config, load_format)
        return ModelRunner(Model(self.model_config, weights), self.arena)

    def _default_device(self, randomness: Randomness) -> Device:
        if self._is_oracle:
            return ThreadDevice(randomness, ORACLE_MAX_DELAY_S)
        return InlineDevice()

    def new_sequence(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        tenant_key: bytes,
        output: Iterable[int] = (),
    ) -> Sequence:
        """A sequence without blocks. Its blocks are shared within `tenant_key` alone.

        `output` are the tokens that an earlier attempt emitted. The boundary stays that of the
        prompt, so penalties, min_tokens, draws and finish reasons continue as if nothing happened.
        """
        return Sequence(
            tokens=[*prompt, *output],
            prompt_len=len(prompt),
            sampling=sampling,
            tenant_key=tenant_key,
            root=root_hash(tenant_key, self.fingerprint),
        )

    @property
    def in_flight(self) -> bool:
        """Whether a launched step has not been collected."""
        return self._flight is not None

    @property
    def retiring(self) -> list[tuple[Slot, ...]]:
        """The slots that the step in flight may still write, per chunk, each with a pin of its own.

        What a cancelled sequence lets go of meanwhile stays out of every hand until `collect`.
        """
        return [] if self._flight is None else list(self._flight.written)

    def launch(self, chunks: list[Chunk]) -> None:
        """Start a step that forwards the chunks, at least one; `collect` has its outcome.

        Until then no counter moves and no token is appended. The caller may release sequences of
        the step or extend their tables, and must not change their tokens.
        """
        assert self._flight is None, "one step is in flight at most"
        forward = self.runner.prepare(chunks)
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        written = tuple(_written_slots(chunk, self.block_size) for chunk in chunks)
        for slots in written:
            self.kv.pin(slots)
            if self.digests is not None:
                self.digests.forget(slots)
        ticket = self.device.submit(lambda: self.sampler.sample(forward(), last))
        rows = tuple(_Row(chunk, chunk.is_last, chunk.sequence.num_releases) for chunk in chunks)
        self._flight = _Flight(rows, written, ticket)

    def collect(self) -> list[tuple[Sequence, int | None]] | None:
        """The outcome of the launched step: None while it runs, [] when there is none.

        Else each chunk's sequence with the token sampled after it, or None when the chunk was not
        its last, in chunk order. Their counters have moved and their tokens are appended: from now
        on what the step wrote may be published. Sequences released during the flight are left out
        and not changed. Raises what the step raised. Publishing, finishing and releasing are left
        to the caller.
        """
        flight = self._flight
        if flight is None:
            return []
        if not flight.ticket.poll():
            return None
        self._flight = None
        for slots in flight.written:
            self.kv.unpin(reversed(slots))
        sampled = iter(flight.ticket.result())
        outcome: list[tuple[Sequence, int | None]] = []
        for row in flight.rows:
            token = next(sampled) if row.is_last else None
            sequence = row.chunk.sequence
            if sequence.num_releases != row.num_releases:
                continue
            sequence.advance(row.chunk.num_tokens)
            if token is not None:
                assert sequence.num_pending == 0, "the tokens of a launched chunk were changed"
                sequence.tokens.append(token)
            outcome.append((sequence, token))
        return outcome

    def wait(self, timeout_s: float) -> None:
        """Block until the launched step can be collected; InternalError when it takes longer."""
        if self._flight is not None:
            self._flight.ticket.wait(timeout_s)

    def step(self, chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
        """Launch, wait and collect: each sequence that got a token, with the token."""
        self.launch(chunks)
        self.wait(STEP_DEADLINE_S)
        outcome = self.collect()
        assert outcome is not None, "a step that was waited for has ended"
        return [(sequence, token) for sequence, token in outcome if token is not None]

    def close(self) -> None:
        """End the device; no step runs afterwards. Idempotent."""
        self.device.close()

    def check(
        self,
        *,
        sequences: Iterable[Sequence],
        leased: Iterable[Collection[Slot]] = (),
        receiving: Iterable[Collection[Slot]] = (),
        quarantined: Iterable[Collection[Slot]] = (),
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
                retiring=self.retiring,
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


def _written_slots(chunk: Chunk, block_size: int) -> tuple[Slot, ...]:
    """The slots that hold tokens of the chunk."""
    start = chunk.sequence.num_computed
    end = start + chunk.num_tokens
    return tuple(chunk.sequence.slots[start // block_size : -(-end // block_size)])
