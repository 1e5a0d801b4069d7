"""Runs chunks through the model and moves the progress counters of their sequences."""

from collections.abc import Sequence as Ordered

import torch

from baton.engine.arena import Arena, ArenaLayout
from baton.engine.batch import build_batch
from baton.engine.model import Model
from baton.engine.model_config import ModelConfig
from baton.engine.sequence import Chunk


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
    """One model over one arena, which must have the model's layout."""

    def __init__(self, model: Model, arena: Arena) -> None:
        expected = arena_layout(model.config, arena.layout.block_size)
        assert arena.layout == expected, f"arena {arena.layout}, model {expected}"
        self._model = model
        self._arena = arena
        # Work done by this runner: the oracle of tests that count recomputation.
        self.tokens_forwarded = 0
        self.steps = 0

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    def forward(self, chunks: Ordered[Chunk]) -> torch.Tensor:
        """Forward `chunks` in one step and return fp32 `[n, vocab]`: in order, the logits after
        the newest token of each chunk that is last.

        Writes the slots of the chunks' tokens; their generations must have been raised before.
        """
        batch = build_batch(chunks, self._arena.layout.block_size, self._arena.scratch_slot)
        logits = self._model.forward(batch, self._arena.tensor)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            chunk.sequence.num_forwarded += chunk.num_tokens
        self.tokens_forwarded += batch.num_tokens
        self.steps += 1
        return logits
