"""Sequences for measurements: random tokens, and where it does not matter, KV of nobody."""

from itertools import count

import numpy as np

from baton.common.errors import ConfigError
from baton.common.sampling import SamplingParams
from baton.engine.engine import Engine
from baton.engine.sequence import Sequence

_serial = count()


def random_prompt(engine: Engine, length: int, seed: int) -> list[int]:
    vocab_size = engine.model_config.vocab_size
    drawn: list[int] = np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
    return drawn


def new_sequence(engine: Engine, prompt_len: int, max_tokens: int) -> Sequence:
    """Of a tenant of its own, so that no cache shortens it."""
    serial = next(_serial)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompt = random_prompt(engine, prompt_len, serial)
    return engine.new_sequence(prompt, sampling, serial.to_bytes(8, "little"))


def reserve(engine: Engine, sequence: Sequence, num_tokens: int) -> None:
    """Blocks for so many tokens. Raises ConfigError when the arena is too small."""
    if not engine.kv.reserve(sequence, num_tokens, 0):
        raise ConfigError(
            f"the arena of {engine.num_blocks} blocks is too small for this figure; end what else "
            "runs on the GPU, or choose others with --only"
        )


def decoding_sequence(engine: Engine, context_len: int, num_steps: int) -> Sequence:
    """A sequence about to feed the last token of its context, over whatever its blocks hold."""
    sequence = new_sequence(engine, context_len, num_steps + 1)
    reserve(engine, sequence, context_len + num_steps)
    sequence.num_computed = context_len - 1
    return sequence


def let_go(engine: Engine, sequences: list[Sequence]) -> None:
    """Leave an engine without steps, without these sequences and with an empty cache."""
    engine.abandon()
    for sequence in sequences:
        engine.kv.release(sequence)
    engine.kv.drop_all_cached()
