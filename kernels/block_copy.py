"""Copying whole blocks, or the same bytes of each, between two arenas.

    dst[dst_slots[i], dst_start : dst_start + length]
        = src[src_slots[i], start : start + length]                in bytes, for all i

An arena is `[slots, ...]`, contiguous, of any dtype; a slot is copied as bytes. Heads come first in
a slot, so the heads of one tensor-parallel rank are one range of its bytes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)

# What a program moves at a time. A thread has 128 bytes of it in flight.
CHUNK_BYTES = 32 * 1024
BYTES_PER_THREAD = 128
PROGRAMS_PER_MULTIPROCESSOR = 4
# Without a GPU, where programs run one after the other.
INTERPRETED_PROGRAMS = 8
ALIGNMENT = 16

ByteRange = tuple[int, int]


def copy_blocks(
    src: torch.Tensor,
    src_slots: torch.Tensor,
    dst: torch.Tensor,
    dst_slots: torch.Tensor,
    byte_range: ByteRange | None = None,
    dst_start: int | None = None,
) -> None:
    """Slots are int32 or int64 `[n]`; no slot of `dst` comes twice, nor among those read of it.

    `byte_range` is (start, length) within a block of `src`; `dst_start`, where it begins in a block
    of `dst`, is its own start unless given. Without a range whole blocks of equal bytes are copied.
    All numbers of bytes are multiples of 16.
    """
    assert src_slots.shape == dst_slots.shape, "a source for each destination"
    start, to, length = _span(src, dst, byte_range, dst_start)
    chosen = _bytes(src)[src_slots.long().to(src.device), start : start + length]
    _bytes(dst)[dst_slots.long().to(dst.device), to : to + length] = chosen.to(dst.device)


def copy_blocks_triton(
    src: torch.Tensor,
    src_slots: torch.Tensor,
    dst: torch.Tensor,
    dst_slots: torch.Tensor,
    byte_range: ByteRange | None = None,
    dst_start: int | None = None,
    num_programs: int | None = None,
) -> None:
    """`copy_blocks` on the device of `dst`, where both lists of slots lie.

    `src` may lie on another GPU whose memory kernels here may read: `open_peer` lets them, and so
    does CUDA IPC on opening a handle. What wrote `src` has ended: streams of two GPUs do not wait
    for each other. `num_programs` bounds the programs, four
    of which fill a multiprocessor, to leave the others to a model. The kernel trusts the slots.
    """
    start, to, length = _span(src, dst, byte_range, dst_start)
    for slots in (src_slots, dst_slots):
        assert slots.device == dst.device, "slots lie where the copy runs"
        assert slots.is_contiguous(), "slots follow each other"
        assert slots.shape == (len(dst_slots),), "a source for each destination"
    if len(dst_slots) == 0 or length == 0:
        return
    chunk = min(CHUNK_BYTES, next_power_of_2(length))
    num_chunks = cdiv(length, chunk)
    if num_programs is None:
        num_programs = _default_programs(dst.device)
    pdl = can_overlap_launches(dst)
    with _on(dst.device):
        _copy_blocks_kernel[(min(num_programs, num_chunks * len(dst_slots)),)](
            _words(src),
            src_slots,
            _words(dst),
            dst_slots,
            len(dst_slots),
            _bytes(src).shape[1] // ALIGNMENT,
            _bytes(dst).shape[1] // ALIGNMENT,
            start // ALIGNMENT,
            to // ALIGNMENT,
            length // ALIGNMENT,
            num_chunks,
            CHUNK=chunk // 8,
            PDL=pdl,
            num_warps=max(1, chunk // (32 * BYTES_PER_THREAD)),
            launch_pdl=pdl,
        )


def open_peer(device: torch.device, peer: torch.device) -> None:
    """Let kernels on `device` read the memory of `peer`, another GPU that it can reach.

    Access has a direction: torch opens it for the source of its first copy between the two.
    """
    torch.zeros(1, device=device).to(peer)


def _span(
    src: torch.Tensor, dst: torch.Tensor, byte_range: ByteRange | None, dst_start: int | None
) -> tuple[int, int, int]:
    """Start in a block of `src`, start in a block of `dst`, and length, in bytes."""
    assert src.is_contiguous(), "blocks follow each other"
    assert dst.is_contiguous(), "blocks follow each other"
    src_bytes, dst_bytes = (t[0].numel() * t.element_size() for t in (src, dst))
    if byte_range is None:
        assert dst_start is None, "a start belongs to a range"
        assert src_bytes == dst_bytes, "whole blocks are of equal bytes"
        byte_range = (0, src_bytes)
    start, length = byte_range
    to = start if dst_start is None else dst_start
    for count in (src_bytes, dst_bytes, start, to, length, src.data_ptr(), dst.data_ptr()):
        assert count % ALIGNMENT == 0, "copies go by 16 bytes"
    assert 0 <= start <= start + length <= src_bytes, "a range of the source block"
    assert 0 <= to <= to + length <= dst_bytes, "a range of the destination block"
    return start, to, length


def _bytes(arena: torch.Tensor) -> torch.Tensor:
    """uint8 `[slots, bytes of a block]`."""
    return arena.view(len(arena), -1).view(torch.uint8)


def _words(arena: torch.Tensor) -> torch.Tensor:
    return arena.view(len(arena), -1).view(torch.int64)


def _default_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_SIZES = ["num_blocks", "src_units", "dst_units", "src_start", "dst_start", "units", "num_chunks"]


@triton.jit(do_not_specialize=_SIZES)
def _copy_blocks_kernel(
    src,
    src_slots,
    dst,
    dst_slots,
    num_blocks,
    src_units,
    dst_units,
    src_start,
    dst_start,
    units,
    num_chunks,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take turns at (block, chunk of it), chunks of a block in a row.

    Sizes and starts come in units of 16 bytes, pointers are to words of 8: from the factor 2 the
    compiler knows that pairs of words are aligned.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    words = tl.arange(0, CHUNK)
    item = tl.program_id(0)
    while item < num_blocks * num_chunks:
        block = item // num_chunks
        word = (item % num_chunks).to(tl.int64) * CHUNK + words
        mask = word < units.to(tl.int64) * 2
        from_slot = tl.load(src_slots + block).to(tl.int64)
        to_slot = tl.load(dst_slots + block).to(tl.int64)
        first_read = src + (from_slot * src_units + src_start) * 2
        first_write = dst + (to_slot * dst_units + dst_start) * 2
        value = tl.load(first_read + word, mask=mask)
        tl.store(first_write + word, value, mask=mask)
        item += tl.num_programs(0)
