"""Paged decode attention against a plain softmax in fp64 over the contiguous context."""

import copy
import ctypes
import mmap

import pytest
import torch
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    HAS_GPU,
    TOLERANCE,
    needs_gpu,
    needs_triton,
    normal,
    poisoned,
    relative_error,
)
from support.paged_kv import Shape, make_arena, num_blocks, plain_attention, write_contexts

from baton.kernels import decode_attention as decode_attention_module
from baton.kernels.decode_attention import (
    DEFAULT_TUNING,
    MERGE_AHEAD,
    DecodeTuning,
    decode_attention,
    decode_attention_triton,
    plan_decode,
)
from baton.kernels.decode_work import (
    DecodeWork,
    Grain,
    decode_work_bound,
    plan_decode_work,
    reserve_decode_work,
)
from baton.kernels.jit import jit, tl
from baton.kernels.softmax_state import fold, nothing

SHAPES = [Shape(8, 4, 32, 32), Shape(6, 1, 20, 5), Shape(3, 3, 16, 8), Shape(4, 1, 80, 20)]
LAYER = 1
GRAINS: list[Grain] = ["row", "segment", "block"]
# Tokens, small so that short rows have segments.
BLOCK, SEGMENT = 16, 64
# The weights of V are rounded to its dtype on their way into an MMA.
ROUNDED_WEIGHTS = 2


@pytest.fixture(autouse=True)
def _merges_cheap_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr(decode_attention_module, "MERGE_AHEAD", 3)


