"""The seam between the engine's thread and whatever runs a step: a queue of work in order.

    engine thread   submit(work) -> ticket      poll() ... True -> result()
    device          runs the works one after the other, in the order of submission

What a work writes is final once its ticket polls true, and not a moment before: that poll is the
event behind its last write. `InlineDevice` runs works at once, as a CPU model does. `ThreadDevice`
runs them late on a thread of its own, as a GPU does. `ManualDevice` runs them when told to, for
tests and for simulation on virtual time.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from baton.common.errors import InternalError
from baton.common.randomness import Randomness

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# An engine has one step in flight; a device that is asked for much more is driven by a bug.
MAX_QUEUED: Final = 64
# A device that is closed ends the work that it has begun, which is one step.
CLOSE_DEADLINE_S: Final = 60.0
_DELAY_BITS: Final = 32

# Seconds to wait before the work, and what runs it.
_DelayedWork = tuple[float, Callable[[], None]]


class Ticket(Protocol[T_co]):
    """One submitted work, seen from the thread that submitted it."""

    def poll(self) -> bool:
        """Whether the work has ended, well or not. Never waits."""
        ...

    def result(self) -> T_co:
        """What the work returned, or raises what it raised; only once `poll` is true."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until the work has ended; InternalError when it has not within the time."""
        ...


class Device(Protocol):
    """Runs works in the order of submission. One thread submits and closes."""

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        """Queue the work and return at once. Never raises what the work raises."""
        ...

    def close(self) -> None:
        """Take no more work; what was submitted and has not begun may never run. Idempotent.

        Afterwards no work is running: the arena may be given back.
        """
        ...


class InlineDevice:
    """Runs each work before `submit` returns."""

    def __init__(self) -> None:
        self._is_closed = False

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        assert not self._is_closed, "a closed device takes no work"
        ticket = _HostTicket(work)
        ticket.run()
        return ticket

    def close(self) -> None:
        self._is_closed = True


class ThreadDevice:
    """Runs each work on a daemon thread, after a random delay of at most `max_delay_s` seconds.

    The delay comes before the work, so that whoever looks at memory without having seen the event
    finds the bytes of before.
    """

    def __init__(self, randomness: Randomness, max_delay_s: float) -> None:
        assert max_delay_s >= 0, "a delay is not negative"
        self._randomness = randomness
        self._max_delay_s = max_delay_s
        self._works: queue.Queue[_DelayedWork | None] = queue.Queue(MAX_QUEUED + 1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        assert not self._closing.is_set(), "a closed device takes no work"
        assert self._works.qsize() < MAX_QUEUED, f"{MAX_QUEUED} works are outstanding"
        ticket = _HostTicket(work)
        # Drawn here: the source of randomness belongs to the thread that submits.
        share = self._randomness.bits(_DELAY_BITS) / 2**_DELAY_BITS
        self._works.put_nowait((share * self._max_delay_s, ticket.run))
        return ticket

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._works.put_nowait(None)
        self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            raise InternalError(
                f"the device still runs a step {CLOSE_DEADLINE_S:g} s after it was closed"
            )

    def _run(self) -> None:
        # No work outlives its turn in a local of this loop: it holds the arena.
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        # Bounded by close(), which always puts the end into the queue.
        entry = self._works.get()
        if entry is None:
            return False
        delay_s, run = entry
        if not self._closing.wait(delay_s):
            run()
        return True


class ManualDevice:
    """Runs works only when its owner says so: the device's own pace becomes part of the test."""

    def __init__(self) -> None:
        self._works: deque[Callable[[], None]] = deque()
        self._is_closed = False

    @property
    def num_queued(self) -> int:
        return len(self._works)

    def submit(self, work: Callable[[], T]) -> Ticket[T]:
        assert not self._is_closed, "a closed device takes no work"
        assert len(self._works) < MAX_QUEUED, f"{MAX_QUEUED} works are outstanding"
        ticket = _ManualTicket(work)
        self._works.append(ticket.run)
        return ticket

    def run_next(self) -> bool:
        """Run the oldest queued work; whether there was one."""
        if not self._works:
            return False
        self._works.popleft()()
        return True

    def run_all(self) -> int:
        """Run everything queued; the number of works run."""
        count = 0
        while self.run_next():
            count += 1
        return count

    def close(self) -> None:
        self._is_closed = True
        self._works.clear()


class _HostTicket(Generic[T]):
    """A work of the host with its outcome, which is written before the event is set."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        work, self._work = self._work, None
        assert work is not None, "a work runs once"
        try:
            self._outcome.append(work())
        # The root of whatever runs the work: the caller meets the error in result().
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def poll(self) -> bool:
        return self._ended.is_set()

    def result(self) -> T:
        assert self.poll(), "the work has not ended"
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def wait(self, timeout_s: float) -> None:
        if not self._ended.wait(timeout_s):
            raise InternalError(f"the device has not ended a step within {timeout_s:g} s")


class _ManualTicket(_HostTicket[T]):
    """Nobody but the waiting thread could run the work, so waiting for it is a dead end."""

    def wait(self, timeout_s: float) -> None:
        if not self.poll():
            raise InternalError(
                f"a step was not run by hand, so waiting {timeout_s:g} s for it is in vain"
            )
