"""The random numbers are those of the paper, and the noise is Gumbel noise, bit for bit."""

import numpy as np
import pytest

from baton.engine.philox import gumbel, gumbel_at, log_fp32, philox4x32

# Known-answer vectors published with Random123.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

GOLDEN_NOISE = [0x4049D273, 0x3EC8CD98, 0x3F5BE356, 0x3EFAFEFD]


def one_each(words):
    return [np.array([word], dtype=np.uint32) for word in words]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    words = philox4x32(one_each(counter), one_each(key))
    assert tuple(int(word[0]) for word in words) == expected


def test_vectorised_equals_one_by_one():
    counters = np.arange(50, dtype=np.uint32)
    zero = np.zeros(1, dtype=np.uint32)
    key = one_each((7, 9))
    together = philox4x32([counters, zero, zero, zero], key)
    for index in range(50):
        alone = philox4x32([counters[index : index + 1], zero, zero, zero], key)
        assert [int(word[0]) for word in alone] == [int(word[index]) for word in together]


def test_logarithm_is_accurate_on_every_uniform_value():
    words = np.arange(0, 1 << 23, 5, dtype=np.uint32)
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    assert uniform.min() > 0
    assert uniform.max() < 1
    exact = np.log(uniform.astype(np.float64))
    assert np.max(np.abs(log_fp32(uniform) / exact - 1)) < 1.2e-7


def test_noise_bits_never_change():
    noise = gumbel(seed=0x0123456789ABCDEF, position=5, vocab=4)
    assert noise.dtype == np.float32
    assert noise.view(np.uint32).tolist() == GOLDEN_NOISE


def test_extreme_uniforms_give_finite_noise():
    ends = np.array([0.5 * 2**-23, 1 - 0.5 * 2**-23], dtype=np.float32)
    noise = -log_fp32(-log_fp32(ends))
    assert np.isfinite(noise).all()


def test_each_part_of_the_key_matters_and_nothing_else():
    base = gumbel(1, 2, 64)
    assert np.array_equal(base, gumbel(1, 2, 64))
    assert np.array_equal(base[:10], gumbel(1, 2, 10)), "independent of the vocabulary"
    for other in (
        gumbel(2, 2, 64),
        gumbel(1 << 32 | 1, 2, 64),
        gumbel(1, 3, 64),
        gumbel(1, 2, 64, choice=1),
    ):
        assert not np.any(base == other)


def test_single_entries_of_many_rows_equal_the_rows():
    seeds = np.array([1, 2**64 - 1, 1], dtype=np.uint64)
    positions = np.array([2, 3, 4], dtype=np.uint32)
    token_ids = np.array([3, 60, 7], dtype=np.uint32)
    found = gumbel_at(seeds, positions, token_ids)
    for row in range(3):
        whole = gumbel(int(seeds[row]), int(positions[row]), 64)
        assert found[row] == whole[token_ids[row]]


def test_noise_has_the_gumbel_distribution():
    noise = np.sort(gumbel(42, 0, 20_000).astype(np.float64))
    expected = np.exp(-np.exp(-noise))
    steps = np.arange(1, noise.size + 1) / noise.size
    # Kolmogorov-Smirnov: 1.63/sqrt(n) is the 1 % point.
    assert np.max(np.abs(steps - expected)) < 1.63 / noise.size**0.5
