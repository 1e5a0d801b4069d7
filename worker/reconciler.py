"""Pool against requests, leases and reads, once a second: a difference is reported, not hidden.

What nobody owns stays pinned until the process ends, so an operator must see it at once; the
number of bytes is 0, or there is a bug.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from baton.common.ids import Slot
from baton.common.messages import LoadReport
from baton.engine.census import Census, census
from baton.engine.engine import Engine
from baton.engine.sequence import Sequence
from baton.kvtransfer.owner import LeaseOwner

log = logging.getLogger(__name__)


class Reconciler:
    """Engine thread only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last = (0, 0)

    def report(
        self,
        now: float,
        owner: LeaseOwner,
        *,
        sequences: Iterable[Sequence],
        receiving: Collection[Collection[Slot]] = (),
        quarantined: Collection[Collection[Slot]] = (),
        counters: Iterable[Mapping[str, int]],
    ) -> LoadReport:
        """What all roles tell of their memory; the role adds what it knows of its queues."""
        leased = owner.leased
        found = self.count(
            sequences=sequences, leased=leased, receiving=receiving, quarantined=quarantined
        )
        engine = self._engine
        return LoadReport(
            blocks_total=engine.num_blocks,
            blocks_free=engine.pool.num_free,
            blocks_cached=engine.prefix.num_evictable,
            blocks_leased=len({slot for slots in leased for slot in slots}),
            blocks_quarantined=sum(len(slots) for slots in quarantined),
            leases=owner.rows(now),
            steps=engine.runner.steps,
            pinned_unowned_bytes=len(found.unowned_slots) * engine.arena.block_bytes,
            counters=dict(sum((Counter(each) for each in counters), Counter[str]())),
        )

    def count(
        self,
        *,
        sequences: Iterable[Sequence],
        leased: Iterable[Collection[Slot]] = (),
        receiving: Iterable[Collection[Slot]] = (),
        quarantined: Iterable[Collection[Slot]] = (),
    ) -> Census:
        """Who holds what now, recomputed from the holders; logs a difference when it changes."""
        found = census(
            self._engine.pool,
            self._engine.prefix,
            sequences=sequences,
            leased=leased,
            receiving=receiving,
            quarantined=quarantined,
            retiring=self._engine.retiring,
        )
        difference = (len(found.unowned_slots), len(found.missing_slots))
        if difference != self._last:
            self._last = difference
            log.error(
                "%d KV blocks are pinned by nobody, %d are held without a pin: slots %s and %s",
                *difference,
                list(found.unowned_slots[:8]),
                list(found.missing_slots[:8]),
            )
        return found