class Rows:
    """Random rows in an arena that is NaN elsewhere, their queries and what they must give."""

    def __init__(
        self,
        shape: Shape,
        context_lens: list[int],
        dtype: torch.dtype,
        window: int | None = None,
        *,
        block: int = BLOCK,
        segment: int = SEGMENT,
    ) -> None:
        self.shape, self.context_lens, self.window = shape, context_lens, window
        self.block, self.segment = block, segment
        num_slots = num_blocks(context_lens, shape.block_size) + 3
        self.arena = make_arena(shape, num_slots, dtype)
        self.contexts, self.table = write_contexts(shape, self.arena, context_lens, LAYER)
        self.q = normal(len(context_lens), shape.num_heads, shape.head_dim, dtype=dtype)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [
            plain_attention(self.q[row : row + 1], context, self.shape.scale, self.window)
            for row, context in enumerate(self.contexts)
        ]
        return torch.cat([o for o, _ in pairs]), torch.cat([lse for _, lse in pairs])

    def plan(self, grain: Grain | None, into: DecodeWork | None = None) -> DecodeWork:
        return plan_decode_work(
            self.context_lens, self.shape.num_heads, self.shape.head_dim,
            num_kv_heads=self.shape.num_kv_heads, device=DEVICE, window=self.window, grain=grain,
            block=self.block, segment=self.segment, into=into,
        )  # fmt: skip

    def run(
        self,
        grain: Grain | None = None,
        work: DecodeWork | None = None,
        tuning: DecodeTuning = DEFAULT_TUNING,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        work = work or self.plan(grain)
        out = poisoned(*self.q.shape, dtype=self.q.dtype)
        lse = poisoned(*self.q.shape[:2], dtype=torch.float32)
        for pieces in (work.pieces, work.piece_max, work.piece_sum):
            pieces.fill_(torch.nan)
        decode_attention_triton(
            self.q, self.arena, LAYER, self.table.to(DEVICE), work,
            scale=self.shape.scale, out=out, lse_out=lse, tuning=tuning,
        )  # fmt: skip
        return out, lse

    def alone(self, row: int) -> "Rows":
        """The same row, in a batch of its own."""
        rows = copy.copy(self)
        rows.context_lens, rows.contexts = [self.context_lens[row]], [self.contexts[row]]
        rows.table, rows.q = self.table[row : row + 1], self.q[row : row + 1]
        return rows

    def check(self, out: torch.Tensor, lse: torch.Tensor, slack: float = 1.0) -> None:
        o, expected_lse = self.expected()
        assert relative_error(out, o) < slack * ROUNDED_WEIGHTS * TOLERANCE[self.q.dtype]
        seen = expected_lse > -torch.inf
        assert relative_error(lse.cpu()[seen], expected_lse[seen]) < 2e-6
        assert (lse.cpu()[~seen] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_plain_attention(
    shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    rows = Rows(shape, [1, 17, 64, 33, 5], dtype, window)
    # The reference reads whole blocks, and padding as slot 0.
    rows.arena.nan_to_num_(0.0)
    table = torch.where(rows.table < len(rows.arena), rows.table, 0).long().to(DEVICE)
    context_lens = torch.tensor(rows.context_lens, device=DEVICE)
    plan = plan_decode(table, context_lens, rows.arena, window)
    lse = poisoned(*rows.q.shape[:2], dtype=torch.float32)
    out = decode_attention(rows.q, rows.arena, LAYER, plan, scale=shape.scale, lse_out=lse)
    assert out.dtype == dtype
    rows.check(out, lse)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(shape: Shape, grain: Grain, dtype: torch.dtype) -> None:
    block = shape.block_size
    rows = Rows(shape, [block - 1, 0, 2 * block, 71], dtype)
    rows.check(*rows.run(grain))


@needs_triton
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("window", [1, 7, 33, 100])
def test_window_hides_what_lies_before_it(window: int, grain: Grain) -> None:
    rows = Rows(SHAPES[1], [70, 1, 33, 131], torch.float32, window)
    rows.check(*rows.run(grain))


@needs_triton
@pytest.mark.parametrize("group", [1, 4, 8, 17])
def test_query_heads_share_a_kv_head(group: int) -> None:
    rows = Rows(Shape(2 * group, 2, 16, 8), [39, 8], torch.float32)
    rows.check(*rows.run("block"))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 90])
def test_a_row_has_the_same_bits_alone_and_in_every_batch_by_every_grain(
    window: int | None, dtype: torch.dtype
) -> None:
    rows = Rows(SHAPES[3], [2 * SEGMENT, 7, 2 * SEGMENT + BLOCK + 3, 0], dtype, window)
    out, lse = rows.run("row")
    rows.check(out, lse)
    assert equal_bits(rows.run("segment"), (out, lse))
    assert equal_bits(rows.run("block"), (out, lse))
    assert equal_bits(rows.alone(0).run("block"), (out[:1], lse[:1]))
    for grain in GRAINS:
        assert equal_bits(rows.alone(2).run(grain), (out[2:3], lse[2:3]))


def equal_bits(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Also of zeros, whose signs a comparison of numbers would not see."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@jit
def _fold_with_nothing(values, out, M: tl.constexpr, D: tl.constexpr):
    place = tl.arange(0, M)[:, None] * D + tl.arange(0, D)[None, :]
    state = tl.load(values + place), tl.full([M], -3.0, tl.float32), tl.full([M], 2.5, tl.float32)
    tl.store(out + place, fold(nothing(M, D), state)[0])
    tl.store(out + M * D + place, fold(state, nothing(M, D))[0])


@needs_triton
def test_nothing_changes_no_bit_of_a_state() -> None:
    values = normal(2, 16, dtype=torch.float32)
    values[0, :4] = torch.tensor([0.0, -0.0, 1e-38, -1e-38])
    out = poisoned(2, 2, 16, dtype=torch.float32)
    _fold_with_nothing[(1,)](values, out, M=2, D=16)
    assert equal_bits((out[0], out[1]), (values, values))


@needs_triton
@pytest.mark.parametrize("window", [None, 16 * 18 - 3])
def test_more_pieces_than_a_merge_loads_ahead(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention_module, "MERGE_AHEAD", MERGE_AHEAD)
    rows = Rows(Shape(2, 1, 16, 8), [16 * 33 + 3], torch.float32, window, segment=48)
    count = 34 if window is None else 19
    assert len(rows.plan("block").piece_max) == count > MERGE_AHEAD
    out, lse = rows.run("row")
    rows.check(out, lse)
    assert equal_bits(rows.run("block"), (out, lse))
    assert equal_bits(rows.run("segment"), (out, lse))


@needs_triton
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("loud", [0, 2, 5])
def test_parts_of_very_different_weight(loud: int, grain: Grain) -> None:
    """Scores of about ±300 in one block: its share is all or nothing, and nothing overflows."""
    rows = Rows(Shape(4, 1, 16, 8), [96, 96], torch.float32)
    for row, context in enumerate(rows.contexts):
        span = slice(16 * loud, 16 * loud + 16)
        context[0, span] *= 100
        slots = rows.table[row, 2 * loud : 2 * loud + 2].long().to(DEVICE)
        rows.arena[slots, :, LAYER, 0] *= 100
    # A score of 300 is rounded to 3e-5, and that is the error of its weight.
    rows.check(*rows.run(grain), slack=8)


@needs_triton
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("grain", GRAINS)
def test_slots_outside_the_context_and_window_are_never_read(
    grain: Grain, window: int | None
) -> None:
    """Bytes at such a slot lie 2^42 behind the arena: a read ends the process."""
    rows = Rows(SHAPES[3], [SEGMENT, 3 * BLOCK + 1, 2 * SEGMENT + 5, 0], torch.float32, window)
    rows.table = torch.nn.functional.pad(rows.table, (3, 40), value=2**30)[:, 3:]
    for row, length in enumerate(rows.context_lens):
        assert (rows.table[row, num_blocks([length], 20) :] == 2**30).all()
        rows.table[row, : max(0, length - (window or length)) // 20] = 2**30
    rows.check(*rows.run(grain))


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="pages of the host")
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("length", [BLOCK + 1, 2 * SEGMENT, 2 * SEGMENT - 3])
def test_table_is_not_read_past_the_context(grain: Grain, length: int) -> None:
    """It ends where a page does, and nobody may read the next: that ends the process."""
    rows = Rows(SHAPES[1], [length], torch.float32)
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.c_void_p(address + mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    count = rows.table.shape[1]
    table = torch.frombuffer(
        memory, dtype=torch.int32, count=count, offset=mmap.PAGESIZE - 4 * count
    )
    rows.table = table.copy_(rows.table[0])[None]
    rows.check(*rows.run(grain))


@needs_triton
def test_reserved_lists_are_planned_anew_in_any_grain() -> None:
    shape = Shape(4, 1, 16, 8)
    bound = decode_work_bound(3, 300, 1, block=BLOCK, segment=SEGMENT)
    sizes = {"device": DEVICE, "block": BLOCK, "segment": SEGMENT}
    work = reserve_decode_work(*bound, 4, 16, **sizes)
    addresses = [work.lists.data_ptr(), work.pieces.data_ptr(), work.piece_max.data_ptr()]
    plans: list[tuple[list[int], Grain | None]] = [
        ([200, 7, 64], "block"),
        ([5, 0], "row"),
        ([150, 70], "segment"),
        ([], None),
        ([65], "block"),
    ]
    for context_lens, grain in plans:
        rows = Rows(shape, context_lens or [1], torch.float32)
        if context_lens:
            assert rows.plan(grain, into=work) is work
            rows.check(*rows.run(work=work))
            assert equal_bits(rows.run(work=work), rows.run("row"))
        else:
            rows.context_lens = []
            rows.plan(grain, into=work)
            assert torch.isnan(rows.run(work=work)[0]).all()
    assert addresses == [work.lists.data_ptr(), work.pieces.data_ptr(), work.piece_max.data_ptr()]
    with pytest.raises(AssertionError, match="more items"):
        plan_decode_work([BLOCK * 99], 4, 16, num_kv_heads=1, grain="block", into=work, **sizes)
    with pytest.raises(AssertionError, match="bits depend"):
        plan_decode_work([5], 4, 16, num_kv_heads=1, into=work, device=DEVICE)


@needs_triton
def test_queries_may_be_a_slice_of_wider_rows() -> None:
    rows = Rows(SHAPES[0], [40, 9], torch.float32)
    wide = poisoned(2, 12, 32, dtype=torch.float32)
    wide[:, :8] = rows.q
    rows.q = wide[:, :8]
    rows.check(*rows.run("segment"))


@needs_triton
def test_no_rows_are_no_work() -> None:
    rows = Rows(SHAPES[0], [4], torch.float32)
    work = plan_decode_work([], 8, 32, num_kv_heads=4, device=DEVICE)
    table = rows.table[:0].to(DEVICE)
    out = decode_attention_triton(rows.q[:0], rows.arena, 0, table, work, scale=1.0)
    assert out.shape == (0, 8, 32)


@needs_gpu
@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize(
    ("block", "segment", "tuning"),
    [
        (128, 512, DecodeTuning()),
        (128, 2048, DecodeTuning(num_warps=8, num_stages=3)),
        (64, 512, DecodeTuning(num_stages=3, max_registers=168)),
        (64, 1024, DecodeTuning(num_stages=4)),
    ],
)
def test_the_geometry_of_llama(
    block: int, segment: int, tuning: DecodeTuning, window: int | None
) -> None:
    sizes = {"block": block, "segment": segment}
    lengths = [1, 33, 700, 2049, 6500]
    rows = Rows(Shape(32, 8, 128, 32), lengths, torch.bfloat16, window, **sizes)
    out, lse = rows.run("row", tuning=tuning)
    rows.check(out, lse)
    assert equal_bits(rows.run("segment", tuning=tuning), (out, lse))
    assert equal_bits(rows.run("block", tuning=tuning), (out, lse))
