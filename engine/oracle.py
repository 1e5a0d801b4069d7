"""The oracle model: a model whose every token depends on every KV byte of its context.

    KV of token t at position p    mix(mix(p << 32 | t) + (i + 1) GAMMA), word i of 8 bytes, for
                                   i over [kv_head][layer][k|v][word of head_dim], little-endian
    logits after a context         from blake2b over the KV bytes of its tokens, in order, as read
                                   from the arena through the block table

Equal prefixes have equal blocks, as in a transformer, and nothing else has. A stale, torn or
foreign byte anywhere in the context changes all logits, where attention might average it away. So
tests of the hand-over see in the tokens whether the KV was right. `mix` is SplitMix64's finaliser
(`kernels/block_digest.py` has the source), `GAMMA` its increment.

`oracle_answer` is the independent path that tests compare an engine with: no arena, no batch.
`oracle_runner.py` runs the model over an arena.
"""

from collections.abc import Collection
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from baton.common.ids import BlockHash
from baton.common.sampling import SamplingParams
from baton.engine.finish import finish_reason
from baton.engine.sampler import Draw, Sampler
from baton.engine.sequence import Sequence
from baton.kernels.block_digest import GAMMA, MULTIPLIER_1, MULTIPLIER_2, WORD_BYTES

# In place of an identity of weights: raised when tokens or bytes of this model change.
ORACLE_WEIGHTS_ID: Final = "oracle-1"
# Logits lie in [-LOGIT_RANGE, LOGIT_RANGE): spread enough that sampling has favourites.
LOGIT_RANGE: Final = 8.0
# Whole numbers below 2^23 and their products with powers of two are exact in fp32.
_LOGIT_BITS: Final = 23
# Half of the bits tell tokens apart, the other half decide between them.
MAX_VOCAB_SIZE: Final = 2 ** (_LOGIT_BITS // 2)

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class OracleModel:
    """The model as pure functions: `num_words` 8-byte words of KV per token."""

    vocab_size: int
    num_words: int

    def kv_words(self, tokens: Ordered[int] | Words, first_position: int) -> Words:
        """`[T, num_words]`: the KV of tokens at `[first_position, first_position + T)`."""
        token_T = np.asarray(tokens, dtype=np.uint64)
        position_T = np.arange(first_position, first_position + len(token_T), dtype=np.uint64)
        return self.kv_words_at(token_T, position_T)

    def kv_words_at(self, token_T: Words, position_T: Words) -> Words:
        """`[T, num_words]`: the KV of each token at its position."""
        base_T = _mix((position_T << np.uint64(32)) | token_T)
        salt = np.arange(1, self.num_words + 1, dtype=np.uint64) * np.uint64(GAMMA)
        return _mix(base_T[:, None] + salt)

    def logits(self, digests: Ordered[bytes]) -> npt.NDArray[np.float32]:
        """`[S, vocab]` from the `context_digest` of each row; no two logits of a row are equal."""
        seed_S = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
        token_V = np.arange(self.vocab_size, dtype=np.uint64)
        drawn = _mix(seed_S[:, None] + (token_V + np.uint64(1)) * np.uint64(GAMMA))
        drawn >>= np.uint64(64 - _LOGIT_BITS)
        # The token's own number as the last digit to the base of the vocabulary: no ties.
        size = np.uint64(self.vocab_size)
        distinct = np.minimum(drawn // size, np.uint64(2**_LOGIT_BITS // self.vocab_size - 1))
        distinct = distinct * size + token_V
        step = np.float32(2 * LOGIT_RANGE / 2**_LOGIT_BITS)
        logits: npt.NDArray[np.float32] = distinct.astype(np.float32) * step
        return logits - np.float32(LOGIT_RANGE)


def context_digest(kv: memoryview) -> bytes:
    """What the logits after a context are made from: 8 bytes, of its KV bytes in token order."""
    return blake2b(kv, digest_size=WORD_BYTES).digest()


def oracle_answer(
    prompt: Ordered[int],
    max_tokens: int,
    vocab_size: int,
    *,
    num_words: int = 8,
    stop_token_ids: Collection[int] = (),
) -> list[int]:
    """What the oracle model must answer to `prompt`, greedily: no arena, no batch, no engine.

    `num_words` is the KV of a token in 8-byte words. The token that stops it is its last one.
    """
    model = OracleModel(vocab_size, num_words)
    context = blake2b(model.kv_words(prompt, 0).tobytes(), digest_size=WORD_BYTES)
    answer: list[int] = []
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = int(model.logits([context.digest()])[0].argmax())
        answer.append(token)
        if token in stop_token_ids:
            break
        context.update(model.kv_words([token], position).tobytes())
    return answer


def oracle_sampled_answer(
    prompt: Ordered[int],
    sampling: SamplingParams,
    vocab_size: int,
    *,
    num_words: int = 8,
    eos_token_ids: Collection[int] = (),
    max_model_len: int | None = None,
) -> list[int]:
    """`oracle_answer` under any sampling: pure logits, the engine's sampler and finish reasons."""
    model, sampler = OracleModel(vocab_size, num_words), Sampler(eos_token_ids)
    limit = len(prompt) + sampling.max_tokens if max_model_len is None else max_model_len
    sequence = Sequence(
        tokens=list(prompt),
        prompt_len=len(prompt),
        sampling=sampling,
        tenant_key=b"",
        root=BlockHash(b""),
    )
    context = blake2b(model.kv_words(prompt, 0).tobytes(), digest_size=WORD_BYTES)
    while True:
        logits = torch.from_numpy(model.logits([context.digest()]))
        [token] = sampler.sample(logits, [Draw.of(sequence)])
        sequence.tokens.append(token)
        if finish_reason(sequence, eos_token_ids, limit) is not None:
            return sequence.tokens[len(prompt) :]
        context.update(model.kv_words([token], len(sequence.tokens) - 1).tobytes())


def _mix(words: Words) -> Words:
    """SplitMix64's finaliser; a new array."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return words ^ (words >> np.uint64(31))
