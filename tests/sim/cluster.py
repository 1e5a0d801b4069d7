"""A whole cluster on virtual time: routers, workers that come and go, clients, and the checks.

What must hold is checked all along: conservation after each round of an engine (`workers.py`), each
token as a client gets it (`clients.py`). At the end, with all faults over, everything must have
ended and every slot must be free or cached.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sim.clients import ALLOWED, LONG_S, SOON_S, Client, Prompts, draw_sampling
from sim.fabric import ReadFaults
from sim.network import Network
from sim.points import Points
from sim.routers import SimRouter
from sim.wire import Wire
from sim.workers import MODEL_NAME, SimWorker, WorkerConfig
from sim.world import START_S, World
from support.history import History, RequestLog
from support.rest_checks import unrest

from baton.common.errors import LeaseLost, NoCapacity
from baton.common.ids import WorkerIdentity
from baton.common.sampling import Role
from baton.common.timing import Timing
from baton.kvtransfer.transport.memory import MemoryFabric
from baton.router.generation import GenerationSpec

# The terms of leases and graces are shorter than the default ones, so that less has to happen.
TIMING = Timing(
    lease_first_term_s=3.0,
    lease_term_s=9.0,
    renew_every_s=2.0,
    link_grace_s=3.0,
    stalled_after_s=8.0,
    move_deadline_s=3.0,
    drain_deadline_s=10.0,
    slow_router_s=5.0,
    queued_deadline_s=15.0,
    prefill_deadline_s=25.0,
    handover_deadline_s=25.0,
    decode_deadline_s=20.0,
)
LISTED_S = 3.0
RESTART_S = (0.2, 5.0)
FREEZE_S = (0.1, 15.0)
WORKLOAD_S = 6.0
# After the last fault and the last request: every term, grace and deadline has passed.
SETTLE_S = 22.0
NUM_EACH = 3
ROLES = {"p": Role.PREFILL, "d": Role.DECODE}


@dataclass(slots=True)
class Tally:
    """What happened, to see over many seeds that everything does."""

    faults: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)


class Cluster:
    """Everything of one seed."""

    def __init__(self, seed: int, model: Path) -> None:
        self.world = world = World(seed)
        random = world.random
        self.network = Network(world)
        self.has_digests = random.random() < 0.25
        self.config = WorkerConfig(
            model=model,
            timing=TIMING,
            block_size=4,
            prefill_blocks=random.choice([10, 10, 12, 20]),
            decode_blocks=random.choice([10, 12, 20]),
            prefill_budget=random.choice([4, 8, 64]),
            decode_budget=random.choice([4, 64]),
            max_num_seqs=random.choice([2, 4, 16]),
            max_requests=random.choice([4, 100, 100]),
            kv_digest=self.has_digests,
        )
        self.tally = Tally()
        self.points = Points()
        self.read_faults = ReadFaults(world, with_digests=self.has_digests)
        self.history = History(world.clock)
        self.workers: dict[str, SimWorker] = {}
        self.routers: dict[str, SimRouter] = {}
        self.clients: list[Client] = []
        # Until when each router does not read its streams.
        self.slow_until: dict[str, float] = {}
        self._prompts = Prompts(world)
        self._fabric = MemoryFabric()
        self._wire = Wire(is_encoded=random.random() < 0.2)
        self._listed: dict[str, tuple[WorkerIdentity, float]] = {}
        self._num_lives = 0
        for role in ROLES:
            for number in range(NUM_EACH):
                self.start_worker(f"{role}{number}")
        for number in range(random.choice([1, 1, 2])):
            self.start_router(f"r{number}")

    # --- who is there ---

    def start_worker(self, name: str) -> None:
        """A new life of that name: another epoch, and an empty arena."""
        self._num_lives += 1
        worker = self.workers[name] = SimWorker(
            self.network,
            self._fabric,
            self.read_faults,
            self._wire,
            self.config,
            role=ROLES[name[0]],
            name=name,
            epoch=self._num_lives,
            slow_until=lambda router: self.slow_until.get(router, 0.0),
            points=self.points,
            died_at=lambda point: self._died_at(name, point),
            froze_at=lambda point: self._froze_at(name, point),
        )
        self.world.log(f"{worker.identity} starts")
        self._list(worker)
        worker.process.every(TIMING.heartbeat_every_s, lambda: self._list(worker))

    def start_router(self, name: str) -> None:
        self.routers[name] = SimRouter(
            self.network, self._wire, TIMING, name, listed=self._registered
        )

    def lose_worker(self, name: str, *, in_order: bool = False) -> None:
        worker = self.workers[name]
        self._keep_counters(worker)
        if in_order:
            self._listed.pop(name, None)
            worker.stop()
        else:
            worker.crash()

    def restart_worker(self, name: str) -> None:
        """It comes back after a while."""
        self.world.at(self.world.draw(*RESTART_S), lambda: self.start_worker(name))

    def freeze_worker(self, name: str, seconds: float) -> None:
        process = self.workers[name].process
        self.world.log(f"{name} freezes for {seconds:.2f} s")
        process.freeze()
        self.network.froze(process)
        self.world.at(seconds, process.thaw)

    def _died_at(self, name: str, point: str) -> None:
        self.world.log(f"{name} dies at {point}")
        self.tally.faults[f"crash at {point}"] += 1
        self.lose_worker(name)
        self.restart_worker(name)

    def _froze_at(self, name: str, point: str) -> None:
        self.tally.faults[f"freeze at {point}"] += 1
        self.freeze_worker(name, self.world.draw(*FREEZE_S))

    def lose_router(self, name: str) -> None:
        router = self.routers.pop(name)
        self.tally.counters.update(router.dispatch.counters)
        router.crash()
        for client in self.clients:
            if client.router is router:
                client.lost()

    @property
    def alive(self) -> list[SimWorker]:
        return [worker for worker in self.workers.values() if worker.process.is_alive]

    def _list(self, worker: SimWorker) -> None:
        if self.workers[worker.process.name] is worker:
            self._listed[worker.process.name] = worker.identity, self.world.now + LISTED_S

    def _registered(self) -> Iterable[WorkerIdentity]:
        return [who for who, until in self._listed.values() if until >= self.world.now]

    # --- clients ---

    def add_clients(self, count: int, *, at_once: bool = False) -> None:
        for _ in range(count):
            delay_s = 0.0 if at_once else 2.0
            if self.world.chance(0.4):
                delay_s += self.world.random.uniform(0.0, 0.5 if at_once else WORKLOAD_S)
            client = self._client(f"q{len(self.clients):02}")
            self.clients.append(client)
            self.world.at(delay_s, client.ask)

    def _client(self, request_id: str) -> Client:
        random = self.world.random
        spec = GenerationSpec(
            request_id=request_id,
            model=MODEL_NAME,
            prompt_tokens=self._prompts.draw(),
            sampling=draw_sampling(self.world),
            stop=(),
            tenant_key=random.choice([b"", b"tenant"]),
            timeout_s=random.uniform(0.3, SOON_S) if random.random() < 0.08 else LONG_S,
        )
        cancels_after_s = self.world.draw(0.002, 3.0) if random.random() < 0.15 else None
        return Client(
            self.world, self.history, self._any_router, spec, cancels_after_s=cancels_after_s
        )

    def _any_router(self) -> SimRouter | None:
        return self.world.random.choice(list(self.routers.values())) if self.routers else None

    # --- the run ---

    def run(self, faults_end_s: float) -> None:
        """Until nobody waits, and everything that was held has had the time to be let go."""
        with self.points.watched():
            self._run(faults_end_s)

    def _run(self, faults_end_s: float) -> None:
        self.world.run_until(START_S + max(faults_end_s, 2.0 + WORKLOAD_S))
        self.points.clear()
        last_s = self.world.now + LONG_S + 2.0
        while self.world.now < last_s and not all(client.has_ended for client in self.clients):
            self.world.run_until(self.world.now + 0.5)
        self.world.run_until(self.world.now + SETTLE_S)
        for worker in self.alive:
            self._keep_counters(worker)
        for router in self.routers.values():
            self.tally.counters.update(router.dispatch.counters)

    def violations(self, *, is_complete: bool) -> list[str]:
        """What is wrong in the end; `is_complete`: nothing excuses an error."""
        answers = {client.spec.request_id: client.answer for client in self.clients}
        found = [
            f"{client.spec.request_id}: nobody accepted it"
            for client in self.clients
            if client.log is None
        ]
        # Those that cannot wait may be too late without anybody's fault.
        patient = {c.spec.request_id for c in self.clients if c.spec.timeout_s == LONG_S}
        for log in self.history.requests:
            errors = [end.error for end in log.ends if end.error is not None]
            if self.config.max_requests < len(self.clients):
                # Full workers refuse, or have their reader told that there is no lease, and a
                # router asks three of them at most.
                errors = [e for e in errors if not isinstance(e, NoCapacity | LeaseLost)]
            if is_complete and errors and log.id in patient:
                found.append(f"{log.id}: nothing excuses {errors[0].reason}: {errors[0].message}")
        found += self.history.violations(lambda log: _answer(answers, log), ALLOWED)
        for worker in self.alive:
            found += unrest(str(worker.identity), worker.load)
            if worker.core.num_requests:
                found.append(f"{worker.identity}: {worker.core.num_requests} requests")
            pool, prefix = worker.engine.pool, worker.engine.prefix
            if pool.num_free + prefix.num_evictable != worker.engine.num_blocks:
                found.append(f"{worker.identity}: not every slot is free or cached")
        for router in self.routers.values():
            found += router.unrest
        return found

    def _keep_counters(self, worker: SimWorker) -> None:
        self.tally.counters.update(worker.load.counters)
        self.tally.counters["preemptions"] += worker.load.preemptions


def _answer(answers: dict[str, list[int]], log: RequestLog) -> list[int]:
    return answers[log.id]
