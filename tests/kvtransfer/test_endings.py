"""A transfer that has ended stays ended for one lease time."""

from hypothesis import given
from hypothesis import strategies as st

from baton.common.clock import ManualClock
from baton.common.ids import RequestKey, TransferId
from baton.kvtransfer.endings import Endings

TERM_S = 30.0


def key(number: int, attempt: int = 1) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), attempt)


def test_what_never_ended_has_not_ended() -> None:
    endings = Endings(TERM_S)
    endings.remember(key(1), now=0.0)
    assert endings.has_ended(key(1))
    assert not endings.has_ended(key(2))


def test_lower_attempts_are_over_and_higher_ones_are_not() -> None:
    endings = Endings(TERM_S)
    endings.remember(key(1, 2), now=0.0)
    assert [endings.has_ended(key(1, attempt)) for attempt in (1, 2, 3)] == [True, True, False]


def test_a_late_end_of_an_older_attempt_changes_nothing() -> None:
    endings = Endings(TERM_S)
    endings.remember(key(1, 3), now=0.0)
    endings.remember(key(1, 1), now=1.0)
    assert endings.has_ended(key(1, 3))


def test_a_cancel_may_overtake_its_submit() -> None:
    """An ending is remembered of a transfer that nobody here ever knew."""
    endings = Endings(TERM_S)
    endings.remember(key(9), now=5.0)
    assert endings.has_ended(key(9))


def test_memory_lasts_one_lease_time_after_the_last_word() -> None:
    clock, endings = ManualClock(), Endings(TERM_S)
    endings.remember(key(1), now=clock.monotonic())
    clock.advance(TERM_S - 1)
    endings.remember(key(1), now=clock.monotonic())
    clock.advance(TERM_S - 1)
    endings.remember(key(2), now=clock.monotonic())
    assert endings.has_ended(key(1))
    clock.advance(1)
    endings.remember(key(3), now=clock.monotonic())
    assert not endings.has_ended(key(1))
    assert endings.has_ended(key(2))


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    endings = Endings(TERM_S, max_entries=3)
    for number in range(5):
        endings.remember(key(number), now=0.0)
    assert [endings.has_ended(key(number)) for number in range(5)] == [False] * 2 + [True] * 3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=30))
def test_ended_means_the_highest_attempt_that_was_named(ends: list[tuple[int, int]]) -> None:
    endings = Endings(TERM_S)
    highest: dict[int, int] = {}
    for number, attempt in ends:
        endings.remember(key(number, attempt), now=0.0)
        highest[number] = max(highest.get(number, 0), attempt)
    for number in range(4):
        for attempt in range(1, 6):
            expected = attempt <= highest.get(number, 0)
            assert endings.has_ended(key(number, attempt)) == expected
