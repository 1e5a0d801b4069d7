"""A 64-bit digest of a block's bytes, equal on CPU and GPU, to see that a copy is the original.

    digest = mix(num_bytes * GAMMA + sum over i of mix(w[i] + (i + 1) * GAMMA))      modulo 2^64

w[i] are the block's little-endian 8-byte words. `mix` is the finaliser of SplitMix64 (variant 13 of
David Stafford's mixers; GAMMA is the odd integer nearest 2^64 over the golden ratio, as there):
Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
doi:10.1145/2660193.2660195. It is a bijection, so any change within a single word changes the
digest for certain; others go unseen with a chance of about 2^-64. The sum has no order, hence any
number of programs may share a block. It guards against faults, not against forgery.
"""

import torch

from baton.kernels.jit import (
    can_overlap_launches,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
WORD_BYTES = 8
# Of a large block a program takes so much, in steps of what 256 threads load at once.
SHARE_BYTES = 64 * 1024
STEP_BYTES = 16 * 1024
BYTES_PER_THREAD = 64

_GAMMA = tl.constexpr(GAMMA)
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2)


def block_digest(arena: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Digests int64 `[n]` of the `slots` (int32 or int64 `[n]`) of `arena` `[slots, ...]`.

    The arena is contiguous, of any dtype; a block's bytes are a multiple of 8.
    """
    words = _words(arena)
    position = torch.arange(1, words.shape[1] + 1, device=arena.device)
    mixed = _mix(words.index_select(0, slots) + position * _signed(GAMMA))
    return _mix(mixed.sum(dim=1) + _signed(words.shape[1] * WORD_BYTES * GAMMA))


def block_digest_triton(
    arena: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`block_digest` where the arena lies; the kernel trusts the slots."""
    words = _words(arena)
    num_words = words.shape[1]
    out = torch.empty(len(slots), dtype=torch.int64, device=arena.device) if out is None else out
    assert slots.device == out.device == arena.device, "slots lie where the arena is"
    assert slots.is_contiguous(), "slots follow each other"
    assert out.is_contiguous(), "digests follow each other"
    assert out.dtype == torch.int64, "64 bits"
    assert out.shape == slots.shape, "a digest for each slot"
    if len(slots) == 0:
        return out
    step = min(STEP_BYTES // WORD_BYTES, next_power_of_2(num_words))
    shares = cdiv(num_words * WORD_BYTES, SHARE_BYTES)
    partial = out if shares == 1 else out.new_empty(len(slots), shares)
    pdl = can_overlap_launches(arena)
    _digest_kernel[(len(slots) * shares,)](
        words,
        slots,
        partial,
        NUM_WORDS=num_words,
        SHARES=shares,
        STEPS=cdiv(min(num_words, SHARE_BYTES // WORD_BYTES), step),
        STEP=step,
        PDL=pdl,
        num_warps=max(1, step * WORD_BYTES // (32 * BYTES_PER_THREAD)),
        launch_pdl=pdl,
    )
    if shares > 1:
        _finish_kernel[(len(slots),)](
            partial,
            out,
            NUM_WORDS=num_words,
            SHARES=shares,
            BLOCK=next_power_of_2(shares),
            PDL=pdl,
            num_warps=4 if shares > 128 else 1,
            launch_pdl=pdl,
        )
    return out


def _words(arena: torch.Tensor) -> torch.Tensor:
    assert arena.is_contiguous(), "blocks follow each other"
    assert arena[0].numel() * arena.element_size() % WORD_BYTES == 0, "blocks are whole words"
    return arena.view(len(arena), -1).view(torch.int64)


def _signed(constant: int) -> int:
    """The int64 of the same low 64 bits: torch computes modulo 2^64 in int64 alone."""
    return (constant + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Zeros move in, not the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(MULTIPLIER_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MULTIPLIER_2)
    return z ^ _shift_right(z, 31)


@jit
def _mix_kernel(z):
    """`_mix` of uint64."""
    z = (z ^ (z >> 30)) * _MULTIPLIER_1
    z = (z ^ (z >> 27)) * _MULTIPLIER_2
    return z ^ (z >> 31)


@jit
def _finished_kernel(total, NUM_WORDS: tl.constexpr):
    """The digest as int64 from the sum as uint64."""
    salt = tl.full((), NUM_WORDS * 8, tl.uint64) * _GAMMA
    return _mix_kernel(total + salt).to(tl.int64, bitcast=True)


@jit
def _digest_kernel(
    words,
    slots,
    partial,
    NUM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    STEPS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program n SHARES + s: the sum over share s of the words of block n, finished if all."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0) // SHARES
    slot = tl.load(slots + block).to(tl.int64)
    first = words + slot * NUM_WORDS
    # Grows by a scalar: one multiplication per word less.
    index = (tl.program_id(0) % SHARES) * (STEPS * STEP) + tl.arange(0, STEP)
    salt = (index + 1).to(tl.uint64) * _GAMMA
    salt_of_step = tl.full((), STEP, tl.uint64) * _GAMMA
    total = tl.zeros((STEP,), tl.uint64)
    for _ in range(STEPS):
        exists = index < NUM_WORDS
        word = tl.load(first + index, mask=exists, other=0).to(tl.uint64, bitcast=True)
        total += tl.where(exists, _mix_kernel(word + salt), 0)
        index += STEP
        salt += salt_of_step
    result = tl.sum(total)
    if SHARES == 1:
        tl.store(partial + block, _finished_kernel(result, NUM_WORDS))
    else:
        tl.store(partial + tl.program_id(0), result.to(tl.int64, bitcast=True))


@jit
def _finish_kernel(
    partial,
    out,
    NUM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program n: the digest of block n from its partial sums."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    share = tl.arange(0, BLOCK)
    first = partial + tl.program_id(0).to(tl.int64) * SHARES
    sums = tl.load(first + share, mask=share < SHARES, other=0).to(tl.uint64, bitcast=True)
    tl.store(out + tl.program_id(0), _finished_kernel(tl.sum(sums), NUM_WORDS))
