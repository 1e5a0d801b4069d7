"""Causal prefill attention out of the paged arena, against the fastest attention that torch has.

The rivals read contiguous tensors. Operations count the visible pairs of query and key alone:
4 D H pairs, two products of two operations each.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    SCALE,
    Tables,
    exact_attention,
    gather_kv,
    make_arena,
    make_tables,
)
from baton.kernels.bench.harness import Call, Context, check, normal, poison_
from baton.kernels.prefill_attention import prefill_attention_triton
from baton.kernels.prefill_attention_hopper import can_attend, prefill_attention_hopper
from baton.kernels.prefill_work import plan_prefill_work

# 4 MiB each: four times what the longest case needs.
NUM_SLOTS: Final = 2048
TARGET: Final = 0.95
CHECKED_QUERIES: Final = 64
# Calls of a replay: some milliseconds.
CALLS: Final = 8
# Name, what it is, rows, queries of a row, its context.
CASES: Final = (
    ("prefill 4 x 4k", "4 prompts of 4096 tokens", 4, 4096, 4096),
    ("prefill 1 x 16k", "one prompt of 16384 tokens", 1, 16384, 16384),
    ("prefill 2k after 14k", "a chunk of 2048 tokens behind 14336", 1, 2048, 16384),
)
BACKENDS: Final = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
}

Kernel = Callable[..., torch.Tensor]
Rival = Callable[[], torch.Tensor]


def measure(context: Context) -> Iterator[Figure]:
    """The kernel of this device, and the portable one where that is another."""
    arena = make_arena(NUM_SLOTS, context.device)
    probe = normal(1, NUM_HEADS, HEAD_DIM, device=context.device)
    kernels: dict[str, Kernel] = {"triton": prefill_attention_triton}
    if can_attend(probe, arena):
        kernels = {"hopper": prefill_attention_hopper, **kernels}
    for name, what, rows, query_len, context_len in CASES:
        pairs = rows * (query_len * (context_len - query_len) + query_len * (query_len + 1) // 2)
        operations = 4 * HEAD_DIM * NUM_HEADS * pairs
        context.say(name)
        tables = make_tables([context_len] * rows, NUM_SLOTS, context.device)
        calls = {
            label: _calls(context, kernel, arena, tables, query_len)
            for label, kernel in kernels.items()
        }
        calls |= _rival_calls(context, rows, query_len, context_len)
        took = context.seconds_side_by_side(calls)
        seconds_of = {label: seconds / len(calls[label]) for label, seconds in took.items()}
        rivals = {label: each for label, each in seconds_of.items() if label not in kernels}
        fastest = min(rivals, key=rivals.__getitem__, default=None)
        for nth, label in enumerate(kernels):
            seconds = seconds_of[label]
            yield Figure(
                name=name if nth == 0 else f"{name}, {label}",
                what=f"{what}, causal, from a paged arena ({label})",
                achieved=operations / seconds / 1e12,
                unit="TFLOP/s",
                rival=operations / rivals[fastest] / 1e12 if fastest else None,
                rival_name=fastest or "",
                against="rival",
                target=TARGET if nth == 0 else None,
                details={
                    "us": seconds * 1e6,
                    "operations": operations,
                    "rivals_tflops": {
                        rival: operations / each / 1e12 for rival, each in rivals.items()
                    },
                },
            )


def _calls(
    context: Context, kernel: Kernel, arena: torch.Tensor, tables: Tables, query_len: int
) -> list[Call]:
    """Some layers in turn, after a check."""
    lens, device = tables.context_lens, context.device
    query_lens = [query_len] * len(lens)
    work = plan_prefill_work(query_lens, lens, device=device)
    q = normal(sum(query_lens), NUM_HEADS, HEAD_DIM, device=device)
    out = torch.empty_like(q)

    def run(layer: int) -> None:
        kernel(q, arena, layer, tables.block_table, work, scale=SCALE, out=out)

    for layer in (0, NUM_LAYERS - 1):
        poison_(out)
        run(layer)
        for row in {0, len(lens) - 1}:
            kv = gather_kv(arena, layer, tables.slots[row])
            for first in (0, query_len - CHECKED_QUERIES):
                token = row * query_len + first
                some = slice(token, token + CHECKED_QUERIES)
                position = lens[row] - query_len + first
                expected = exact_attention(q[some], kv, position, lens[row])
                check(f"prefill attention, row {row}, layer {layer}", out[some], expected)
    return [partial(run, layer) for layer in range(CALLS)]


def _rival_calls(
    context: Context, rows: int, query_len: int, context_len: int
) -> dict[str, list[Call]]:
    """Each rival that takes the case."""
    q = normal(rows, NUM_HEADS, query_len, HEAD_DIM, device=context.device)
    k, v = (
        normal(rows, NUM_KV_HEADS, context_len, HEAD_DIM, device=context.device) for _ in range(2)
    )
    calls: dict[str, list[Call]] = {}
    for rival, run in _rivals(q, k, v).items():
        try:
            with warnings.catch_warnings():
                # torch tells in warnings why a backend will not do.
                warnings.simplefilter("ignore")
                run()
        except RuntimeError:
            continue
        calls[rival] = [run] * CALLS
    return calls


def _rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Rival]:
    """Each backend with K and V as they are, and expanded to a head per query head."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    query_len, context_len = q.shape[2], k.shape[2]
    rivals: dict[str, Rival] = {}
    for label, keys, values in (("GQA", k, v), ("expanded", wide_k, wide_v)):
        is_gqa = keys.shape[1] != q.shape[1]
        for name, backend in BACKENDS.items():
            run = partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=is_gqa)
            if query_len == context_len:
                run = partial(run, is_causal=True)
            elif backend is SDPBackend.CUDNN_ATTENTION:
                # It knows no triangle in the lower right: the mask as it is.
                seen = torch.ones(query_len, context_len, dtype=torch.bool, device=q.device)
                run = partial(run, attn_mask=seen.tril(context_len - query_len))
            else:
                run = partial(run, attn_mask=causal_lower_right(query_len, context_len))
            rivals[f"{name} {label}"] = partial(_with_backend, backend, run)
    return rivals


def _with_backend(backend: SDPBackend, run: Rival) -> torch.Tensor:
    with sdpa_kernel([backend]):
        return run()
