"""Who waits, who is admitted, who runs: continuous batching over all joined sequences.

Pure policy over plain data, no torch. Waiting requests, new or preempted, are ordered by age since
acceptance, so that a retry keeps its place; nobody overtakes a head that finds no room.
"""

from bisect import insort
from dataclasses import dataclass

from baton.common.ids import RequestKey


@dataclass(frozen=True, slots=True)
class _Aged:
    key: RequestKey
    accepted_at: float


def _age(entry: _Aged) -> float:
    return entry.accepted_at


class DecodeScheduler:
    """`waiting` hold nothing here; `pulling` have their prompt's blocks; `running` are decoded.

    `suspended` ones ran and keep their blocks while another worker pulls them.
    """

    def __init__(self, *, max_num_seqs: int) -> None:
        assert max_num_seqs >= 1, "a worker without a sequence makes no progress"
        self._max_num_seqs = max_num_seqs
        self._waiting: list[_Aged] = []
        self._pulling: dict[RequestKey, _Aged] = {}
        self._suspended: dict[RequestKey, _Aged] = {}
        # Oldest first.
        self._running: list[_Aged] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_admitted(self) -> int:
        """Requests that hold blocks here."""
        return len(self._pulling) + len(self._suspended) + len(self._running)

    def pulling(self) -> list[RequestKey]:
        """The requests whose blocks are on their way."""
        return list(self._pulling)

    def plan(self) -> list[RequestKey]:
        """The sequences of the next step: every running one, oldest first."""
        return [entry.key for entry in self._running]

    def youngest(self) -> RequestKey:
        """The running sequence that gives way first."""
        return self._running[-1].key

    def add(self, key: RequestKey, *, accepted_at: float) -> None:
        """Queue a request whose lease is open."""
        insort(self._waiting, _Aged(key, accepted_at), key=_age)

    def head(self) -> RequestKey | None:
        """The request to admit next, if a place is free."""
        if not self._waiting or self.num_admitted >= self._max_num_seqs:
            return None
        return self._waiting[0].key

    def admit(self, key: RequestKey) -> None:
        """The head's blocks are reserved: it pulls."""
        assert self._waiting[0].key == key, "only the head is admitted"
        self._pulling[key] = self._waiting.pop(0)

    def resume(self, key: RequestKey) -> None:
        """The head was preempted and has blocks again: it runs."""
        assert self._waiting[0].key == key, "only the head is admitted"
        insort(self._running, self._waiting.pop(0), key=_age)

    def join(self, key: RequestKey) -> None:
        """The pull has passed its fence: the sequence runs from the next iteration."""
        insort(self._running, self._pulling.pop(key), key=_age)

    def suspend(self, key: RequestKey) -> None:
        """A running sequence stops and keeps its blocks."""
        (entry,) = (entry for entry in self._running if entry.key == key)
        self._running.remove(entry)
        self._suspended[key] = entry

    def unsuspend(self, key: RequestKey) -> None:
        """A suspended sequence runs again."""
        insort(self._running, self._suspended.pop(key), key=_age)

    def preempt(self, key: RequestKey, *, accepted_at: float) -> None:
        """A running sequence lost its blocks: it waits again, at the place of its age."""
        self._running = [entry for entry in self._running if entry.key != key]
        self.add(key, accepted_at=accepted_at)

    def remove(self, key: RequestKey) -> None:
        """Forget a request wherever it is; unknown ones are no error."""
        if self._pulling.pop(key, None) is None and self._suspended.pop(key, None) is None:
            self._running = [entry for entry in self._running if entry.key != key]
            self._waiting = [entry for entry in self._waiting if entry.key != key]
