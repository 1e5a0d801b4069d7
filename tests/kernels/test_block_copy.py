"""Blocks and ranges of them arrive bit for bit, and nothing else is written."""

import pytest
import torch
from support.kernel_checks import DEVICE, needs_gpu, needs_triton

from baton.kernels.block_copy import CHUNK_BYTES, copy_blocks, copy_blocks_triton, open_peer

# Bytes of a block: one unit, no power of two, a chunk, a chunk and a unit, several chunks.
BLOCK_BYTES = [16, 48, 4096, CHUNK_BYTES, CHUNK_BYTES + 16, 3 * CHUNK_BYTES + 80]


def arena(slots: int, block_bytes: int) -> torch.Tensor:
    shape = (slots, block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE)


def slots(*numbers: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


@needs_triton
@pytest.mark.parametrize("num_programs", [None, 1, 3, 1000])
@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_kernel_equals_reference(block_bytes: int, num_programs: int | None) -> None:
    src, dst = arena(5, block_bytes), arena(7, block_bytes)
    expected = dst.clone()
    copy_blocks(src, slots(4, 0, 2), expected, slots(1, 6, 3))
    for to, source in ((1, 4), (6, 0), (3, 2)):
        assert torch.equal(expected[to], src[source])
    copy_blocks_triton(src, slots(4, 0, 2), dst, slots(1, 6, 3), num_programs=num_programs)
    assert torch.equal(dst, expected)


@needs_triton
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_dtype_within_one_arena(dtype: torch.dtype, ids: torch.dtype) -> None:
    blocks = arena(4, 3 * 5 * 64).view(dtype).view(4, 3, 5, -1)
    before = blocks.clone()
    copy_blocks_triton(blocks, slots(3, 0, dtype=ids), blocks, slots(1, 2, dtype=ids))
    expected = before[[0, 3, 0, 3]]
    assert torch.equal(blocks.view(torch.uint8), expected.view(torch.uint8))


@needs_triton
@pytest.mark.parametrize("start", [0, 16, 112])
@pytest.mark.parametrize("length", [0, 16, 48, CHUNK_BYTES + 32])
def test_range_of_each_block(start: int, length: int) -> None:
    block_bytes = CHUNK_BYTES + 160
    src, dst = arena(3, block_bytes), arena(3, block_bytes)
    expected = dst.clone()
    expected[0, start : start + length] = src[2, start : start + length]
    expected[2, start : start + length] = src[1, start : start + length]
    reference = dst.clone()
    copy_blocks(src, slots(2, 1), reference, slots(0, 2), (start, length))
    assert torch.equal(reference, expected)
    copy_blocks_triton(src, slots(2, 1), dst, slots(0, 2), (start, length))
    assert torch.equal(dst, expected)


@needs_triton
def test_share_of_a_rank_between_blocks_of_other_sizes() -> None:
    """Two heads of four, from whole blocks to a rank's own arena and back."""
    whole, rank = arena(3, 4 * 96), arena(2, 2 * 96)
    copy_blocks_triton(whole, slots(2), rank, slots(1), (2 * 96, 2 * 96), dst_start=0)
    assert torch.equal(rank[1], whole[2, 2 * 96 :])
    before = whole.clone()
    copy_blocks_triton(rank, slots(0), whole, slots(1), (0, 2 * 96), dst_start=96)
    before[1, 96 : 3 * 96] = rank[0]
    assert torch.equal(whole, before)


@needs_triton
@pytest.mark.parametrize(
    ("byte_range", "dst_start"),
    [((0, 8), None), ((8, 16), None), ((0, 112), None), ((0, 64), 48), ((-16, 16), None)],
)
def test_ranges_outside_or_askew_are_refused(
    byte_range: tuple[int, int], dst_start: int | None
) -> None:
    src, dst = arena(2, 96), arena(2, 96)
    for copy in (copy_blocks, copy_blocks_triton):
        with pytest.raises(AssertionError):
            copy(src, slots(0), dst, slots(1), byte_range, dst_start)


@needs_triton
def test_no_blocks_are_no_work() -> None:
    src, dst = arena(2, 96), arena(2, 96)
    before = dst.clone()
    copy_blocks_triton(src, slots(), dst, slots())
    assert torch.equal(dst, before)


@needs_gpu
def test_from_a_peer() -> None:
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("one GPU, or none that reads the other's memory")
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    src = arena(9, 1 << 20).cpu().to(there)
    dst = arena(9, 1 << 20)
    open_peer(here, there)
    torch.cuda.synchronize(1)
    read, written = slots(8, 2, 5).to("cuda:0"), slots(1, 0, 7).to("cuda:0")
    copy_blocks_triton(src, read, dst, written, num_programs=32)
    assert torch.equal(dst[[1, 0, 7]].cpu(), src[[8, 2, 5]].cpu())


@needs_gpu
def test_places_beyond_32_bits() -> None:
    # Words are counted by 8 bytes, units by 16: 33 GiB hold 2^31 units and more.
    last = (33 << 30) >> 22
    blocks = torch.empty(last + 1, 1 << 22, dtype=torch.uint8, device=DEVICE)
    blocks[0].copy_(arena(1, 1 << 22)[0])
    copy_blocks_triton(blocks, slots(0), blocks, slots(last))
    copy_blocks_triton(blocks, slots(last), blocks, slots(last - 1))
    assert torch.equal(blocks[last - 1], blocks[0])
