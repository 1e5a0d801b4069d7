"""Rotation and the write of K and V against fp64, and what must stay as it was."""

import math
from dataclasses import dataclass, replace

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

from baton.kernels.rotary_write import rotary_write, rotary_write_triton

LAYERS, LAYER, BLOCK_SIZE, SLOTS, POSITIONS = 3, 1, 4, 6, 40
EPS = 1e-6
# Tokens, query heads, KV heads, head_dim: many groups, one KV head, heads that fill no tile.
SHAPES = [
    (1, 4, 4, 64),
    (9, 20, 10, 128),
    (5, 3, 1, 80),
    (3, 6, 3, 96),
    (2, 2, 1, 256),
    (7, 2, 2, 6),
]


@dataclass(frozen=True)
class Inputs:
    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    arena: torch.Tensor

    def fresh(self) -> "Inputs":
        return replace(self, qkv=self.qkv.clone(), arena=self.arena.clone())

    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        return (
            *(self.qkv, self.cos, self.sin, self.positions),
            *(self.slots, self.offsets, self.arena, LAYER),
        )


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    table: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
) -> Inputs:
    tokens, heads, kv_heads, head_dim = shape
    exponents = torch.arange(0, head_dim, 2) / head_dim
    angles = torch.outer(torch.arange(POSITIONS), 10000.0**-exponents).to(DEVICE)
    places = torch.randperm(SLOTS * BLOCK_SIZE)[:tokens].to(DEVICE)
    slots = places // BLOCK_SIZE
    slots[1::3] = -1
    return Inputs(
        qkv=normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        cos=angles.cos().to(table),
        sin=angles.sin().to(table),
        positions=torch.randint(0, POSITIONS, (tokens,)).to(ids).to(DEVICE),
        slots=slots.to(ids),
        offsets=(places % BLOCK_SIZE).to(ids),
        arena=poisoned(SLOTS, kv_heads, LAYERS, 2, BLOCK_SIZE, head_dim, dtype=dtype),
    )


