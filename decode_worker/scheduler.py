"""Which sequences run this step: continuous batching over all joined sequences.

Pure policy over plain data, no torch. Admission is Orca's: a sequence enters only when the blocks
for its prompt and all its output are reserved, so a running one never runs out of memory.
Waiting ones are ordered by age since acceptance, so that a retry keeps its place.
"""

from dataclasses import dataclass

from baton.common.ids import RequestKey


@dataclass(slots=True)
class WaitingHandover:
    key: RequestKey
    accepted_at: float


class DecodeScheduler:
    """`waiting` hold nothing here; `pulling` have their blocks; `running` are decoded each step."""

    def __init__(self, *, max_num_seqs: int) -> None:
        assert max_num_seqs >= 1, "a worker without a sequence makes no progress"
        self._max_num_seqs = max_num_seqs
        self._waiting: list[WaitingHandover] = []
        self._pulling: dict[RequestKey, None] = {}
        self._running: dict[RequestKey, None] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_pulling(self) -> int:
        return len(self._pulling)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def pulling(self) -> list[RequestKey]:
        """The requests whose blocks are on their way."""
        return list(self._pulling)

    def add(self, key: RequestKey, *, accepted_at: float) -> None:
        """Queue a request whose lease is open."""
        position = len(self._waiting)
        while position and self._waiting[position - 1].accepted_at > accepted_at:
            position -= 1
        self._waiting.insert(position, WaitingHandover(key, accepted_at))

    def head(self) -> RequestKey | None:
        """The request to admit next, if a place is free. Nobody overtakes a head without room."""
        if not self._waiting or len(self._pulling) + len(self._running) >= self._max_num_seqs:
            return None
        return self._waiting[0].key

    def admit(self, key: RequestKey) -> None:
        """The head's blocks are reserved: it pulls."""
        assert self._waiting[0].key == key, "only the head is admitted"
        del self._waiting[0]
        self._pulling[key] = None

    def join(self, key: RequestKey) -> None:
        """The pull has passed its fence: the sequence runs from the next iteration."""
        del self._pulling[key]
        self._running[key] = None

    def remove(self, key: RequestKey) -> None:
        """Forget a request wherever it is; unknown ones are no error."""
        if key in self._running:
            del self._running[key]
        elif key in self._pulling:
            del self._pulling[key]
        else:
            self._waiting = [entry for entry in self._waiting if entry.key != key]

    def plan(self) -> list[RequestKey]:
        """The sequences of the next step: every running one."""
        return list(self._running)
