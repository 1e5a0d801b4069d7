"""One model on one rank, assembled: weights, arena, pool, prefix cache, runner, sampler.

The engine runs what it is told to; which chunks make a step is the business of a scheduler. All of
it belongs to one thread.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from baton.common.block_hash import root_hash
from baton.common.clock import Clock, SystemClock
from baton.common.fingerprint import fingerprint
from baton.common.ids import Slot
from baton.common.progress import Progress, no_progress
from baton.common.randomness import Randomness
from baton.common.sampling import SamplingParams
from baton.engine.arena import Arena, GenerationTable
from baton.engine.assembly import assemble
from baton.engine.block_pool import BlockPool
from baton.engine.conservation import check_conservation
from baton.engine.device import Device, Ticket
from baton.engine.digests import DigestTable
from baton.engine.engine_config import EngineConfig
from baton.engine.finish import will_end
from baton.engine.kv_cache import KvCache
from baton.engine.model_config import load_model_config
from baton.engine.prefix_cache import PrefixCache, PrefixListener
from baton.engine.sequence import Chunk, Sequence
from baton.engine.step_recorder import Launch, StepRecorder

# For those who block on a step: far above the longest legal one, so that a hang has an end.
STEP_DEADLINE_S: Final = 600.0
# Of which the arena's size is told.
LONG_SEQUENCE: Final = 8192


@dataclass(frozen=True, slots=True)
class _Row:
    """A chunk as it was launched."""

    sequence: Sequence
    num_tokens: int
    is_last: bool
    num_releases: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step: its chunks, the slots that each may write, its tokens to come, and what the
    recorder is to know."""

    rows: tuple[_Row, ...]
    written: tuple[tuple[Slot, ...], ...]
    ticket: Ticket[list[int]]
    launch: Launch
    replayed: bool | None


