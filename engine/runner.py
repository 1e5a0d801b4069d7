"""From chunks to logits on the host, in two halves: metadata at once, the rest on the device.

    prepare(chunks)   engine thread   reads the sequences, builds the batch; writes nothing
    forward(sampled)  device          writes KV into the arena, returns logits

The second half touches no sequence, so that they may change while a step is in flight.
"""

from collections.abc import Sequence as Ordered
from functools import partial
from typing import Protocol

import torch

from baton.engine.arena import Arena, ArenaLayout
from baton.engine.batch import Batch, build_batch
from baton.engine.model import Model
from baton.engine.model_config import ModelConfig
from baton.engine.sequence import Chunk


class Forward(Protocol):
    """A prepared step."""

    def __call__(self, sampled: Ordered[int] = ()) -> torch.Tensor:
        """Run it: fp32 `[n, vocab]`, in order the logits after the newest token of each chunk that
        is last. All that it writes is final when it returns.

        `sampled` are the tokens of the step before, of which the chunks take what it promised.
        """
        ...


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

    def _execute(self, batch: Batch, sampled: Ordered[int] = ()) -> torch.Tensor:
        for token, place in batch.promised:
            batch.token_ids[token] = sampled[place]
        logits = self._model.forward(batch, self._arena.tensor)
        self.tokens_forwarded += batch.num_tokens
        self.steps += 1
        return logits
