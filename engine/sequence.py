"""A sequence: one request's tokens, its block table and how far its KV is computed.

tokens   | prompt ............................ | output ........ |
KV       | cached | computed here ............. | last: not fed   |
         [0, num_cached)   [.., num_computed)    the newest token has no KV yet
"""

from dataclasses import dataclass, field

from baton.common.block_hash import extend_hashes
from baton.common.ids import BlockHash, Slot
from baton.common.sampling import SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Progress counters and the block table; the block pool owns what the slots mean."""

    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    tenant_key: bytes
    root: BlockHash
    slots: list[Slot] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    # Tokens whose KV lies in the arena: `[0, num_computed)`.
    num_computed: int = 0
    # Of those, the prefix that was found in the cache when the sequence was admitted.
    num_cached: int = 0
    # Leading blocks of the table that this sequence has already put in the prefix cache.
    num_published: int = 0
    # Tokens that this worker forwarded for the sequence.
    num_forwarded: int = 0
    # How often its table was let go: tells a step in flight that the table is no longer its own.
    num_releases: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed: a prompt's rest, or the one sampled last."""
        return len(self.tokens) - self.num_computed

    def advance(self, num_tokens: int) -> None:
        """The KV of the next `num_tokens` tokens is in the arena, seen to be written."""
        assert 0 < num_tokens <= self.num_pending, "only known tokens have KV"
        self.num_computed += num_tokens
        self.num_forwarded += num_tokens

    def full_hashes(self, num_tokens: int, block_size: int) -> list[BlockHash]:
        """Hashes of the full blocks within the first `num_tokens` tokens."""
        assert num_tokens <= len(self.tokens), "hashes cover known tokens alone"
        full = num_tokens // block_size
        if len(self.hashes) < full:
            known = self.tokens[: full * block_size]
            extend_hashes(self.hashes, self.tenant_key, self.root, known, block_size)
        return self.hashes[:full]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of a sequence, to be forwarded in one step.

    Its slots must already cover `[0, num_computed + num_tokens)`.
    """

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the newest known token, so that the next can be sampled."""
        return self.num_tokens == self.sequence.num_pending
