"""Crashes and freezes at exact places of the cores: the failpoints of this process, by seed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from baton.common.failpoints import NAMES, armed

if TYPE_CHECKING:
    from sim.workers import SimWorker

# Those that a core reaches; the router's and the process's own are not in this simulation.
POINTS: Final = tuple(sorted(name for name in NAMES if name.split(".")[0] in ("p", "d", "move")))


class CrashedAtPoint(Exception):
    """Unwinds the core that is to die where it stands."""


class Points:
    """`running` is the worker whose core is at work now."""

    def __init__(self) -> None:
        self.running: SimWorker | None = None
        self._calls: dict[str, Callable[[SimWorker], None]] = {}
        self._crashes: list[str] = []
        self._freezes: list[str] = []

    def crash_at(self, name: str) -> None:
        """The next worker to reach it crashes."""
        self._crashes.append(name)

    def freeze_at(self, name: str) -> None:
        """The next worker to reach it stands still from the end of that round on."""
        self._freezes.append(name)

    def call_at(self, name: str, action: "Callable[[SimWorker], None]") -> None:
        """Called with the next worker to reach it; an older call for the place is forgotten."""
        self._calls[name] = action

    def clear(self) -> None:
        self._calls.clear()
        self._crashes.clear()
        self._freezes.clear()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this runs, the points of this process are these."""
        with ExitStack() as stack:
            for name in POINTS:
                stack.enter_context(armed(name, lambda name=name: self._reached(name)))
            yield

    def _reached(self, name: str) -> None:
        if self.running is None:
            return
        if name in self._calls:
            self._calls.pop(name)(self.running)
        if name in self._freezes:
            self._freezes.remove(name)
            self.running.freezes_after_round = name
        if name in self._crashes:
            self._crashes.remove(name)
            raise CrashedAtPoint(name)
