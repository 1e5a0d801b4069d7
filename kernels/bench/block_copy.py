"""Gathering scattered blocks: inside one GPU against a device copy, and out of another GPU's memory
against cudaMemcpyPeer of as many bytes in one piece. Digests of blocks beside them."""

from collections.abc import Iterator
from functools import partial
from typing import Final

import torch

from baton.kernels.bench.figures import Figure
from baton.kernels.bench.geometry import SLOT_BYTES
from baton.kernels.bench.harness import Context, check_equal, poison_, random_bytes
from baton.kernels.block_copy import copy_blocks_triton, open_peer
from baton.kernels.block_digest import block_digest, block_digest_triton

LOCAL_BYTES: Final = 4 << 30
PEER_BYTES: Final = 1 << 30
LOCAL_BLOCKS: Final = (64 << 10, SLOT_BYTES)
PEER_BLOCKS: Final = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
PEER_TARGET: Final = 0.93


def measure(context: Context) -> Iterator[Figure]:
    source = random_bytes(LOCAL_BYTES, context.device)
    target = torch.empty_like(source)
    for block_bytes in LOCAL_BLOCKS:
        label = _label(block_bytes)
        context.say(f"blocks: local {label}")
        seconds = _gather_seconds(context, source, target, block_bytes)
        yield _local_figure(
            context, f"blocks local {label}", f"gather of blocks of {label}", 2, seconds
        )
    context.say("blocks: digest")
    yield _local_figure(
        context, "blocks digest", "digests of 4 MiB blocks", 1, _digest_seconds(context, source)
    )
    del source, target
    context.release()
    yield from _peer_figures(context)


def _local_figure(context: Context, name: str, what: str, passes: int, seconds: float) -> Figure:
    return Figure(
        name=name,
        what=f"{what} inside one GPU, bytes read{' and written' if passes == 2 else ''}",
        achieved=passes * LOCAL_BYTES / seconds / 1e9,
        unit="GB/s",
        limit=context.copy_rate / 1e9,
        limit_name="device copy",
        details={"us": seconds * 1e6, "bytes": LOCAL_BYTES},
    )


def _gather_seconds(
    context: Context, source: torch.Tensor, target: torch.Tensor, block_bytes: int
) -> float:
    """All blocks of `source`, shuffled, into `target`; after a comparison of every byte."""
    blocks = source.view(-1, block_bytes // source.element_size())
    gathered = poison_(target).view_as(blocks)
    device = target.device
    shuffled = torch.randperm(len(blocks), device=device, dtype=torch.int32)
    in_order = torch.arange(len(blocks), device=device, dtype=torch.int32)
    gather = partial(copy_blocks_triton, blocks, shuffled, gathered, in_order)
    gather()
    torch.cuda.synchronize(device)
    expected = blocks.index_select(0, shuffled.to(source.device).long()).to(device)
    # Bit for bit: of floating-point numbers a NaN never equals itself.
    check_equal(
        f"gather of {block_bytes} B blocks",
        gathered.view(torch.int16),
        expected.view(torch.int16),
    )
    return context.seconds_per_call(gather)


def _digest_seconds(context: Context, source: torch.Tensor) -> float:
    blocks = source.view(-1, SLOT_BYTES // source.element_size())
    slots = torch.randperm(len(blocks), device=source.device, dtype=torch.int32)
    out = poison_(torch.empty(len(slots), device=source.device, dtype=torch.int64))
    block_digest_triton(blocks, slots, out)
    check_equal("block digest", out[:4], block_digest(blocks, slots[:4]))
    return context.seconds_per_call(partial(block_digest_triton, blocks, slots, out))


def _peer_figures(context: Context) -> Iterator[Figure]:
    """None without a second GPU whose memory this one reads."""
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        context.say("blocks: no second GPU to read from")
        return
    source = random_bytes(PEER_BYTES, torch.device("cuda", 1))
    torch.cuda.synchronize(source.device)
    target = torch.empty(source.shape, dtype=source.dtype, device=context.device)
    context.say("blocks: cudaMemcpyPeer")
    open_peer(target.device, source.device)
    whole = context.seconds_per_call(lambda: target.copy_(source), captured=False)
    for block_bytes in PEER_BLOCKS:
        label = _label(block_bytes)
        context.say(f"blocks: peer {label}")
        seconds = _gather_seconds(context, source, target, block_bytes)
        yield Figure(
            name=f"blocks peer {label}",
            what=f"gather of blocks of {label} out of another GPU's memory",
            achieved=PEER_BYTES / seconds / 1e9,
            unit="GB/s",
            rival=PEER_BYTES / whole / 1e9,
            rival_name="cudaMemcpyPeer",
            against="rival",
            target=PEER_TARGET,
            details={"us": seconds * 1e6, "bytes": PEER_BYTES},
        )


def _label(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
