"""Connections between processes: FIFO each way, late at random, cut, silenced and partitioned.

A connection that breaks is noticed by its two ends at different times, and what was under way may
or may not arrive before. An end that hears nothing of a frozen or unreachable peer gives up after
a while, as gRPC's keepalive does.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from sim.world import Process, World

# Between two processes, most of the time.
LATENCY_S = (0.0002, 0.01)
HICCUP_S = (0.05, 0.6)
HICCUP_SHARE = 0.02
KEEPALIVE_S = (4.0, 10.0)
DIAL_TIMEOUT_S = 2.0

Accept = Callable[["End"], None]


class End:
    """One side of a connection, used by its process alone."""

    def __init__(self, connection: "Connection", process: Process) -> None:
        self.connection = connection
        self.process = process
        self.is_open = True
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_closed: Callable[[], None] = lambda: None
        # Nothing reaches this end before.
        self.silent_until = 0.0
        self.arriving: deque[Any] = deque()
        self._last_arrival = 0.0

    @property
    def peer(self) -> "End":
        first, second = self.connection.ends
        return second if self is first else first

    def send(self, message: Any) -> None:
        """Dropped once either side has gone; whoever misses it notices the end of the stream."""
        if self.is_open and not self.connection.is_broken:
            self.peer.expect(message)

    def close(self) -> None:
        """From this side; what was sent before still arrives."""
        if not self.is_open:
            return
        self.is_open = False
        if not self.connection.is_broken:
            self.peer.expect(None)

    def expect(self, message: Any) -> None:
        """`message` is on its way; None is the end of the stream."""
        network, world = self.connection.network, self.connection.network.world
        self.arriving.append(message)
        due = max(
            world.now + self._latency_s(),
            self.silent_until + world.random.uniform(0.0, 0.01),
            self._last_arrival,
            network.reachable_at(self.process.name, self.peer.process.name),
        )
        self._last_arrival = due
        world.at(due - world.now, self._arrive)

    def _latency_s(self) -> float:
        world = self.connection.network.world
        return world.draw(*(HICCUP_S if world.chance(HICCUP_SHARE) else LATENCY_S))

    def _arrive(self) -> None:
        if not self.arriving:
            return
        until = self.connection.network.reachable_at(self.process.name, self.peer.process.name)
        world = self.connection.network.world
        if max(until, self.silent_until) > world.now:
            # A silence that began meanwhile: all that is on its way waits in its order.
            world.at(max(until, self.silent_until) - world.now + 0.001, self._arrive)
            return
        message = self.arriving.popleft()
        self.process.run(lambda: self._take(message))

    def _take(self, message: Any) -> None:
        if not self.is_open:
            return
        if message is None:
            self.lose()
        else:
            self.on_message(message)

    def lose(self) -> None:
        """This side notices that the stream is over."""
        if self.is_open:
            self.is_open = False
            self.arriving.clear()
            self.on_closed()


class Connection:
    def __init__(self, network: "Network", dialler: Process, listener: Process) -> None:
        self.network = network
        self.is_broken = False
        self.ends = (End(self, dialler), End(self, listener))

    @property
    def is_over(self) -> bool:
        return not any(end.is_open for end in self.ends)

    def joins(self, name: str) -> bool:
        return any(end.process.name == name for end in self.ends)

    def cut(self, notice_s: tuple[float, float] = (0.001, 0.5)) -> None:
        """Nothing more is sent; each side notices in its own time."""
        world = self.network.world
        self.cut_at(world.draw(*notice_s), world.draw(*notice_s))

    def cut_at(self, dialler_s: float, listener_s: float) -> None:
        """Nothing more is sent; the sides notice after so many seconds."""
        if self.is_broken:
            return
        self.is_broken = True
        for end, seconds in zip(self.ends, (dialler_s, listener_s), strict=True):
            end.process.after(seconds, end.lose)


class Network:
    """All connections, who listens where, and who cannot reach whom until when."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._listeners: dict[str, tuple[Process, Accept]] = {}
        self._connections: list[Connection] = []
        self._partitions: dict[frozenset[str], float] = {}

    @property
    def connections(self) -> list[Connection]:
        """Those that are not over, oldest first."""
        self._connections = [each for each in self._connections if not each.is_over]
        return list(self._connections)

    def listen(self, address: str, process: Process, accept: Accept) -> None:
        self._listeners[address] = (process, accept)

    def is_refused(self, address: str) -> bool:
        listener = self._listeners.get(address)
        return listener is None or not listener[0].is_alive

    def reachable_at(self, one: str, other: str) -> float:
        return self._partitions.get(frozenset((one, other)), 0.0)

    def partition(self, one: str, other: str, seconds: float) -> None:
        """No byte between both for so long; what they have open may give up meanwhile."""
        self._partitions[frozenset((one, other))] = self.world.now + seconds
        for connection in self.connections:
            if connection.joins(one) and connection.joins(other):
                self.doubt(connection, lambda: self.reachable_at(one, other) > self.world.now)

    def doubt(self, connection: Connection, is_silent: Callable[[], bool]) -> None:
        """Keepalive: the connection breaks if nothing is heard for that long."""

        def give_up() -> None:
            if is_silent():
                connection.cut()

        self.world.at(self.world.random.uniform(*KEEPALIVE_S), give_up)

    def froze(self, process: Process) -> None:
        """Its peers may give it up."""
        for connection in self.connections:
            if connection.joins(process.name):
                self.doubt(connection, lambda: process.is_frozen)

    def died(self, process: Process) -> None:
        """Its kernel resets what was open, or, if the whole machine went, nobody does."""
        resets = self.world.chance(0.8)
        for connection in self.connections:
            if connection.joins(process.name):
                connection.cut((0.0005, 0.02) if resets else (0.5, KEEPALIVE_S[1]))

    def dial(
        self, dialler: Process, address: str, connected: Accept, failed: Callable[[], None]
    ) -> None:
        """Ends in `connected` or `failed`, in the dialler."""
        listener = self._listeners.get(address)
        if listener is None or not listener[0].is_alive:
            dialler.after(self.world.draw(*LATENCY_S), failed)
            return
        process, accept = listener
        if self.reachable_at(dialler.name, process.name) > self.world.now:
            dialler.after(DIAL_TIMEOUT_S, failed)
            return

        def established() -> None:
            if not process.is_alive or not dialler.is_alive:
                dialler.run(failed)
                return
            connection = Connection(self, dialler, process)
            self._connections.append(connection)
            ours, theirs = connection.ends
            dialler.run(lambda: connected(ours))
            # A frozen process has a kernel that answers for it.
            process.run(lambda: accept(theirs))
            if process.is_frozen:
                self.doubt(connection, lambda: process.is_frozen)

        self.world.at(self.world.draw(*LATENCY_S), established)
