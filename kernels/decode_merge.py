"""Putting the pieces of rows together: what decode attention left of rows that were cut.

A row's sums have one order (see `decode_work`): blocks fold into segments, segments into the row.
"""

from baton.kernels.jit import gdc_launch_dependents, gdc_wait, jit, tl, triton
from baton.kernels.softmax_state import finish, fold, nothing


@jit
def fold_block(row, part, block, end, SEGMENT: tl.constexpr):
    """Fold a block that ends at `end` into its segment, and that into the row where both end."""
    part = fold(part, block)
    if end % SEGMENT == 0:
        row = fold(row, part)
        part = nothing(part[0].shape[0], part[0].shape[1])
    return row, part


@triton.jit(do_not_specialize=["merges_at"])
def merge_kernel(
    lists, out, lse_out, pieces, piece_max, piece_sum, merges_at,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr, AHEAD: tl.constexpr, HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (h, i): query head h of merge i, folded piece after piece by one warp."""
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    entry = lists + 4 * (merges_at + tl.program_id(1))
    num_merges = tl.load(lists + 1)
    row, first, count, before = load_entry(entry)
    if PDL:
        # Also where nothing is merged: whoever waits for this kernel waits for those before it.
        gdc_wait()
    if tl.program_id(1) < num_merges:
        end = first + count
        merged = nothing(1, DIM_PADDED)
        part = nothing(1, DIM_PADDED)
        states = _load_pieces(
            pieces, piece_max, piece_sum, first, end, head, NUM_HEADS, HEAD_DIM, DIM_PADDED, AHEAD
        )
        for start in range(first, end, AHEAD):
            following = _load_pieces(
                pieces, piece_max, piece_sum, start + AHEAD, end, head,
                NUM_HEADS, HEAD_DIM, DIM_PADDED, AHEAD,
            )  # fmt: skip
            if before < 0:
                for nth in tl.static_range(AHEAD):
                    merged = fold(merged, states[nth])
            else:
                done = before + start - first
                for nth in tl.static_range(AHEAD):
                    merged, part = fold_block(
                        merged, part, states[nth], done + nth + 1, SEGMENT_BLOCKS
                    )
            states = following
        attended, row_max, row_sum = fold(merged, part)
        o, lse = finish(attended, row_max, row_sum)
        dim = tl.arange(0, DIM_PADDED)[None, :]
        place = row.to(tl.int64) * NUM_HEADS + head
        tl.store(out + place * HEAD_DIM + dim, o.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
        if HAS_LSE:
            tl.store(lse_out + place + tl.arange(0, 1), lse)


@jit
def load_entry(entry):
    """The four numbers of an entry of the lists, which may be read before `gdc_wait()`, as block
    tables may: they were there before the first kernel of the step began."""
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@jit
def _load_pieces(
    pieces, piece_max, piece_sum, start, end, head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The states of the pieces `[start, start + AHEAD)`; of nothing from `end` on."""
    dim = tl.arange(0, DIM_PADDED)[None, :]
    no_values, no_max, no_sum = nothing(1, DIM_PADDED)
    piece = start + tl.arange(0, 1)
    place = piece.to(tl.int64) * NUM_HEADS + head
    states = ()
    for nth in tl.static_range(AHEAD):
        seen = piece + nth < end
        mask = seen[:, None] & (dim < HEAD_DIM)
        at = place + nth * NUM_HEADS
        values = tl.load(pieces + at[:, None] * HEAD_DIM + dim, mask=mask, other=no_values)
        row_max = tl.load(piece_max + at, mask=seen, other=no_max)
        row_sum = tl.load(piece_sum + at, mask=seen, other=no_sum)
        states += ((values, row_max, row_sum),)  # type: ignore[assignment]
    return states
