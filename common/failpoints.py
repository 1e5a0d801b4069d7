"""Places at which a test of faults kills, stops, holds or breaks a process, exactly there.

A process that was started with `--failpoints FOLDER` looks, each time it reaches the place NAME,
for `FOLDER/NAME.arm`, writes `NAME.hit`, and then does what the file's one line says:

    kill     SIGKILL this process
    stop     SIGSTOP this process, until somebody sends SIGCONT
    wait     go on once `NAME.release` exists; InternalError after 60 s
    raise    raise InternalError
    kill*3   any of them, but only the third time since the file was written

Without a folder a place costs one comparison. A test whose servers live in its own process arms a
place with a callable instead: `with armed("d.mid_pull", take_the_owner_away): ...`.
"""

import asyncio
import inspect
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from baton.common.clock import Clock
from baton.common.errors import ConfigError, InternalError
from baton.common.periodic import wait_for

log = logging.getLogger(__name__)

NAMES: Final = {
    "p.submitted": "P has taken a submit and reserved nothing",
    "p.before_lease": "P has reserved the blocks of a prompt and opened no lease",
    "p.after_lease": "P has opened the lease and told nobody",
    "p.mid_prefill": "P has computed a chunk that is not the last",
    "p.before_first_token": "P has computed the prompt and sampled nothing",
    "p.after_first_token": "P has sampled its token and sent it to nobody",
    "d.submitted": "D has taken a submit and reserved nothing",
    "d.after_reserve": "D has reserved its blocks and read nothing",
    "d.mid_pull": "D has posted a read that has not ended",
    "d.before_join": "D has all blocks past their fence and has not joined",
    "d.after_join": "D runs the request and has released the lease",
    "d.after_emit": "D has handed a step's tokens to the event loop",
    "r.after_submit": "the router has sent an attempt to its workers",
    "r.before_emit": "the router has a record that its client has not seen",
    "r.after_emit": "the router has given a record's tokens to the client's stream",
    "w.before_register": "a worker serves and is not in Redis",
    "move.source_stopped": "the source of a move has stopped the sequence and leased its KV",
    "move.before_join": "the target of a move has all blocks and has not joined",
}
RELEASE_DEADLINE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.005

_LINE: Final = re.compile(r"(?P<action>[a-z]+)(?:\*(?P<only>[1-9][0-9]*))?")


class Action(Enum):
    KILL = "kill"
    STOP = "stop"
    WAIT = "wait"
    RAISE = "raise"


@dataclass(frozen=True, slots=True)
class Order:
    """What an armed place does; `only` is the one time that it does so, None: each time."""

    action: Action
    only: int | None = None

    @classmethod
    def parse(cls, text: str, name: str) -> "Order":
        """Raises ConfigError naming the place, the text and what is understood."""
        found = _LINE.fullmatch(text.strip())
        if found is None or found["action"] not in {action.value for action in Action}:
            raise ConfigError(
                f"failpoint {name} is armed with {text.strip()!r}; write kill, stop, wait or "
                "raise, and *N behind it for the N-th time alone"
            )
        return cls(Action(found["action"]), int(found["only"]) if found["only"] else None)


@dataclass(slots=True)
class _Armed:
    """One `.arm` file as it was read: another file in its place is armed anew."""

    file: tuple[int, int]
    order: Order
    times_reached: int = 0


