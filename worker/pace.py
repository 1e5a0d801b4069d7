"""When a core reports, how long it may wait, and what time it lost without coming round."""

from typing import Final

from baton.common.clock import Clock
from baton.common.timing import Timing

IDLE_WAIT_S: Final = 0.1
# Between looks at a step or a read in flight.
POLL_WAIT_S: Final = 0.0002
# A core that stays away longer than this, in a long step or frozen, could neither tell nor hear
# anything: the rest of that time counts against nobody's lease.
COUNTED_ABSENCE_S: Final = 1.0


class Pace:
    """Engine thread only."""

    def __init__(self, clock: Clock, timing: Timing) -> None:
        self._report_every_s = timing.heartbeat_every_s
        self._counted_s = COUNTED_ABSENCE_S * timing.heartbeat_every_s
        self._last = clock.monotonic()
        self._next_report = 0.0

    def lost_s(self, now: float) -> float:
        """Seconds since the last call, less what counts; called once per iteration."""
        away, self._last = now - self._last, now
        return max(0.0, away - self._counted_s)

    def is_report_due(self, now: float) -> bool:
        """Whether it is time for a load report; True once per period."""
        if now < self._next_report:
            return False
        self._next_report = now + self._report_every_s
        return True
