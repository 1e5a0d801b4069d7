"""Which prompts, and how much of each, this step: iteration-level scheduling with chunked prefill.

Pure policy over plain data, no torch: Orca's iteration-level scheduling with a token budget.
Waiting prompts are ordered by acceptance, so that a retry keeps its place and nobody starves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from baton.common.ids import RequestKey


@dataclass(slots=True)
class WaitingPrompt:
    key: RequestKey
    accepted_at: float


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    key: RequestKey
    num_tokens: int


class PrefillScheduler:
    """Waiting prompts become running ones when the caller has reserved their blocks."""

    def __init__(self, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        assert max_num_batched_tokens >= 1, "a step without a budget makes no progress"
        assert max_num_seqs >= 1, "a worker without a sequence makes no progress"
        self._budget = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._waiting: list[WaitingPrompt] = []
        # Tokens left to compute, in order of admission; and those of them that no step computes.
        self._running: dict[RequestKey, int] = {}
        self._unplanned: dict[RequestKey, int] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def waiting(self) -> Iterator[RequestKey]:
        return (prompt.key for prompt in self._waiting)

    def add(self, key: RequestKey, *, accepted_at: float) -> None:
        position = len(self._waiting)
        while position and self._waiting[position - 1].accepted_at > accepted_at:
            position -= 1
        self._waiting.insert(position, WaitingPrompt(key, accepted_at))

    def head(self) -> RequestKey | None:
        """The prompt to admit next, if a place is free. Nobody overtakes a head without room."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        return self._waiting[0].key

    def admit(self, key: RequestKey, *, num_tokens: int) -> None:
        """The head's blocks are reserved; `num_tokens` of its prompt are to be computed."""
        assert self._waiting[0].key == key, "only the head is admitted"
        assert num_tokens >= 1, "the last prompt token is always computed"
        del self._waiting[0]
        self._running[key] = self._unplanned[key] = num_tokens

    def remove(self, key: RequestKey) -> None:
        """Forget a request wherever it is; unknown ones are no error."""
        self._unplanned.pop(key, None)
        if self._running.pop(key, None) is None:
            self._waiting = [prompt for prompt in self._waiting if prompt.key != key]

    def plan(self) -> list[PlannedChunk]:
        """The chunks of the next step, oldest first, within the token budget. They are under way
        from now on, and their tokens in no later plan."""
        chunks: list[PlannedChunk] = []
        left = self._budget
        for key, unplanned in self._unplanned.items():
            if left == 0:
                break
            chunks.append(PlannedChunk(key, min(left, unplanned)))
            left -= chunks[-1].num_tokens
        for chunk in chunks:
            self._unplanned[chunk.key] -= chunk.num_tokens
            if not self._unplanned[chunk.key]:
                del self._unplanned[chunk.key]
        return chunks

    def computed(self, chunk: PlannedChunk) -> bool:
        """Take a chunk off the running prompt; True when it was the last."""
        self._running[chunk.key] -= chunk.num_tokens
        if self._running[chunk.key]:
            return False
        del self._running[chunk.key]
        return True
