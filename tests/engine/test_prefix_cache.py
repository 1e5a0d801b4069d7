"""The radix tree alone: matching, duplicates, leaf-first LRU, and what listeners are told."""

import pytest

from baton.common.ids import BlockHash, Slot
from baton.common.randomness import SeededRandomness
from baton.engine.arena import GenerationTable
from baton.engine.block_pool import BlockPool
from baton.engine.prefix_cache import PrefixCache


class Journal:
    """Remembers what a listener is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes, bytes | None]] = []

    def on_stored(self, block: BlockHash, parent: BlockHash | None) -> None:
        self.events.append(("stored", block, parent))

    def on_evicted(self, block: BlockHash) -> None:
        self.events.append(("evicted", block, None))


def path(names: str) -> list[BlockHash]:
    """Chained names: "abc" is the blocks a, ab, abc."""
    return [BlockHash(names[: end + 1].encode()) for end in range(len(names))]


class Cache:
    """A pool of ten slots with its cache, and shorthand to fill it."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.generations = GenerationTable(10, SeededRandomness(1))
        self.pool = BlockPool(10, self.generations)
        self.prefix = PrefixCache(self.pool, self.journal)

    def put(self, names: str, start: int = 0) -> list[Slot]:
        """Insert a path with freshly taken slots, which stay pinned."""
        slots = self.prefix.match(path(names)[:start])
        self.pool.pin(slots)
        slots += self.pool.take(len(names) - len(slots))
        self.prefix.insert(path(names), slots, start)
        return slots

    def put_idle(self, names: str, start: int = 0) -> list[Slot]:
        slots = self.put(names, start)
        self.pool.unpin(slots)
        return slots

    def evicted(self, count: int) -> str:
        """Evict and tell the last letters of the paths that went."""
        before = len(self.journal.events)
        self.prefix.evict(count)
        return " ".join(block.decode() for _, block, _ in self.journal.events[before:])


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_match_finds_the_longest_leading_run(cache):
    slots = cache.put("abc")
    assert cache.prefix.match(path("abcd")) == slots
    assert cache.prefix.match(path("abx")) == slots[:2]
    assert cache.prefix.match(path("x")) == []
    assert cache.prefix.peek(path("abx")) == (2, 0)


def test_duplicate_keeps_the_first_slot_and_frees_the_second(cache):
    first, second = cache.put("ab"), cache.put("ab")
    assert not set(first) & set(second)
    assert cache.prefix.match(path("ab")) == first
    cache.pool.unpin(second)
    assert all(cache.pool.is_free(slot) for slot in second)
    cache.pool.unpin(first)
    assert not any(cache.pool.is_free(slot) for slot in first)


def test_child_of_a_twin_keeps_the_idle_parent_from_eviction(cache):
    twin = cache.put("a")
    own = cache.put("a")
    own += cache.pool.take(1)
    cache.prefix.insert(path("ab"), own, 1)
    cache.pool.unpin(twin)
    assert cache.pool.refcount(twin[0]) == 0
    assert cache.prefix.num_evictable == 0, "its child is pinned"
    assert cache.prefix.peek(path("ab")) == (2, 0)
    cache.pool.unpin(own)
    assert cache.prefix.num_evictable == 2


def test_insert_repairs_a_path_whose_twin_was_evicted(cache):
    twin, own = cache.put("a"), cache.put("a")
    cache.pool.unpin(twin)
    assert cache.evicted(1) == "a"
    own += cache.pool.take(1)
    cache.prefix.insert(path("ab"), own, 1)
    assert cache.prefix.match(path("ab")) == own


def test_eviction_takes_leaves_before_parents(cache):
    cache.put_idle("abc")
    assert cache.prefix.num_evictable == 3
    assert cache.evicted(3) == "abc ab a"
    assert cache.pool.num_free == 10
    assert len(cache.prefix) == 0


def test_eviction_is_least_recently_used_first(cache):
    cache.put_idle("a")
    cache.put_idle("b")
    cache.put_idle("c")
    cache.prefix.match(path("a"))
    assert cache.evicted(2) == "b c"


def test_a_block_counts_as_used_until_its_last_holder_lets_go(cache):
    held = cache.put("a")
    cache.put_idle("b")
    cache.prefix.match(path("b"))
    cache.pool.unpin(held)
    assert cache.evicted(2) == "b a"


def test_a_longer_path_keeps_its_ancestors_recent(cache):
    cache.put_idle("ab")
    cache.put_idle("x")
    cache.put_idle("abc", start=2)
    assert cache.evicted(1) == "x"
    assert cache.evicted(3) == "abc ab a"


def test_pinned_blocks_and_their_parents_stay(cache):
    slots = cache.put_idle("abc")
    cache.put_idle("x")
    cache.pool.pin([slots[1]])
    assert cache.prefix.num_evictable == 2
    assert cache.evicted(2) == "abc x"
    assert cache.prefix.match(path("abc")) == slots[:2]
    with pytest.raises(AssertionError, match="1 wanted, 0 evictable"):
        cache.prefix.evict(1)


