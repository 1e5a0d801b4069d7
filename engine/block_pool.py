"""The slots of an arena: which are free, and how many holders each of the others has.

A slot is free, or held (reference count at least 1), or idle in the prefix cache (count 0):

    free --take--> held --unpin to 0--> free, or idle if the cache keeps it
                   held <--pin-- idle --reclaim--> free

Reference counts and on-the-spot allocation follow PagedAttention (Kwon et al., SOSP 2023).
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from baton.common.ids import Slot


class Generations(Protocol):
    """The words that tell readers in other processes that a slot changed hands."""

    def raise_words(self, slots: Sequence[Slot]) -> None:
        """Raise the word of each slot, before anything may change its bytes."""
        ...


class SlotKeeper(Protocol):
    """Who may want to keep slots that nobody holds any more: the prefix cache."""

    def slot_idle(self, slot: Slot) -> bool:
        """The last holder let go: whether the slot is kept, out of the free list."""
        ...

    def slot_busy(self, slot: Slot) -> None:
        """A kept slot has a holder again."""
        ...


class BlockPool:
    """Owner of all `num_slots` slots. Not thread-safe: the engine thread alone calls it."""

    def __init__(self, num_slots: int, generations: Generations) -> None:
        assert num_slots > 0, "a pool without slots can serve nothing"
        self.num_slots = num_slots
        self._generations = generations
        self._keeper: SlotKeeper | None = None
        self._refcounts = array("q", bytes(8 * num_slots))
        # A stack whose top is the slot freed last, lowest numbers first at the start.
        self._free = [Slot(index) for index in reversed(range(num_slots))]
        self._is_free = bytearray(b"\x01" * num_slots)

    def attach(self, keeper: SlotKeeper) -> None:
        """Let `keeper` decide about slots that nobody holds; once, before the first take."""
        assert self._keeper is None, "a pool has one keeper"
        assert self.num_free == self.num_slots, "slots were taken before the keeper came"
        self._keeper = keeper

    @property
    def num_free(self) -> int:
        return len(self._free)

    def refcount(self, slot: Slot) -> int:
        """Holders of the slot: sequence tables, leases, open reads."""
        return self._refcounts[slot]

    def refcounts(self) -> npt.NDArray[np.int64]:
        """Holders of every slot, int64 `[num_slots]`: a copy."""
        return np.frombuffer(self._refcounts, dtype=np.int64).copy()

    def free_mask(self) -> npt.NDArray[np.bool_]:
        """`is_free` of every slot, `[num_slots]`: a copy."""
        return np.frombuffer(self._is_free, dtype=np.bool_).copy()

    def is_free(self, slot: Slot) -> bool:
        """Whether the slot can be taken, that is, neither held nor kept by the cache."""
        return bool(self._is_free[slot])

    def free_slots(self) -> list[Slot]:
        """A copy of the free list, for checks."""
        return list(self._free)

    def take(self, count: int) -> list[Slot]:
        """Take `count <= num_free` free slots, each with one holder and a raised generation."""
        assert 0 <= count <= self.num_free, f"{count} slots wanted, {self.num_free} free"
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            assert self._is_free[slot], f"slot {slot} is on the free list but in use"
            assert self._refcounts[slot] == 0, f"free slot {slot} has holders"
            self._is_free[slot] = 0
            self._refcounts[slot] = 1
        if slots:
            self._generations.raise_words(slots)
        return slots

    def pin(self, slots: Iterable[Slot]) -> None:
        """Add a holder to each slot, none of which may be free."""
        for slot in slots:
            assert not self._is_free[slot], f"slot {slot} is free and cannot be pinned"
            self._refcounts[slot] += 1
            if self._refcounts[slot] == 1 and self._keeper is not None:
                self._keeper.slot_busy(slot)

    def unpin(self, slots: Iterable[Slot]) -> None:
        """Remove a holder of each slot; a slot without holders is kept by the cache or free."""
        for slot in slots:
            assert self._refcounts[slot] > 0, f"slot {slot} has no holder to remove"
            self._refcounts[slot] -= 1
            if self._refcounts[slot] > 0:
                continue
            if self._keeper is None or not self._keeper.slot_idle(slot):
                self._put_back(slot)

    def reclaim(self, slots: Iterable[Slot]) -> None:
        """Put slots that the cache gave up on the free list."""
        for slot in slots:
            assert self._refcounts[slot] == 0, f"evicted slot {slot} still has holders"
            self._put_back(slot)

    def _put_back(self, slot: Slot) -> None:
        assert not self._is_free[slot], f"slot {slot} was freed twice"
        self._is_free[slot] = 1
        self._free.append(slot)
