"""A dispatcher with its clock and a fleet on paper, and everything that it sent and said."""

from dataclasses import replace

from baton.common.clock import ManualClock
from baton.common.errors import BatonError
from baton.common.ids import Epoch, RequestKey, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    HandoverReport,
    LoadReport,
    OutputRecord,
    PrefillReport,
    RouterMessage,
    Submit,
)
from baton.common.randomness import SeededRandomness
from baton.common.sampling import Role, SamplingParams
from baton.common.timing import DEFAULT_TIMING, Timing
from baton.router.dispatch import Dispatch
from baton.router.generation import GenerationSpec, TokenEvent
from baton.router.journal import JournalEntry
from baton.router.placement import Candidate, LeastLoaded

PREFILLED = PrefillReport(cached_tokens=2, computed_tokens=1, queue_s=0.1, compute_s=0.2)
HANDED_OVER = HandoverReport(
    pulled_blocks=1,
    pulled_bytes=4096,
    transport="nixl",
    cached_tokens=0,
    owner_cached_tokens=0,
    pull_s=0.1,
)
TIMEOUT_S = 20.0
PROMPT = [5, 6, 7]
# `Desk.play` fills in the key of the current attempt.
NO_KEY = RequestKey(TransferId(bytes(16)), 0)


def identity(name: str, epoch: int = 1) -> WorkerIdentity:
    return WorkerIdentity(WorkerId(name), Epoch(epoch), f"{name}-{epoch}")


def candidate(
    worker: WorkerIdentity, *, blocks: int = 10_000, fingerprint: str = "same", in_flight: int = 0
) -> Candidate:
    """Whose name begins with p prefills, with u does both; the others decode."""
    return Candidate(
        identity=worker,
        role={"p": Role.PREFILL, "u": Role.UNIFIED}.get(worker.worker_id[0], Role.DECODE),
        fingerprint=fingerprint,
        block_size=32,
        load=LoadReport(blocks_total=blocks, blocks_free=blocks),
        in_flight=in_flight,
    )


def record(position: int, *tokens: int, **rest: object) -> OutputRecord:
    return OutputRecord(key=NO_KEY, position=position, tokens=tokens, **rest)  # type: ignore[arg-type]


def first(position: int = 0) -> OutputRecord:
    """What the prefill worker says; the token at each position is the position itself."""
    return record(position, position, prefill=PREFILLED)


def join(position: int = 0) -> OutputRecord:
    """What the decode worker says first."""
    return record(position, position, handover=HANDED_OVER)


class Desk:
    """Drives a `Dispatch`. `ready` are the workers that placement may pick."""

    def __init__(
        self,
        *ready: WorkerIdentity,
        max_requests: int = 1000,
        timing: Timing = DEFAULT_TIMING,
        seed: int = 1,
    ) -> None:
        self.clock = ManualClock(50.0)
        self.ready = {worker: candidate(worker) for worker in ready}
        self.timing = timing
        self.dispatch = Dispatch(
            LeastLoaded(SeededRandomness(seed)),
            candidates=lambda _: self.candidates(),
            link_address=lambda worker: f"{worker.worker_id}:7000",
            clock=self.clock,
            randomness=SeededRandomness(seed + 1),
            timing=timing,
            max_requests=max_requests,
        )
        self.sends: list[tuple[WorkerIdentity, RouterMessage]] = []
        self.events: list[tuple[TransferId, TokenEvent | BatonError]] = []

    def candidates(self) -> list[Candidate]:
        return [
            replace(worker, in_flight=self.dispatch.num_requests_on(worker.identity))
            for worker in self.ready.values()
        ]

    def submit(
        self,
        *,
        max_tokens: int = 8,
        timeout_s: float = TIMEOUT_S,
        end_token_ids: frozenset[int] = frozenset(),
        **sampling: object,
    ) -> JournalEntry:
        spec = GenerationSpec(
            request_id="req-1",
            model="tiny",
            prompt_tokens=PROMPT,
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
            stop=(),
            tenant_key=b"tenant",
            timeout_s=timeout_s,
            end_token_ids=end_token_ids,
        )
        return self.dispatch.submit(spec)

    def play(self, entry: JournalEntry, *steps: tuple[WorkerIdentity, OutputRecord]) -> None:
        for worker, step in steps:
            if step.key == NO_KEY:
                assert entry.attempt is not None, "nobody has the request"
                step = replace(step, key=entry.attempt.key)
            self.dispatch.record(worker, step)
        self.look()

    def lose(self, *workers: WorkerIdentity) -> None:
        """Their streams are gone past the grace."""
        for worker in workers:
            self.ready.pop(worker, None)
            self.dispatch.worker_gone(worker)
        self.look()

    def join(self, *workers: WorkerIdentity) -> None:
        for worker in workers:
            self.ready[worker] = candidate(worker)
            self.dispatch.worker_joined(worker)
        self.look()

    def drain(self, worker: WorkerIdentity) -> None:
        """`worker` reports that it drains: it is placed no more."""
        self.ready.pop(worker, None)
        self.dispatch.worker_draining(worker)
        self.look()

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.dispatch.sweep()
        self.look()

    def look(self) -> None:
        effects = self.dispatch.take_effects()
        self.sends += effects.sends
        self.events += effects.events

    def forget(self) -> None:
        """Look only at what comes from now on."""
        self.look()
        self.sends.clear()
        self.events.clear()

    @property
    def tokens(self) -> list[int]:
        return [
            token
            for _, event in self.events
            if isinstance(event, TokenEvent)
            for token in event.token_ids
        ]

    @property
    def errors(self) -> list[BatonError]:
        return [event for _, event in self.events if isinstance(event, BatonError)]

    @property
    def error_types(self) -> list[type[BatonError]]:
        return [type(error) for error in self.errors]

    @property
    def last(self) -> TokenEvent:
        event = self.events[-1][1]
        assert isinstance(event, TokenEvent)
        return event

    @property
    def cancelled_on(self) -> list[WorkerIdentity]:
        return [worker for worker, message in self.sends if isinstance(message, Cancel)]

    @property
    def submits(self) -> list[tuple[WorkerIdentity, Submit]]:
        return [(worker, message) for worker, message in self.sends if isinstance(message, Submit)]
