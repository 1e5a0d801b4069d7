"""A step's chunks as flat tensors: what the forward needs to know, and nothing about requests.

    tokens   | row 0 | row 1 ......... | row 2 | ...      [T], rows in the order of the chunks
    context  each row attends to [0, end) of its own sequence

Rows with one token go through batched attention, the others one by one. This is on the path of
every step: plain lists, and one array made of them; rows are too few for array arithmetic to pay.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from baton.common.ids import Slot
from baton.engine.sequence import Chunk

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows with one token and of like length. `block_table` `[S, N]` is padded with the scratch
    slot; a table less than half as long as another is in another group."""

    # Their tokens among all T; None when they are all tokens, in order.
    token_rows: torch.Tensor | None
    block_table: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row with many tokens: `[first_token, first_token + query_len)` of the batch."""

    first_token: int
    query_len: int
    context_len: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """All tensors are int64 on the host."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    # Where each token's KV goes: the slot and the token's place in its block.
    slots: torch.Tensor
    offsets: torch.Tensor
    highest_position: int
    decode: tuple[DecodeRows, ...]
    prefill: tuple[PrefillRow, ...]
    # Tokens after which the next one is sampled, in chunk order.
    last_tokens: torch.Tensor
    # Slots of blocks that this step begins and does not fill.
    begun_slots: tuple[int, ...]
    # Tokens whose ids are not known yet, with their places among those that the step before
    # samples.
    promised: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def build_batch(chunks: Ordered[Chunk], block_size: int, scratch_slot: Slot) -> Batch:
    """Lay out `chunks`, at least one, each of another sequence and with at least one token."""
    assert chunks, "an idle step launches nothing"
    starts: list[int] = []
    lens: list[int] = []
    last_tokens: list[int] = []
    begun_slots: list[int] = []
    promised: list[tuple[int, int]] = []
    num_tokens = 0
    for chunk in chunks:
        sequence = chunk.sequence
        start, end = chunk.start, chunk.end
        assert start < end, "a chunk is of pending tokens"
        assert len(sequence.slots) * block_size >= end, "the slots must cover the chunk"
        starts.append(start)
        lens.append(chunk.num_tokens)
        place = chunk.promise
        if place is not None:
            promised.append((num_tokens, place))
        num_tokens += chunk.num_tokens
        if chunk.is_last:
            last_tokens.append(num_tokens - 1)
        last_block, filled = divmod(end, block_size)
        if filled and start <= end - filled:
            begun_slots.append(sequence.slots[last_block])
    ends = [start + length for start, length in zip(starts, lens, strict=True)]
    table_SN = _block_table(chunks, [-(-end // block_size) for end in ends], scratch_slot)
    token_ids, positions, slots, offsets = _flat_tokens(chunks, starts, lens, block_size).unbind()
    decode, prefill = _split_rows(table_SN, starts, lens, block_size)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        offsets=offsets,
        highest_position=max(ends) - 1,
        decode=decode,
        prefill=prefill,
        last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
        begun_slots=tuple(begun_slots),
        promised=tuple(promised),
    )


def _block_table(chunks: Ordered[Chunk], num_blocks_S: Ordered[int], scratch_slot: Slot) -> Int64s:
    """`[S, N]`: the slots of each row's context, padded with the scratch slot."""
    width = max(num_blocks_S)
    rows = []
    for chunk, num_blocks in zip(chunks, num_blocks_S, strict=True):
        row = chunk.sequence.slots[:num_blocks]
        row.extend([scratch_slot] * (width - num_blocks))
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def _flat_tokens(
    chunks: Ordered[Chunk], starts: list[int], lens: list[int], block_size: int
) -> torch.Tensor:
    """`[4, T]`: token ids, positions, slots and in-block offsets."""
    columns: tuple[list[int], ...] = ([], [], [], [])
    token_ids, positions, slots, offsets = columns
    for chunk, start, length in zip(chunks, starts, lens, strict=True):
        sequence = chunk.sequence
        token_ids.extend(chunk.token_ids())
        if length == 1:
            block, offset = divmod(start, block_size)
            positions.append(start)
            slots.append(sequence.slots[block])
            offsets.append(offset)
        else:
            span = range(start, start + length)
            positions.extend(span)
            slots.extend([sequence.slots[position // block_size] for position in span])
            offsets.extend([position % block_size for position in span])
    return torch.from_numpy(np.array(columns, dtype=np.int64))


def _split_rows(
    table_SN: Int64s, starts: list[int], lens: list[int], block_size: int
) -> tuple[tuple[DecodeRows, ...], tuple[PrefillRow, ...]]:
    """The rows with one token in groups of like length, each of the others by itself."""
    single: list[tuple[int, int, int]] = []
    prefill: list[PrefillRow] = []
    first_token = 0
    for row, (start, length) in enumerate(zip(starts, lens, strict=True)):
        num_blocks = -(-(start + length) // block_size)
        if length == 1:
            single.append((num_blocks, row, first_token))
        else:
            slots = torch.from_numpy(table_SN[row, :num_blocks])
            prefill.append(PrefillRow(first_token, length, start + length, slots))
        first_token += length
    if len(single) == len(lens) and min(single)[0] * 2 >= table_SN.shape[1]:
        context_lens = torch.tensor([start + 1 for start in starts])
        return (DecodeRows(None, torch.from_numpy(table_SN), context_lens),), ()
    groups: list[list[tuple[int, int, int]]] = []
    for entry in sorted(single, reverse=True):
        # Padding to the longest row of a group at most doubles the work.
        if not groups or entry[0] * 2 < groups[-1][0][0]:
            groups.append([])
        groups[-1].append(entry)
    decode = []
    for group in groups:
        rows, tokens = [entry[1] for entry in group], [entry[2] for entry in group]
        table = torch.from_numpy(table_SN[rows, : group[0][0]])
        context_lens = torch.tensor([starts[row] + 1 for row in rows])
        decode.append(DecodeRows(torch.tensor(tokens), table, context_lens))
    return tuple(decode), tuple(prefill)
