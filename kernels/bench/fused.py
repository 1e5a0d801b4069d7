"""The kernels between the large ones, in a prefill step: bytes against a device copy.

Each input counts once and each output once. Calls rotate over sets of inputs, so that a call finds
nothing of the one before last in the cache.
"""

from collections.abc import Iterator
from functools import partial
from typing import Final

import torch

from baton.kernels.activation import silu_and_mul, silu_and_mul_triton
from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import (
    BLOCK_SIZE,
    FFN,
    HEAD_DIM,
    HIDDEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    QKV_WIDTH,
    make_arena,
)
from baton.kernels.bench.harness import Context, check, normal, poison_
from baton.kernels.rms_norm import add_rms_norm_, add_rms_norm_triton
from baton.kernels.rotary_write import rotary_write, rotary_write_triton

NUM_TOKENS: Final = 8192
NUM_SETS: Final = 4
EPS: Final = 1e-5
ROPE_BASE: Final = 500_000.0
TARGET: Final = 0.85


def measure(context: Context) -> Iterator[Figure]:
    for name, of_kernel in (
        ("fused norm", _add_rms_norm),
        ("fused rope+write", _rotary_write),
        ("fused silu x up", _silu_and_mul),
    ):
        context.say(name)
        seconds, num_bytes, what = of_kernel(context)
        yield Figure(
            name=name,
            what=f"{what}, read and written",
            achieved=num_bytes / seconds / 1e9,
            unit="GB/s",
            limit=context.copy_rate / 1e9,
            limit_name="device copy",
            target=TARGET,
            details={"us": seconds * 1e6, "bytes": num_bytes},
        )


def _add_rms_norm(context: Context) -> tuple[float, int, str]:
    device = context.device
    weight = normal(HIDDEN, device=device)
    sets = [[normal(NUM_TOKENS, HIDDEN, device=device) for _ in range(3)] for _ in range(NUM_SETS)]
    x, residual, out = sets[0]
    expected_sum = x.float() + residual.float()
    expected = add_rms_norm_(x.float(), residual.float(), weight.float(), EPS)
    add_rms_norm_triton(x, residual, weight, EPS, poison_(out))
    check("rms norm", out, expected)
    check("rms norm, the sum", residual, expected_sum)
    calls = [partial(add_rms_norm_triton, x, r, weight, EPS, out) for x, r, out in sets]
    # x and the residual in, the sum and its norm out.
    num_bytes = 4 * x.nbytes + weight.nbytes
    what = f"residual and RMS norm of {NUM_TOKENS} x {HIDDEN}"
    return context.seconds_per_call(calls), num_bytes, what


def _silu_and_mul(context: Context) -> tuple[float, int, str]:
    device = context.device
    gate_ups = [normal(NUM_TOKENS, 2 * FFN, device=device) for _ in range(NUM_SETS)]
    outs = [normal(NUM_TOKENS, FFN, device=device) for _ in range(NUM_SETS)]
    silu_and_mul_triton(gate_ups[0], poison_(outs[0]))
    check("silu and up", outs[0], silu_and_mul(gate_ups[0].float()))
    pairs = zip(gate_ups, outs, strict=True)
    calls = [partial(silu_and_mul_triton, gate_up, out) for gate_up, out in pairs]
    num_bytes = gate_ups[0].nbytes + outs[0].nbytes
    return context.seconds_per_call(calls), num_bytes, f"silu times up of {NUM_TOKENS} x {FFN}"


def _rotary_write(context: Context) -> tuple[float, int, str]:
    device = context.device
    num_slots = NUM_TOKENS // BLOCK_SIZE
    arena = make_arena(num_slots, device)
    positions = torch.arange(NUM_TOKENS, device=device, dtype=torch.int32)
    slots = torch.randperm(num_slots, device=device, dtype=torch.int32)[positions // BLOCK_SIZE]
    offsets = positions % BLOCK_SIZE
    exponent = torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM
    angles = positions[:, None] * ROPE_BASE**-exponent
    cos, sin = angles.cos(), angles.sin()
    places = (cos, sin, positions, slots, offsets)
    qkvs = [normal(NUM_TOKENS, QKV_WIDTH, device=device) for _ in range(NUM_SETS)]
    outs = [normal(NUM_TOKENS, NUM_HEADS, HEAD_DIM, device=device) for _ in range(NUM_SETS)]

    layer = NUM_LAYERS - 1
    shape = (num_slots, NUM_KV_HEADS, 1, 2, BLOCK_SIZE, HEAD_DIM)
    exact_arena = torch.empty(shape, device=device)
    exact_q = rotary_write(qkvs[0].float(), *places, exact_arena, 0)
    poison_(arena[:, :, layer])
    rotary_write_triton(qkvs[0], *places, arena, layer, poison_(outs[0]))
    check("rope and write, q", outs[0], exact_q)
    check("rope and write, the arena", arena[:, :, layer], exact_arena[:, :, 0])

    calls = [
        partial(rotary_write_triton, qkvs[i % NUM_SETS], *places, arena, i, outs[i % NUM_SETS])
        for i in range(NUM_LAYERS)
    ]
    num_bytes = 2 * qkvs[0].nbytes + sum(each.nbytes for each in places)
    what = f"rotation of Q and K, K and V into the arena, of {NUM_TOKENS} tokens"
    return context.seconds_per_call(calls), num_bytes, what
