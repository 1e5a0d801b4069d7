"""The conservation check: every slot has exactly one meaning, and every pin has an owner.

Each entry of each listing (a sequence's table, a lease, an open read's destinations, quarantine, a
launched step's freed slots) is one pin. A read that is under way therefore pins its destinations
beside the sequence that waits for it, and its pin is what remains when that sequence is aborted.

Counts are recomputed from these listings and the tree, never read back from the pool's counters.
Costs O(slots): for tests, for idle moments and for the reconciler.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from baton.common.ids import BlockHash, Slot
from baton.engine.block_pool import BlockPool
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence

STATES = ("quarantined", "receiving", "retiring", "leased", "owned", "cached", "free")


def check_conservation(
    pool: BlockPool,
    prefix: PrefixCache,
    *,
    sequences: Iterable[Sequence],
    leased: Iterable[Collection[Slot]] = (),
    receiving: Iterable[Collection[Slot]] = (),
    quarantined: Iterable[Collection[Slot]] = (),
    retiring: Iterable[Collection[Slot]] = (),
) -> dict[str, int]:
    """Slots per state; each slot counts in the first of `STATES` that holds, the sum is the total.

    Raises AssertionError naming the slot and the difference when a slot is lost, is in use and
    free at once, or has another reference count than holders, or when the cache's tree is broken.
    """
    holders = {
        "quarantined": _count(quarantined),
        "receiving": _count(receiving),
        "retiring": _count(retiring),
        "leased": _count(leased),
        "owned": _count(sequence.slots for sequence in sequences),
    }
    cached = {block.slot for block in prefix.blocks()}
    free = _free_slots(pool)
    totals = dict.fromkeys(STATES, 0)
    for index in range(pool.num_slots):
        slot = Slot(index)
        pins = {name: counts[slot] for name, counts in holders.items() if counts[slot]}
        _check_slot(pool, slot, pins, is_cached=slot in cached, is_free=slot in free)
        state = next(iter(pins), "cached" if slot in cached else "free")
        totals[state] += 1
    assert sum(totals.values()) == pool.num_slots, f"{totals} is not {pool.num_slots} slots"
    _check_tree(prefix, {slot for counts in holders.values() for slot in counts})
    return totals


def _count(listings: Iterable[Collection[Slot]]) -> Counter[Slot]:
    return Counter(slot for slots in listings for slot in slots)


def _free_slots(pool: BlockPool) -> set[Slot]:
    listed = Counter(pool.free_slots())
    for slot, times in listed.items():
        assert times == 1, f"slot {slot} is {times} times on the free list"
    return set(listed)


def _check_slot(
    pool: BlockPool, slot: Slot, pins: dict[str, int], *, is_cached: bool, is_free: bool
) -> None:
    expected, stored = sum(pins.values()), pool.refcount(slot)
    assert stored == expected, (
        f"slot {slot} has reference count {stored}, but {expected} holders: {pins or 'none'}"
    )
    assert is_free == pool.is_free(slot), f"slot {slot}: free list and free mark differ"
    if is_free:
        assert not pins, f"slot {slot} is free, but held: {pins}"
        assert not is_cached, f"slot {slot} is free, but cached"
    else:
        assert pins or is_cached, f"slot {slot} is lost: not free, not cached, and nobody holds it"


def _check_tree(prefix: PrefixCache, held: set[Slot]) -> None:
    blocks = list(prefix.blocks())
    by_hash = {block.hash: block for block in blocks}
    assert len({block.slot for block in blocks}) == len(blocks), "two cached blocks share a slot"
    busy: set[BlockHash] = set()
    for block in blocks:
        assert prefix.holds(block.slot), f"slot {block.slot} is cached, but the cache denies it"
        assert block.parent is None or block.parent in by_hash, (
            f"slot {block.slot} is cached without the block before it"
        )
        cursor = block if block.slot in held else None
        while cursor is not None and cursor.hash not in busy:
            busy.add(cursor.hash)
            cursor = None if cursor.parent is None else by_hash[cursor.parent]
    evictable = len(blocks) - len(busy)
    assert prefix.num_evictable == evictable, (
        f"the cache counts {prefix.num_evictable} evictable blocks, the tree has {evictable}"
    )
