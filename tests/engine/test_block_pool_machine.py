"""Pool, prefix cache and KV cache together against a naive model, on random histories.

The model knows which path each slot's bytes were written for. A shared slot with other bytes, a
reservation that is not all or nothing, a leaked pin or a wrong generation all show up in it. A step
in flight writes late: into slots that were its own when it was launched, whoever has them then.
"""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.common.block_hash import root_hash
from baton.common.randomness import SeededRandomness
from baton.common.sampling import SamplingParams
from baton.engine.arena import GenerationTable
from baton.engine.block_pool import BlockPool
from baton.engine.census import census
from baton.engine.conservation import check_conservation
from baton.engine.kv_cache import KvCache
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence

# What a slot holds whose bytes were found wrong, or were computed from such bytes.
WRONG = "wrong"
BLOCK = 2
NUM_SLOTS = 9
TENANTS = (b"red", b"blue")
# Two token values, and often the start of a known text, so that paths meet, part and meet again.
TEXT = [0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1]
PROMPTS = st.one_of(
    st.integers(1, len(TEXT)).map(lambda length: TEXT[:length]),
    st.lists(st.integers(0, 1), min_size=1, max_size=len(TEXT)),
)
ANY_INDEX = st.integers(0, 1000)


class KvMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.generations = GenerationTable(NUM_SLOTS, SeededRandomness(0))
        self.pool = BlockPool(NUM_SLOTS, self.generations)
        self.prefix = PrefixCache(self.pool, self)
        self.kv = KvCache(self.pool, self.prefix, BLOCK)
        self.sequences = []
        self.pins = {"leased": [], "receiving": [], "quarantined": [], "retiring": []}
        # Rows of the step in flight: (sequence, its num_releases, start, end, table, slots, words).
        self.flight = []
        # The model: what each slot's bytes are for, the path of each hash, parents of cached
        # blocks, words of held slots.
        self.written = {}
        self.paths = {}
        self.cached = {}
        self.words = {}

    def on_stored(self, block, parent):
        assert block not in self.cached
        assert parent is None or parent in self.cached
        self.cached[block] = parent

    def on_evicted(self, block):
        assert block not in self.cached.values(), "a child is still there"
        del self.cached[block]

    def path(self, sequence, index):
        return (sequence.tenant_key, *sequence.tokens[: (index + 1) * BLOCK])

    def held(self):
        listings = [sequence.slots for sequence in self.sequences]
        listings += [slots for pins in self.pins.values() for slots in pins]
        return Counter(slot for slots in listings for slot in slots)

    def naive_available(self, extra_held):
        """Free slots and cached blocks without a holder on them or below them."""
        held = self.held() | Counter(extra_held)
        cached = {block.hash: block for block in self.prefix.blocks()}
        stays = set()
        for block in cached.values():
            cursor = block if block.slot in held else None
            while cursor is not None:
                stays.add(cursor.hash)
                cursor = cached.get(cursor.parent)
        in_use = set(held) | {block.slot for block in cached.values()}
        return NUM_SLOTS - len(in_use) + len(cached) - len(stays)

    def pick(self, index):
        return self.sequences[index % len(self.sequences)]

    def snapshot(self):
        refcounts = [self.pool.refcount(slot) for slot in range(NUM_SLOTS)]
        return refcounts, self.pool.free_slots(), dict(self.cached)

    @rule(prompt=PROMPTS, more=st.integers(0, 4), tenant=st.sampled_from(TENANTS))
    def reserve(self, prompt, more, tenant):
        sequence = Sequence(
            tokens=list(prompt),
            prompt_len=len(prompt),
            sampling=SamplingParams(max_tokens=more + 1),
            tenant_key=tenant,
            root=root_hash(tenant, "fingerprint"),
        )
        limit, total = len(prompt) - 1, len(prompt) + more
        hashes = sequence.full_hashes(limit, BLOCK)
        hits = 0
        while hits < len(hashes) and hashes[hits] in self.cached:
            hits += 1
        by_hash = {block.hash: block.slot for block in self.prefix.blocks()}
        hit_slots = [by_hash[block] for block in hashes[:hits]]
        rest = -(-total // BLOCK) - hits
        assert self.kv.num_hits(sequence, limit) == hits
        fits = rest <= self.naive_available(hit_slots)
        before = self.snapshot()
        words = [self.generations.word(slot) for slot in range(NUM_SLOTS)]
        if self.kv.reserve(sequence, total, limit):
            assert fits
            assert sequence.slots[:hits] == hit_slots
            assert sequence.num_cached == sequence.num_computed == hits * BLOCK
            for slot in sequence.slots[hits:]:
                assert self.generations.word(slot) > words[slot]
                self.written.pop(slot, None)
            self.sequences.append(sequence)
        else:
            assert not fits
            assert self.snapshot() == before
            assert not sequence.slots

    @precondition(lambda self: self.sequences)
    @rule(index=ANY_INDEX, tokens=st.integers(1, 5))
    def compute(self, index, tokens):
        """Forward a chunk, write its KV, publish; an output token follows a finished prompt."""
        sequence = self.pick(index)
        if any(row[0] is sequence for row in self.flight):
            return
        start, end = self.chunk(sequence, tokens)
        self.write(sequence, sequence.slots, start, end)
        self.advance(sequence, end)

    def chunk(self, sequence, tokens):
        start = sequence.num_computed
        end = min(start + tokens, len(sequence.tokens), len(sequence.slots) * BLOCK)
        return start, max(start, end)

    def write(self, sequence, table, start, end):
        """The blocks that the chunk fills have their bytes now; wrong ones if one before was."""
        for position in range(start, end):
            index, offset = divmod(position, BLOCK)
            if offset == BLOCK - 1:
                is_right = all(self.written.get(slot) != WRONG for slot in table[: index + 1])
                self.written[table[index]] = self.path(sequence, index) if is_right else WRONG

    def advance(self, sequence, end):
        sequence.num_computed = end
        for index, block in enumerate(sequence.full_hashes(end, BLOCK)):
            self.paths[block] = self.path(sequence, index)
        self.kv.publish(sequence, len(sequence.tokens))
        if end == len(sequence.tokens):
            sequence.tokens.append(end % 2)

    @precondition(lambda self: self.sequences and not self.flight)
    @rule(index=ANY_INDEX, count=st.integers(1, 2), tokens=st.integers(1, 5))
    def launch(self, index, count, tokens):
        """A step starts; from now on the slots that it will write have a holder more."""
        chosen = {id(each): each for each in (self.pick(index + n) for n in range(count))}
        for sequence in chosen.values():
            start, end = self.chunk(sequence, tokens)
            if start == end:
                continue
            table = list(sequence.slots)
            slots = table[start // BLOCK : -(-end // BLOCK)]
            words = [self.generations.word(slot) for slot in slots]
            self.kv.pin(slots)
            self.pins["retiring"].append(slots)
            self.flight.append((sequence, sequence.num_releases, start, end, table, slots, words))

    @precondition(lambda self: self.flight)
    @rule()
    def writer_done(self):
        """The step has written, and its event is seen."""
        flight, self.flight = self.flight, []
        for sequence, num_releases, start, end, table, slots, words in flight:
            is_own = sequence.num_releases == num_releases
            others = [each.slots for each in self.sequences if each is not sequence or not is_own]
            assert not {slot for other in others for slot in other} & set(slots)
            assert [self.generations.word(slot) for slot in slots] == words
            self.pins["retiring"].remove(slots)
            self.kv.unpin(reversed(slots))
            if is_own:
                self.write(sequence, table, start, end)
                self.advance(sequence, end)

    @precondition(lambda self: self.sequences)
    @rule(index=ANY_INDEX, more=st.integers(0, 4))
    def grow(self, index, more):
        sequence = self.pick(index)
        old = list(sequence.slots)
        missing = max(0, -(-(len(sequence.tokens) + more) // BLOCK) - len(old))
        fits = missing <= self.naive_available(())
        assert self.kv.grow(sequence, len(sequence.tokens) + more) == fits
        assert sequence.slots[: len(old)] == old
        for slot in sequence.slots[len(old) :]:
            self.written.pop(slot, None)

    @precondition(lambda self: self.sequences)
    @rule(index=ANY_INDEX, outlives=st.sampled_from([None, "quarantined", "receiving"]))
    def release(self, index, outlives):
        """A sequence ends, perhaps in flight; an unfinished read may still hold its slots."""
        sequence = self.pick(index)
        if outlives is not None:
            own = sequence.slots[sequence.num_published :]
            self.kv.pin(own)
            self.pins[outlives].append(own)
        self.sequences.remove(sequence)
        self.kv.release(sequence)

    @precondition(lambda self: self.sequences)
    @rule(index=ANY_INDEX, skip=st.integers(0, 2))
    def lease_own_blocks(self, index, skip):
        self.lease(self.pick(index).slots[skip:])

    @precondition(lambda self: self.cached)
    @rule(start=ANY_INDEX, step=st.integers(1, 3))
    def lease_cached_blocks(self, start, step):
        slots = [block.slot for block in self.prefix.blocks()]
        self.lease(slots[start % len(slots) :: step])

    def lease(self, slots):
        self.kv.pin(slots)
        self.pins["leased"].append(list(slots))

    @precondition(lambda self: self.pins["receiving"])
    @rule(index=ANY_INDEX)
    def quarantine(self, index):
        """The request of an open read is gone, and the read is not: its pin outlives the table."""
        reads = self.pins["receiving"]
        self.pins["quarantined"].append(reads.pop(index % len(reads)))

    def unpinnable(self):
        """Listings whose entries end by themselves; a step's end with `writer_done`."""
        return [name for name, pins in self.pins.items() if pins and name != "retiring"]

    @precondition(unpinnable)
    @rule(index=ANY_INDEX)
    def unpin(self, index):
        kinds = self.unpinnable()
        pins = self.pins[kinds[index % len(kinds)]]
        self.kv.unpin(pins.pop(index % len(pins)))

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        count = min(count, self.prefix.num_evictable)
        held = self.held()
        slots = self.prefix.evict(count)
        assert len(set(slots)) == count
        assert not any(slot in held for slot in slots)

    @precondition(lambda self: self.sequences)
    @rule(index=ANY_INDEX, tokens=st.integers(0, 3))
    def reserve_again(self, index, tokens):
        """Preempted and admitted at once, perhaps while its step is in flight."""
        sequence = self.pick(index)
        self.kv.release(sequence)
        self.generation_of_a_held_slot_stands_still()
        limit = len(sequence.tokens) - 1
        if self.kv.reserve(sequence, len(sequence.tokens) + tokens, limit):
            for slot in sequence.slots[sequence.num_cached // BLOCK :]:
                self.written.pop(slot, None)
        else:
            self.sequences.remove(sequence)

    @precondition(lambda self: self.cached)
    @rule(index=ANY_INDEX, count=st.integers(1, 2))
    def drop(self, index, count):
        """Bytes of cached blocks turn out to be wrong: they go with all that follows them."""
        blocks = list(self.prefix.blocks())
        named = {blocks[(index + 3 * n) % len(blocks)].slot for n in range(count)}
        doomed = set()
        for block in blocks:
            if block.slot in named or block.parent in doomed:
                doomed.add(block.hash)
        slots = {block.slot for block in blocks if block.hash in doomed}
        held = self.held()
        assert self.prefix.drop(sorted(named)) == len(doomed)
        assert not doomed & self.cached.keys()
        for slot in slots:
            self.written[slot] = WRONG
            assert self.pool.is_free(slot) == (slot not in held)

    @rule()
    def drop_all_cached(self):
        before = len(self.cached)
        assert self.kv.drop_all_cached() == before - len(self.cached)
        assert self.prefix.num_evictable == 0

    @invariant()
    def conserved(self):
        totals = check_conservation(self.pool, self.prefix, sequences=self.sequences, **self.pins)
        assert sum(totals.values()) == NUM_SLOTS
        assert self.kv.available == self.naive_available(())
        assert {block.hash for block in self.prefix.blocks()} == set(self.cached)
        found = census(self.pool, self.prefix, sequences=self.sequences, **self.pins)
        assert found.counts == totals
        assert found.is_consistent
        assert found.num_blocks == NUM_SLOTS

    @invariant()
    def bytes_are_those_of_the_path(self):
        for sequence in self.sequences:
            for index in range(sequence.num_computed // BLOCK):
                found = self.written[sequence.slots[index]]
                if found == WRONG:
                    break
                assert found == self.path(sequence, index)

    @invariant()
    def cached_bytes_are_those_of_the_hash(self):
        for block in self.prefix.blocks():
            assert self.written[block.slot] == self.paths[block.hash]

    @invariant()
    def generation_of_a_held_slot_stands_still(self):
        held = {slot: self.generations.word(slot) for slot in self.held()}
        for slot in held.keys() & self.words.keys():
            assert held[slot] == self.words[slot]
        self.words = held


def test_random_histories():
    run_state_machine_as_test(
        KvMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


class Setup:
    """Four slots and one sequence that holds two of them, one published."""

    def __init__(self):
        self.pool = BlockPool(4, GenerationTable(4, SeededRandomness(0)))
        self.prefix = PrefixCache(self.pool)
        self.kv = KvCache(self.pool, self.prefix, BLOCK)
        self.sequence = Sequence(
            tokens=[1, 2, 3],
            prompt_len=3,
            sampling=SamplingParams(max_tokens=1),
            tenant_key=b"t",
            root=root_hash(b"t", "f"),
        )
        assert self.kv.reserve(self.sequence, 4, 2)
        self.sequence.num_computed = 3
        self.kv.publish(self.sequence, 3)

    def check(self, sequences=None, **pins):
        found = [self.sequence] if sequences is None else sequences
        return check_conservation(self.pool, self.prefix, sequences=found, **pins)


def test_each_slot_counts_in_the_first_state_that_holds():
    setup = Setup()
    assert setup.check() == dict.fromkeys(
        ("quarantined", "receiving", "retiring", "leased", "cached"), 0
    ) | {"owned": 2, "free": 2}
    setup.kv.pin(setup.sequence.slots)
    totals = setup.check(leased=[setup.sequence.slots[:1]], receiving=[setup.sequence.slots[1:]])
    assert totals["leased"] == totals["receiving"] == 1
    assert totals["owned"] == 0


@pytest.mark.parametrize("fault", ["leaked", "forgotten", "unpinned", "lost"])
def test_planted_faults_are_named(fault):
    setup = Setup()
    first, second = setup.sequence.slots
    if fault == "leaked":
        setup.kv.pin([first])
        message, sequences = f"slot {first} has reference count 2, but 1 holders", None
    elif fault == "forgotten":
        message, sequences = f"slot {first} has reference count 1, but 0 holders", []
    elif fault == "unpinned":
        setup.kv.unpin([second])
        message, sequences = f"slot {second} has reference count 0, but 1 holders", None
    else:
        setup.kv.release(setup.sequence)
        setup.pool._free.remove(second)
        setup.pool._is_free[second] = 0
        message, sequences = f"slot {second} is lost", []
    with pytest.raises(AssertionError, match=message):
        setup.check(sequences)


def test_a_hit_is_not_counted_as_evictable_for_the_rest():
    setup = Setup()
    setup.kv.release(setup.sequence)
    other = Sequence(
        tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9],
        prompt_len=9,
        sampling=SamplingParams(max_tokens=1),
        tenant_key=b"t",
        root=root_hash(b"t", "f"),
    )
    assert setup.kv.available == 4
    assert not setup.kv.reserve(other, 9, 8), "one hit and four more do not fit four slots"
    assert setup.kv.reserve(other, 8, 8)
    assert other.num_cached == BLOCK


def test_publish_leaves_out_a_block_whose_last_token_was_not_fed():
    setup = Setup()
    setup.sequence.tokens.append(4)
    setup.kv.publish(setup.sequence, 4)
    assert setup.sequence.num_published == 1
    setup.sequence.num_computed = 4
    setup.kv.publish(setup.sequence, 4)
    assert setup.sequence.num_published == 2
