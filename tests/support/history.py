"""What clients saw of every request, and whether that is a history that Baton may produce.

G1  Each request ends exactly once, with its answer or one error of an allowed class, at the latest
    a second after its deadline.
G2  Its tokens are those of the oracle: none missing, twice, out of order, or after the end.
G5  No wrong token, ever. An error may follow right tokens; it may not follow a wrong one.
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.common.clock import Clock, SystemClock
from baton.common.errors import BatonError

LATE_S = 1.0

Oracle = Callable[["RequestLog"], Sequence[int]]
"""The whole answer to a request."""


class Piece(Protocol):
    """A `client.Chunk` or a `router.TokenEvent`; `finish` is None but for the last."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def finish(self) -> object: ...


@dataclass(frozen=True, slots=True)
class End:
    """How a client was told that its request is over; `error` is None for a whole answer."""

    at_s: float
    num_tokens: int
    error: BatonError | None = None
    # The client itself went away: nobody tells it anything.
    is_cancelled: bool = False
    # As the router counted them; None when it did not say.
    completion_tokens: int | None = None


@dataclass(eq=False)
class RequestLog:
    """One request as its client saw it; times are of the history's clock, in seconds."""

    id: str
    prompt: Sequence[int]
    max_tokens: int
    deadline_s: float
    submitted_s: float
    clock: Clock
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    def received(self, tokens: Sequence[int]) -> None:
        if tokens:
            self.tokens.extend(tokens)
            self.times_s.append(self.clock.monotonic())

    def finished(self, completion_tokens: int | None = None) -> None:
        self.ends.append(End(self._now(), len(self.tokens), completion_tokens=completion_tokens))

    def failed(self, error: BatonError) -> None:
        self.ends.append(End(self._now(), len(self.tokens), error=error))

    def cancelled(self) -> None:
        self.ends.append(End(self._now(), len(self.tokens), is_cancelled=True))

    async def follow(self, pieces: AsyncIterator[Piece]) -> None:
        """Log an answer to its end. Only a BatonError counts as one; others are the test's."""
        try:
            async for piece in pieces:
                self.received(piece.token_ids)
                if piece.finish is not None:
                    # A client's finish counts itself; a router's event brings its usage beside it.
                    counted = getattr(piece, "usage", None) or piece.finish
                    self.finished(getattr(counted, "completion_tokens", None))
        except BatonError as error:
            self.failed(error)

    @property
    def longest_gap_s(self) -> float:
        """The longest time without a token between the first and the last."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)

    def _now(self) -> float:
        return self.clock.monotonic()


class History:
    """All requests of a test."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self.requests: list[RequestLog] = []

    def submit(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, deadline_s: float
    ) -> RequestLog:
        """Called as the request is sent."""
        log = RequestLog(
            id=request_id,
            prompt=prompt,
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            submitted_s=self._clock.monotonic(),
            clock=self._clock,
        )
        self.requests.append(log)
        return log

    @property
    def longest_gap_s(self) -> float:
        return max((log.longest_gap_s for log in self.requests), default=0.0)

    def violations(self, oracle: Oracle, allowed: Collection[type[BatonError]] = ()) -> list[str]:
        """Everything that may not happen and did, each with its request."""
        return [
            f"{log.id}: {what}"
            for log in self.requests
            for what in _violations(log, oracle(log), tuple(allowed))
        ]

    def check(self, oracle: Oracle, allowed: Collection[type[BatonError]] = ()) -> None:
        """AssertionError naming every violation of G1, G2 and G5.

        `allowed` are the errors, with those below them in the tree, that may end a request here.
        """
        assert self.requests, "no request was submitted: the check would say nothing"
        found = self.violations(oracle, allowed)
        assert not found, "\n".join([f"{len(found)} violations", *found])


def _violations(
    log: RequestLog, answer: Sequence[int], allowed: tuple[type[BatonError], ...]
) -> list[str]:
    found = []
    if len(log.ends) != 1:
        found.append(f"ended {len(log.ends)} times: {[_said(end) for end in log.ends]}")
    length = min(len(log.tokens), len(answer))
    wrong = [i for i in range(length) if log.tokens[i] != answer[i]]
    if wrong:
        at = wrong[0]
        found.append(f"token {at} is {log.tokens[at]}, the oracle says {answer[at]}")
    if len(log.tokens) > len(answer):
        found.append(f"{len(log.tokens)} tokens, the whole answer has {len(answer)}")
    if not log.ends:
        return found
    end = log.ends[0]
    if len(log.tokens) > end.num_tokens:
        found.append(f"{len(log.tokens) - end.num_tokens} tokens after the end")
    late_s = end.at_s - log.submitted_s - log.deadline_s
    if late_s > LATE_S:
        found.append(f"ended {late_s:.2f} s after its deadline")
    if end.error is not None and not isinstance(end.error, allowed):
        found.append(f"ended with {_said(end)}")
    if end.error is None and not end.is_cancelled:
        if end.num_tokens < len(answer):
            found.append(f"a whole answer of {end.num_tokens} tokens, not {len(answer)}")
        if end.completion_tokens not in (None, end.num_tokens):
            found.append(f"{end.num_tokens} tokens, but usage says {end.completion_tokens}")
    return found


def _said(end: End) -> str:
    if end.error is not None:
        return f"{type(end.error).__name__} ({end.error.message})"
    return "cancelled" if end.is_cancelled else f"{end.num_tokens} tokens"
