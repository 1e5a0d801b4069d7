"""Paged prefill attention against a plain softmax in fp64 over the contiguous context."""

import pytest
import torch
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    needs_gpu,
    needs_triton,
    normal,
    poisoned,
    relative_error,
)
from support.paged_kv import Shape, make_arena, num_blocks, plain_attention, write_contexts

from baton.kernels.prefill_attention import (
    PrefillTuning,
    plan_prefill,
    prefill_attention,
    prefill_attention_triton,
)
from baton.kernels.prefill_work import plan_prefill_work

SHAPES = [Shape(8, 4, 32, 32), Shape(6, 1, 20, 5), Shape(3, 3, 16, 8), Shape(2, 1, 80, 20)]
LAYER = 2
NARROW = PrefillTuning(block_n=16, num_warps=4, num_stages=2)
# The weights of V are rounded to its dtype on their way into an MMA.
ROUNDED_WEIGHTS = 2


class Rows:
    """Random rows in an arena that is NaN elsewhere, their queries and what they must give."""

    def __init__(
        self,
        shape: Shape,
        lens: list[tuple[int, int]],
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        """`lens` are queries and context of each row."""
        self.shape, self.window = shape, window
        self.query_lens = [query for query, _ in lens]
        self.context_lens = [context for _, context in lens]
        num_slots = num_blocks(self.context_lens, shape.block_size) + 3
        self.arena = make_arena(shape, num_slots, dtype)
        self.contexts, self.table = write_contexts(shape, self.arena, self.context_lens, LAYER)
        self.q = normal(sum(self.query_lens), shape.num_heads, shape.head_dim, dtype=dtype)

    def run(self, tuning: PrefillTuning, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = poisoned(*self.q.shape, dtype=self.q.dtype)
        lse = poisoned(*self.q.shape[:2], dtype=torch.float32)
        work = plan_prefill_work(
            self.query_lens, self.context_lens, block_m, device=DEVICE, window=self.window
        )
        prefill_attention_triton(
            self.q, self.arena, LAYER, self.table.to(DEVICE), work,
            scale=self.shape.scale, out=out, lse_out=lse, tuning=tuning,
        )  # fmt: skip
        return out, lse

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        pairs = [
            plain_attention(q_QHD, context, self.shape.scale, self.window)
            for q_QHD, context in zip(self.q.split(self.query_lens), self.contexts, strict=True)
        ]
        o = torch.cat([o for o, _ in pairs])
        assert relative_error(out, o) < ROUNDED_WEIGHTS * TOLERANCE[self.q.dtype]
        assert relative_error(lse, torch.cat([lse for _, lse in pairs])) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("lens", [(17, 17), (12, 45), (2, 33), (40, 40)])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_plain_attention(
    shape: Shape, lens: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    rows = Rows(shape, [lens], dtype, window)
    rows.arena.nan_to_num_(0.0)  # the reference reads whole blocks
    plan = plan_prefill(rows.table[0].long().to(DEVICE), *lens, rows.arena, window)
    lse = poisoned(*rows.q.shape[:2], dtype=torch.float32)
    out = prefill_attention(rows.q, rows.arena, LAYER, plan, scale=shape.scale, lse_out=lse)
    assert out.dtype == dtype
    rows.check(out, lse)


def test_reference_leaves_out_blocks_that_no_query_sees() -> None:
    arena = make_arena(SHAPES[2], 8, torch.float32)
    plan = plan_prefill(torch.arange(8, device=DEVICE), 4, 64, arena, window=10)
    # Queries at 60..63 see from 51 on: blocks 6 and 7 of 8 tokens.
    assert plan.num_keys == 64 - 6 * 8
    assert len(plan.rows) == 2 * SHAPES[2].num_kv_heads * 2


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(shape: Shape, dtype: torch.dtype) -> None:
    block = shape.block_size
    lens = [(1, 1), (block, block), (0, 9), (3, 2 * block - 1), (20, 50), (block + 1, block + 1)]
    rows = Rows(shape, lens, dtype)
    rows.check(*rows.run(NARROW, block_m=16))


@needs_triton
@pytest.mark.parametrize("window", [1, 7, 33, 100])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]])
def test_window_hides_what_lies_before_it(shape: Shape, window: int) -> None:
    rows = Rows(shape, [(40, 40), (20, 75), (1, 64)], torch.float32, window)
    rows.check(*rows.run(NARROW, block_m=16))


@needs_triton
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_query_heads_share_a_kv_head(group: int) -> None:
    rows = Rows(Shape(2 * group, 2, 16, 8), [(9, 19)], torch.float32)
    rows.check(*rows.run(NARROW, block_m=16))


