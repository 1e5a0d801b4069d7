"""Which tokens each program of a decode step attends to, worked out once for all layers.

A row's sums have one order, whatever its batch: a block of 64 tokens makes a softmax state, a
segment of 1,024 folds those of its blocks from left to right, a row folds those of its segments.
Blocks and segments lie at multiples of their sizes. How a step's rows are spread over programs
(arXiv:2311.01282) is therefore free, in one of three grains: whole rows, segments, blocks. What is
less than a row leaves its state as a piece, and a merge does the folds that remain.

Legend: S rows, H query heads, K KV heads, D head_dim, P pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Grain = Literal["row", "segment", "block"]

# Tokens; a row's bits depend on them, hence never per batch.
BLOCK: Final = 64
SEGMENT: Final = 16 * BLOCK

# Rows are programs where there are so many,
ROW_PROGRAMS: Final = 256
# none of which has more than this share, so that they end at one time,
LONGEST_SHARE: Final = 0.75
# of what each would have if so many ran at a time: two on each of 132 multiprocessors.
RESIDENT_PROGRAMS: Final = 264
# Else segments are, where there are so many. What is left is a few short rows: blocks are.
SEGMENT_PROGRAMS: Final = 64


# Of an item that lacks the token which this step writes: its KV was complete before the step.
SETTLED: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """What the programs of a step do. Sizes are capacities: a CUDA graph replays other lists.

    `lists` is int32 `[1 + num_items + num_merges, 4]`:
    row 0: items and merges in use, 0, 0;
    then the items, longest first: row of the batch (plus SETTLED if the row's newest token is not
    in it), first token, end, piece (-1: the row's only one, which writes the result itself);
    from row 1 + num_items on the merges: row of the batch, first piece, pieces, and how many blocks
    of its segment lie before the first piece (-1: the pieces are segments).
    """

    lists: torch.Tensor
    num_items: int
    num_merges: int
    # fp32 `[P, H, D]`, `[P, H]`, `[P, H]`: values not yet divided, maximum, sum. In the order of a
    # row's tokens.
    pieces: torch.Tensor
    piece_max: torch.Tensor
    piece_sum: torch.Tensor
    window: int | None
    block: int
    segment: int


def reserve_decode_work(
    num_items: int,
    num_merges: int,
    num_pieces: int,
    num_heads: int,
    head_dim: int,
    *,
    device: torch.device,
    window: int | None = None,
    block: int = BLOCK,
    segment: int = SEGMENT,
) -> DecodeWork:
    """Empty lists for `plan_decode_work` to fill. `decode_work_bound` says how large."""
    assert block & (block - 1) == 0, "blocks are tiles"
    assert segment % block == 0, "segments are whole blocks"
    return DecodeWork(
        lists=torch.zeros(1 + num_items + num_merges, 4, dtype=torch.int32, device=device),
        num_items=num_items,
        num_merges=num_merges,
        window=window,
        block=block,
        segment=segment,
        **_pieces(num_pieces, num_heads, head_dim, device),
    )


def decode_work_bound(
    num_rows: int,
    num_tokens: int,
    num_kv_heads: int,
    *,
    window: int | None = None,
    block: int = BLOCK,
    segment: int = SEGMENT,
) -> tuple[int, int, int]:
    """The items, merges and pieces that suffice for up to `num_rows` rows which see `num_tokens`
    tokens together, whatever grain `plan_decode_work` picks for them. Programs beyond a step's
    items only end, yet each costs its start: bound the tokens closely."""
    # A row adds the parts of its last unit, and of its first where a window cuts that.
    partial = num_rows * (1 if window is None else 2)
    segments = num_tokens // segment + partial
    # Blocks are picked only where segments are too few.
    tokens_in_blocks = min(num_tokens, SEGMENT_PROGRAMS * segment // num_kv_heads)
    items = max(segments, tokens_in_blocks // block + partial)
    return items, num_rows, items


def plan_decode_work(
    context_lens: Sequence[int] | torch.Tensor,
    num_heads: int,
    head_dim: int,
    *,
    num_kv_heads: int,
    device: torch.device,
    window: int | None = None,
    grain: Grain | None = None,
    block: int = BLOCK,
    segment: int = SEGMENT,
    into: DecodeWork | None = None,
) -> DecodeWork:
    """The work of a step, from `context_lens` `[S]` on the host; a row may be empty.

    `grain` None picks by `choose_grain`. One copy to the device, which the host does not wait for.
    `into` keeps its addresses, sizes and window; it must be large enough.
    """
    listed = list_decode_work(
        context_lens, num_kv_heads, window=window, grain=grain, block=block, segment=segment
    )
    if into is None:
        into = reserve_decode_work(
            listed.num_items, listed.num_merges, listed.num_pieces, num_heads, head_dim,
            device=device, window=window, block=block, segment=segment,
        )  # fmt: skip
    assert into.pieces.shape[1:] == (num_heads, head_dim), "reserved for these heads"
    fill_decode_work(into, listed)
    return into


@dataclass(frozen=True, slots=True)
class ListedWork:
    """The work of a step on the host: `items` int64 `[I, 4]` and `merges` `[M, 4]` of
    `DecodeWork.lists`."""

    items: NDArray[np.int64]
    merges: NDArray[np.int64]
    window: int | None
    block: int
    segment: int

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_merges(self) -> int:
        return len(self.merges)

    @property
    def num_pieces(self) -> int:
        return int(self.merges[:, 2].sum())


def list_decode_work(
    context_lens: Sequence[int] | torch.Tensor,
    num_kv_heads: int,
    *,
    window: int | None = None,
    grain: Grain | None = None,
    block: int = BLOCK,
    segment: int = SEGMENT,
) -> ListedWork:
    """The first half of `plan_decode_work`, without a device."""
    context_S = np.asarray(context_lens, dtype=np.int64)
    first_S = np.maximum(context_S - window, 0) if window is not None else np.zeros_like(context_S)
    grain = grain or choose_grain(context_S, first_S, num_kv_heads, segment)
    items, merges = _list_items(context_S, first_S, grain, block, segment)
    return ListedWork(items, merges, window, block, segment)


def fill_decode_work(into: DecodeWork, listed: ListedWork) -> None:
    """The second half: one copy to the device, which the host does not wait for."""
    assert into.window == listed.window, "a graph keeps the window that it was captured with"
    assert (into.block, into.segment) == (listed.block, listed.segment), "bits depend on them"
    packed = torch.from_numpy(pack_lists(listed, into.num_items, into.num_merges))
    assert listed.num_pieces <= len(into.piece_max), "more pieces than reserved"
    if into.lists.is_cuda:
        packed = packed.pin_memory()
    into.lists.copy_(packed, non_blocking=True)


def pack_lists(listed: ListedWork, num_items: int, num_merges: int) -> NDArray[np.int32]:
    """`DecodeWork.lists` with room for so many items and merges, on the host."""
    assert listed.num_items <= num_items, "more items than reserved"
    assert listed.num_merges <= num_merges, "more merges than reserved"
    rows = np.zeros((1 + num_items + num_merges, 4), dtype=np.int32)
    rows[0, :2] = (listed.num_items, listed.num_merges)
    rows[1 : 1 + listed.num_items] = listed.items
    rows[1 + num_items : 1 + num_items + listed.num_merges] = listed.merges
    return rows


def work_over(lists: torch.Tensor, listed: ListedWork, num_heads: int, head_dim: int) -> DecodeWork:
    """The work of `listed`, whose packed `lists` are on the device without room for more."""
    return DecodeWork(
        lists=lists,
        num_items=listed.num_items,
        num_merges=listed.num_merges,
        window=listed.window,
        block=listed.block,
        segment=listed.segment,
        **_pieces(listed.num_pieces, num_heads, head_dim, lists.device),
    )


def _pieces(
    count: int, num_heads: int, head_dim: int, device: torch.device
) -> dict[str, torch.Tensor]:
    return {
        "pieces": torch.empty(count, num_heads, head_dim, device=device),
        "piece_max": torch.empty(count, num_heads, device=device),
        "piece_sum": torch.empty(count, num_heads, device=device),
    }


def choose_grain(
    context_S: NDArray[np.int64],
    first_S: NDArray[np.int64],
    num_kv_heads: int,
    segment: int = SEGMENT,
) -> Grain:
    """The coarsest grain that keeps the card busy (see the constants). Rows see the tokens
    `[first, context)`."""
    seen_S = context_S - first_S
    fair_share = int(seen_S.sum()) * num_kv_heads / RESIDENT_PROGRAMS
    balanced = int(seen_S.max(initial=0)) <= LONGEST_SHARE * fair_share
    if balanced and len(context_S) * num_kv_heads >= ROW_PROGRAMS:
        return "row"
    segments = int(_count_units(context_S, first_S, segment).sum())
    return "segment" if segments * num_kv_heads >= SEGMENT_PROGRAMS else "block"


def _count_units(
    context_S: NDArray[np.int64], first_S: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Units of `size` that each row has tokens in; 1 of an empty row, which still has a result."""
    units_S: NDArray[np.int64] = np.maximum(-(-context_S // size) - first_S // size, 1)
    return units_S


def _list_items(
    context_S: NDArray[np.int64],
    first_S: NDArray[np.int64],
    grain: Grain,
    block: int,
    segment: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Items and merges of `DecodeWork.lists`."""
    longest_context = int(context_S.max(initial=1))
    size = {"row": max(longest_context, 1), "segment": segment, "block": block}[grain]
    first_unit_S = first_S // size
    num_S = _count_units(context_S, first_S, size)
    merged_S = num_S > 1
    pieces_S = np.where(merged_S, num_S, 0)
    first_piece_S = np.cumsum(pieces_S) - pieces_S
    row = np.repeat(np.arange(len(context_S)), num_S)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(num_S) - num_S, num_S)
    start = (first_unit_S[row] + nth) * size
    end = np.minimum(start + size, context_S[row])
    start = np.maximum(start, first_S[row])
    piece = np.where(merged_S[row], first_piece_S[row] + nth, -1)
    longest_first = np.argsort(start - end, kind="stable")
    marked = np.where(end < context_S[row], row + SETTLED, row)
    items = np.stack([marked, start, end, piece], axis=1)[longest_first]
    merged = np.flatnonzero(merged_S)
    before = first_unit_S[merged] % (segment // block) if grain == "block" else -1
    before = np.broadcast_to(before, merged.shape)
    merges = np.stack([merged, first_piece_S[merged], num_S[merged], before], axis=1)
    return items, merges
