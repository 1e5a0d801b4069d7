"""A digest of each published block, to notice bytes that changed although nobody may write them.

    published here       record(slots)           computed from the arena at that moment
    pulled and verified  adopt(slots, digests)   as the owner announced them
    before each use      mismatches(slots)       computed again and compared

A digest holds for one generation of its slot: when the slot is taken again, it is forgotten, and so
is that of a partial block, handed over with its digest, when a step goes on writing into it. The
fence finds blocks that changed hands; this finds bit flips and stray writes besides. Digests are
the signed 64-bit numbers of `kernels/block_digest.py`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from baton.common.ids import Slot
from baton.engine.arena import Arena, GenerationTable
from baton.kernels.block_digest import block_digest, block_digest_triton

Int64s = npt.NDArray[np.int64]


class DigestTable:
    """At most one digest per slot. Costs 17 bytes per slot and a read of each block it digests."""

    def __init__(self, arena: Arena, generations: GenerationTable) -> None:
        self._arena = arena
        self._generations = generations
        self._digests: Int64s = np.zeros(arena.num_slots, dtype=np.int64)
        # The generation at which the digest was taken, where there is one.
        self._words = np.zeros(arena.num_slots, dtype=np.uint64)
        self._is_known = np.zeros(arena.num_slots, dtype=np.bool_)

    def digests_now(self, slots: Sequence[Slot]) -> list[int]:
        """Digests of the bytes that the arena holds at this moment, of any slots."""
        digests: list[int] = self._compute(_indices(slots)).tolist()
        return digests

    def record(self, slots: Sequence[Slot]) -> None:
        """Digest the slots as they are. One that has a digest of this generation keeps it: what
        was verified once stays what later bytes are compared with."""
        index = _indices(slots)
        missing = index[~self._has_digest(index)]
        if missing.size:
            self._store(missing, self._compute(missing))

    def adopt(self, slots: Sequence[Slot], digests: Sequence[int]) -> None:
        """Take over digests that `verify` found right after a pull."""
        assert len(slots) == len(digests), "a digest for each slot"
        self._store(_indices(slots), np.array(digests, dtype=np.int64))

    def forget(self, slots: Sequence[Slot]) -> None:
        """A step is about to write into the slots, whose blocks were not full so far."""
        self._is_known[_indices(slots)] = False

    def knows(self, slots: Sequence[Slot]) -> bool:
        """Whether each of the slots has a digest of its current generation."""
        return bool(self._has_digest(_indices(slots)).all())

    def of(self, slots: Sequence[Slot]) -> list[int]:
        """The digests of published blocks, without looking at their bytes."""
        digests: list[int] = self._known(_indices(slots)).tolist()
        return digests

    def mismatches(self, slots: Sequence[Slot]) -> list[int]:
        """Indices into `slots`, published blocks, whose bytes no longer give their digest."""
        index = _indices(slots)
        return _differing(self._known(index), self._compute(index))

    def verify(self, slots: Sequence[Slot], digests: Sequence[int]) -> list[int]:
        """Indices into `slots` whose bytes do not give the digest that the owner told."""
        assert len(slots) == len(digests), "a digest for each slot"
        return _differing(np.array(digests, dtype=np.int64), self._compute(_indices(slots)))

    def _compute(self, index: Int64s) -> Int64s:
        if not index.size:
            return index
        arena, slots = self._arena.tensor, torch.from_numpy(index)
        if arena.is_cuda:
            # A kernel runs on the current device, whatever its arguments lie on.
            with torch.cuda.device(arena.device):
                digests = block_digest_triton(arena, slots.to(arena.device))
        else:
            digests = block_digest(arena, slots)
        found: Int64s = digests.cpu().numpy()
        return found

    def _store(self, index: Int64s, digests: Int64s) -> None:
        self._digests[index] = digests
        self._words[index] = self._generations.words(index)
        self._is_known[index] = True

    def _has_digest(self, index: Int64s) -> npt.NDArray[np.bool_]:
        has: npt.NDArray[np.bool_] = self._is_known[index] & (
            self._words[index] == self._generations.words(index)
        )
        return has

    def _known(self, index: Int64s) -> Int64s:
        has = self._has_digest(index)
        assert has.all(), f"slots {index[~has].tolist()} have no digest of this generation"
        return self._digests[index]


def _indices(slots: Sequence[Slot]) -> Int64s:
    return np.array(slots, dtype=np.int64)


def _differing(expected: Int64s, found: Int64s) -> list[int]:
    indices: list[int] = np.flatnonzero(expected != found).tolist()
    return indices
