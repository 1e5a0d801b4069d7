"""What a worker remembers of transfers that have ended, so that late messages cannot revive them.

For one lease time it keeps the highest attempt and the end of each transfer, also of transfers that
it never knew: a cancel may overtake its submit. Lower or ended attempts are refused.
"""

from collections import OrderedDict

from baton.common.ids import RequestKey, TransferId


class Endings:
    """Bounded by time and by count; the oldest go first."""

    def __init__(self, keep_s: float, *, max_entries: int = 100_000) -> None:
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._ended: OrderedDict[TransferId, tuple[int, float, bool]] = OrderedDict()

    def remember(self, key: RequestKey, *, now: float, is_well: bool = False) -> None:
        """Attempt `key.attempt` of this transfer, and all lower ones, are over.

        `is_well`: it ended with its answer, so nobody is to be told of an error any more.
        """
        attempt, _, was_well = self._ended.pop(key.transfer_id, (-1, now, False))
        if key.attempt >= attempt:
            is_well = is_well or (was_well and key.attempt == attempt)
            self._ended[key.transfer_id] = (key.attempt, now, is_well)
        else:
            self._ended[key.transfer_id] = (attempt, now, was_well)
        self._forget(now)

    def has_ended_well(self, key: RequestKey) -> bool:
        """Whether exactly this attempt is known to have ended with its answer."""
        entry = self._ended.get(key.transfer_id)
        return entry is not None and key.attempt == entry[0] and entry[2]

    def has_ended(self, key: RequestKey) -> bool:
        entry = self._ended.get(key.transfer_id)
        return entry is not None and key.attempt <= entry[0]

    def _forget(self, now: float) -> None:
        while self._ended:
            transfer, (_, ended_at, _) = next(iter(self._ended.items()))
            if now - ended_at < self._keep_s and len(self._ended) <= self._max_entries:
                return
            del self._ended[transfer]