@needs_triton
@pytest.mark.parametrize("block_m", [32, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_every_tiling_gives_the_same_answer(block_m: int, block_n: int) -> None:
    rows = Rows(SHAPES[0], [(70, 130), (33, 33)], torch.float32)
    tuning = PrefillTuning(block_n=block_n, num_warps=4, num_stages=2)
    rows.check(*rows.run(tuning, block_m=block_m))


@needs_triton
def test_queries_may_be_a_slice_of_wider_tokens() -> None:
    rows = Rows(SHAPES[0], [(5, 40), (9, 9)], torch.float32)
    wide = poisoned(14, 12, 32, dtype=torch.float32)
    wide[:, :8] = rows.q
    rows.q = wide[:, :8]
    rows.check(*rows.run(NARROW, block_m=16))


@needs_triton
def test_no_queries_are_no_work() -> None:
    rows = Rows(SHAPES[0], [(0, 4)], torch.float32)
    out, lse = rows.run(NARROW, block_m=16)
    assert out.shape == (0, 8, 32)
    assert lse.shape == (0, 8)


def test_tiles_cover_each_query_once_most_keys_first() -> None:
    work = plan_prefill_work([20, 0, 8], [50, 5, 8], 16, device=DEVICE)
    assert work.tiles.tolist() == [
        # row, first token, queries, position of the first, end of context, first token seen
        [0, 16, 4, 46, 50, 0],
        [0, 0, 16, 30, 46, 0],
        [2, 20, 8, 0, 8, 0],
    ]
    assert work.cu_query_lens.tolist() == [0, 20, 20, 28]
    assert work.query_lens.tolist() == [20, 0, 8]
    assert work.context_lens.tolist() == [50, 5, 8]


def test_tiles_start_at_the_window_of_their_first_query() -> None:
    work = plan_prefill_work([20], [50], 16, device=DEVICE, window=10)
    assert work.tiles.tolist() == [[0, 0, 16, 30, 46, 21], [0, 16, 4, 46, 50, 37]]


@needs_gpu
def test_the_geometry_of_llama() -> None:
    rows = Rows(Shape(32, 8, 128, 32), [(1, 33), (150, 150), (70, 300)], torch.bfloat16)
    rows.check(*rows.run(PrefillTuning(), block_m=128))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize(
    "shape", [Shape(8, 2, 128, 32), Shape(4, 4, 64, 16), Shape(4, 1, 128, 128), Shape(6, 2, 64, 8)]
)
def test_hopper_kernel_equals_plain_attention(
    shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    """Rows of several tiles, of one query, and tiles whose first keys some queries do not see."""
    from baton.kernels.prefill_attention_hopper import can_attend, prefill_attention_hopper

    rows = Rows(shape, [(257, 600), (64, 64), (1, 77), (130, 131), (90, 411)], dtype, window)
    if not can_attend(rows.q, rows.arena):
        pytest.skip("not a Hopper GPU")
    # It weighs what lies behind a context in its last block with 0: numbers, as the engine sees to,
    # of whatever size. What lies before the windows of all queries of a row is not there.
    for row, (queries, length) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        last = int(rows.table[row, (length - 1) // shape.block_size])
        rows.arena[last, :, LAYER] = rows.arena[last, :, LAYER].nan_to_num(nan=6e4)
        if window is not None:
            first = max(length - queries - window + 1, 0)
            rows.table[row, : first // shape.block_size] = 2**30
    work = plan_prefill_work(rows.query_lens, rows.context_lens, device=DEVICE, window=window)
    out = poisoned(*rows.q.shape, dtype=dtype)
    lse = poisoned(*rows.q.shape[:2], dtype=torch.float32)
    prefill_attention_hopper(
        rows.q, rows.arena, LAYER, rows.table.to(DEVICE), work,
        scale=shape.scale, out=out, lse_out=lse,
    )  # fmt: skip
    rows.check(out, lse)


@needs_gpu
def test_hopper_kernel_takes_scores_of_any_size() -> None:
    """Rows that see nothing of their first tile, at scales where sloppy masks overflow."""
    from baton.kernels.prefill_attention_hopper import can_attend, prefill_attention_hopper

    rows = Rows(Shape(4, 2, 128, 32), [(200, 343), (300, 999)], torch.bfloat16)
    if not can_attend(rows.q, rows.arena):
        pytest.skip("not a Hopper GPU")
    rows.arena.nan_to_num_()
    work = plan_prefill_work(rows.query_lens, rows.context_lens, device=DEVICE)
    table = rows.table.to(DEVICE)
    for scale in (0.1, 3.7, 1e-3):
        out = poisoned(*rows.q.shape, dtype=torch.bfloat16)
        prefill_attention_hopper(rows.q, rows.arena, LAYER, table, work, scale=scale, out=out)
        expected = [
            plain_attention(q_QHD, context, scale)[0]
            for q_QHD, context in zip(rows.q.split(rows.query_lens), rows.contexts, strict=True)
        ]
        assert relative_error(out, torch.cat(expected)) < 2 * TOLERANCE[torch.bfloat16]
