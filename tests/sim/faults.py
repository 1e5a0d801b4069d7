"""What happens to a cluster, drawn from the seed: what, to whom, when and for how long."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from sim.cluster import FREEZE_S, RESTART_S, TIMING, WORKLOAD_S, Cluster
from sim.network import Connection
from sim.points import POINTS
from sim.workers import SimWorker

from baton.common.ids import WorkerIdentity
from baton.common.messages import Reap, SetDraining
from baton.common.sampling import Role

# A fault that finds nobody to strike looks again for a while.
LOOK_EVERY_S = 0.1
LOOKS = 30
MAX_FAULT_S = 15.0
# Requests that come at once, so that slots are wanted.
BURST = 6
# Of the workers that a fault picks: those that have something to lose.
BUSY_SHARE = 0.8


class Fault(Enum):
    CRASH = "a worker crashes and starts anew"
    CRASH_AT_POINT = "the next worker at a failpoint crashes there and starts anew"
    CRASH_FOR_GOOD = "a worker crashes and stays away"
    FREEZE = "a worker is stopped and continued"
    FREEZE_AT_POINT = "the next worker at a failpoint is stopped there and continued"
    STALL = "an engine thread does not come round"
    SLOW_DEVICE = "steps take long"
    CUT_LINK = "a link between two workers breaks"
    CUT_STREAM = "a control stream breaks"
    SILENCE = "one direction of a connection is silent"
    PARTITION = "two workers cannot reach each other"
    PARTITION_ROUTER = "a router and a worker cannot reach each other"
    DRAIN = "a worker drains, stops at its deadline and starts anew"
    DRAIN_RESUMED = "a worker drains and is told to go on"
    BAD_READS = "a share of the reads goes wrong"
    ROUTER_CRASH = "a router crashes and another one starts"
    SLOW_ROUTER = "a router does not read its streams"
    REAP = "an operator ends all leases of a worker"
    REAP_UNHEARD = "leases are ended, and their readers read on and hear nothing of it"
    REAP_MOVE = "the lease of a move is ended, and its reader hears nothing of it"
    HALF_CUT = "a link breaks, which its owner notices at once and its reader later"


# These alone end no request: whoever is patient gets an answer.
HARMLESS = {Fault.SLOW_DEVICE, Fault.DRAIN_RESUMED, Fault.DRAIN, Fault.ROUTER_CRASH}


@dataclass(frozen=True, slots=True)
class Plan:
    """`end_s`: when the last fault is over, in seconds from the start."""

    faults: list[Fault]
    end_s: float

    @property
    def excuses_errors(self) -> bool:
        """One disturbance costs a request at most one attempt of several."""
        return sum(fault not in HARMLESS for fault in self.faults) > 1 or (
            Fault.BAD_READS in self.faults
        )


class Faults:
    """Draws and injects them. Each `_inject` says whether it found whom to strike."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._random = cluster.world.random
        self._inject: dict[Fault, Callable[[], bool]] = {
            Fault.CRASH: lambda: self._crash(restarts=True),
            Fault.CRASH_AT_POINT: self._crash_at_point,
            Fault.CRASH_FOR_GOOD: lambda: self._crash(restarts=False),
            Fault.FREEZE: self._freeze,
            Fault.FREEZE_AT_POINT: self._freeze_at_point,
            Fault.STALL: self._stall,
            Fault.SLOW_DEVICE: self._slow_device,
            Fault.CUT_LINK: lambda: self._cut(of_router=False),
            Fault.CUT_STREAM: lambda: self._cut(of_router=True),
            Fault.SILENCE: self._silence,
            Fault.PARTITION: self._partition,
            Fault.PARTITION_ROUTER: self._partition_router,
            Fault.DRAIN: self._drain,
            Fault.DRAIN_RESUMED: self._drain_resumed,
            Fault.BAD_READS: self._bad_reads,
            Fault.ROUTER_CRASH: self._router_crash,
            Fault.SLOW_ROUTER: self._slow_router,
            Fault.REAP: self._reap,
            Fault.REAP_UNHEARD: self._reap_unheard,
            Fault.REAP_MOVE: self._reap_move,
            Fault.HALF_CUT: self._half_cut,
        }
        self._num_routers = len(cluster.routers)

    def plan(self) -> Plan:
        """Draw and schedule them."""
        count = self._random.choice([0, 1, 1, 2, 3, 4, 6, 8])
        faults = [self._random.choice(list(Fault)) for _ in range(count)]
        if faults.count(Fault.CRASH_FOR_GOOD) > 1:
            # One of each role is there to the end.
            faults = [fault for fault in faults if fault is not Fault.CRASH_FOR_GOOD]
        for fault in faults:
            start_s = 2.0 + self._random.uniform(0.0, WORKLOAD_S + 1.0)
            self._world.at(start_s, lambda fault=fault: self._strike(fault, LOOKS))
        looking_s = LOOKS * LOOK_EVERY_S
        lasting_s = TIMING.drain_deadline_s + MAX_FAULT_S + RESTART_S[1]
        end_s = 3.0 + WORKLOAD_S + looking_s + lasting_s
        return Plan(faults, end_s if faults else 0.0)

    def _strike(self, fault: Fault, looks: int) -> None:
        if self._inject[fault]():
            self._world.log(f"fault: {fault.name}")
            self._cluster.tally.faults[fault.name] += 1
        elif looks:
            self._world.at(LOOK_EVERY_S, lambda: self._strike(fault, looks - 1))

    # --- whom ---

    def _any_worker(self, role: Role | None = None) -> SimWorker | None:
        awake = [
            worker
            for worker in self._cluster.alive
            if not worker.process.is_frozen and role in (None, worker.role)
        ]
        busy = [worker for worker in awake if worker.core.num_requests]
        if busy and self._world.chance(BUSY_SHARE):
            awake = busy
        return self._random.choice(awake) if awake else None

    def _any_router(self) -> str | None:
        names = sorted(self._cluster.routers)
        return self._random.choice(names) if names else None

    # --- workers ---

    def _crash(self, *, restarts: bool) -> bool:
        worker = self._any_worker()
        if worker is None:
            return False
        self._cluster.lose_worker(worker.process.name)
        if restarts:
            self._cluster.restart_worker(worker.process.name)
        return True

    def _crash_at_point(self) -> bool:
        self._cluster.points.crash_at(self._random.choice(POINTS))
        return True

    def _freeze(self) -> bool:
        worker = self._any_worker()
        if worker is None:
            return False
        self._cluster.freeze_worker(worker.process.name, self._world.draw(*FREEZE_S))
        return True

    def _freeze_at_point(self) -> bool:
        self._cluster.points.freeze_at(self._random.choice(POINTS))
        return True

    def _stall(self) -> bool:
        worker = self._any_worker()
        if worker is None:
            return False
        seconds = self._world.draw(0.5, MAX_FAULT_S)
        self._world.log(f"{worker.identity} stalls for {seconds:.2f} s")
        worker.stalled_until = self._world.now + seconds
        return True

    def _slow_device(self) -> bool:
        worker = self._any_worker()
        if worker is None:
            return False
        device = worker.device
        device.slowness = self._world.draw(3.0, 30.0)
        self._world.at(self._world.draw(1.0, 8.0), lambda: setattr(device, "slowness", 1.0))
        return True

    def _drain(self) -> bool:
        role = self._random.choice([Role.PREFILL, Role.DECODE, Role.DECODE])
        worker = self._any_worker(role)
        if worker is None:
            return False
        deadline = self._world.now + TIMING.drain_deadline_s
        worker.drain()

        def look() -> None:
            if worker.core.num_requests and self._world.now < deadline:
                worker.process.after(LOOK_EVERY_S, look)
                return
            self._cluster.lose_worker(worker.process.name, in_order=True)
            self._cluster.restart_worker(worker.process.name)

        worker.process.after(0.5, look)
        return True

    def _drain_resumed(self) -> bool:
        worker = self._any_worker(Role.DECODE)
        if worker is None:
            return False
        self._drain_and_resume(worker, self._world.draw(0.5, 4.0))
        return True

    def _drain_and_resume(self, worker: SimWorker, seconds: float) -> None:
        self._tell(worker.identity, SetDraining(True))
        self._world.at(seconds, lambda: self._tell(worker.identity, SetDraining(False)))

    def _reap(self) -> bool:
        leasing = [worker for worker in self._cluster.alive if worker.load.leases]
        if not leasing:
            return False
        self._reap_all(self._random.choice(leasing))
        return True

    def _reap_all(self, owner: SimWorker) -> None:
        for router in self._cluster.routers.values():
            router.send(owner.identity, Reap(tuple(router.leases.get(owner.identity, []))))

    def _reap_unheard(self) -> bool:
        """When a prompt has just been computed and its reader may be anywhere in its pull."""
        self._cluster.points.call_at("p.after_first_token", self._take_away)
        return True

    def _reap_move(self) -> bool:
        worker = self._any_worker(Role.DECODE)
        if worker is None or not worker.core.num_requests:
            return False
        self._cluster.points.call_at("move.source_stopped", self._take_away)
        self._drain_and_resume(worker, self._random.uniform(2.0, 4.0))
        return True

    def _take_away(self, owner: SimWorker) -> None:
        """Its leases end and its slots change hands, while reads go on from stale handles."""

        def reap() -> None:
            self._deafen_readers(owner)
            self._reap_all(owner)
            self._cluster.add_clients(BURST, at_once=True)

        owner.process.after(self._random.uniform(0.005, 0.15), reap)

    def _deafen_readers(self, owner: SimWorker) -> None:
        """Reads go on, slowly; what the owner says of its leases does not arrive."""
        seconds = self._random.uniform(1.0, 4.0)
        self._cluster.read_faults.drag_until = self._world.now + seconds
        for connection in self._cluster.network.connections:
            reader, listener = connection.ends
            if listener.process is owner.process and reader.process.name[0] != "r":
                reader.silent_until = self._world.now + seconds

    def _tell(self, identity: WorkerIdentity, message: SetDraining) -> None:
        for router in self._cluster.routers.values():
            router.send(identity, message)

    # --- connections ---

    def _cut(self, *, of_router: bool) -> bool:
        connections = [
            connection
            for connection in self._cluster.network.connections
            if of_router == any(end.process.name[0] == "r" for end in connection.ends)
        ]
        if not connections:
            return False
        connection = self._random.choice(connections)
        self._world.log(f"the connection of {_ends(connection)} is cut")
        connection.cut()
        return True

    def _half_cut(self) -> bool:
        links = [
            connection
            for connection in self._cluster.network.connections
            if all(end.process.name[0] != "r" for end in connection.ends)
        ]
        if not links:
            return False
        connection = self._random.choice(links)
        self._world.log(f"the connection of {_ends(connection)} is cut in half")
        reader_s, owner_s = self._random.uniform(2.0, 9.0), 0.001
        connection.cut_at(reader_s, owner_s)
        return True

    def _silence(self) -> bool:
        connections = self._cluster.network.connections
        if not connections:
            return False
        end = self._random.choice(self._random.choice(connections).ends)
        end.silent_until = self._world.now + self._world.draw(0.2, 12.0)
        self._world.log(f"{end.process.name} hears nothing of {end.peer.process.name}")
        self._cluster.network.doubt(end.connection, lambda: end.silent_until > self._world.now)
        return True

    def _partition(self) -> bool:
        one, other = self._random.sample(sorted(self._cluster.workers), 2)
        self._part(one, other)
        return True

    def _partition_router(self) -> bool:
        router, worker = self._any_router(), self._any_worker()
        if router is None or worker is None:
            return False
        self._part(router, worker.process.name)
        return True

    def _part(self, one: str, other: str) -> None:
        seconds = self._world.draw(0.2, 12.0)
        self._world.log(f"{one} and {other} are parted for {seconds:.2f} s")
        self._cluster.network.partition(one, other, seconds)

    def _bad_reads(self) -> bool:
        faults = self._cluster.read_faults
        faults.share = self._random.choice([0.1, 0.3, 0.8])
        self._world.at(self._world.draw(0.5, 6.0), lambda: setattr(faults, "share", 0.0))
        return True

    # --- routers ---

    def _router_crash(self) -> bool:
        name = self._any_router()
        if name is None:
            return False
        self._cluster.lose_router(name)
        self._num_routers += 1
        successor = f"r{self._num_routers}"
        delay_s = self._world.draw(*RESTART_S)
        self._world.at(delay_s, lambda: self._cluster.start_router(successor))
        return True

    def _slow_router(self) -> bool:
        name = self._any_router()
        if name is None:
            return False
        self._cluster.slow_until[name] = self._world.now + self._world.draw(0.2, 8.0)
        return True


def _ends(connection: Connection) -> str:
    return " and ".join(end.process.name for end in connection.ends)
