"""The clock as an interface, so that the state machines also run on virtual time."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds for deadlines and leases; wall time only to name an epoch."""

    def monotonic(self) -> float: ...

    def unix_ms(self) -> int: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


class ManualClock:
    """A clock that moves only when told: tests and simulation."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def monotonic(self) -> float:
        return self._now_s

    def unix_ms(self) -> int:
        return int(self._now_s * 1000)

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "a monotonic clock never goes back"
        self._now_s += seconds
