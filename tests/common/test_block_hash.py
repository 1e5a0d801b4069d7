"""Block hashes are the same in every process of every release."""

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from baton.common.block_hash import block_hash, extend_hashes, root_hash

PROGRAM = """
from baton.common.block_hash import extend_hashes, root_hash
hashes = []
extend_hashes(hashes, b"tenant", root_hash(b"tenant", "fingerprint"), list(range(8)), 4)
print(" ".join(block.hex() for block in hashes))
"""
GOLDEN_ROOTS = {
    (b"", ""): "cae66941d9efbd404e4d88758ea67670",
    (b"", "fingerprint"): "af1dca2e628fa7a0be264de4544b2156",
    (b"tenant", "fingerprint"): "d12218be7110238e013bf80a22020232",
    (bytes(range(64)), "größe"): "c9b2685abdbc0c6af06dc08022cfbc0c",
}
GOLDEN_BLOCKS = ["14ed07bb8870911065d3f4579ddb4de6", "1b92494e4b829d904950a9fbba24088e"]
GOLDEN_LARGE_IDS = "75b993594401a0e8c74809e1d3c3b899"


def test_golden_roots():
    for (key, fingerprint), expected in GOLDEN_ROOTS.items():
        assert root_hash(key, fingerprint).hex() == expected


def test_golden_blocks():
    hashes = []
    extend_hashes(hashes, b"tenant", root_hash(b"tenant", "fingerprint"), list(range(11)), 4)
    assert [block.hex() for block in hashes] == GOLDEN_BLOCKS


def test_token_ids_are_32_bits_little_endian():
    parent = root_hash(b"", "f")
    assert block_hash(b"", parent, [0, 255, 65536, 2**32 - 1]).hex() == GOLDEN_LARGE_IDS


def test_other_processes_compute_the_same():
    for hash_seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == GOLDEN_BLOCKS


def test_every_input_decides():
    root = root_hash(b"a", "f")
    base = block_hash(b"a", root, [1, 2])
    assert root != root_hash(b"b", "f")
    assert root != root_hash(b"a", "g")
    assert base != block_hash(b"b", root, [1, 2])
    assert base != block_hash(b"a", base, [1, 2])
    assert base != block_hash(b"a", root, [2, 1])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_extending_in_steps_equals_at_once(tokens, block_size, first):
    root = root_hash(b"k", "f")
    at_once, in_steps = [], []
    extend_hashes(at_once, b"k", root, tokens, block_size)
    extend_hashes(in_steps, b"k", root, tokens[:first], block_size)
    extend_hashes(in_steps, b"k", root, tokens, block_size)
    assert in_steps == at_once
    assert len(at_once) == len(tokens) // block_size
