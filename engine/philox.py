"""Counter-based random numbers: the draw for a position depends on nothing drawn before.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Gumbel noise, version 1. A Triton kernel must reproduce it bit for bit, so every step is exact
integer arithmetic or one correctly rounded fp32 add, subtract or multiply, in the order written
here, none fused (compile with `enable_fp_fusion=False`), and no library logarithm:

    key     = (seed mod 2^32, seed div 2^32)                     seed in [0, 2^64)
    counter = (token id, position, choice, 0)
    x       = word 0 of philox4x32-10(counter, key)
    u       = (float32(x >> 9) + 0.5) * 2^-23                    exact, in (0, 1)
    noise   = -log(-log(u))                                      `log_fp32` below, twice

The token that maximises logit + noise is a sample of softmax(logits) (Gumbel-max).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)

# log(1 + f) = f + f² P(f) on [sqrt(1/2) - 1, sqrt(2) - 1): a Chebyshev fit of degree 8, rounded to
# fp32; relative error of `log_fp32` below 1e-7. Highest power first.
_LOG_COEFFICIENTS = tuple(
    np.float32(value)
    for value in (
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
)
# ln 2 in two parts: the first has so few bits that its product with an exponent is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> list[Words]:
    """The four output words for each counter; its four words and the key's two broadcast."""
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in np.broadcast_arrays(*counter))
    k0, k1 = (word.astype(np.uint64) for word in key)
    for _ in range(ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF_WORD) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF_WORD) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def log_fp32(x: Floats) -> Floats:
    """Natural logarithm of positive normal fp32 numbers from exactly specified fp32 steps."""
    bits = x.view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1)
    polynomial: Floats = np.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        polynomial = polynomial * f + coefficient
    scale = exponent.astype(np.float32)
    result: Floats = scale * _LN2_HIGH + (f + (f * f * polynomial + scale * _LN2_LOW))
    return result


def gumbel(seed: int, position: int, vocab: int, *, choice: int = 0) -> Floats:
    """Standard Gumbel noise for the token ids `[0, vocab)`: fp32 `[vocab]`.

    A function of (seed, choice, position, token id) alone, so a retried request continues the same
    random sequence on any worker.
    """
    assert 0 <= seed < 1 << 64, "a seed is 64 bits"
    token_ids = np.arange(vocab, dtype=np.uint32)
    return gumbel_at(
        np.array([seed], dtype=np.uint64),
        np.array([position], dtype=np.uint32),
        token_ids,
        choice=choice,
    )


def gumbel_at(
    seeds: NDArray[np.uint64], positions: Words, token_ids: Words, *, choice: int = 0
) -> Floats:
    """Single entries of `gumbel`, without computing the others; the arguments broadcast."""
    rest = (np.array([word], dtype=np.uint32) for word in (choice, 0))
    key = ((seeds & _LOW).astype(np.uint32), (seeds >> _HALF_WORD).astype(np.uint32))
    word = philox4x32([token_ids, positions, *rest], key)[0]
    uniform = ((word >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -log_fp32(-log_fp32(uniform))
