"""Digests of blocks, where the worker keeps them: what is told, what is compared, what is dropped.

The fence sees slots that were reused; digests see memory and wires that changed a bit as well.
Without `--kv-digest` nothing is kept and nothing is found.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from baton.common import metric_names as names
from baton.common.ids import RequestKey, Slot
from baton.engine.engine import Engine

log = logging.getLogger(__name__)


class Integrity:
    """Engine thread only."""

    def __init__(self, engine: Engine) -> None:
        self._table = engine.digests
        self._prefix = engine.prefix
        self._kv = engine.kv
        # Found by a peer or in what a peer sent; what the cache's own check finds, it counts.
        self._num_damaged = 0

    @property
    def counters(self) -> Counter[str]:
        found = self._num_damaged + self._kv.num_digest_mismatches
        return Counter({names.DIGEST_MISMATCHES: found})

    def digests(self, slots: Sequence[Slot]) -> list[int]:
        """What to tell of blocks whose bytes are final: one digest each, or nothing."""
        if self._table is None:
            return []
        self._table.record(slots)
        return self._table.of(slots)

    def changed(self, slots: Sequence[Slot]) -> list[Slot]:
        """Those of the published blocks whose bytes are not what they were."""
        if self._table is None:
            return []
        return [slots[index] for index in self._table.mismatches(slots)]

    def differing(self, slots: Sequence[Slot], digests: Sequence[int]) -> list[int]:
        """Indices of pulled blocks that are not what their owner digested; adopts the others'."""
        if self._table is None or len(digests) != len(slots):
            return []
        bad = self._table.verify(slots, digests)
        if not bad:
            self._table.adopt(slots, digests)
        return bad

    def drop(self, key: RequestKey, slots: Sequence[Slot]) -> None:
        """Take damaged blocks, and all that was computed behind them, out of the cache."""
        num_dropped = self._prefix.drop(slots)
        self._num_damaged += len(slots)
        log.error("%s: %d damaged KV blocks, %d dropped", key, len(slots), num_dropped)
