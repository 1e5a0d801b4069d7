"""The KV of sequences: what pool and prefix cache do together when a sequence comes and goes.

A sequence's table after `reserve`:

    | hits: pinned, shared, read-only | taken: its own, to be written |
    [0, num_cached)                   [num_cached, num_tokens)

Only the engine thread calls this; nothing here waits.
"""

from collections.abc import Iterable

from baton.common.ids import Slot
from baton.engine.block_pool import BlockPool
from baton.engine.digests import DigestTable
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence


class KvCache:
    """Reserves, publishes and releases tables. One pool serves cache and running sequences.

    With `digests` each published block has one, and no hit is used whose bytes have changed.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache,
        block_size: int,
        digests: DigestTable | None = None,
    ) -> None:
        assert block_size > 0
        self._pool = pool
        self._prefix = prefix
        self.block_size = block_size
        self._digests = digests
        # Cached blocks whose bytes were found changed, since the start.
        self.num_digest_mismatches = 0

    @property
    def available(self) -> int:
        """Blocks that a reservation could get: free ones and evictable ones."""
        return self._pool.num_free + self._prefix.num_evictable

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    def num_hits(self, sequence: Sequence, limit_tokens: int) -> int:
        """Full blocks within `[0, limit_tokens)` that the cache holds; changes nothing."""
        return self._prefix.peek(sequence.full_hashes(limit_tokens, self.block_size))[0]

    def fits(self, sequence: Sequence, num_tokens: int, limit_tokens: int) -> bool:
        """Whether `reserve` with the same arguments would succeed now."""
        hashes = sequence.full_hashes(limit_tokens, self.block_size)
        num_hits, num_evictable_hits = self._prefix.peek(hashes)
        # Pinning the hits takes them out of what can be evicted for the rest.
        left = self.available - num_evictable_hits
        return self.num_blocks(num_tokens) - num_hits <= left

    def reserve(self, sequence: Sequence, num_tokens: int, limit_tokens: int) -> bool:
        """Give the sequence blocks for `[0, num_tokens)`: all of them, or False and no change.

        Full blocks inside `[0, limit_tokens)` come from the cache where it holds them. The limit
        is below the newest known token, because that one must be forwarded to get logits. Hits
        that fail their digest are dropped from the cache first, also when False comes of that.
        """
        assert not sequence.slots, "the sequence already has a table"
        assert 0 <= limit_tokens <= num_tokens, "hits lie within the reservation"
        # Verified only when there is room: a waiting sequence asks again and again.
        if not self.fits(sequence, num_tokens, limit_tokens):
            return False
        hits = self._prefix.match(sequence.full_hashes(limit_tokens, self.block_size))
        num_right = self._drop_mismatches(hits)
        if num_right < len(hits):
            del hits[num_right:]
            if not self.fits(sequence, num_tokens, limit_tokens):
                return False
        self._pool.pin(hits)
        sequence.slots = hits + self._take(self.num_blocks(num_tokens) - len(hits))
        sequence.num_cached = sequence.num_computed = len(hits) * self.block_size
        sequence.num_published = len(hits)
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the table to cover `[0, num_tokens)`: entirely, or False and no change."""
        missing = self.num_blocks(num_tokens) - len(sequence.slots)
        if missing > self.available:
            return False
        if missing > 0:
            sequence.slots.extend(self._take(missing))
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Put the full blocks of `[0, min(num_tokens, num_computed))` in the prefix cache.

        The caller vouches that their bytes are final and visible. A block whose last token was
        sampled but never fed is not full.
        """
        num_final = min(num_tokens, sequence.num_computed)
        num_full = num_final // self.block_size
        if num_full <= sequence.num_published:
            return
        hashes = sequence.full_hashes(num_final, self.block_size)
        if self._digests is not None:
            self._digests.record(sequence.slots[sequence.num_published : num_full])
        self._prefix.insert(hashes, sequence.slots, sequence.num_published)
        sequence.num_published = num_full

    def release(self, sequence: Sequence) -> None:
        """Let go of all blocks of the sequence; what it published stays cached, evictable.

        Afterwards none of its KV is computed, so it may be reserved again. `num_cached` stays: it
        reports what the last reservation found.
        """
        slots, sequence.slots = sequence.slots, []
        sequence.lose_kv()
        # Leaf to root, so that each release of a node ends at once at its still busy parent.
        self._pool.unpin(reversed(slots))

    def pin(self, slots: Iterable[Slot]) -> None:
        """Add a holder to each slot: a lease, an open read, a step in flight."""
        self._pool.pin(slots)

    def unpin(self, slots: Iterable[Slot]) -> None:
        """Remove the holder that `pin` added."""
        self._pool.unpin(slots)

    def drop_all_cached(self) -> int:
        """Evict everything that nobody holds; the number of blocks dropped."""
        return len(self._prefix.evict(self._prefix.num_evictable))

    def _drop_mismatches(self, hits: list[Slot]) -> int:
        """Drop the hits whose bytes have changed; how many lead up to the first of them."""
        if self._digests is None or not hits:
            return len(hits)
        wrong = self._digests.mismatches(hits)
        if not wrong:
            return len(hits)
        self.num_digest_mismatches += len(wrong)
        self._prefix.drop([hits[index] for index in wrong])
        return wrong[0]

    def _take(self, count: int) -> list[Slot]:
        self._prefix.evict(max(0, count - self._pool.num_free))
        return self._pool.take(count)
