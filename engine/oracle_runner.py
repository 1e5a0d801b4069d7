"""Runs the oracle model over an arena: writes the KV of a step, reads back all of its contexts.

Selected by `"architectures": ["BatonOracle"]` in config.json; such a folder has no weights. Token
ids are read for the KV to write alone, what comes next is made of the arena's bytes. Rows of a
block beyond its sequence's tokens are no part of a context, and keep what they had.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from baton.common.errors import ModelError
from baton.engine.arena import Arena
from baton.engine.model_config import ModelConfig
from baton.engine.oracle import MAX_VOCAB_SIZE, OracleModel, Words, context_digest
from baton.engine.runner import Forward
from baton.engine.sequence import Chunk
from baton.kernels.block_digest import WORD_BYTES

# So late may a step of this model begin by default.
ORACLE_MAX_DELAY_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class _Step:
    """A prepared step of T tokens; `contexts` are (table, length in tokens) of sampled rows,
    `promised` (token, place among the tokens that the step before samples)."""

    token_T: Words
    position_T: npt.NDArray[np.int64]
    slot_T: npt.NDArray[np.int64]
    contexts: tuple[tuple[tuple[int, ...], int], ...]
    promised: tuple[tuple[int, int], ...]


class OracleRunner:
    """The oracle model over an arena, wherever the arena lies.

    Raises ModelError for KV that is not whole words, or a vocabulary that leaves logits no room.
    """

    def __init__(self, config: ModelConfig, arena: Arena) -> None:
        layout = arena.layout
        row_bytes = layout.head_dim * layout.dtype.itemsize
        if row_bytes % WORD_BYTES:
            raise ModelError(
                f"head_dim {layout.head_dim} of {config.dtype} is {row_bytes} bytes; the oracle "
                f"model needs a multiple of {WORD_BYTES}",
                field="head_dim",
            )
        if config.vocab_size > MAX_VOCAB_SIZE:
            raise ModelError(
                f"vocab_size {config.vocab_size} is above {MAX_VOCAB_SIZE}, the oracle model's",
                field="vocab_size",
            )
        self._block_size = layout.block_size
        # `[slots, kv_heads, layers, 2, block_size, words of head_dim]`
        self._words = arena.tensor.view(torch.int64)
        num_words = layout.block_bytes // WORD_BYTES // layout.block_size
        self._model = OracleModel(config.vocab_size, num_words)
        self.tokens_forwarded = 0
        self.steps = 0

    @property
    def model(self) -> OracleModel:
        return self._model

    def prepare(self, chunks: Ordered[Chunk]) -> Forward:
        assert chunks, "an idle step launches nothing"
        spans = [(chunk.start, chunk.end) for chunk in chunks]
        tables = [
            chunk.sequence.slots[: -(-end // self._block_size)]
            for chunk, (_, end) in zip(chunks, spans, strict=True)
        ]
        tokens = chain.from_iterable(chunk.token_ids() for chunk in chunks)
        firsts = [0, *accumulate(chunk.num_tokens for chunk in chunks)]
        num_tokens = firsts.pop()
        step = _Step(
            token_T=np.fromiter(tokens, np.uint64, num_tokens),
            position_T=np.concatenate([np.arange(*span, dtype=np.int64) for span in spans]),
            # Each row's table, repeated for its tokens by where their block is in it.
            slot_T=np.concatenate(
                [
                    np.asarray(table, dtype=np.int64)[np.arange(*span) // self._block_size]
                    for table, span in zip(tables, spans, strict=True)
                ]
            ),
            contexts=tuple(
                (tuple(table), end)
                for chunk, table, (_, end) in zip(chunks, tables, spans, strict=True)
                if chunk.is_last
            ),
            promised=tuple(
                (first, chunk.promise)
                for first, chunk in zip(firsts, chunks, strict=True)
                if chunk.promise is not None
            ),
        )
        return partial(self._execute, step)

    def _execute(self, step: _Step, sampled: Ordered[int] = ()) -> torch.Tensor:
        for token, place in step.promised:
            step.token_T[token] = sampled[place]
        with torch.inference_mode():
            self._write(step)
            digests = [context_digest(kv) for kv in self._read(step)]
        self.tokens_forwarded += len(step.token_T)
        self.steps += 1
        return torch.from_numpy(self._model.logits(digests))

    def _write(self, step: _Step) -> None:
        words = self._words
        _, num_heads, num_layers, _, block_size, width = words.shape
        kv = self._model.kv_words_at(step.token_T, step.position_T.astype(np.uint64))
        kv_T = torch.from_numpy(kv.view(np.int64)).view(-1, num_heads, num_layers, 2, width)
        slot_T = torch.from_numpy(step.slot_T).to(words.device)
        offset_T = torch.from_numpy(step.position_T % block_size).to(words.device)
        words[slot_T, :, :, :, offset_T] = kv_T.to(words.device)
        if words.is_cuda:
            # The step's last write must be over when its ticket polls true.
            torch.cuda.current_stream(words.device).synchronize()

    def _read(self, step: _Step) -> Iterator[memoryview]:
        """The KV of each sampled row's context, token by token, as one run of words."""
        if not step.contexts:
            return
        slots = torch.tensor([slot for table, _ in step.contexts for slot in table])
        blocks = self._words.index_select(0, slots.to(self._words.device)).cpu().numpy()
        # [N, kv_heads, layers, 2, block_size, words] with the tokens moved to the front.
        words = np.ascontiguousarray(np.moveaxis(blocks, 4, 1)).view(np.uint64).reshape(-1)
        first_block = 0
        for table, num_tokens in step.contexts:
            first = first_block * self._block_size * self._model.num_words
            yield words[first : first + num_tokens * self._model.num_words].data
            first_block += len(table)
