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
        self._heard: float | None = None
        self._next_report = 0.0

    def heard(self, now: float) -> None:
        """The event loop came round, as it does with each heartbeat: what peers sent gets here."""
        self._heard = now

    def lost_s(self, now: float) -> float:
        """Seconds since the last call in which this worker was away or deaf, less what counts;
        called once per iteration."""
        last, self._last = self._last, now
        lost = now - last - self._counted_s
        if self._heard is not None:
            deaf_since = self._heard + self._report_every_s + self._counted_s
            lost = max(lost, now - max(last, deaf_since))
        return max(0.0, lost)

    def is_report_due(self, now: float) -> bool:
        """Whether it is time for a load report; True once per period."""
        if now < self._next_report:
            return False
        self._next_report = now + self._report_every_s
        return True
