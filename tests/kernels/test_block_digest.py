"""One digest from torch and from the kernel, that no damage leaves as it was."""

import pytest
import torch
from support.kernel_checks import DEVICE, needs_triton, poisoned

from baton.kernels.block_digest import (
    GAMMA,
    MULTIPLIER_1,
    MULTIPLIER_2,
    SHARE_BYTES,
    block_digest,
    block_digest_triton,
)

# One word, an odd number, a step of a program, a share and a word, three shares and some.
SIZES = [8, 24, 16 * 1024, SHARE_BYTES, SHARE_BYTES + 8, 3 * SHARE_BYTES + 48]
MODULUS = 1 << 64


def arena(slots: int, block_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (slots, block_bytes), dtype=torch.uint8).to(DEVICE)


def digest(block: torch.Tensor) -> int:
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return int(block_digest(block[None], first))


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * MULTIPLIER_1 % MODULUS
    z = (z ^ (z >> 27)) * MULTIPLIER_2 % MODULUS
    return z ^ (z >> 31)


def digest_of_bytes(data: bytes) -> int:
    """The definition, in Python's integers."""
    total = len(data) * GAMMA
    for i in range(len(data) // 8):
        word = int.from_bytes(data[8 * i : 8 * i + 8], "little")
        total += mix((word + (i + 1) * GAMMA) % MODULUS)
    result = mix(total % MODULUS)
    return result - MODULUS if result >= MODULUS // 2 else result


@pytest.mark.parametrize("block_bytes", [8, 24, 4096])
def test_reference_is_the_definition(block_bytes: int) -> None:
    block = arena(1, block_bytes)[0]
    assert digest(block) == digest_of_bytes(bytes(block.tolist()))


@needs_triton
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_bytes", SIZES)
def test_kernel_equals_reference(block_bytes: int, ids: torch.dtype) -> None:
    blocks = arena(4, block_bytes)
    slots = torch.tensor([3, 0, 3], dtype=ids, device=DEVICE)
    out = block_digest_triton(blocks, slots, poisoned(3, dtype=torch.int64))
    assert torch.equal(out, block_digest(blocks, slots))


@needs_triton
def test_any_dtype_is_bytes() -> None:
    blocks = arena(2, 96)
    slots = torch.tensor([1, 0], device=DEVICE)
    expected = block_digest(blocks, slots)
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        seen = blocks.view(dtype).view(2, 3, -1)
        assert torch.equal(block_digest(seen, slots), expected)
        assert torch.equal(block_digest_triton(seen, slots), expected)


def test_every_bit_counts() -> None:
    block = arena(1, 40)[0]
    seen = {digest(block)}
    for byte in range(40):
        for bit in range(8):
            block[byte] ^= 1 << bit
            seen.add(digest(block))
            block[byte] ^= 1 << bit
    assert len(seen) == 1 + 40 * 8


def test_every_place_counts() -> None:
    words = torch.randperm(64).to(DEVICE)
    seen = {digest(words)}
    for first in range(64):
        for second in range(first):
            swapped = words.clone()
            swapped[first], swapped[second] = words[second], words[first]
            seen.add(digest(swapped))
    assert len(seen) == 1 + 64 * 63 // 2


def test_torn_blocks_are_neither() -> None:
    """Old bytes up to some word, new ones from there on."""
    old, new = arena(2, 1024)
    seen = {digest(torch.cat((new[:cut], old[cut:]))) for cut in range(0, 1025, 8)}
    assert len(seen) == 129


@pytest.mark.parametrize("value", [0, 255])
def test_lengths_of_constant_blocks_count(value: int) -> None:
    blocks = [torch.full((8 * n,), value, dtype=torch.uint8, device=DEVICE) for n in range(1, 200)]
    assert len({digest(block) for block in blocks}) == len(blocks)


def test_rows_moved_within_a_block_count() -> None:
    rows = arena(1, 32 * 64)[0].view(32, 64)
    assert digest(rows) != digest(rows.roll(1, dims=0))


def test_golden_values() -> None:
    """Two versions of Baton must agree: a change of these is a change of the protocol."""
    counting = torch.arange(512, dtype=torch.int64).to(DEVICE)
    assert digest(torch.zeros(8, dtype=torch.uint8, device=DEVICE)) == 4890566965504419038
    assert digest(torch.zeros(4096, dtype=torch.uint8, device=DEVICE)) == -3072426650397733900
    assert digest(counting) == 3183945310331584312
    assert digest(-counting) == -5538167429258349812


@needs_triton
def test_no_blocks_are_no_work() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert block_digest_triton(arena(1, 8), none).shape == (0,)
