"""A step of the engine, seen from the role: which requests are in it, and what it cost them."""

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
    """The step in flight, at most one. Engine thread only."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._rows: list[tuple[Request, int]] = []
        self._launched_at = 0.0

    def launch(self, rows: Ordered[tuple[Request, int]]) -> None:
        """Forward the next so many tokens of each request; without any there is no step."""
        if not rows:
            return
        self._rows = list(rows)
        self._launched_at = self._clock.monotonic()
        self._engine.launch([Chunk(request.sequence, count) for request, count in rows])

    def collect(self) -> list[Landed[Request]]:
        """What has ended with the step; requests that ended before it did are left out.

        The time is shared out by tokens.
        """
        results = self._engine.collect()
        if results is None or not self._rows:
            return []
        rows, self._rows = self._rows, []
        seconds_per_token = (self._clock.monotonic() - self._launched_at) / sum(
            count for _, count in rows
        )
        tokens = dict(results)
        landed = []
        for request, count in rows:
            if request.sequence in tokens:
                request.engine_s += seconds_per_token * count
                landed.append(Landed(request, count, tokens[request.sequence] is not None))
        return landed
