"""Time in which a worker could not hear its peers counts against none of their leases."""

import pytest

from baton.common.timing import DEFAULT_TIMING
from baton.worker.pace import COUNTED_ABSENCE_S, Pace

BEAT_S = DEFAULT_TIMING.heartbeat_every_s


class _Clock:
    def monotonic(self) -> float:
        return 100.0


@pytest.fixture
def pace() -> Pace:
    return Pace(_Clock(), DEFAULT_TIMING)


def lost_between(pace: Pace, start: float, end: float, step_s: float = 0.25) -> float:
    """What a core that comes round every `step_s` seconds loses."""
    lost, now = 0.0, start
    while now < end:
        now += step_s
        lost += pace.lost_s(now)
    return lost


def test_a_core_that_comes_round_loses_nothing(pace: Pace) -> None:
    assert lost_between(pace, 100.0, 160.0) == 0.0


def test_a_long_step_counts_for_a_moment(pace: Pace) -> None:
    assert pace.lost_s(110.0) == pytest.approx(10.0 - COUNTED_ABSENCE_S)


def test_a_deaf_core_loses_all_that_follows_a_missed_beat(pace: Pace) -> None:
    """The engine thread runs on while the event loop is starved: no renewal reaches it."""
    pace.heard(100.0)
    lost = lost_between(pace, 100.0, 130.0)
    assert lost == pytest.approx(30.0 - BEAT_S - COUNTED_ABSENCE_S)


def test_a_core_that_hears_again_loses_no_more(pace: Pace) -> None:
    pace.heard(100.0)
    lost_between(pace, 100.0, 110.0)
    for second in range(110, 120):
        pace.heard(float(second))
        assert lost_between(pace, second, second + 1) == 0.0


def test_away_and_deaf_is_lost_once(pace: Pace) -> None:
    pace.heard(100.0)
    assert pace.lost_s(120.0) == pytest.approx(20.0 - COUNTED_ABSENCE_S)
    assert lost_between(pace, 120.0, 121.0) == pytest.approx(1.0)
