"""Attempts at a request: who works on one, and what the earlier ones taught."""

import math
from collections import Counter
from dataclasses import dataclass, field

from baton.common.errors import BatonError
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.sampling import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try, and the workers that know its key.

    `prefill` is None when `decode`, a unified worker or one without a partner, computes everything
    itself, or got a running request from `source`. `decode` is None when the request ends with its
    next token. `first_position` is the number of output tokens that were emitted when the attempt
    was made.
    """

    key: RequestKey
    prefill: WorkerIdentity | None
    decode: WorkerIdentity | None
    source: WorkerIdentity | None = None
    fingerprint: str
    grant_key: bytes = field(repr=False)
    first_position: int

    @property
    def workers(self) -> list[WorkerIdentity]:
        return [worker for worker in (self.prefill, self.decode) if worker is not None]

    @property
    def decoder(self) -> WorkerIdentity:
        """The decode worker of an attempt that has one."""
        assert self.decode is not None, f"attempt {self.key} ends with its next token"
        return self.decode

    @property
    def pair(self) -> tuple[WorkerIdentity, WorkerIdentity] | None:
        """Owner and reader of the KV that this attempt hands over, if it does."""
        owner = self.prefill or self.source
        return None if owner is None or self.decode is None else (owner, self.decode)

    @property
    def position_at_join(self) -> int:
        """The fewest output tokens that there are when the decode worker joins."""
        return self.first_position + (1 if self.prefill is not None else 0)

    def __str__(self) -> str:
        workers = [self.prefill or self.source, self.decode]
        return "+".join(str(worker) for worker in workers if worker is not None)


@dataclass(slots=True, kw_only=True)
class RunningMove:
    """A running request on its way to another decode worker, as a higher attempt.

    Until the target's first frame the source's attempt is the current one. `source_lost` says why
    there is none to go back to; the target may have everything all the same.
    """

    attempt: Attempt
    ends_at: float
    source_lost: BatonError | None = None

    @property
    def target(self) -> WorkerIdentity:
        return self.attempt.decoder


@dataclass(slots=True)
class AttemptHistory:
    """What a request went through so far. Workers are excluded by identity: one life, not a name.

    A crash counts against the request when the worker was running it, as what (`crashes`). A token
    absolves: the first of an attempt the earlier crashes in prefill, one that was decoded all of
    them. So a prompt that kills whoever decodes it is not absolved by its next prefill, on
    whichever worker that was.
    """

    # Attempts without a new token since the last one that brought some; recoveries in all.
    tries: int = 0
    recoveries: int = 0
    crashes: Counter[Role] = field(default_factory=Counter)
    # Workers that may have crashed while they ran it: the peer has said so, the router not yet.
    suspects: dict[WorkerIdentity, Role] = field(default_factory=dict)
    # Until when, in monotonic seconds.
    excluded: dict[WorkerIdentity, float] = field(default_factory=dict)
    excluded_pairs: set[tuple[WorkerIdentity, WorkerIdentity]] = field(default_factory=set)
    # Targets of moves away from the current decode worker that came to nothing.
    failed_targets: list[WorkerIdentity] = field(default_factory=list)

    def excluded_at(self, now: float) -> frozenset[WorkerIdentity]:
        return frozenset(worker for worker, until in self.excluded.items() if now < until)

    def exclude(self, worker: WorkerIdentity, until: float = math.inf) -> None:
        self.excluded[worker] = max(until, self.excluded.get(worker, until))

    def crashed(self, worker: WorkerIdentity, role: Role) -> None:
        """`worker` was lost while it ran the request."""
        self.suspects.pop(worker, None)
        self.crashes[role] += 1

    def progressed(self, role: Role) -> None:
        """A new token came from a worker at work in that role."""
        self.tries = 0
        if role is Role.DECODE:
            self.crashes.clear()
            self.suspects.clear()
        else:
            self.crashes[role] = 0
            self.suspects = {w: r for w, r in self.suspects.items() if r is not role}