class _Folder:
    """The files that a test and this process exchange."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._armed: dict[str, _Armed] = {}

    def check(self) -> None:
        """ConfigError unless every armed place exists and its order is understood."""
        if not self._folder.is_dir():
            raise ConfigError(f"no folder of failpoints at {self._folder}")
        for path in sorted(self._folder.glob("*.arm")):
            if path.stem not in NAMES:
                raise ConfigError(
                    f"{path} arms no failpoint of Baton; there are {', '.join(NAMES)}"
                )
            self._look(path.stem)

    def due(self, name: str) -> Action | None:
        """What is to be done at `name` now; it was written down as hit then."""
        armed = self._look(name)
        if armed is None:
            return None
        armed.times_reached += 1
        if armed.order.only not in (None, armed.times_reached):
            return None
        self._file(name, "hit").write_text(f"{armed.times_reached}\n", encoding="ascii")
        log.warning("failpoint %s: %s", name, armed.order.action.value)
        return armed.order.action

    def is_released(self, name: str) -> bool:
        return self._file(name, "release").exists()

    def deadline(self) -> float:
        return self._clock.monotonic() + RELEASE_DEADLINE_S

    def refuse_late(self, name: str, deadline: float) -> None:
        if self._clock.monotonic() >= deadline:
            raise InternalError(
                f"failpoint {name} was not released within {RELEASE_DEADLINE_S:g} s"
            )

    def _look(self, name: str) -> _Armed | None:
        path = self._file(name, "arm")
        try:
            stat = path.stat()
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._armed.pop(name, None)
            return None
        if not text.strip():
            # Somebody is writing it.
            return None
        file = (stat.st_ino, stat.st_mtime_ns)
        armed = self._armed.get(name)
        if armed is None or armed.file != file:
            armed = self._armed[name] = _Armed(file, Order.parse(text, name))
        return armed

    def _file(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}.{kind}"


class _Failpoints:
    """What is armed in this process: files of a folder, callables of a test."""

    def __init__(self) -> None:
        self.folder: _Folder | None = None
        self.callables: dict[str, Callable[[], object]] = {}

    def reach(self, name: str) -> None:
        assert name in NAMES, f"{name} is not registered"
        if (called := self.callables.get(name)) is not None:
            result = called()
            assert not inspect.isawaitable(result), f"{name} is reached where nobody can await"
        if self.folder is None or (action := self.folder.due(name)) is None:
            return
        if action is Action.WAIT:
            deadline, never = self.folder.deadline(), threading.Event()
            while not self.folder.is_released(name):
                self.folder.refuse_late(name, deadline)
                never.wait(LOOK_EVERY_S)
        else:
            _do(action, name)

    async def reach_async(self, name: str) -> None:
        assert name in NAMES, f"{name} is not registered"
        if (called := self.callables.get(name)) is not None:
            result = called()
            if inspect.isawaitable(result):
                await result
        if self.folder is None or (action := self.folder.due(name)) is None:
            return
        if action is Action.WAIT:
            deadline, never = self.folder.deadline(), asyncio.Event()
            while not self.folder.is_released(name):
                self.folder.refuse_late(name, deadline)
                await wait_for(never, LOOK_EVERY_S)
        else:
            _do(action, name)


# None until a folder is installed or a test arms something: what a place compares with.
_failpoints: _Failpoints | None = None


def install(folder: str | None, clock: Clock) -> None:
    """Obey the `.arm` files of a folder from now on; None, as in production, changes nothing.

    Called once, at the start of a process. ConfigError: no such folder, a name that is no
    failpoint, an order that is not understood.
    """
    global _failpoints
    if folder is None:
        return
    files = _Folder(Path(folder), clock)
    files.check()
    log.warning("failpoints of %s are obeyed", folder)
    if _failpoints is None:
        _failpoints = _Failpoints()
    _failpoints.folder = files


def uninstall() -> None:
    """Forget folder and callables: for tests."""
    global _failpoints
    _failpoints = None


def reach(name: str) -> None:
    """This thread is at the place `name` of `NAMES`."""
    if _failpoints is not None:
        _failpoints.reach(name)


async def reach_async(name: str) -> None:
    """As `reach`, on the event loop: while this place waits, the loop goes on."""
    if _failpoints is not None:
        await _failpoints.reach_async(name)


@contextmanager
def armed(name: str, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` whenever a server of this process reaches `name`, on the thread that does.

    At a place of the event loop it may return an awaitable, which is awaited there.
    """
    global _failpoints
    assert name in NAMES, f"{name} is not registered"
    if _failpoints is None:
        _failpoints = _Failpoints()
    failpoints = _failpoints
    assert name not in failpoints.callables, f"{name} is armed already"
    failpoints.callables[name] = action
    try:
        yield
    finally:
        failpoints.callables.pop(name, None)
        if _failpoints is failpoints and not failpoints.callables and failpoints.folder is None:
            _failpoints = None


def _do(action: Action, name: str) -> None:
    if action is Action.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action is Action.STOP:
        # To this thread, so that it does not run on while another takes the signal.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    else:
        raise InternalError(f"failpoint {name} was armed to fail")
