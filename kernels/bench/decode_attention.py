"""Decode attention over a paged arena that fills the card: bytes of KV against a device copy.

Every call reads another layer of the same blocks, so that none is read again before gigabytes of
others. Merging the pieces of split contexts is inside the time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch

from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    SCALE,
    SLOT_BYTES,
    Tables,
    exact_attention,
    gather_kv,
    make_arena,
    make_tables,
)
from baton.kernels.bench.harness import Context, check, normal, poison_
from baton.kernels.decode_attention import decode_attention_triton
from baton.kernels.decode_work import plan_decode_work

GB: Final = 10**9
# Cards of more than this hold an arena of 80 GB with room for everything else.
LARGE_CARD: Final = 100 * GB
SPARED: Final = 8 * GB
SHARE_OF_SMALL: Final = 0.85
LONGEST_RAGGED: Final = 8192


def _ragged() -> list[int]:
    drawn: list[int] = torch.randint(1, LONGEST_RAGGED + 1, (64,)).tolist()
    return drawn


# Name, what it is, its context lengths, the share of the copy rate to reach.
CASES: Final[tuple[tuple[str, str, Callable[[], list[int]], float], ...]] = (
    ("decode 64 x 4096", "64 rows of 4096 tokens", lambda: [4096] * 64, 0.98),
    ("decode ragged 64", "64 rows of 1 to 8192 tokens, uniform", _ragged, 0.92),
    ("decode 8 x 32768", "8 rows of 32768 tokens", lambda: [32768] * 8, 0.92),
    ("decode 1 x 32768", "one row of 32768 tokens", lambda: [32768], 0.75),
)


def measure(context: Context) -> Iterator[Figure]:
    copy_rate = context.copy_rate
    context.say("decode: filling the arena")
    arena = make_arena(_num_slots(context.device), context.device)
    for name, what, context_lens, target in CASES:
        context.say(name)
        tables = make_tables(context_lens(), len(arena), context.device)
        seconds = _seconds(context, arena, tables)
        yield Figure(
            name=name,
            what=f"{what}, KV read",
            achieved=tables.kv_bytes / seconds / GB,
            unit="GB/s",
            limit=copy_rate / GB,
            limit_name="device copy",
            target=target,
            details={
                "us": seconds * 1e6,
                "kv_bytes": tables.kv_bytes,
                "arena_bytes": arena.nbytes,
                "tokens": sum(tables.context_lens),
            },
        )


def _num_slots(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    usable = free - SPARED if total > LARGE_CARD else int(free * SHARE_OF_SMALL)
    return usable // SLOT_BYTES


def _seconds(context: Context, arena: torch.Tensor, tables: Tables) -> float:
    """Of one layer."""
    lens, device = tables.context_lens, context.device
    q = normal(len(lens), NUM_HEADS, HEAD_DIM, device=device)
    out = torch.empty_like(q)
    work = plan_decode_work(lens, NUM_HEADS, HEAD_DIM, num_kv_heads=NUM_KV_HEADS, device=device)

    def run(layer: int) -> None:
        decode_attention_triton(q, arena, layer, tables.block_table, work, scale=SCALE, out=out)

    for layer in (0, NUM_LAYERS - 1):
        poison_(out)
        run(layer)
        for row in {lens.index(min(lens)), lens.index(max(lens))}:
            kv = gather_kv(arena, layer, tables.slots[row])
            expected = exact_attention(q[row : row + 1], kv, lens[row] - 1, lens[row])
            check(f"decode attention, row {row}, layer {layer}", out[row : row + 1], expected)
    return context.seconds_per_call([partial(run, layer) for layer in range(NUM_LAYERS)])
