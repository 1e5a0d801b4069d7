"""Virtual time: a queue of things to happen, processes that freeze and die, and what was seen.

Everything random comes from one seed, so the same seed gives the same history, to the last digit of
its times. Things that happen at one moment happen in an order that the seed shuffles.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from math import exp, log

from baton.common.clock import ManualClock

START_S = 1000.0
KEPT_LINES = 20_000


class Trace:
    """A digest of the whole history, and its newest lines."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)

    def add(self, now: float, line: str) -> None:
        line = f"{now - START_S:10.4f} {line}"
        self._digest.update(line.encode())
        self.lines.append(line)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def about(self, *words: str, last: int = 60) -> list[str]:
        """The newest lines that hold any of the words."""
        found = [line for line in self.lines if any(word in line for word in words)]
        return found[-last:]


class World:
    """The clock, the queue and the seed's random numbers."""

    def __init__(self, seed: int) -> None:
        self.clock = ManualClock(START_S)
        self.random = random.Random(seed)
        self.trace = Trace()
        self._queue: list[tuple[float, float, int, Callable[[], None]]] = []
        self._count = 0

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Let `action` happen in `delay_s` seconds."""
        assert delay_s >= 0, "the past is over"
        self._count += 1
        entry = (self.now + delay_s, self.random.random(), self._count, action)
        heapq.heappush(self._queue, entry)

    def run_until(self, time_s: float) -> None:
        """Let everything happen that is due by then."""
        while self._queue and self._queue[0][0] <= time_s:
            due, _, _, action = heapq.heappop(self._queue)
            self.clock.advance(max(0.0, due - self.now))
            action()
        self.clock.advance(max(0.0, time_s - self.now))

    def log(self, line: str) -> None:
        self.trace.add(self.now, line)

    def draw(self, low: float, high: float) -> float:
        """A duration between both, as likely in each order of magnitude."""
        return exp(self.random.uniform(log(low), log(high)))

    def chance(self, share: float) -> bool:
        return self.random.random() < share


class Process:
    """What reaches it waits while it is frozen, and is lost once it is dead."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self._world = world
        self._waiting: deque[Callable[[], None]] = deque()

    def run(self, action: Callable[[], None]) -> None:
        if not self.is_alive:
            return
        if self.is_frozen:
            self._waiting.append(action)
        else:
            action()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """A timer of this process: late by as long as it is frozen."""
        self._world.at(delay_s, lambda: self.run(action))

    def every(self, period_s: float, action: Callable[[], None]) -> None:
        """Again and again, with a little jitter, from a random moment within the first period."""

        def tick() -> None:
            action()
            self.after(period_s * self._world.random.uniform(0.98, 1.02), tick)

        self.after(self._world.random.uniform(0.0, period_s), tick)

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False
        while self._waiting and self.is_alive and not self.is_frozen:
            self._waiting.popleft()()

    def kill(self) -> None:
        self.is_alive = False
        self._waiting.clear()
