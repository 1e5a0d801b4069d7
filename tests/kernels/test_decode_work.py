"""The lists of a decode step: every token once, in a grain that suits, within what is reserved."""

from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import DEVICE

from baton.kernels.decode_work import (
    SETTLED,
    DecodeWork,
    Grain,
    decode_work_bound,
    plan_decode_work,
)

GRAINS: list[Grain] = ["row", "segment", "block"]


def plan(
    context_lens: list[int], num_kv_heads: int = 1, window: int | None = None, **sizes: Any
) -> DecodeWork:
    return plan_decode_work(
        context_lens, 1, 1, num_kv_heads=num_kv_heads, device=DEVICE, window=window, **sizes
    )


def items_of(work: DecodeWork) -> tuple[np.ndarray, np.ndarray]:
    """Items with their plain rows, and merges."""
    lists = work.lists.cpu().numpy().copy()
    num_items, num_merges = lists[0, :2]
    items = lists[1 : 1 + num_items]
    items[:, 0] %= SETTLED
    return items, lists[1 + work.num_items :][:num_merges]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("window", [None, 40])
def test_an_item_is_settled_that_lacks_the_newest_token(grain: Grain, window: int | None) -> None:
    """Its KV was there before the step: the kernel reads it before it waits."""
    context_lens = np.array([1, 16, 64, 65, 100])
    work = plan(context_lens.tolist(), grain=grain, window=window, block=16, segment=32)
    rows, _, ends, _ = work.lists[1 : 1 + work.num_items].cpu().numpy().T
    is_settled = rows >= SETTLED
    assert (is_settled == (ends < context_lens[rows % SETTLED])).all()
    assert (~is_settled).sum() == len(context_lens)


@pytest.mark.parametrize("grain", GRAINS)
def test_items_cover_each_context_once_longest_first(grain: Grain) -> None:
    context_lens = [0, 1, 32, 33, 64, 100]
    items, merges = items_of(plan(context_lens, grain=grain, block=16, segment=32))
    assert list(items[:, 2] - items[:, 1]) == sorted(items[:, 2] - items[:, 1], reverse=True)
    for row, length in enumerate(context_lens):
        own = items[items[:, 0] == row]
        tokens = [t for _, first, end, _ in own for t in range(first, end)]
        assert sorted(tokens) == list(range(length))
        assert (own[:, 3] == -1).all() == (len(own) == 1)
    for row, first_piece, count, before in merges:
        own = items[items[:, 0] == row]
        assert list(own[own[:, 1].argsort(), 3]) == list(range(first_piece, first_piece + count))
        assert before == (0 if grain == "block" else -1)


def test_items_before_the_window_are_left_out() -> None:
    work = plan([100, 20], window=40, grain="segment", block=16, segment=32)
    items, merges = items_of(work)
    assert items.tolist() == [[0, 64, 96, 1], [1, 0, 20, -1], [0, 60, 64, 0], [0, 96, 100, 2]]
    assert merges.tolist() == [[0, 0, 3, -1]]
    items, merges = items_of(plan([100, 20], window=40, grain="block", block=16, segment=64))
    assert sorted(items[items[:, 0] == 0][:, 1].tolist()) == [60, 64, 80, 96]
    assert merges.tolist() == [[0, 0, 4, 3], [1, 4, 2, 0]]


@pytest.mark.parametrize(
    ("context_lens", "grain"),
    [
        ([4096] * 64, "row"),
        (list(range(128, 8193, 128)), "segment"),
        ([32768] * 8, "segment"),
        ([1024] * 64, "row"),
        ([1024] * 256, "row"),
        ([4096] * 16, "segment"),
        ([2048] * 32, "segment"),
        ([32768], "segment"),
        ([8192], "segment"),
        ([4096], "block"),
        ([1024], "block"),
        ([100] * 63 + [32768], "segment"),
        ([], "block"),
    ],
)
def test_grain_is_the_coarsest_that_keeps_the_card_busy(
    context_lens: list[int], grain: Grain
) -> None:
    chosen, by_grain = plan(context_lens, 8), plan(context_lens, 8, grain=grain)
    assert torch.equal(chosen.lists, by_grain.lists)


@pytest.mark.parametrize("window", [None, 5000])
def test_bound_holds_for_whatever_fits_it(window: int | None) -> None:
    for num_rows in (1, 3, 20, 70, 300):
        for longest in (1, 200, 3000, 40_000):
            context_lens = torch.randint(0, longest + 1, (num_rows,)).tolist()
            seen = sum(min(length, window or length) for length in context_lens)
            bound = decode_work_bound(num_rows, seen, 8, window=window)
            work = plan(context_lens, 8, window)
            sizes = work.num_items, work.num_merges, len(work.piece_max)
            assert all(size <= most for size, most in zip(sizes, bound, strict=True))
