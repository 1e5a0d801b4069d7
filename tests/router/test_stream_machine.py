"""SM5: the real dispatcher between workers that do anything, and clients that may leave.

Workers crash, restart as another life, lose their streams and come back, lose leases, drain, move
requests with the target winning or failing, refuse, send late records, and are ordered by nothing
but their own stream. Whatever happens: a client sees a prefix of the one right answer, each token
once, and exactly one end; and whoever holds an attempt that was left is told so.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.router_desk import Desk, candidate, identity
from support.router_workers import END_TOKEN, WRONG_TOKEN, JobState, PaperWorker

from baton.common.errors import (
    BatonError,
    DigestMismatch,
    FenceFailed,
    HandshakeMismatch,
    InternalError,
    LeaseLost,
    NoCapacity,
    PeerLost,
    QueueFull,
    TransferTimeout,
    WorkerLost,
)
from baton.common.ids import RequestKey, TransferId, WorkerIdentity
from baton.common.messages import OutputRecord
from baton.common.metric_names import RECOVERIES
from baton.common.sampling import FinishReason, SamplingParams
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry, RequestState
from baton.router.recovery import MAX_CRASHES, MAX_TRIES, MIN_BUDGET

FAILURES = (
    LeaseLost,
    FenceFailed,
    DigestMismatch,
    TransferTimeout,
    HandshakeMismatch,
    PeerLost,
    QueueFull,
    WorkerLost,
)
NAMES = ("p0", "p1", "d0", "d1", "d2")
MAX_LENGTH = 40
# Of a settled cluster: more than all deadlines that lie on the way to an end.
SETTLE_ROUNDS = 60


@dataclass(eq=False)
class Client:
    """One request as its client sees it."""

    entry: JournalEntry
    answer: list[int]
    tokens: list[int] = field(default_factory=list)
    end: FinishReason | BatonError | None = None
    has_left: bool = False

    def see(self, event: TokenEvent | BatonError) -> None:
        assert self.end is None, "nothing follows the end"
        assert not self.has_left, "who left is told nothing"
        if isinstance(event, BatonError):
            assert not isinstance(event, InternalError), event.message
            self.end = event
            return
        self.tokens += event.token_ids
        assert self.tokens == self.answer[: len(self.tokens)], "the one right answer, in order"
        if event.finish is not None:
            self.end = event.finish
            assert self.tokens == self.answer, "an answer that finished is whole"
            assert event.usage is not None
            assert event.usage.completion_tokens == len(self.answer)


class StreamMachine(RuleBasedStateMachine):
    """The cluster: a dispatcher, workers on paper, clients and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(seed=7)
        self.dispatch = self.desk.dispatch
        self.workers: dict[WorkerIdentity, PaperWorker] = {}
        self.epochs = dict.fromkeys(NAMES, 0)
        self.answers: dict[int, list[int]] = {}
        self.clients: dict[TransferId, Client] = {}
        # When each recovery that was not a request's first happened.
        self.paid: deque[float] = deque()
        self.num_paid = 0

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self._start(name)
        for length in (1, 12, MAX_LENGTH):
            self._request(length, stops=False, timeout_s=1e6)

    # --- clients ---

    @precondition(lambda self: len(self.clients) < 12)
    @rule(
        length=st.integers(1, MAX_LENGTH),
        stops=st.booleans(),
        timeout_s=st.sampled_from([3.0, 1e5, 1e6]),
    )
    def request(self, length: int, stops: bool, timeout_s: float) -> None:
        self._request(length, stops=stops, timeout_s=timeout_s)

    def _request(self, length: int, *, stops: bool, timeout_s: float) -> None:
        number = len(self.answers)
        answer = [100 * number + position for position in range(length)]
        if stops:
            answer[-1] = END_TOKEN
        self.answers[number] = answer
        spec = GenerationSpec(
            request_id=f"req-{number}",
            model="tiny",
            prompt_tokens=[number],
            sampling=SamplingParams(max_tokens=length + 3 if stops else length),
            stop=(),
            tenant_key=b"",
            timeout_s=timeout_s,
            end_token_ids=frozenset({END_TOKEN}),
        )
        try:
            entry = self.dispatch.submit(spec)
        except NoCapacity:
            assert not any(worker.worker_id.startswith("d") for worker in self.desk.ready)
            return
        self.clients[entry.transfer_id] = Client(entry, answer)
        self._flow()

    @precondition(lambda self: len(self._live()) > 2)
    @rule(data=st.data(), wants_report=st.booleans())
    def leave(self, data: st.DataObject, wants_report: bool) -> None:
        client = data.draw(st.sampled_from(self._live()))
        if wants_report:
            event = self.dispatch.finish_early(client.entry)
            assert event.usage is not None
            assert event.usage.completion_tokens == len(client.tokens)
        else:
            self.dispatch.cancel(client.entry)
        client.has_left = True
        self._flow()

    # --- workers at work ---

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), count=st.integers(1, 4))
    def read(self, data: st.DataObject, count: int) -> None:
        worker = self._draw(data)
        for _ in range(min(count, len(worker.inbox))):
            worker.read()

    @precondition(lambda self: self._jobs())
    @rule(data=st.data(), count=st.integers(1, 3), splits_finish=st.booleans())
    def work(self, data: st.DataObject, count: int, splits_finish: bool) -> None:
        worker, key = data.draw(st.sampled_from(self._jobs()))
        worker.work(key, count, splits_finish=splits_finish)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), count=st.integers(1, 4))
    def hear(self, data: st.DataObject, count: int) -> None:
        worker = self._draw(data)
        for _ in range(min(count, len(worker.outbox))):
            self._arrive(worker)

    @rule()
    def all_read(self) -> None:
        for worker in self.workers.values():
            while worker.inbox:
                worker.read()

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), rounds=st.integers(1, 3))
    def busy(self, data: st.DataObject, rounds: int) -> None:
        """All workers do what they have, in some order."""
        order = data.draw(st.permutations(list(self.workers.values())))
        for _ in range(rounds):
            self._round(order)

    # --- workers in trouble ---

    @precondition(lambda self: any(worker.is_attached for worker in self.workers.values()))
    @rule(data=st.data(), survives=st.booleans())
    def lose(self, data: st.DataObject, survives: bool) -> None:
        """A crash, or a stream that stays away past its grace: the same to the router."""
        attached = [worker for worker in self.workers.values() if worker.is_attached]
        worker = data.draw(st.sampled_from(attached))
        if survives:
            worker.is_attached = False
            worker.inbox.clear()
            worker.outbox.clear()
        else:
            del self.workers[worker.identity]
        waited = self._queued()
        self.desk.ready.pop(worker.identity, None)
        self.dispatch.worker_gone(worker.identity)
        self._flow()
        self._expect_no_gap(waited)

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        """Another life, if none lives."""
        if not any(worker.worker_id == name for worker in self.workers):
            self._start(name)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def attach_again(self, data: st.DataObject) -> None:
        """A new stream, within the grace or after it; messages not yet sent are kept."""
        worker = self._draw(data)
        was_gone = not worker.is_attached
        worker.attach_again(self.dispatch.live_on(worker.identity))
        if was_gone:
            if not worker.is_draining:
                self.desk.ready[worker.identity] = candidate(worker.identity)
            self.dispatch.worker_joined(worker.identity)
        self._flow()
        if was_gone:
            self._expect_no_gap(set())

    @precondition(lambda self: any(worker.is_attached for worker in self._movable()))
    @rule(data=st.data())
    def lose_the_last_word(self, data: st.DataObject) -> None:
        """A request ends, and its stream breaks between its last token and its finish."""
        worker = data.draw(st.sampled_from([w for w in self._movable() if w.is_attached]))
        running = [key for key, job in worker.jobs.items() if job.state is JobState.RUNNING]
        worker.work(running[0], MAX_LENGTH, splits_finish=True)
        while len(worker.outbox) > 1:
            self._arrive(worker)
        worker.attach_again(self.dispatch.live_on(worker.identity))

    @precondition(lambda self: self._jobs())
    @rule(data=st.data(), kind=st.sampled_from(FAILURES))
    def fail(self, data: st.DataObject, kind: type[BatonError]) -> None:
        worker, key = data.draw(st.sampled_from(self._jobs()))
        worker.fail(key, kind("it broke"))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), drains=st.booleans())
    def resume_or_drain(self, data: st.DataObject, drains: bool) -> None:
        """The router hears of it later."""
        self._draw(data).is_draining = drains

    @precondition(lambda self: self._movable())
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """A worker with running requests drains and says so."""
        worker = data.draw(st.sampled_from(self._movable()))
        worker.is_draining = True
        self._report_load(worker)

    @rule()
    def report_load(self) -> None:
        for worker in list(self.workers.values()):
            self._report_load(worker)

    @precondition(lambda self: self._stale())
    @rule(data=st.data(), says=st.sampled_from(["token", "finish", "error"]))
    def say_something_late(self, data: st.DataObject, says: str) -> None:
        """A worker speaks of an attempt that it has no part in, and what it says is wrong."""
        worker, key = data.draw(st.sampled_from(self._stale()))
        client = self.clients[key.transfer_id]
        record = OutputRecord(
            key=key,
            position=client.entry.num_emitted,
            tokens=(WRONG_TOKEN,) if says != "error" else (),
            finish=FinishReason.STOP if says == "finish" else None,
            error=LeaseLost("late") if says == "error" else None,
        )
        before = (client.entry.attempt, client.entry.state, list(client.tokens))
        self.dispatch.record(worker, record)
        self._flow()
        assert (client.entry.attempt, client.entry.state, client.tokens) == before

    @rule(seconds=st.sampled_from([0.25, 0.25, 1.0, 1.0, 2.0, 5.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)
        self.dispatch.sweep()
        self._flow()
        now = self.desk.clock.monotonic()
        for client in self._live():
            assert now < client.entry.ends_at, "past its deadline"

    # --- what holds ---

    @invariant()
    def every_request_is_in_the_journal_until_its_end(self) -> None:
        for transfer_id, client in self.clients.items():
            has_ended = client.end is not None or client.has_left
            assert client.entry.has_ended == has_ended
            assert self.dispatch.knows(transfer_id) == (not has_ended)
            assert list(client.entry.tokens) == client.tokens
        assert self.dispatch.num_requests == len(self._live())

    @invariant()
    def requests_are_counted_where_they_are(self) -> None:
        expected: dict[WorkerIdentity, int] = {}
        for client in self._live():
            for worker in self._holders(client.entry):
                expected[worker] = expected.get(worker, 0) + 1
        known = {*self.workers, *expected}
        assert {w: self.dispatch.num_requests_on(w) for w in known} == {
            w: expected.get(w, 0) for w in known
        }

    @invariant()
    def an_attempt_that_was_left_is_cancelled_wherever_it_may_be(self) -> None:
        for worker in self.workers.values():
            if worker.is_attached:
                for key in worker.keys_in_the_end():
                    assert self._is_current(worker.identity, key), f"{key} lives on {worker}"

    @invariant()
    def nobody_is_asked_again_after_it_failed_a_request(self) -> None:
        now = self.desk.clock.monotonic()
        for client in self._live():
            entry = client.entry
            if entry.attempt is not None and entry.move is None:
                assert entry.history.excluded_at(now).isdisjoint(entry.attempt.workers)
                assert entry.attempt.pair not in entry.history.excluded_pairs

    @invariant()
    def attempts_are_bounded(self) -> None:
        for client in self._live():
            history = client.entry.history
            assert history.tries <= MAX_TRIES
            if client.entry.move is None:
                assert max(history.crashes.values(), default=0) < MAX_CRASHES
        firsts = sum(1 for client in self.clients.values() if client.entry.history.recoveries)
        now = self.desk.clock.monotonic()
        paid = self.dispatch.counters.get(RECOVERIES, 0) - firsts
        self.paid.extend([now] * (paid - self.num_paid))
        self.num_paid = paid
        while self.paid and self.paid[0] <= now - self.desk.timing.recovery_window_s:
            self.paid.popleft()
        assert len(self.paid) <= MIN_BUDGET

    def teardown(self) -> None:
        """When the trouble is over, all requests end, and nobody holds anything."""
        if not self.workers and not self.clients:
            return
        for worker in self.workers.values():
            worker.is_draining = False
            if not worker.is_attached:
                worker.attach_again(self.dispatch.live_on(worker.identity))
                self.dispatch.worker_joined(worker.identity)
            self.desk.ready[worker.identity] = candidate(worker.identity)
        for name in NAMES:
            self.restart(name)
        for _ in range(SETTLE_ROUNDS):
            for _ in range(4):
                self._round(list(self.workers.values()))
            self.wait(1.0)
            self.every_request_is_in_the_journal_until_its_end()
        assert self._live() == []
        for worker in self.workers.values():
            while worker.inbox:
                worker.read()
            assert worker.jobs == {}
            assert self.dispatch.num_requests_on(worker.identity) == 0

    # --- inside ---

    def _start(self, name: str) -> None:
        self.epochs[name] += 1
        life = identity(name, self.epochs[name])
        self.workers[life] = PaperWorker(life, self.workers, self.answers)
        self.desk.ready[life] = candidate(life)
        self.dispatch.worker_joined(life)
        self._flow()
        self._expect_no_gap(set())

    def _flow(self) -> None:
        effects = self.dispatch.take_effects()
        for identity_, message in effects.sends:
            worker = self.workers.get(identity_)
            if worker is not None and worker.is_attached:
                worker.inbox.append(message)
        for request, event in effects.events:
            self.clients[request].see(event)

    def _arrive(self, worker: PaperWorker) -> None:
        self.dispatch.record(worker.identity, worker.outbox.popleft())
        self._flow()

    def _round(self, order: list[PaperWorker]) -> None:
        for worker in order:
            while worker.inbox:
                worker.read()
            for key in list(worker.jobs):
                if key in worker.jobs:
                    worker.work(key)
            while worker.outbox:
                self._arrive(worker)

    def _report_load(self, worker: PaperWorker) -> None:
        if not worker.is_attached:
            return
        if worker.is_draining:
            self.desk.ready.pop(worker.identity, None)
            self.dispatch.worker_draining(worker.identity)
        else:
            self.desk.ready[worker.identity] = candidate(worker.identity)
        self._flow()

    def _movable(self) -> list[PaperWorker]:
        return [
            worker
            for worker in self.workers.values()
            if any(job.state is JobState.RUNNING for job in worker.jobs.values())
        ]

    def _draw(self, data: st.DataObject) -> PaperWorker:
        return data.draw(st.sampled_from(list(self.workers.values())))

    def _live(self) -> list[Client]:
        return [c for c in self.clients.values() if c.end is None and not c.has_left]

    def _queued(self) -> set[TransferId]:
        return {c.entry.transfer_id for c in self._live() if c.entry.state is RequestState.QUEUED}

    def _jobs(self) -> list[tuple[PaperWorker, RequestKey]]:
        return [(worker, key) for worker in self.workers.values() for key in worker.jobs]

    def _stale(self) -> list[tuple[WorkerIdentity, RequestKey]]:
        """Attempts that somebody was told of, each with an attached worker that is not at it."""
        told = {key for worker in self.workers.values() for key in worker.seen}
        return [
            (worker.identity, key)
            for worker in self.workers.values()
            for key in sorted(told, key=str)
            if worker.is_attached and not self._is_current(worker.identity, key)
        ]

    def _is_current(self, worker: WorkerIdentity, key: RequestKey) -> bool:
        entry = self.clients[key.transfer_id].entry
        if entry.has_ended:
            return False
        if entry.move is not None and key == entry.move.attempt.key:
            return worker == entry.move.target
        attempt = entry.attempt
        return attempt is not None and key == attempt.key and worker in attempt.workers

    def _holders(self, entry: JournalEntry) -> list[WorkerIdentity]:
        if entry.attempt is None:
            return []
        if entry.state is not RequestState.DECODING:
            return entry.attempt.workers
        assert entry.attempt.decode is not None
        if entry.move is None:
            return [entry.attempt.decode]
        is_lost = entry.move.source_lost is not None
        return [entry.move.target, *([] if is_lost else [entry.attempt.decode])]

    def _expect_no_gap(self, waited: set[TransferId]) -> None:
        """Beside those of `waited`, nobody waits for a worker while there is one for it."""
        now = self.desk.clock.monotonic()
        for request in self._queued() - waited:
            excluded = self.clients[request].entry.history.excluded_at(now)
            left = [w for w in self.desk.ready if w not in excluded and w.worker_id[0] == "d"]
            assert left == []


TestStreamMachine = StreamMachine.TestCase
TestStreamMachine.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
