"""Gumbel noise on the device: a function of (seed, choice, position, token id) alone.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

This is version 1 of `baton.engine.philox`, bit for bit: exact integer arithmetic, and single
correctly rounded fp32 steps in the order written there. Kernels that call these functions are
launched with `enable_fp_fusion=False`: a fused multiply-add rounds once where version 1 rounds
twice.
"""

import torch

from baton.kernels.jit import cdiv, jit, tl

BLOCK = 1024

_ROUNDS = tl.constexpr(10)
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_ULP = tl.constexpr(2.0**-23)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_LN2_TIMES_127 = tl.constexpr(88.02969193111305)
_LN2_PER_BIT = tl.constexpr(0.6931471805599453 * 2.0**-23)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_ONE_BITS = tl.constexpr(0x3F800000)
_ALL_BITS = tl.constexpr(0xFFFFFFFF)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)

_WORD = 0xFFFFFFFF
_COEFFICIENTS = (
    -0.07866668,
    0.12821749,
    -0.13101634,
    0.14189,
    -0.166276,
    0.20001969,
    -0.25000772,
    0.33333322,
    -0.49999997,
)


def gumbel_noise(
    seed: torch.Tensor, position: torch.Tensor, choice: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Noise fp32 `[S, vocab]` for seed int64 `[S]` (the bits of a 64-bit number), position and
    choice int32 `[S]`."""
    rows = [words.to(torch.int64)[:, None] for words in (seed, position, choice)]
    token = torch.arange(vocab, dtype=torch.int64, device=seed.device)[None, :]
    c0, c1, c2, c3 = token, rows[1] & _WORD, rows[2] & _WORD, torch.zeros_like(token)
    k0, k1 = rows[0] & _WORD, (rows[0] >> 32) & _WORD
    for _ in range(10):
        # Products wrap at 64 bits, which leaves all of their bits right.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    uniform = ((c0 >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -_log(-_log(uniform))


def _log(x: torch.Tensor) -> torch.Tensor:
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    polynomial = torch.full_like(f, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        polynomial = polynomial * f + coefficient
    scale = exponent.to(torch.float32)
    return scale * 0.693359375 + (f + (f * f * polynomial + scale * -2.12194440e-4))


def gumbel_noise_triton(
    seed: torch.Tensor,
    position: torch.Tensor,
    choice: torch.Tensor,
    vocab: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gumbel_noise`, with the functions that the sampling kernels draw with."""
    if out is None:
        out = torch.empty(seed.shape[0], vocab, dtype=torch.float32, device=seed.device)
    assert out.is_contiguous(), "rows follow each other"
    if out.numel():
        _gumbel_kernel[(seed.shape[0], cdiv(vocab, BLOCK))](
            seed, position, choice, out, vocab, BLOCK=BLOCK, enable_fp_fusion=False
        )
    return out


@jit
def philox_word(token, position, choice, key_low, key_high):
    """Word 0 for the counter (token, position, choice, 0); all are uint32.

    What is the same for a row (all of `position`, `choice` and the key) is passed as scalars, so
    that the first two rounds cost one product each.
    """
    c0 = token
    c1 = position
    c2 = choice
    c3 = choice ^ choice
    k0 = key_low
    k1 = key_high
    for _ in tl.static_range(_ROUNDS):
        # One instruction for all 64 bits; umulhi and a product of 32 bits would be two.
        product0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0


@jit
def log_fp32(x):
    """Natural logarithm of positive normal numbers, step by step as version 1 has it."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    polynomial = -0.07866668 * f + 0.12821749
    polynomial = polynomial * f + -0.13101634
    polynomial = polynomial * f + 0.14189
    polynomial = polynomial * f + -0.166276
    polynomial = polynomial * f + 0.20001969
    polynomial = polynomial * f + -0.25000772
    polynomial = polynomial * f + 0.33333322
    polynomial = polynomial * f + -0.49999997
    scale = exponent.to(tl.float32)
    return scale * _LN2_HIGH + (f + (f * f * polynomial + scale * _LN2_LOW))


@jit
def gumbel_of_word(word):
    """Gumbel noise from a random uint32; between -2.82 and 16.64."""
    uniform = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * _ULP
    return -log_fp32(-log_fp32(uniform))


@jit
def gumbel_bound(word):
    """Between `gumbel_of_word(word)` - 1e-4 and, where that is above 4, 0.08 more; no logarithm.

    With w = 1 - u, exact in fp32, -log(u) >= w, so that -log(-log(u)) <= -log(w). And the bits of
    w, read as an integer, are 2^23 (127 + its exponent + its fraction), where log2(1 + f) >= f.
    """
    one_and_more = (((word ^ _ALL_BITS) >> 9) | _ONE_BITS).to(tl.float32, bitcast=True)
    bits = (one_and_more - _BELOW_ONE).to(tl.int32, bitcast=True)
    return _LN2_TIMES_127 - bits.to(tl.float32) * _LN2_PER_BIT


@jit
def _gumbel_kernel(seed, position, choice, out, vocab, BLOCK: tl.constexpr):
    """Program (s, b): tokens `[b BLOCK, (b + 1) BLOCK)` of row s."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed + row)
    word = philox_word(
        token.to(tl.uint32),
        tl.load(position + row).to(tl.uint32),
        tl.load(choice + row).to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    tl.store(out + row * vocab + token, gumbel_of_word(word), mask=token < vocab)
