"""Two prefill and two decode cores, joined by hand: who steps, what arrives and what breaks is said
from outside, one thing at a time.

Pools are so small that two prompts fill them. A router of a few lines submits, emits each position
once and compares it with the oracle, cancels, retries and moves as the real one does.
"""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from sim.clients import answer_to
from sim.lives import DECODES, PREFILLS, HeldReader, Life

from baton.common.clock import ManualClock
from baton.common.errors import DeadlineExceeded, InternalError, PeerLost
from baton.common.ids import RequestKey, RouterId, TransferId, WorkerIdentity
from baton.common.messages import (
    Cancel,
    DecodeJob,
    LeaseStatus,
    Move,
    OutputRecord,
    PrefillJob,
    Stay,
    Submit,
)
from baton.common.sampling import SamplingParams
from baton.kvtransfer.events import (
    FromOwner,
    FromReader,
    LinkClosed,
    LinkOpened,
    PeerConnected,
    PeerDisconnected,
)
from baton.kvtransfer.link_codec import ReaderMessage
from baton.kvtransfer.transport.base import ArenaDescriptor
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.worker.core import Effects, Event, FromRouter

NAMES = PREFILLS + DECODES
ROUTER = RouterId("router")
GRANT = b"the grant of every test"
DEADLINE_S = 3600.0


@dataclass(eq=False)
class Link:
    """From a reader's life to an owner's; what is under way waits in two queues."""

    to_owner: deque[ReaderMessage] = field(default_factory=deque)
    to_reader: deque[LeaseStatus] = field(default_factory=deque)


@dataclass(eq=False)
class Request:
    """`key` is the attempt that counts; `moving_to` a higher one that has not won."""

    transfer: TransferId
    prompt: list[int]
    sampling: SamplingParams
    answer: list[int]
    key: RequestKey
    prefill: str = ""
    decode: str = ""
    tokens: list[int] = field(default_factory=list)
    has_joined: bool = False
    # One of its workers never heard of it.
    is_half: bool = False
    has_ended: bool = False
    has_failed: bool = False
    moving_to: tuple[RequestKey, str] | None = None
    highest: int = 1