def exact(given: Inputs, qk_norm: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Q, K and V `[T, heads, D]` in fp64."""
    kv_heads, head_dim = given.arena.shape[1], given.arena.shape[-1]
    x = given.qkv.double().view(len(given.qkv), -1, head_dim)
    num_rotated = x.shape[1] - kv_heads
    qk = x[:, :num_rotated]
    if qk_norm is not None:
        qk = qk / (qk.square().mean(-1, keepdim=True) + EPS).sqrt() * qk_norm.double()
    a, b = qk.chunk(2, dim=-1)
    c = given.cos.double()[given.positions.long()][:, None]
    s = given.sin.double()[given.positions.long()][:, None]
    qk = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return qk[:, : num_rotated - kv_heads], qk[:, num_rotated - kv_heads :], x[:, num_rotated:]


def check_arena(given: Inputs, k: torch.Tensor, v: torch.Tensor, tolerance: float) -> None:
    """K and V at their places, and the poison everywhere else."""
    expected = torch.full_like(given.arena, math.nan, dtype=torch.float64)
    for token, slot in enumerate(given.slots.tolist()):
        if slot >= 0:
            offset = int(given.offsets[token])
            expected[slot, :, LAYER, 0, offset] = k[token]
            expected[slot, :, LAYER, 1, offset] = v[token]
    assert torch.equal(given.arena.isnan(), expected.isnan()), "no other place was touched"
    assert relative_error(given.arena.nan_to_num(), expected.nan_to_num()) < tolerance
    if bool((given.slots >= 0).any()):
        written = given.arena[:, :, LAYER, 1].double()
        assert torch.equal(written.nan_to_num(), expected[:, :, LAYER, 1].nan_to_num()), "V as is"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_fp64(
    shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    given = inputs(shape, dtype)
    qk_norm = normal(shape[1] + shape[2], shape[3], dtype=dtype) if normed else None
    q, k, v = exact(given, qk_norm)
    run = given.fresh()
    out = rotary_write(*run.arguments(), qk_norm=qk_norm, eps=EPS)
    # The angles, the normed head and both products are rounded.
    assert relative_error(out, q) < 4 * TOLERANCE[dtype]
    check_arena(run, k, v, 4 * TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(
    shape: tuple[int, int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    given = inputs(shape, dtype)
    qk_norm = normal(shape[1] + shape[2], shape[3], dtype=dtype) if normed else None
    q, k, v = exact(given, qk_norm)
    run = given.fresh()
    q_out = poisoned(*q.shape, dtype=dtype)
    assert rotary_write_triton(*run.arguments(), q_out, qk_norm, EPS) is q_out
    assert relative_error(q_out, q) < TOLERANCE[dtype]
    check_arena(run, k, v, TOLERANCE[dtype])
    assert torch.equal(run.qkv, given.qkv), "nothing is rotated twice"


@needs_triton
@pytest.mark.parametrize("table", [torch.float32, torch.float16])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_q_in_place(ids: torch.dtype, table: torch.dtype) -> None:
    given = inputs((5, 4, 2, 32), torch.float16, table, ids)
    q, k, v = exact(given, None)
    run = given.fresh()
    out = rotary_write_triton(*run.arguments())
    assert out.data_ptr() == run.qkv.data_ptr()
    assert relative_error(out, q) < TOLERANCE[torch.float16]
    assert torch.equal(run.qkv[:, 4 * 32 :], given.qkv[:, 4 * 32 :]), "K and V stay"
    check_arena(run, k, v, TOLERANCE[torch.float16])


@needs_triton
def test_tables_and_tokens_may_be_views() -> None:
    """The engine's sine table holds both signs in a row; a row of qkv may be padded."""
    given = inputs((5, 4, 2, 32), torch.float32)
    q, k, v = exact(given, None)
    wide = poisoned(5, 8 * 32 + 16, dtype=torch.float32)
    wide[:, : 8 * 32] = given.qkv
    both = torch.stack((-given.sin, given.sin), dim=1)
    run = replace(given.fresh(), qkv=wide[:, : 8 * 32], sin=both[:, 1])
    assert relative_error(rotary_write_triton(*run.arguments()), q) < TOLERANCE[torch.float32]
    check_arena(run, k, v, TOLERANCE[torch.float32])
    assert bool(wide[:, 8 * 32 :].isnan().all())


@needs_triton
def test_padding_alone_writes_nothing() -> None:
    given = inputs((4, 2, 1, 32), torch.float32)
    given.slots.fill_(-1)
    q, k, v = exact(given, None)
    assert relative_error(rotary_write_triton(*given.arguments()), q) < TOLERANCE[torch.float32]
    check_arena(given, k, v, TOLERANCE[torch.float32])


@needs_triton
def test_no_tokens_are_no_work() -> None:
    given = inputs((0, 2, 1, 32), torch.float32)
    assert rotary_write_triton(*given.arguments()).shape == (0, 2, 32)
    assert bool(given.arena.isnan().all())


@needs_gpu
def test_places_beyond_32_bits() -> None:
    """The arena of an 8B model has more than 2^31 elements."""
    given = inputs((4, 32, 8, 128), torch.bfloat16)
    last = 1 + (1 << 31) // (8 * 32 * 2 * 32 * 128)
    arena = torch.empty(last + 1, 8, 32, 2, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    arena[last].zero_()
    given.slots.fill_(last)
    given.offsets.copy_(torch.arange(4) + 28)
    _, k, v = exact(given, None)
    rotary_write_triton(*given.arguments()[:6], arena, 31)
    written = arena[last, :, 31, :, 28:].permute(1, 2, 0, 3)
    assert relative_error(written[0], k) < TOLERANCE[torch.bfloat16]
    assert torch.equal(written[1].double(), v)
    assert int(arena[last].count_nonzero()) <= 2 * 4 * 8 * 128