class Engine:
    """A loaded model and its KV. `randomness` starts the generations, and paces the device of an
    oracle model; sampling is seeded.

    `device` runs the steps of a host and is closed with the engine: by default in place, for an
    oracle model late on a thread of its own. `progress` hears of what takes long, `clock` times the
    steps. Raises ModelError when the model folder cannot be used, ConfigError when the arena cannot
    be made.
    """

    def __init__(
        self,
        config: EngineConfig,
        randomness: Randomness,
        prefix_listener: PrefixListener | None = None,
        device: Device | None = None,
        progress: Progress = no_progress,
        clock: Clock | None = None,
    ) -> None:
        self.model_config = load_model_config(
            config.model, dtype=config.dtype, max_model_len=config.max_model_len
        )
        self.block_size = config.block_size
        machinery = assemble(config, self.model_config, randomness, device, progress)
        self.arena: Arena = machinery.arena
        self.runner = machinery.runner
        self._stepper = machinery.stepper
        # How many steps may be in flight.
        self.max_in_flight = machinery.max_in_flight
        self.num_blocks = self.arena.num_slots
        self.fingerprint_fields = self.model_config.fingerprint_fields(
            config.block_size, machinery.weights_id
        )
        self.fingerprint = fingerprint(self.fingerprint_fields)
        self.generations = GenerationTable(self.num_blocks, randomness)
        self.pool = BlockPool(self.num_blocks, self.generations)
        self.prefix = PrefixCache(self.pool, prefix_listener)
        self.digests = DigestTable(self.arena, self.generations) if config.kv_digest else None
        self.kv = KvCache(self.pool, self.prefix, config.block_size, self.digests)
        self.recorder = StepRecorder(clock or SystemClock())
        self._flights: deque[_Flight] = deque()
        self._check_invariants = config.check_invariants

    def arena_summary(self) -> str:
        """What the KV arena holds, for people who start a worker."""
        arena, tokens = self.arena, self.num_blocks * self.block_size
        at_once = tokens // LONG_SEQUENCE
        return (
            f"KV arena: {self.num_blocks:,} blocks of {self.block_size} tokens "
            f"({arena.block_bytes:,} bytes each), {arena.num_bytes / 2**30:.1f} GiB in all, "
            f"{tokens:,} tokens: {at_once:,} sequences of {LONG_SEQUENCE:,} at once"
        )

    def new_sequence(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        tenant_key: bytes,
        output: Iterable[int] = (),
    ) -> Sequence:
        """A sequence without blocks. Its blocks are shared within `tenant_key` alone.

        `output` are the tokens that an earlier attempt emitted. The boundary stays that of the
        prompt, so penalties, min_tokens, draws and finish reasons continue as if nothing happened.
        """
        return Sequence(
            tokens=[*prompt, *output],
            prompt_len=len(prompt),
            sampling=sampling,
            tenant_key=tenant_key,
            root=root_hash(tenant_key, self.fingerprint),
        )

    @property
    def in_flight(self) -> bool:
        """Whether a launched step has not been collected."""
        return bool(self._flights)

    @property
    def can_launch(self) -> bool:
        """Whether a step may be launched now, perhaps behind one that is in flight."""
        return len(self._flights) < self.max_in_flight

    @property
    def retiring(self) -> list[tuple[Slot, ...]]:
        """The slots that steps in flight may still write, per chunk, each with a pin of its own.

        What a cancelled sequence lets go of meanwhile stays out of every hand until `collect`.
        """
        return [slots for flight in self._flights for slots in flight.written]

    def can_continue(self, sequence: Sequence) -> bool:
        """Whether the next chunk of a sequence may be launched, as far as its tokens go.

        Not while a token is promised that will be its last for certain, or that must be known for
        the one after it. A token that may turn out to be its last costs a row in vain.
        """
        if sequence.num_promised == 0:
            return True
        return not sequence.sampling.has_penalties and not will_end(
            sequence, self.model_config.max_model_len
        )

    def launch(self, chunks: list[Chunk]) -> None:
        """Start a step that forwards the chunks, at least one; `collect` has its outcome.

        Until then no token is appended. The caller may release sequences of the step or extend
        their tables, and must not change their tokens.
        """
        assert self.can_launch, f"{self.max_in_flight} steps are in flight at most"
        written = tuple(_written_slots(chunk, self.block_size) for chunk in chunks)
        rows = tuple(
            _Row(chunk.sequence, chunk.num_tokens, chunk.is_last, chunk.sequence.num_releases)
            for chunk in chunks
        )
        launch = self.recorder.launched(chunks)
        ticket = self._stepper.launch(chunks)
        for slots in written:
            self.kv.pin(slots)
            if self.digests is not None:
                self.digests.forget(slots)
        num_sampled = 0
        for row in rows:
            row.sequence.launch(row.num_tokens, num_sampled if row.is_last else None)
            num_sampled += row.is_last
        self._flights.append(_Flight(rows, written, ticket, launch, self._stepper.replayed))

    def collect(self) -> list[tuple[Sequence, int | None]] | None:
        """The outcome of the oldest launched step: None while it runs, [] when there is none.

        Else each chunk's sequence with the token sampled after it, or None when the chunk was not
        its last, in chunk order. Their counters have moved and their tokens are appended: from now
        on what the step wrote may be published. Sequences released during the flight are left out
        and not changed. Raises what the step raised. Publishing, finishing and releasing are left
        to the caller.
        """
        if not self._flights:
            return []
        if not self._flights[0].ticket.poll():
            return None
        flight = self._land()
        self.recorder.ended(flight.launch, flight.replayed)
        sampled = iter(flight.ticket.result())
        outcome: list[tuple[Sequence, int | None]] = []
        for row in flight.rows:
            token = next(sampled) if row.is_last else None
            if row.sequence.num_releases == row.num_releases:
                row.sequence.land(row.num_tokens, token)
                outcome.append((row.sequence, token))
        return outcome

    def abandon(self) -> None:
        """Wait for all steps in flight and forget them, with whatever they raised. What they were
        to compute is pending again; tokens that they sampled are sampled again."""
        while self._flights:
            self.wait(STEP_DEADLINE_S)
            for row in self._land().rows:
                if row.sequence.num_releases == row.num_releases:
                    row.sequence.abandon()

    def _land(self) -> _Flight:
        flight = self._flights.popleft()
        for slots in flight.written:
            self.kv.unpin(reversed(slots))
        return flight

    def wait(self, timeout_s: float) -> None:
        """Block until the oldest launched step can be collected; InternalError when it takes
        longer."""
        if self._flights:
            self._flights[0].ticket.wait(timeout_s)

    def step(self, chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
        """Launch, wait and collect: each sequence that got a token, with the token."""
        assert not self._flights, "a step by itself follows no other"
        self.launch(chunks)
        self.wait(STEP_DEADLINE_S)
        outcome = self.collect()
        assert outcome is not None, "a step that was waited for has ended"
        return [(sequence, token) for sequence, token in outcome if token is not None]

    def close(self) -> None:
        """End the device; no step runs afterwards. Idempotent."""
        self._stepper.close()

    def check(
        self,
        *,
        sequences: Iterable[Sequence],
        leased: Iterable[Collection[Slot]] = (),
        receiving: Iterable[Collection[Slot]] = (),
        quarantined: Iterable[Collection[Slot]] = (),
    ) -> None:
        """`check_conservation` of this engine's slots, if its config asks for it."""
        if self._check_invariants:
            check_conservation(
                self.pool,
                self.prefix,
                sequences=sequences,
                leased=leased,
                receiving=receiving,
                quarantined=quarantined,
                retiring=self.retiring,
            )


def _written_slots(chunk: Chunk, block_size: int) -> tuple[Slot, ...]:
    """The slots that hold tokens of the chunk."""
    return tuple(chunk.sequence.slots[chunk.start // block_size : -(-chunk.end // block_size)])
