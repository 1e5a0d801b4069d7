"""What a worker remembers of transfers that have ended, so that late messages cannot revive them.

For one lease time it keeps the highest attempt and the end of each transfer, also of transfers that
it never knew: a cancel may overtake its submit. Lower or ended attempts are refused.
"""

from collections import OrderedDict

from baton.common.ids import RequestKey, TransferId
from baton.kvtransfer.ledger import TERM_S


class Endings:
    """Bounded by time and by count; the oldest go first."""

    def __init__(self, *, max_entries: int = 100_000) -> None:
        self._max_entries = max_entries
        self._ended: OrderedDict[TransferId, tuple[int, float]] = OrderedDict()

    def remember(self, key: RequestKey, *, now: float) -> None:
        """Attempt `key.attempt` of this transfer, and all lower ones, are over."""
        attempt, _ = self._ended.pop(key.transfer_id, (-1, now))
        self._ended[key.transfer_id] = (max(attempt, key.attempt), now)
        self._forget(now)

    def has_ended(self, key: RequestKey) -> bool:
        entry = self._ended.get(key.transfer_id)
        return entry is not None and key.attempt <= entry[0]

    def _forget(self, now: float) -> None:
        while self._ended:
            transfer, (_, ended_at) = next(iter(self._ended.items()))
            if now - ended_at < TERM_S and len(self._ended) <= self._max_entries:
                return
            del self._ended[transfer]