def test_a_block_leased_since_it_became_evictable_stays(cache):
    (leased,) = cache.put_idle("a")
    cache.put_idle("x")
    cache.pool.pin([leased])
    assert cache.evicted(1) == "x"
    cache.pool.unpin([leased])
    assert cache.evicted(1) == "a"


def test_listener_sees_parents_before_children(cache):
    cache.put_idle("ab")
    cache.prefix.evict(2)
    assert cache.journal.events == [
        ("stored", b"a", None),
        ("stored", b"ab", b"a"),
        ("evicted", b"ab", None),
        ("evicted", b"a", None),
    ]


def test_blocks_lists_every_node_with_its_parent(cache):
    slots = cache.put("ab")
    assert [tuple(block) for block in cache.prefix.blocks()] == [
        (b"a", None, slots[0]),
        (b"ab", b"a", slots[1]),
    ]
    assert cache.prefix.holds(slots[0])


def test_long_reuse_keeps_the_eviction_heap_small(cache):
    cache.put_idle("abc")
    for _ in range(1000):
        hits = cache.prefix.match(path("abc"))
        cache.pool.pin(hits)
        cache.pool.unpin(hits)
    assert len(cache.prefix._heap) <= len(cache.prefix)


def test_a_taken_slot_gets_a_new_generation(cache):
    slots = cache.put_idle("ab")
    words = [cache.generations.word(slot) for slot in slots]
    cache.pool.pin(cache.prefix.match(path("ab")))
    assert [cache.generations.word(slot) for slot in slots] == words, "reuse changes no bytes"
    cache.pool.unpin(slots)
    cache.prefix.evict(2)
    taken = cache.pool.take(10)
    assert set(slots) < set(taken)
    assert all(cache.generations.word(slot) > word for slot, word in zip(slots, words, strict=True))


def test_misuse_of_the_pool_is_noticed(cache):
    (slot,) = cache.pool.take(1)
    cache.pool.unpin([slot])
    with pytest.raises(AssertionError, match="no holder"):
        cache.pool.unpin([slot])
    with pytest.raises(AssertionError, match="is free"):
        cache.pool.pin([slot])
    with pytest.raises(AssertionError, match="11 slots wanted, 10 free"):
        cache.pool.take(11)
    with pytest.raises(AssertionError, match="freed twice"):
        cache.pool.reclaim([slot])
    with pytest.raises(AssertionError, match="nobody who holds it"):
        cache.prefix.insert(path("a"), [slot], 0)


def test_drop_takes_the_subtree_children_first(cache):
    slots = cache.put_idle("abcd")
    cache.put_idle("abx", start=2)
    other = cache.put_idle("z")
    before = len(cache.journal.events)
    assert cache.prefix.drop([slots[1]]) == 4
    events = cache.journal.events[before:]
    assert {name for name, _, _ in events} == {"evicted"}
    order = [block.decode() for _, block, _ in events]
    assert sorted(order) == ["ab", "abc", "abcd", "abx"]
    assert order.index("abcd") < order.index("abc") < order.index("ab")
    assert order[-1] == "ab"
    assert cache.prefix.match(path("abcd")) == slots[:1]
    assert all(cache.pool.is_free(slot) for slot in slots[1:])
    assert cache.prefix.num_evictable == len(cache.prefix) == 2
    assert cache.prefix.drop(slots[1:]) == 0
    assert cache.evicted(2) == "z a"
    assert cache.pool.is_free(other[0])


def test_a_dropped_slot_that_is_held_is_freed_by_its_last_holder(cache):
    slots = cache.put("abc")
    cache.pool.unpin([slots[2]])
    assert cache.prefix.drop([slots[1]]) == 2
    assert cache.pool.is_free(slots[2])
    assert not cache.pool.is_free(slots[1])
    assert cache.prefix.num_evictable == 0, "a itself is still held"
    cache.pool.unpin(slots[:2])
    assert cache.pool.is_free(slots[1])
    assert cache.prefix.num_evictable == len(cache.prefix) == 1
    assert cache.evicted(1) == "a"


def test_what_was_dropped_does_not_come_back_by_a_later_publication(cache):
    """A twin repairs the path; what the first table computed behind its wrong block stays out."""
    slots = cache.put("abc")
    cache.prefix.drop([slots[1]])
    cache.prefix.insert(path("abc"), slots, 2)
    assert cache.prefix.match(path("abc")) == slots[:1]
    twin = cache.put("ab", start=1)
    cache.prefix.insert(path("abc"), slots, 2)
    assert cache.prefix.match(path("abc")) == twin


def test_a_dropped_slot_is_as_good_as_any_once_it_was_free(cache):
    slots = cache.put("ab")
    cache.prefix.drop([slots[0]])
    cache.pool.unpin(slots)
    again = cache.put("xyzuvwklmn")
    assert set(slots) < set(again)
    assert cache.prefix.match(path("xyzuvwklmn")) == again


def test_a_named_slot_that_is_held_and_not_cached_is_kept_out_too(cache):
    first, second = cache.put("ab"), cache.put("ab")
    assert cache.prefix.drop([second[0]]) == 0
    cache.pool.unpin(first)
    cache.prefix.evict(2)
    cache.prefix.insert(path("ab"), second, 2)
    cache.prefix.insert(path("ab"), second, 0)
    assert len(cache.prefix) == 0
