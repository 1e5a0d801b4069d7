"""From chunks to logits, in two halves: metadata on the caller's thread, the rest on the device.

    prepare(chunks)   engine thread   reads the sequences, builds the batch; writes nothing
    forward()         device          writes KV into the arena, returns logits

The second half touches no sequence, so that they may change while a step is in flight.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import partial
from typing import Protocol

import torch

from baton.engine.arena import Arena, ArenaLayout
from baton.engine.batch import Batch, build_batch
from baton.engine.model import Model
from baton.engine.model_config import ModelConfig
from baton.engine.sequence import Chunk

# Runs a prepared step and returns fp32 `[n, vocab]`: in order, the logits after the newest token of
# each chunk that is last. All that it writes is final when it returns.
Forward = Callable[[], torch.Tensor]


class Runner(Protocol):
    """A model over an arena."""

    # Work done by this runner: what tests that count recomputation go by.
    tokens_forwarded: int
    steps: int

    def prepare(self, chunks: Ordered[Chunk]) -> Forward:
        """The step that forwards `chunks`, as work for a device.

        It writes the slots of the chunks' tokens; their generations must have been raised before.
        """
        ...


def arena_layout(config: ModelConfig, block_size: int) -> ArenaLayout:
    """The layout of the blocks of a model on one rank."""
    return ArenaLayout(
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=config.torch_dtype,
    )


class ModelRunner:
    """One transformer over one arena, which must have the model's layout."""

    def __init__(self, model: Model, arena: Arena) -> None:
        expected = arena_layout(model.config, arena.layout.block_size)
        assert arena.layout == expected, f"arena {arena.layout}, model {expected}"
        self._model = model
        self._arena = arena
        self.tokens_forwarded = 0
        self.steps = 0

    def prepare(self, chunks: Ordered[Chunk]) -> Forward:
        arena = self._arena
        batch = build_batch(chunks, arena.layout.block_size, arena.scratch_slot)
        return partial(self._execute, batch)

    def _execute(self, batch: Batch) -> torch.Tensor:
        logits = self._model.forward(batch, self._arena.tensor)
        self.tokens_forwarded += batch.num_tokens
        self.steps += 1
        return logits
