"""A sequence: one request's tokens, its block table and how far its KV is computed.

tokens   | prompt ............................ | output ........ |
KV       | cached | computed here ............. | last: not fed   |
         [0, num_cached)   [.., num_computed)    the newest token has no KV yet

Steps in flight move nothing here but two counters: how many tokens they forward, and how many they
sample. A sampled token that the host does not know yet is *promised*: the next step may take it
from where the device left it.
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
    # Tokens that steps in flight forward, and those that they will have sampled.
    num_in_flight: int = 0
    num_promised: int = 0
    # Where the last promised token stands among those that its step samples.
    promised_at: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_launched(self) -> int:
        """Tokens that are computed or in flight: where the next chunk begins."""
        return self.num_computed + self.num_in_flight

    @property
    def num_pending(self) -> int:
        """Tokens known or promised, and not launched: a prompt's rest, or the one sampled last."""
        return len(self.tokens) + self.num_promised - self.num_launched

    def launch(self, num_tokens: int, sampled_at: int | None) -> None:
        """A step forwards the next `num_tokens` tokens, and samples one if `sampled_at` says where
        among its own."""
        assert 0 < num_tokens <= self.num_pending, "a chunk is of pending tokens"
        self.num_in_flight += num_tokens
        if sampled_at is not None:
            self.num_promised += 1
            self.promised_at = sampled_at

    def land(self, num_tokens: int, token: int | None) -> None:
        """The oldest step in flight has ended: the KV of its `num_tokens` tokens is in the arena,
        seen to be written, and `token` is what it sampled."""
        assert 0 < num_tokens <= self.num_in_flight, "what lands was launched"
        self.num_in_flight -= num_tokens
        self.num_computed += num_tokens
        self.num_forwarded += num_tokens
        if token is not None:
            assert self.num_computed == len(self.tokens), "tokens of a launched chunk were changed"
            self.num_promised -= 1
            self.tokens.append(token)

    def abandon(self) -> None:
        """Nothing of the steps in flight will land."""
        self.num_in_flight = self.num_promised = 0

    def lose_kv(self) -> None:
        """The table is let go: nothing is computed, and what is in flight is no longer its own."""
        self.abandon()
        self.num_computed = self.num_published = 0
        self.num_releases += 1

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

    Its slots must already cover `[0, num_launched + num_tokens)`. What it says of itself holds
    until it is launched.
    """

    sequence: Sequence
    num_tokens: int

    @property
    def start(self) -> int:
        return self.sequence.num_launched

    @property
    def end(self) -> int:
        return self.sequence.num_launched + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the newest token, so that the next can be sampled."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def promise(self) -> int | None:
        """Where the step before leaves the chunk's one token among those that it samples; None
        when all of the chunk's tokens are known."""
        known = len(self.sequence.tokens)
        if self.end <= known:
            return None
        assert self.start == known, "one token at most is promised, and the chunk is that token"
        return self.sequence.promised_at

    def token_ids(self, unknown: int = 0) -> list[int]:
        """The chunk's tokens, with `unknown` in place of the promised one."""
        if self.promise is not None:
            return [unknown]
        return self.sequence.tokens[self.start : self.end]
