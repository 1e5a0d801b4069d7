"""Stop strings end the text at the first completed match, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.stop_matcher import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        emitted += text
        if is_stopped:
            return emitted, True
    return emitted + matcher.flush(), False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """Cut at the match that is complete first; of those, at the one that starts first."""
    matches = [
        (start + len(stop), start)
        for stop in stops
        for start in range(len(text) - len(stop) + 1)
        if text.startswith(stop, start)
    ]
    return (text[: min(matches)[1]], True) if matches else (text, False)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["some E", "N", "D more"], ("some ", True)),
        (["END"], ["some E", "NT"], ("some ENT", False)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["abcd", "bc"], ["abcd"], ("a", True)),
        (["bc", "abc"], ["xabc"], ("x", True)),
        (["🌶"], ["chili ", "🌶"], ("chili ", True)),
        (["abc"], ["ab"], ("ab", False)),
    ],
)
def test_matches(stops: list[str], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, pieces) == expected


def test_holds_back_only_what_may_begin_a_stop() -> None:
    matcher = StopMatcher(["STOP", "TOPS"])
    assert matcher.push("a ST") == ("a ", False)
    assert matcher.push("x") == ("STx", False)
    assert matcher.push("TOP") == ("", False)
    assert matcher.flush() == "TOP"


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_equals_a_search_in_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == reference(stops, "".join(pieces))