class LeaseWorld:
    def __init__(self, model: Path) -> None:
        self.clock = ManualClock(1000.0)
        self.requests: list[Request] = []
        self.lives: dict[str, Life] = {}
        self.cut: set[tuple[str, str]] = set()
        self._model = model
        self._fabric = MemoryFabric()
        self._served: dict[str, tuple[MemoryTransport, ArenaDescriptor]] = {}
        self._links: dict[tuple[WorkerIdentity, WorkerIdentity], Link] = {}
        self._epoch = 0
        for name in NAMES:
            self.start(name)

    # --- workers ---

    def start(self, name: str) -> None:
        self._epoch += 1
        life = self.lives[name] = Life(name, self._epoch, self._model, self.clock)
        self._served[name] = life.serve(self._fabric)

    def crash_and_restart(self, name: str) -> None:
        """The router hears of it at once; its peers see their links break."""
        life = self.lives[name]
        self._served[name][0].close()
        life.core.close()
        for reader, owner in list(self._links):
            if life.identity in (reader, owner):
                self._break(reader, owner)
        self.start(name)
        for request in self.requests:
            is_needed = request.decode == name or (
                request.prefill == name and not request.has_joined
            )
            if request.moving_to is not None and request.moving_to[1] == name:
                self.fail_move(request)
            elif is_needed and not request.has_ended and not request.has_failed:
                self._fail(request)

    def step(self, name: str) -> None:
        life = self.lives[name]
        if life.is_frozen:
            return
        life.core.step()
        life.core.check_invariants()
        self._deliver(life, life.core.take_effects())

    def end_step(self, name: str) -> None:
        """A device works on while its process is frozen."""
        self.lives[name].device.run_next()

    def end_reads(self, name: str) -> None:
        for reader in self.lives[name].readers:
            reader.let_go()

    def take_control(self, name: str) -> None:
        life = self.lives[name]
        if life.control and not life.is_frozen:
            self._handle(life, FromRouter(ROUTER, life.control.popleft()))

    # --- links ---

    @property
    def links(self) -> list[tuple[str, str]]:
        return [(reader, owner) for reader in DECODES for owner in NAMES if reader != owner]

    def carry(self, reader: str, owner: str, *, to_owner: bool) -> None:
        """The oldest message of one direction arrives, unless its receiver is frozen."""
        ends = self.lives[reader], self.lives[owner]
        link = self._links.get((ends[0].identity, ends[1].identity))
        if link is None:
            return
        if to_owner and link.to_owner and not ends[1].is_frozen:
            self._handle(ends[1], FromReader(ends[0].identity, link.to_owner.popleft()))
        elif not to_owner and link.to_reader and not ends[0].is_frozen:
            self._handle(ends[0], FromOwner(ends[1].identity, link.to_reader.popleft()))

    def cut_link(self, reader: str, owner: str) -> None:
        self.cut.add((reader, owner))
        self._break(self.lives[reader].identity, self.lives[owner].identity)

    def restore_link(self, reader: str, owner: str) -> None:
        self.cut.discard((reader, owner))

    def _break(self, reader: WorkerIdentity, owner: WorkerIdentity) -> None:
        if self._links.pop((reader, owner), None) is None:
            return
        for life, event in (
            (self._life(owner), LinkClosed(reader)),
            (self._life(reader), PeerDisconnected(owner, PeerLost("the link broke"))),
        ):
            if life is not None:
                self._handle(life, event)

    def _dial(self, reader: Life, owner: WorkerIdentity) -> None:
        if (reader.identity, owner) in self._links:
            return
        names = reader.identity.worker_id, owner.worker_id
        life = self._life(owner)
        if life is None or names in self.cut or life.is_frozen:
            self._handle(reader, PeerDisconnected(owner, PeerLost("nobody answered")))
            return
        self._links[reader.identity, owner] = Link()
        transport, described = self._served[names[0]][0], self._served[names[1]][1]
        held = HeldReader(transport.connect(owner, described))
        reader.readers.append(held)
        self._handle(life, LinkOpened(reader.identity))
        self._handle(reader, PeerConnected(owner, held))

    # --- the router ---

    def submit(self, prefill: str, decode: str, prompt: list[int], max_tokens: int) -> Request:
        transfer = TransferId(len(self.requests).to_bytes(16, "big"))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(
            transfer, prompt, sampling, answer_to(prompt, sampling), RequestKey(transfer, 0)
        )
        self.requests.append(request)
        self.begin(request, prefill, decode)
        return request

    def begin(self, request: Request, prefill: str, decode: str, *, lost: str = "") -> None:
        """An attempt; `lost` names a worker whose submit never arrives."""
        request.key = self._next_key(request)
        request.prefill, request.decode = prefill, decode
        request.has_failed = request.has_joined = False
        request.is_half = bool(lost)
        left = request.sampling.max_tokens - len(request.tokens)
        reader = self.lives[decode].identity if left > 1 else None
        jobs: dict[str, PrefillJob | DecodeJob] = {prefill: PrefillJob(reader, GRANT)}
        if reader is not None:
            jobs[decode] = DecodeJob(self.lives[prefill].identity, prefill, GRANT)
        for name, job in jobs.items():
            if name != lost:
                self.lives[name].control.append(self._submit(request, request.key, job))

    def cancel(self, request: Request) -> None:
        request.has_ended = True
        self._forget(request)

    def move(self, request: Request) -> None:
        """To the other decode worker, as a drain does."""
        target = next(name for name in DECODES if name != request.decode)
        to = self._next_key(request)
        request.moving_to = to, target
        source, reader = self.lives[request.decode], self.lives[target]
        source.control.append(Move(request.key, to, reader.identity, GRANT))
        job = DecodeJob(source.identity, request.decode, GRANT)
        reader.control.append(self._submit(request, to, job))

    def fail_move(self, request: Request) -> None:
        """The source decodes on."""
        assert request.moving_to is not None, "only a move can fail"
        to, target = request.moving_to
        request.moving_to = None
        self.lives[target].control.append(Cancel(to))
        self.lives[request.decode].control.append(Stay(request.key))

    def _next_key(self, request: Request) -> RequestKey:
        attempt = request.highest
        request.highest += 1
        return RequestKey(request.transfer, attempt)

    def _submit(self, request: Request, key: RequestKey, job: PrefillJob | DecodeJob) -> Submit:
        return Submit(
            key=key,
            prompt_tokens=request.prompt,
            output_tokens=list(request.tokens),
            sampling=request.sampling,
            tenant_key=b"",
            age_s=0.0,
            time_left_s=DEADLINE_S,
            job=job,
        )

    def _record(self, sender: str, record: OutputRecord) -> None:
        request = next(r for r in self.requests if r.transfer == record.key.transfer_id)
        if request.has_ended or request.has_failed:
            return
        moving_to = request.moving_to
        if moving_to is not None and moving_to == (record.key, sender):
            if record.error is not None:
                self.fail_move(request)
                return
            self.lives[request.decode].control.append(Cancel(request.key))
            request.key, request.decode, request.moving_to = record.key, sender, None
        if record.key != request.key:
            return
        if record.error is not None:
            assert not isinstance(record.error, InternalError | DeadlineExceeded), record.error
            if not (request.has_joined and sender == request.prefill):
                self._fail(request)
            return
        request.has_joined |= record.handover is not None
        self._emit(request, record)

    def _emit(self, request: Request, record: OutputRecord) -> None:
        assert record.position <= len(request.tokens), "a position was left out"
        request.tokens += record.tokens[len(request.tokens) - record.position :]
        expected = request.answer[: len(request.tokens)]
        assert request.tokens == expected, f"{request.tokens} where the oracle says {expected}"
        if record.finish is not None:
            assert request.tokens == request.answer, "an answer ends where the oracle's does"
            request.has_ended = True
            self._forget(request)

    def _fail(self, request: Request) -> None:
        request.has_failed = True
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """Nobody works on this attempt any more."""
        if request.moving_to is not None:
            to, target = request.moving_to
            request.moving_to = None
            self.lives[target].control.append(Cancel(to))
        for name in {request.prefill, request.decode}:
            self.lives[name].control.append(Cancel(request.key))

    # --- inside ---

    def _life(self, identity: WorkerIdentity) -> Life | None:
        life = self.lives[identity.worker_id]
        return life if life.identity == identity else None

    def _handle(self, life: Life, event: Event) -> None:
        life.core.handle(event)

    def _deliver(self, life: Life, effects: Effects) -> None:
        for record in effects.records.get(ROUTER, []):
            self._record(life.identity.worker_id, record)
        for reader, status in effects.statuses:
            link = self._links.get((reader, life.identity))
            if link is not None:
                link.to_reader.append(status)
        for owner in effects.hangups:
            self._break(life.identity, owner)
        for owner, _ in effects.dials:
            self._dial(life, owner)
        for owner, message in effects.messages:
            link = self._links.get((life.identity, owner))
            if link is not None:
                link.to_owner.append(message)
