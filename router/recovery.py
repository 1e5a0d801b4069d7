"""What a router does when an attempt fails: whom to blame, whether to try again, at whose cost.

The request's tokens are all here, so trying again is safe at any time; it is bounded because each
try costs a prefill that the others wait for.
"""

from collections import deque
from typing import Final

from baton.common.errors import (
    BatonError,
    DigestMismatch,
    FenceFailed,
    HandshakeMismatch,
    LeaseLost,
    NoWorker,
    PeerLost,
    QueueFull,
    TransferError,
    UnknownRequest,
    WorkerLost,
)
from baton.common.ids import WorkerIdentity
from baton.common.timing import Timing
from baton.router.attempt import Attempt
from baton.router.journal import JournalEntry, RequestState

# Attempts in a row that brought no token, and workers that crashed while they ran the request.
MAX_TRIES: Final = 3
MAX_CRASHES: Final = 2
# Of the requests accepted in the last minute, those that may be recovered once more.
BUDGET_SHARE: Final = 0.1
MIN_BUDGET: Final = 16

# An attempt that ends with one of these is followed by another one; the rest end the request.
_RECOVERABLE: Final = (WorkerLost, TransferError, UnknownRequest, NoWorker, QueueFull)
# What is wrong with a pair stays wrong with it; a block or a lease that is lost says nothing of it.
_PASSING: Final = (FenceFailed, DigestMismatch, LeaseLost)
# The owner does not answer, or another life of it does: nobody else will find it either.
_OWNER_LOST: Final = (PeerLost, HandshakeMismatch)


def is_recoverable(error: BatonError) -> bool:
    return isinstance(error, _RECOVERABLE)


def blame_error(
    entry: JournalEntry, sender: WorkerIdentity, error: BatonError, timing: Timing, now: float
) -> None:
    """Exclude from further attempts whoever makes this error likely to come again."""
    attempt, history = entry.current, entry.history
    if isinstance(error, WorkerLost):
        history.exclude(sender)
    elif isinstance(error, NoWorker | QueueFull):
        # It drains, or is full: its next load reports say so to placement.
        history.exclude(sender, now + 2 * timing.heartbeat_every_s)
    elif (
        isinstance(error, _OWNER_LOST) and sender == attempt.decode and attempt.prefill is not None
    ):
        # Most likely it crashed, and the router's own stream will say so in a moment.
        history.exclude(attempt.prefill)
        role = entry.runs_on(attempt.prefill)
        if role is not None:
            history.suspects[attempt.prefill] = role
    elif isinstance(error, TransferError) and not isinstance(error, _PASSING):
        blame_pair(entry, attempt)


def blame_pair(entry: JournalEntry, attempt: Attempt) -> None:
    """This owner and this reader hand nothing more over for the request."""
    if attempt.pair is not None:
        entry.history.excluded_pairs.add(attempt.pair)


def blame_silence(entry: JournalEntry) -> None:
    """The deadline of the entry's state passed without progress."""
    attempt = entry.current
    if entry.state is RequestState.HANDING_OVER and attempt.pair is not None:
        blame_pair(entry, attempt)
        return
    for worker in attempt.workers:
        if entry.runs_on(worker) is not None:
            entry.history.exclude(worker)


def blame_loss(entry: JournalEntry, worker: WorkerIdentity) -> None:
    """`worker`, which held the entry, is gone."""
    entry.history.exclude(worker)
    role = entry.runs_on(worker)
    if role is not None:
        entry.history.crashed(worker, role)


def has_crashed_too_often(entry: JournalEntry) -> bool:
    return max(entry.history.crashes.values(), default=0) >= MAX_CRASHES


class RecoveryBudget:
    """How many recoveries beyond each request's first one a router may make.

    At any time at most max(MIN_BUDGET, BUDGET_SHARE of the requests accepted) within one window:
    when many attempts fail, trying all of them again makes it worse.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._accepted = _WindowCount(window_s)
        # When each was spent; no longer than the budget of the busiest window.
        self._spent: deque[float] = deque()

    def accepted(self, now: float) -> None:
        self._accepted.add(now)

    def take(self, now: float) -> bool:
        """Spend one unless they are used up."""
        while self._spent and self._spent[0] <= now - self._window_s:
            self._spent.popleft()
        if len(self._spent) >= max(MIN_BUDGET, int(BUDGET_SHARE * self._accepted.count(now))):
            return False
        self._spent.append(now)
        return True


class _WindowCount:
    """How often something happened in the last window, in steps of a sixtieth of it.

    Rather too few than too many: a step is forgotten when its beginning leaves the window.
    """

    STEPS: Final = 60

    def __init__(self, window_s: float) -> None:
        self._step_s = window_s / self.STEPS
        self._counts: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, now: float) -> None:
        step = int(now // self._step_s)
        self._forget(step)
        if self._counts and self._counts[-1][0] == step:
            self._counts[-1] = (step, self._counts[-1][1] + 1)
        else:
            self._counts.append((step, 1))
        self._total += 1

    def count(self, now: float) -> int:
        self._forget(int(now // self._step_s))
        return self._total

    def _forget(self, step: int) -> None:
        while self._counts and self._counts[0][0] <= step - self.STEPS:
            self._total -= self._counts.popleft()[1]


class RecoveryPolicy:
    """Whether a request is tried again."""

    def __init__(self, timing: Timing) -> None:
        self._budget = RecoveryBudget(timing.recovery_window_s)

    def accepted(self, now: float) -> None:
        self._budget.accepted(now)

    def refusal(self, entry: JournalEntry, cause: BatonError, now: float) -> BatonError | None:
        """The error that the request ends with instead; None when the recovery is paid for."""
        history = entry.history
        if has_crashed_too_often(entry):
            return WorkerLost(
                f"{MAX_CRASHES} workers were lost while they ran the request; "
                "it is not given to another one"
            )
        if history.tries >= MAX_TRIES:
            return cause
        if history.recoveries > 0 and not self._budget.take(now):
            return cause
        history.recoveries += 1
        return None
