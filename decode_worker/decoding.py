"""The running batch: room for every sequence's next token, preemption when there is none, a step.

Memory is taken as sequences grow (vLLM's optimistic admission). When it runs out the youngest
sequence gives its blocks to the older ones and is computed again later; the oldest never does, so
the batch as a whole always gets on.
"""

import logging

from baton.common.ids import RequestKey
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine
from baton.engine.sequence import Chunk

log = logging.getLogger(__name__)


class Decoding:
    """Runs iterations over `requests`; engine thread only."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        requests: dict[RequestKey, DecodeRequest],
        *,
        max_num_batched_tokens: int,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._requests = requests
        self._budget = max_num_batched_tokens
        self.num_preemptions = 0

    def has_room(self, request: DecodeRequest, *, num_tokens: int, limit_tokens: int) -> bool:
        """Whether blocks for `num_tokens` can be had and leave one for each admitted sequence."""
        kv = self._engine.kv
        headroom = self._scheduler.num_admitted
        # Alone, a sequence needs no room but its own: it fits the pool, or was refused.
        return kv.fits(request.sequence, num_tokens + headroom * kv.block_size, limit_tokens)

    def step(self) -> list[tuple[DecodeRequest, int]]:
        """One iteration; the sequences that have a new token, with it."""
        chunks = self._chunks()
        if not chunks:
            return []
        by_sequence = {self._requests[key].sequence: self._requests[key] for key in chunks}
        sampled = self._engine.step(list(chunks.values()))
        return [(by_sequence[sequence], token) for sequence, token in sampled]

    def _chunks(self) -> dict[RequestKey, Chunk]:
        """The next tokens of every running sequence that has room for them, oldest first."""
        chunks: dict[RequestKey, Chunk] = {}
        left = self._budget
        for key in self._scheduler.plan():
            request = self._requests[key]
            if request.state is not DecodeState.RUNNING:
                continue
            # More than one token is pending only while a preempted sequence is computed again.
            num_tokens = max(1, min(left, request.sequence.num_pending))
            if self._make_room(request, request.sequence.num_computed + num_tokens):
                chunks[key] = Chunk(request.sequence, num_tokens)
                left -= num_tokens
        return chunks

    def _make_room(self, request: DecodeRequest, num_tokens: int) -> bool:
        """Grow the sequence's table, at the cost of younger ones; False if it has to wait."""
        while not self._engine.kv.grow(request.sequence, num_tokens):
            victim = self._scheduler.youngest()
            if victim == request.key and self._scheduler.num_running == 1:
                # Pulls hold the rest; they join soon and are younger.
                return False
            self._preempt(self._requests[victim])
            if victim == request.key:
                return False
        return True

    def _preempt(self, request: DecodeRequest) -> None:
        log.info("preempting %s: the KV arena is full", request.key)
        self.num_preemptions += 1
        self._engine.kv.publish(request.sequence, request.sequence.num_computed)
        self._engine.kv.release(request.sequence)
        request.state = DecodeState.PREEMPTED
        self._scheduler.preempt(request.key, accepted_at=request.accepted_at)
