"""The engine's flight recorder: its last steps, always kept, for whoever asks what it just did.

    engine thread   launched(chunks) ... ended(launch)      any thread   last(count)

    | launched_at ....... began_at | took_s ........ | ended_at
                  the step before ran until here

It costs some microseconds per step, and a tenth of one per row.
"""

import math
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Final, NamedTuple

from baton.common.clock import Clock
from baton.engine.sequence import Chunk

KEPT_STEPS: Final = 4096


# A tuple where the house has dataclasses: one is made per step, and a frozen one takes four times
# as long to make.
class Launch(NamedTuple):
    """A step that was launched; what it is made of is read then, since sequences go on."""

    number: int
    launched_at: float
    rows: int
    tokens: int
    prompt_tokens: int


class Step(NamedTuple):
    """A step that has ended, in monotonic seconds of the engine's clock.

    `began_at` is its launch, or the end of the step before it if that came later; `ended_at` is
    when its end was seen. `replayed`: a CUDA graph, rather than kernel by kernel; None on a host.
    """

    number: int
    launched_at: float
    began_at: float
    ended_at: float
    rows: int
    tokens: int
    prompt_tokens: int
    replayed: bool | None

    @property
    def took_s(self) -> float:
        return self.ended_at - self.began_at


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """Of steps in a row. The window lasts from the beginning of the first to the end of the last;
    `busy_s` of it were steps."""

    steps: int = 0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0
    window_s: float = 0.0
    busy_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.window_s if self.window_s > 0 else 0.0


class StepRecorder:
    """The last `capacity` steps. Written by the engine thread alone."""

    def __init__(self, clock: Clock, capacity: int = KEPT_STEPS) -> None:
        assert capacity > 0, "a recorder keeps a step at least"
        self._clock = clock
        self._capacity = capacity
        self._ring: list[Step | None] = [None] * capacity
        self._num_recorded = 0
        self._ended_at = -math.inf
        self.num_launched = 0
        # Of the newest step that has ended; those that were abandoned leave gaps.
        self.last_ended = 0

    def launched(self, chunks: Ordered[Chunk]) -> Launch:
        """To be called before the step is handed to the device, which may run it at once."""
        tokens = prompt_tokens = 0
        for chunk in chunks:
            count, sequence = chunk.num_tokens, chunk.sequence
            tokens += count
            # `num_launched` written out, since this is per row and step.
            prompt_left = sequence.prompt_len - sequence.num_computed - sequence.num_in_flight
            if prompt_left > 0:
                prompt_tokens += min(prompt_left, count)
        self.num_launched += 1
        return Launch(
            self.num_launched, self._clock.monotonic(), len(chunks), tokens, prompt_tokens
        )

    def ended(self, launch: Launch, replayed: bool | None) -> None:
        """The oldest step in flight was seen to have ended, well or not."""
        now = self._clock.monotonic()
        number, launched_at, rows, tokens, prompt_tokens = launch
        began_at = max(launched_at, self._ended_at)
        step = Step(number, launched_at, began_at, now, rows, tokens, prompt_tokens, replayed)
        self._ring[self._num_recorded % self._capacity] = step
        self._num_recorded += 1
        self._ended_at = now
        self.last_ended = number

    def last(self, count: int = KEPT_STEPS) -> list[Step]:
        """The newest steps, the oldest of them first; from any thread, also while a step hangs."""
        assert count > 0, "one step at least is asked for"
        # The copy is one operation of the interpreter: no step is half there.
        held = [step for step in self._ring[:] if step is not None]
        held.sort()
        return held[-count:]


def summarise(steps: Ordered[Step]) -> StepSummary:
    """Percentiles by nearest rank, so that each is the time of a step that there was."""
    if not steps:
        return StepSummary()
    times = sorted(step.took_s for step in steps)
    return StepSummary(
        steps=len(steps),
        p50_s=_percentile(times, 50),
        p90_s=_percentile(times, 90),
        p99_s=_percentile(times, 99),
        max_s=times[-1],
        window_s=steps[-1].ended_at - steps[0].began_at,
        busy_s=sum(times),
        tokens=sum(step.tokens for step in steps),
        prompt_tokens=sum(step.prompt_tokens for step in steps),
    )


def _percentile(ordered: Ordered[float], percent: int) -> float:
    # In whole numbers: 0.9 * 10 is not quite 9.
    return ordered[-(-percent * len(ordered) // 100) - 1]
