"""Which decode steps a captured graph has room for."""

from random import Random

import pytest

from baton.engine.cuda.graphs import graph_sizes, row_sizes, smallest_fit
from baton.kernels.decode_work import list_decode_work

KV_HEADS = 8
MAX_ROWS, MAX_TOKENS = 100, 200_000


@pytest.mark.parametrize("max_rows", [1, 3, 64, 100, 256, 300, 1000])
def test_rows_are_padded_little_and_never_cut(max_rows: int) -> None:
    sizes = row_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        padded = next(size for size in sizes if size >= rows)
        assert padded < 2 * rows or rows == 1
        assert padded - rows < 64


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("seed", range(40))
def test_every_step_that_the_arena_can_hold_has_a_graph(seed: int, window: int | None) -> None:
    """One row or many, even or ragged, short or as long as all of the arena."""
    random = Random(seed)
    sizes = graph_sizes(MAX_ROWS, MAX_TOKENS, KV_HEADS, windowed=window is not None)
    rows = random.choice([1, 2, 5, 63, MAX_ROWS])
    longest = MAX_TOKENS // rows
    shapes = [[longest] * rows, [random.randint(1, longest) for _ in range(rows)], [1] * rows]
    for context_lens in [*shapes, [longest] + [1] * (rows - 1)]:
        listed = {window: list_decode_work(context_lens, KV_HEADS, window=window)}
        size = smallest_fit(sizes, rows, listed)
        assert size is not None
        assert size.num_rows == next(each for each in row_sizes(MAX_ROWS) if each >= rows)
        assert size.num_items >= listed[window].num_items
        assert size.num_merges >= listed[window].num_merges


def test_rows_that_share_blocks_may_see_more_than_the_arena_holds() -> None:
    """Even rows are one item each, whatever they see; ragged ones run kernel by kernel."""
    sizes = graph_sizes(MAX_ROWS, MAX_TOKENS, KV_HEADS, windowed=False)
    even = {None: list_decode_work([100_000] * MAX_ROWS, KV_HEADS)}
    assert smallest_fit(sizes, MAX_ROWS, even) is not None
    ragged = {None: list_decode_work([1_000_000] + [100_000] * 30, KV_HEADS)}
    assert smallest_fit(sizes, 31, ragged) is None


def test_more_rows_than_graphs_are_of_have_none() -> None:
    sizes = graph_sizes(MAX_ROWS, MAX_TOKENS, KV_HEADS, windowed=False)
    rows = MAX_ROWS + 1
    assert smallest_fit(sizes, rows, {None: list_decode_work([10] * rows, KV_HEADS)}) is None
