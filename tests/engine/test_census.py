"""The census counts as the strict check does, tells what is wrong, and is fast."""

from itertools import count
from timeit import repeat

from baton.common.block_hash import root_hash
from baton.common.ids import BlockHash
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.arena import GenerationTable
from baton.engine.block_pool import BlockPool
from baton.engine.census import census
from baton.engine.conservation import STATES, check_conservation
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence


class World:
    """A pool with every state in it: `size` slots of each but "free", which has the rest."""

    def __init__(self, num_slots: int = 20, size: int = 2) -> None:
        self.pool = BlockPool(num_slots, GenerationTable(num_slots, SeededRandomness(0)))
        self.prefix = PrefixCache(self.pool)
        self.size = size
        names = count()
        cached = self.pool.take(size)
        self.prefix.insert([BlockHash(b"%d" % next(names)) for _ in cached], cached, 0)
        self.pool.unpin(reversed(cached))
        self.cached = cached
        self.sequence = Sequence(
            tokens=[1],
            prompt_len=1,
            sampling=SamplingParams(max_tokens=1),
            tenant_key=b"",
            root=root_hash(b"", ""),
            slots=self.pool.take(size),
        )
        self.pins = {
            name: [self.pool.take(size)]
            for name in ("leased", "receiving", "quarantined", "retiring")
        }

    def count(self, sequences=None, **changed):
        found = [self.sequence] if sequences is None else sequences
        return census(self.pool, self.prefix, sequences=found, **{**self.pins, **changed})


def test_it_agrees_with_the_strict_check():
    world = World()
    found = world.count()
    assert found.counts == check_conservation(
        world.pool, world.prefix, sequences=[world.sequence], **world.pins
    )
    assert list(found.counts) == list(STATES)
    assert found.counts == dict.fromkeys(STATES, 2) | {"free": 8}
    assert (found.unowned_slots, found.missing_slots, found.num_blocks) == ((), (), 20)
    assert found.is_consistent


def test_a_slot_counts_in_the_first_state_that_holds():
    world = World()
    shared = world.sequence.slots[:1]
    world.pool.pin(shared)
    world.pool.pin(world.cached)
    found = world.count(leased=[*world.pins["leased"], shared], receiving=[world.cached])
    assert found.counts["leased"] == 3
    assert (found.counts["owned"], found.counts["cached"]) == (1, 0)
    assert found.missing_slots == ()
    assert found.unowned_slots == tuple(sorted(world.pins["receiving"][0]))


def test_leaked_and_missing_holders_are_told_and_never_raised():
    world = World()
    first, second = world.sequence.slots
    world.pool.pin([first])
    assert world.count().unowned_slots == (first,)
    forgotten = world.count(sequences=[])
    assert forgotten.unowned_slots == tuple(sorted((first, second)))
    assert sum(forgotten.counts.values()) == 18
    twice = world.count(leased=[*world.pins["leased"], [second]])
    assert twice.missing_slots == (second,)
    assert not twice.is_consistent


def test_lost_and_torn_slots_are_told():
    world = World()
    lost = world.pool.free_slots()[-1]
    world.pool._free.remove(lost)
    world.pool._is_free[lost] = 0
    held = world.sequence.slots[0]
    world.pool._is_free[held] = 1
    found = world.count()
    assert found.unowned_slots == (lost,)
    assert found.missing_slots == (held,)


def test_slots_that_the_pool_does_not_have_are_left_out():
    world = World()
    found = world.count(leased=[*world.pins["leased"], [-3, 20, 10**12]])
    assert found == world.count()


def test_a_large_pool_is_counted_within_a_step():
    world = World(100_000, 14_000)
    best_s = min(repeat(world.count, number=1, repeat=7))
    # 4.2 ms on an idle core; the bound leaves room for a busy machine.
    assert best_s < 0.03, f"census of 100,000 slots: {best_s * 1e3:.1f} ms"
