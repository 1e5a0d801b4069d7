"""Sequences from their prompts to their ends on one engine, as long as it takes."""

from collections import deque
from collections.abc import Callable

from baton.common.sampling import FinishReason
from baton.engine.engine import STEP_DEADLINE_S, Engine
from baton.engine.finish import finish_reason
from baton.engine.sequence import Chunk, Sequence
from baton.engine.validation import kv_tokens

# Called with the index of the sequence and its newest token id, in the thread that generates.
OnToken = Callable[[int, int], None]


class Generation:
    """One batch of sequences: the queue, the running ones, and why each one ended.

    The simplest policy that is safe: first come first served, all blocks of a request reserved
    before it starts (so a started one always ends), every decode in every step, and prompts in
    chunks with what is left of the token budget.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: list[Sequence],
        max_num_batched_tokens: int,
        max_num_seqs: int,
        on_token: OnToken | None,
    ) -> None:
        self._engine = engine
        self._waiting = deque(sequences)
        self._running: list[Sequence] = []
        self._index = {sequence: index for index, sequence in enumerate(sequences)}
        self._reasons: dict[Sequence, FinishReason] = {}
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._on_token = on_token

    def run(self) -> list[FinishReason]:
        """Step until all have ended; no blocks stay reserved, whatever is raised on the way."""
        engine = self._engine
        try:
            while self._waiting or self._running:
                self._admit()
                while engine.can_launch and (chunks := self._plan()):
                    engine.launch(chunks)
                engine.wait(STEP_DEADLINE_S)
                self._collect()
        finally:
            # Also when all went well: a sequence may have ended while a row in vain was in flight.
            engine.abandon()
            for sequence in self._running:
                engine.kv.release(sequence)
        return [self._reasons[sequence] for sequence in self._index]

    def _admit(self) -> None:
        max_model_len = self._engine.model_config.max_model_len
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            num_tokens = kv_tokens(sequence.prompt_len, sequence.sampling, max_model_len)
            if not self._engine.kv.reserve(sequence, num_tokens, sequence.prompt_len - 1):
                break
            self._running.append(self._waiting.popleft())
        assert self._running or self._engine.in_flight, "a validated request fits an empty arena"

    def _plan(self) -> list[Chunk]:
        """Every decode, then prompts in order of arrival until the budget is used up."""
        ready = [
            each for each in self._running if each.num_pending and self._engine.can_continue(each)
        ]
        chunks = [Chunk(sequence, 1) for sequence in ready if sequence.num_pending == 1]
        budget = self._max_num_batched_tokens - len(chunks)
        for sequence in ready:
            if sequence.num_pending > 1 and budget > 0:
                chunk = Chunk(sequence, min(sequence.num_pending, budget))
                budget -= chunk.num_tokens
                chunks.append(chunk)
        return chunks

    def _collect(self) -> None:
        engine = self._engine
        outcome = engine.collect()
        assert outcome is not None, "a step that was waited for has ended"
        for sequence, token in outcome:
            engine.kv.publish(sequence, sequence.num_computed)
            if token is None:
                continue
            if self._on_token is not None:
                self._on_token(self._index[sequence], token)
            model = engine.model_config
            reason = finish_reason(sequence, model.eos_token_ids, model.max_model_len)
            if reason is not None:
                self._reasons[sequence] = reason
                engine.kv.release(sequence)
        self._running = [each for each in self._running if each not in self._reasons]
        engine.check(sequences=self._running)
