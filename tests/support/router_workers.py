"""Workers on paper for a router: they follow the protocol, one micro-step at a time.

A worker has an inbox (messages of the router), jobs, and an outbox (records on their way), each in
order; between workers nothing is ordered. Links are collapsed: a decode worker looks into its
owner's jobs. Every token is that of `answers[prompt]`, so whoever continues must continue right.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from support.router_desk import HANDED_OVER, PREFILLED

from baton.common.errors import BatonError, LeaseLost, NoWorker, PeerLost, UnknownRequest
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    LiveRequest,
    Move,
    OutputRecord,
    PrefillJob,
    RouterMessage,
    Stay,
    Submit,
)
from baton.common.sampling import FinishReason

END_TOKEN = 9_999
WRONG_TOKEN = 6_666


class JobState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    LEASED = "leased"
    MOVING = "moving"


@dataclass(eq=False)
class Job:
    """`num_known`: output tokens that this worker has."""

    submit: Submit
    num_known: int
    state: JobState = JobState.WAITING
    move: Move | None = None

    @property
    def key(self) -> RequestKey:
        return self.submit.key


@dataclass(eq=False, repr=False)
class PaperWorker:
    """One life of a worker. `peers` are all that live, itself included."""

    identity: WorkerIdentity
    peers: Mapping[WorkerIdentity, "PaperWorker"]
    answers: Mapping[int, Sequence[int]]
    is_attached: bool = True
    is_draining: bool = False
    inbox: deque[RouterMessage] = field(default_factory=deque)
    outbox: deque[OutputRecord] = field(default_factory=deque)
    jobs: dict[RequestKey, Job] = field(default_factory=dict)
    ended: set[RequestKey] = field(default_factory=set)
    # Every key that it was ever told of.
    seen: list[RequestKey] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"worker {self.identity}"

    # --- the router's messages ---

    def read(self) -> None:
        """Take one message."""
        match self.inbox.popleft():
            case Submit() as submit:
                self._accept(submit)
            case Cancel(key):
                self.jobs.pop(key, None)
                self.ended.add(key)
            case Move() as move:
                job = self.jobs.get(move.key)
                if job is not None and job.state is JobState.RUNNING:
                    job.state, job.move = JobState.MOVING, move
            case Stay(key):
                job = self.jobs.get(key)
                if job is None:
                    self._say(key, error=UnknownRequest("it moved out, or ended"))
                elif job.state is JobState.MOVING:
                    job.state, job.move = JobState.RUNNING, None

    def _accept(self, submit: Submit) -> None:
        emitted = submit.output_tokens
        assert emitted == list(self.answer(submit)[: len(emitted)]), "resumed with what was emitted"
        assert len(emitted) < len(self.answer(submit)), "a whole answer is not submitted again"
        assert submit.time_left_s > 0
        self.seen.append(submit.key)
        if submit.key in self.ended:
            return
        if self.is_draining:
            self.ended.add(submit.key)
            self._say(submit.key, error=NoWorker("draining"))
            return
        self.jobs[submit.key] = Job(submit, len(emitted))

    def attach_again(self, live: Sequence[LiveRequest]) -> None:
        """A new stream: what the router does not name is aborted, the rest said again."""
        self.outbox.clear()
        self.is_attached = True
        named = {request.key: request.next_position for request in live}
        for key in self.jobs.keys() - named.keys():
            self._end(key)
        for key, position in named.items():
            job = self.jobs.get(key)
            if job is None:
                # Its submit may still lie in the inbox, and counts then.
                self._say(key, error=UnknownRequest("never heard of it, or it ended"))
            elif job.state is JobState.LEASED:
                self._say(key, len(job.submit.output_tokens), job, prefill=PREFILLED)
            elif job.num_known > position:
                self._say(key, position, job, handover=HANDED_OVER)

    # --- work ---

    def work(self, key: RequestKey, count: int = 1, *, splits_finish: bool = False) -> None:
        """One step of a job; nothing where it has to wait."""
        job = self.jobs[key]
        if isinstance(job.submit.job, PrefillJob):
            if job.state is JobState.WAITING:
                job.state = JobState.LEASED
                self._grow(job, 1, prefill=PREFILLED)
                assert job.submit.job.reader is not None or key in self.ended
        elif job.state is JobState.WAITING:
            self._start(job, job.submit.job)
        elif job.state is JobState.RUNNING:
            self._grow(job, count, splits_finish=splits_finish)
        elif job.state is JobState.MOVING:
            self._resume_without_reader(job)

    def fail(self, key: RequestKey, error: BatonError) -> None:
        """The job ends here, with that error."""
        self._end(key)
        self._say(key, error=error)

    def answer(self, submit: Submit) -> Sequence[int]:
        return self.answers[submit.prompt_tokens[0]]

    def _start(self, job: Job, wanted: DecodeJob) -> None:
        if wanted.owner is None:
            job.state = JobState.RUNNING
            self._grow(job, 1, prefill=PREFILLED)
            return
        owner = self.peers.get(wanted.owner)
        if owner is None:
            self.fail(job.key, PeerLost("the owner is gone"))
            return
        lease = owner._lease_of(job.key)
        if lease is None:
            if job.key in owner.ended:
                self.fail(job.key, LeaseLost("the owner gave it up"))
            return
        told = lease.move.grant_key if lease.move is not None else _secret(lease.submit)
        assert told == wanted.grant_key, "owner and reader were told different secrets"
        owner._end(lease.key)
        job.state, job.num_known = JobState.RUNNING, lease.num_known
        self._say(job.key, len(job.submit.output_tokens), job, handover=HANDED_OVER)

    def _lease_of(self, key: RequestKey) -> Job | None:
        """The job whose KV may be read as `key`."""
        for job in self.jobs.values():
            if job.move is not None and job.move.to == key:
                return job
            if job.key == key and job.state is JobState.LEASED:
                return job
        return None

    def _resume_without_reader(self, job: Job) -> None:
        """A lease that ends without a join leaves the source with its sequence."""
        assert job.move is not None, "it moves"
        reader = self.peers.get(job.move.reader)
        if reader is None or job.move.to in reader.ended:
            job.state, job.move = JobState.RUNNING, None

    def _grow(self, job: Job, count: int, *, splits_finish: bool = False, **rest: object) -> None:
        """`count` further tokens, or fewer where the answer ends."""
        answer = self.answer(job.submit)
        start = job.num_known
        job.num_known = min(start + count, len(answer))
        finish = None
        if job.num_known == len(answer):
            finish = FinishReason.STOP if answer[-1] == END_TOKEN else FinishReason.LENGTH
            self._end(job.key)
        if finish is not None and splits_finish:
            self._say(job.key, start, job, **rest)
            self._say(job.key, job.num_known, job, finish=finish)
        else:
            self._say(job.key, start, job, finish=finish, **rest)

    def _end(self, key: RequestKey) -> None:
        self.jobs.pop(key, None)
        self.ended.add(key)

    def _say(
        self, key: RequestKey, position: int = 0, job: Job | None = None, **rest: object
    ) -> None:
        """A record with the job's tokens from `position` on."""
        tokens = tuple(self.answer(job.submit)[position : job.num_known]) if job else ()
        record = OutputRecord(key=key, position=position, tokens=tokens, **rest)  # type: ignore[arg-type]
        if self.is_attached:
            self.outbox.append(record)

    def keys_in_the_end(self) -> set[RequestKey]:
        """What it would work on if it read its whole inbox now."""
        keys = set(self.jobs)
        for message in self.inbox:
            if isinstance(message, Submit) and message.key not in self.ended:
                keys.add(message.key)
            elif isinstance(message, Cancel):
                keys.discard(message.key)
        return keys


def _secret(submit: Submit) -> bytes:
    return submit.job.grant_key
