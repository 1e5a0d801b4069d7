"""Steps of the engine, seen from the role: which requests are in them, and what they cost."""

from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from baton.common.clock import Clock
from baton.engine.engine import Engine
from baton.engine.sequence import Chunk, Sequence


class Forwarded(Protocol):
    """What a role's own request must tell, and take."""

    @property
    def sequence(self) -> Sequence: ...

    # Seconds of the engine that went into it so far.
    engine_s: float


Request = TypeVar("Request", bound=Forwarded)


@dataclass(frozen=True, slots=True)
class Landed(Generic[Request]):
    """A request whose chunk has ended; `is_sampled` says whether its sequence has a new token."""

    request: Request
    num_tokens: int
    is_sampled: bool


class Flight(Generic[Request]):
    """The steps in flight, oldest first. Engine thread only."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._steps: deque[tuple[list[tuple[Request, int]], float]] = deque()
        self._collected_at = 0.0

    def launch(self, rows: Ordered[tuple[Request, int]]) -> None:
        """Forward the next so many tokens of each request; without any there is no step."""
        if not rows:
            return
        launched_at = self._clock.monotonic()
        self._engine.launch([Chunk(request.sequence, count) for request, count in rows])
        self._steps.append((list(rows), launched_at))

    def collect(self) -> list[Landed[Request]]:
        """What has ended with the oldest step; requests that ended before it did are left out.

        The time since its launch, or since the step before it if that ended later, is shared out
        by tokens.
        """
        results = self._engine.collect()
        if results is None or not self._steps:
            return []
        rows, launched_at = self._steps.popleft()
        now = self._clock.monotonic()
        took_s = now - max(launched_at, self._collected_at)
        self._collected_at = now
        seconds_per_token = took_s / sum(count for _, count in rows)
        tokens = dict(results)
        landed = []
        for request, count in rows:
            if request.sequence in tokens:
                request.engine_s += seconds_per_token * count
                landed.append(Landed(request, count, tokens[request.sequence] is not None))
        return landed
