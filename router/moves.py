"""Moving running requests off a worker that drains, with their KV.

A move raises the attempt without counting it. Until the target's first frame the source's attempt
is the current one, and the source may be told to go on; from that frame on there is only the
target. What can be moved nowhere goes on where it is.
"""

import logging
from collections import Counter
from typing import Final

from baton.common.clock import Clock
from baton.common.errors import BatonError
from baton.common.ids import WorkerIdentity
from baton.common.metric_names import MOVES, MOVES_FAILED
from baton.common.timing import Timing
from baton.router.assignment import Assigner
from baton.router.journal import Journal, JournalEntry, RequestState

log = logging.getLogger(__name__)

# At a time, off one worker.
MAX_MOVES_PER_SOURCE: Final = 32
# Of one request off one worker; then it stays until the worker is gone.
MAX_MOVE_TRIES: Final = 3


class Moves:
    """The running moves of all requests."""

    def __init__(
        self,
        journal: Journal,
        assigner: Assigner,
        *,
        clock: Clock,
        timing: Timing,
        counters: Counter[str],
    ) -> None:
        self._journal = journal
        self._assigner = assigner
        self._clock = clock
        self._timing = timing
        self._counters = counters
        # When each worker last said that it drains: old news once it may have resumed.
        self._draining: dict[WorkerIdentity, float] = {}

    def draining(self, worker: WorkerIdentity) -> None:
        """`worker` says that it drains: what decodes there moves away. Said again and again."""
        now = self._clock.monotonic()
        self._draining[worker] = now
        self._begin(worker, now, again=True)

    def gone(self, worker: WorkerIdentity) -> None:
        self._draining.pop(worker, None)

    def won(self, entry: JournalEntry) -> None:
        """The target's first frame came."""
        source = entry.current.decoder
        self._assigner.finish_move(entry)
        log.info("request %s moved as attempt %s", entry.spec.request_id, entry.current.key)
        entry.history.failed_targets.clear()
        # A source that is gone by now has handed everything over: that was no crash.
        entry.history.crashes.clear()
        entry.progress_at = self._clock.monotonic()
        self._counters[MOVES] += 1
        self._next(source)

    def failed(
        self, entry: JournalEntry, why: str, told: tuple[WorkerIdentity, ...] = ()
    ) -> BatonError | None:
        """The move came to nothing: the source goes on, or the answer says why there is none."""
        move, source = entry.move, entry.current.decoder
        assert move is not None, "only a running move fails"
        log.info(
            "move of request %s as %s to %s failed: %s",
            entry.spec.request_id,
            move.attempt.key,
            move.target,
            why,
        )
        self._assigner.end_move(entry, told)
        entry.history.failed_targets.append(move.target)
        self._counters[MOVES_FAILED] += 1
        if move.source_lost is None:
            self._assigner.stay(entry)
        self._next(source)
        return move.source_lost

    def source_lost(self, entry: JournalEntry, cause: BatonError) -> None:
        """The source is gone, or has the request no longer, perhaps because the target joined.

        The target's own words, or the move's deadline, say which.
        """
        assert entry.move is not None, "only a move has a source"
        entry.move.source_lost = cause
        self._assigner.lose_source(entry)

    # --- inside ---

    def _next(self, source: WorkerIdentity) -> None:
        """One move fewer off `source`. Those that failed wait for its next report."""
        now = self._clock.monotonic()
        told_at = self._draining.get(source)
        if told_at is None:
            return
        if now - told_at > 2 * self._timing.heartbeat_every_s:
            del self._draining[source]
        else:
            self._begin(source, now, again=False)

    def _begin(self, source: WorkerIdentity, now: float, *, again: bool) -> None:
        held = self._journal.held_by(source)
        running = sum(1 for entry in held if entry.move is not None)
        limit = MAX_MOVE_TRIES if again else 1
        for entry in held:
            if running >= MAX_MOVES_PER_SOURCE:
                return
            may_move = (
                entry.state is RequestState.DECODING
                and entry.move is None
                and entry.natural_end() is None
                and len(entry.history.failed_targets) < limit
            )
            if may_move and self._assigner.begin_move(entry, now + self._timing.move_deadline_s):
                running += 1
