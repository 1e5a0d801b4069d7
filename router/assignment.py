"""Who works on a request: begins and leaves attempts and moves, and keeps count of both."""

from collections.abc import Callable

from baton.common.clock import Clock
from baton.common.errors import ExceedsKvCapacity, NoCapacity
from baton.common.ids import RequestKey, WorkerIdentity
from baton.common.messages import Cancel, DecodeJob, Move, PrefillJob, RouterMessage, Stay, Submit
from baton.common.randomness import Randomness
from baton.kvtransfer.grant import grant_key
from baton.router.attempt import Attempt, RunningMove
from baton.router.journal import Journal, JournalEntry
from baton.router.placement import Candidate, Choice, Placement

Send = tuple[WorkerIdentity, RouterMessage]


class Assigner:
    """Places requests and tells workers what to begin and what to leave.

    Every worker that was told of an attempt is told of its end, unless it said so itself; the
    journal's index holds who works on what at any time.
    """

    def __init__(
        self,
        journal: Journal,
        placement: Placement,
        *,
        candidates: Callable[[str], list[Candidate]],
        link_address: Callable[[WorkerIdentity], str],
        clock: Clock,
        randomness: Randomness,
    ) -> None:
        self._journal = journal
        self._placement = placement
        self._candidates = candidates
        self._link_address = link_address
        self._clock = clock
        self._randomness = randomness
        self._sends: list[Send] = []

    def take_sends(self) -> list[Send]:
        sends, self._sends = self._sends, []
        return sends

    # --- attempts ---

    def begin(self, entry: JournalEntry) -> Attempt:
        """Place a request that no worker has, and submit it.

        Raises NoWorker or ExceedsKvCapacity; then nothing has changed.
        """
        now = self._clock.monotonic()
        history = entry.history
        candidates = self._candidates(entry.spec.model)
        choice = self._placement.choose(
            candidates,
            prompt_len=len(entry.spec.prompt_tokens) + entry.num_emitted,
            max_tokens=entry.spec.sampling.max_tokens - entry.num_emitted,
            excluded=history.excluded_at(now),
            excluded_pairs=frozenset(history.excluded_pairs),
        )
        attempt = Attempt(
            key=entry.next_key(),
            prefill=choice.prefill,
            decode=choice.decode,
            fingerprint=_fingerprint(candidates, choice),
            grant_key=grant_key(self._randomness),
            first_position=entry.num_emitted,
        )
        entry.begin(attempt, now)
        if attempt.prefill is not None:
            job = PrefillJob(attempt.decode, attempt.grant_key)
            self._submit(entry, attempt.key, attempt.prefill, job, now)
        if attempt.decode is not None:
            self._submit(entry, attempt.key, attempt.decode, self._decode_job(attempt), now)
        return attempt

    def leave(self, entry: JournalEntry, told: tuple[WorkerIdentity, ...] = ()) -> None:
        """Nobody works on the entry any more; those who do not know it yet are told."""
        if entry.move is not None:
            self.end_move(entry, told)
        attempt = entry.attempt
        if attempt is None:
            return
        for worker in attempt.workers:
            self._journal.release(entry, worker)
            if worker not in told:
                self._send(worker, Cancel(attempt.key))

    def prefill_is_done(self, entry: JournalEntry) -> None:
        """The decode worker has joined: the prefill worker is nothing to the entry."""
        if entry.attempt is not None and entry.attempt.prefill is not None:
            self._journal.release(entry, entry.attempt.prefill)

    # --- moves ---

    def begin_move(self, entry: JournalEntry, ends_at: float) -> bool:
        """Send a running request on its way to another worker; False if there is none."""
        attempt = entry.current
        source = attempt.decoder
        target = self._move_target(entry, attempt, source)
        if target is None:
            return False
        moved = Attempt(
            key=entry.next_key(),
            prefill=None,
            decode=target,
            source=source,
            fingerprint=attempt.fingerprint,
            grant_key=grant_key(self._randomness),
            first_position=entry.num_emitted,
        )
        entry.move = RunningMove(attempt=moved, ends_at=ends_at)
        self._send(source, Move(attempt.key, moved.key, target, moved.grant_key))
        now = self._clock.monotonic()
        self._submit(entry, moved.key, target, self._decode_job(moved), now)
        return True

    def finish_move(self, entry: JournalEntry) -> None:
        """The target has joined: its attempt is the current one from now on."""
        move, attempt = entry.move, entry.current
        assert move is not None, "there is a move to finish"
        self._journal.release(entry, attempt.decoder)
        self._send(attempt.decoder, Cancel(attempt.key))
        entry.attempt, entry.move = move.attempt, None

    def end_move(self, entry: JournalEntry, told: tuple[WorkerIdentity, ...] = ()) -> None:
        """The move came to nothing; the target forgets it."""
        move = entry.move
        assert move is not None, "there is a move to end"
        self._journal.release(entry, move.target)
        if move.target not in told:
            self._send(move.target, Cancel(move.attempt.key))
        entry.move = None

    def stay(self, entry: JournalEntry) -> None:
        """The source of a move that ended decodes on."""
        self._send(entry.current.decoder, Stay(entry.current.key))

    def lose_source(self, entry: JournalEntry) -> None:
        """The source of a running move has the request no longer."""
        self._journal.release(entry, entry.current.decoder)

    # --- inside ---

    def _send(self, worker: WorkerIdentity, message: RouterMessage) -> None:
        self._sends.append((worker, message))

    def _move_target(
        self, entry: JournalEntry, attempt: Attempt, source: WorkerIdentity
    ) -> WorkerIdentity | None:
        """Another worker that decodes and stores KV alike; one that failed already comes last."""
        history = entry.history
        # Without prefill workers among them, placement picks one that decodes alone.
        candidates = [
            worker
            for worker in self._candidates(entry.spec.model)
            if worker.role.decodes
            and worker.identity != source
            and worker.fingerprint == attempt.fingerprint
            and (source, worker.identity) not in history.excluded_pairs
        ]
        excluded = history.excluded_at(self._clock.monotonic())
        for shunned in (excluded.union(history.failed_targets), excluded):
            try:
                return self._placement.choose(
                    candidates,
                    prompt_len=len(entry.spec.prompt_tokens) + entry.num_emitted,
                    max_tokens=entry.spec.sampling.max_tokens - entry.num_emitted,
                    excluded=shunned,
                ).decode
            except (NoCapacity, ExceedsKvCapacity):
                continue
        return None

    def _decode_job(self, attempt: Attempt) -> DecodeJob:
        owner = attempt.prefill or attempt.source
        if owner is None:
            return DecodeJob(None)
        return DecodeJob(owner, self._link_address(owner), attempt.grant_key)

    def _submit(
        self,
        entry: JournalEntry,
        key: RequestKey,
        worker: WorkerIdentity,
        job: PrefillJob | DecodeJob,
        now: float,
    ) -> None:
        spec = entry.spec
        age_s = now - entry.accepted_at
        submit = Submit(
            key=key,
            prompt_tokens=spec.prompt_tokens,
            output_tokens=entry.tokens.tolist(),
            sampling=spec.sampling,
            tenant_key=spec.tenant_key,
            age_s=age_s,
            time_left_s=spec.timeout_s - age_s,
            job=job,
            request_id=spec.request_id,
        )
        self._journal.hold(entry, worker)
        self._send(worker, submit)


def _fingerprint(candidates: list[Candidate], choice: Choice) -> str:
    chosen = choice.decode or choice.prefill
    return next(worker.fingerprint for worker in candidates if worker.identity == chosen)
