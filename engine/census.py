"""A count of all slots by meaning, fast enough for each second, that never stops what it counts.

Like `conservation.py` it compares the pool's reference counts with the holders that are known from
elsewhere (tables, leases, open reads, quarantine, the step in flight). There a difference raises
and ends a test; here it is told, so that a reconciler can report it from a worker that serves on.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from baton.common.ids import Slot
from baton.engine.block_pool import BlockPool
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """How many slots each state has, by the names of `conservation.STATES`; a slot counts in the
    first that holds, in that order.

    A slot that somebody unknown holds, or that is lost, is in none of them unless it is cached: the
    counts sum up to `num_blocks` when every slot has a meaning.
    """

    counts: Mapping[str, int]
    num_blocks: int
    unowned_slots: tuple[Slot, ...]
    """More holders in the pool than are known: leaked, or out of circulation altogether."""
    missing_slots: tuple[Slot, ...]
    """More holders known than in the pool, or held and free at once: about to be given away."""

    @property
    def is_consistent(self) -> bool:
        return not self.unowned_slots and not self.missing_slots


def census(
    pool: BlockPool,
    prefix: PrefixCache,
    *,
    sequences: Iterable[Sequence],
    leased: Iterable[Collection[Slot]] = (),
    receiving: Iterable[Collection[Slot]] = (),
    quarantined: Iterable[Collection[Slot]] = (),
    retiring: Iterable[Collection[Slot]] = (),
) -> Census:
    """Count the slots of `pool`. Each entry of each listing is one pin, as in `conservation.py`.

    Costs O(slots) array operations: a few milliseconds for 100,000. Slots that the pool does not
    have are left out of the listings.
    """
    num_slots = pool.num_slots
    pins: dict[str, Int64s] = {
        "quarantined": _pins(quarantined, num_slots),
        "receiving": _pins(receiving, num_slots),
        "retiring": _pins(retiring, num_slots),
        "leased": _pins(leased, num_slots),
        "owned": _pins((sequence.slots for sequence in sequences), num_slots),
    }
    refcounts, is_free = pool.refcounts(), pool.free_mask()
    is_cached = np.zeros(num_slots, dtype=np.bool_)
    is_cached[np.fromiter(prefix.slots(), np.int64)] = True

    is_open = np.ones(num_slots, dtype=np.bool_)
    holds = {state: pinned > 0 for state, pinned in pins.items()}
    holds |= {"cached": is_cached, "free": is_free}
    counts = {}
    for state, holding in holds.items():
        here = is_open & holding
        counts[state] = int(np.count_nonzero(here))
        is_open &= ~here

    known = np.sum(list(pins.values()), axis=0)
    is_lost = is_open & (refcounts == 0)
    is_torn = is_free & ((known > 0) | (refcounts > 0) | is_cached)
    return Census(
        counts=counts,
        num_blocks=num_slots,
        unowned_slots=_slots((refcounts > known) | is_lost),
        missing_slots=_slots((refcounts < known) | is_torn),
    )


def _pins(listings: Iterable[Collection[Slot]], num_slots: int) -> Int64s:
    """How often each slot is listed, `[num_slots]`."""
    listed = np.fromiter(chain.from_iterable(listings), np.int64)
    inside = (listed >= 0) & (listed < num_slots)
    if not inside.all():
        listed = listed[inside]
    return np.bincount(listed, minlength=num_slots)


def _slots(mask: npt.NDArray[np.bool_]) -> tuple[Slot, ...]:
    return tuple(Slot(slot) for slot in np.flatnonzero(mask).tolist())
