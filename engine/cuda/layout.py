"""A step's chunks as one run of numbers, laid out on the host for one copy to the device.

    draws | tokens | tables of decode rows | of prefill rows | last | lists

    tokens   decode rows (one token each), in chunk order | prefill rows, in chunk order       [T]
    last     the tokens after which the next one is sampled, in the order of the chunks        [L]
    lists    the work of decode attention, for each sliding window one behind the other

All are int32. A promised token has the source -1 - place: where the step before leaves it among the
tokens that it samples.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.engine.sampler import Draw
from baton.engine.sequence import Chunk
from baton.kernels.step_inputs import PER_TOKEN

Int32s = npt.NDArray[np.int32]

# Of a sampled token: seed (two words), position, temperature, top-p, min-p, top-k, choice.
PER_DRAW = 8
PADDING_SLOT = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies in `words`, and what the kernels' plans need to know on the host."""

    words: Int32s
    # Tokens with padding, and those without.
    num_rows: int
    num_tokens: int
    decode_lens: Ordered[int]
    decode_width: int
    prefill_lens: Ordered[tuple[int, int]]
    prefill_width: int
    num_last: int
    # The length of each list.
    list_sizes: Ordered[int]
    # Whether token i is the i-th sampled one, so that nothing has to be picked.
    samples_all: bool
    # Blocks that stay partly filled after a row of many tokens: slot and tokens in it.
    tails: Ordered[tuple[int, int]]

    @property
    def num_decode(self) -> int:
        return len(self.decode_lens)

    @property
    def sizes(self) -> list[int]:
        """Of the sections of `words`, in their order; the lists are one."""
        return [
            PER_DRAW * self.num_last,
            PER_TOKEN * self.num_rows,
            self.num_decode * self.decode_width,
            len(self.prefill_lens) * self.prefill_width,
            self.num_last,
            sum(self.list_sizes),
        ]


def lay_out(
    chunks: Ordered[Chunk],
    draws: Ordered[Draw],
    block_size: int,
    *,
    pad_to: int = 0,
    lists: Ordered[Int32s] = (),
) -> Layout:
    """`draws` are those of the chunks that are last. `pad_to` tokens are laid out at least: what
    is not a token has no slot, and sits at position 0."""
    decode = [chunk for chunk in chunks if chunk.num_tokens == 1]
    prefill = [chunk for chunk in chunks if chunk.num_tokens > 1]
    columns = _columns(decode, prefill, block_size)
    num_tokens = columns.shape[1]
    num_rows = max(num_tokens, pad_to)
    last = _last_tokens(chunks, len(decode))
    tables = [_table(group, block_size) for group in (decode, prefill)]
    per_token = np.zeros((PER_TOKEN, num_rows), dtype=np.int32)
    per_token[:, :num_tokens] = columns
    per_token[2, num_tokens:] = PADDING_SLOT
    parts = (_draws(draws), per_token, *tables, np.array(last, dtype=np.int32), *lists)
    return Layout(
        words=np.concatenate([part.ravel() for part in parts]),
        num_rows=num_rows,
        num_tokens=num_tokens,
        decode_lens=[chunk.end for chunk in decode],
        decode_width=tables[0].shape[1],
        prefill_lens=[(chunk.num_tokens, chunk.end) for chunk in prefill],
        prefill_width=tables[1].shape[1],
        num_last=len(last),
        list_sizes=[each.size for each in lists],
        samples_all=len(last) == num_tokens and not prefill,
        tails=[_tail(chunk, block_size) for chunk in prefill if chunk.end % block_size],
    )


def _columns(decode: list[Chunk], prefill: list[Chunk], block_size: int) -> Int32s:
    """`[PER_TOKEN, T]`."""
    singles = np.empty((PER_TOKEN, len(decode)), dtype=np.int32)
    for row, chunk in enumerate(decode):
        place = chunk.promise
        start = chunk.start
        block, offset = divmod(start, block_size)
        source = chunk.sequence.tokens[start] if place is None else -1 - place
        singles[:, row] = (source, start, chunk.sequence.slots[block], offset)
    parts = [singles]
    for chunk in prefill:
        position = np.arange(chunk.start, chunk.end, dtype=np.int32)
        slots = np.array(chunk.sequence.slots, dtype=np.int32)
        parts.append(
            np.stack(
                [
                    np.array(chunk.token_ids(), dtype=np.int32),
                    position,
                    slots[position // block_size],
                    position % block_size,
                ]
            )
        )
    return np.concatenate(parts, axis=1)


def _last_tokens(chunks: Ordered[Chunk], num_decode: int) -> list[int]:
    """Where the last tokens of sampled chunks lie, in the order of the chunks."""
    last = []
    next_decode, next_prefill = 0, num_decode
    for chunk in chunks:
        if chunk.num_tokens == 1:
            token, next_decode = next_decode, next_decode + 1
        else:
            next_prefill += chunk.num_tokens
            token = next_prefill - 1
        if chunk.is_last:
            last.append(token)
    return last


def _table(chunks: list[Chunk], block_size: int) -> Int32s:
    """`[S, N]`: the slots of each context. Padding is never read."""
    num_blocks = [-(-chunk.end // block_size) for chunk in chunks]
    table = np.zeros((len(chunks), max(num_blocks, default=0)), dtype=np.int32)
    for row, chunk, count in zip(table, chunks, num_blocks, strict=True):
        row[:count] = chunk.sequence.slots[:count]
    return table


def _tail(chunk: Chunk, block_size: int) -> tuple[int, int]:
    block, filled = divmod(chunk.end, block_size)
    return chunk.sequence.slots[block], filled


def _draws(draws: Ordered[Draw]) -> Int32s:
    """`[PER_DRAW, L]`. Seeds come first, where eight bytes are aligned."""
    into = np.zeros((PER_DRAW, len(draws)), dtype=np.int32)
    if draws:
        params = [draw.sampling for draw in draws]
        seeds = np.array([each.seed for each in params], dtype=np.uint64)
        into[:2].reshape(-1)[:] = seeds.view(np.int32)
        into[2] = [draw.num_output for draw in draws]
        into[3] = np.array([each.temperature for each in params], dtype=np.float32).view(np.int32)
        into[4] = np.array([each.top_p for each in params], dtype=np.float32).view(np.int32)
        into[5] = np.array([each.min_p for each in params], dtype=np.float32).view(np.int32)
        into[6] = [each.top_k for each in params]
    return into
