"""Stop strings in a stream of text: Aho and Corasick's automaton (CACM 18(6), 1975).

One step per character, whatever the number of stop strings, and the same result however the text
is cut. The string that is complete first wins; of two that end together, the longer.
"""

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Holds back text that may yet turn out to begin a stop string.

    A state is the longest suffix of the text that begins some stop string: exactly what is held.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere; validation refuses it"
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        # Length of the longest stop string that ends in this state; 0 for none.
        self._match = [0]
        for stop in stops:
            self._add(stop)
        self._fallback = [0] * len(self._next)
        self._link()
        self._state = 0
        self._held = ""

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = following
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Point each state to its longest proper suffix that is a state too, shallow ones first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[self._fallback[state]]
            for character, following in self._next[state].items():
                self._fallback[following] = self._step(self._fallback[state], character)
                queue.append(following)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is final now, and whether a stop string ended it; without the match."""
        state = self._state
        seen = len(self._held)
        whole = self._held + text
        for character in text:
            state = self._step(state, character)
            seen += 1
            if self._match[state]:
                self._state, self._held = 0, ""
                return whole[: seen - self._match[state]], True
        self._state = state
        border = len(whole) - self._depth[state]
        self._held = whole[border:]
        return whole[:border], False

    def flush(self) -> str:
        """The text still held, which no stop string will complete."""
        held, self._held, self._state = self._held, "", 0
        return held
