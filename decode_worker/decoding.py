"""The running batch: room for every sequence's next token, preemption when there is none, a step.

Memory is taken as sequences grow (vLLM's optimistic admission). When it runs out the youngest
sequence gives its blocks to the older ones and is computed again later; the oldest never does, so
the batch as a whole always gets on.
"""

import logging
from collections.abc import Set

from baton.common.clock import Clock
from baton.common.ids import RequestKey, RouterId
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine
from baton.worker.flight import Flight

log = logging.getLogger(__name__)


class Decoding:
    """Runs iterations over `requests`; engine thread only."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        requests: dict[RequestKey, DecodeRequest],
        *,
        paused_routers: Set[RouterId],
        max_num_batched_tokens: int,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._requests = requests
        self._paused_routers = paused_routers
        self._budget = max_num_batched_tokens
        self._flight: Flight[DecodeRequest] = Flight(engine, clock)
        self.num_preemptions = 0

    def has_room(self, request: DecodeRequest, *, num_tokens: int, limit_tokens: int) -> bool:
        """Whether blocks for `num_tokens` can be had and leave one for each admitted sequence."""
        kv = self._engine.kv
        headroom = self._scheduler.num_admitted
        # Alone, a sequence needs no room but its own: it fits the pool, or was refused.
        return kv.fits(request.sequence, num_tokens + headroom * kv.block_size, limit_tokens)

    @property
    def is_runnable(self) -> bool:
        """Whether a launch would find something to do."""
        return any(self._runs(self._requests[key]) for key in self._scheduler.plan())

    def launch(self) -> None:
        """Start the next iteration, if there is one to run, behind the one that runs."""
        self._flight.launch(self._rows())

    def collect(self) -> list[DecodeRequest]:
        """The sequences that have a new token, once the oldest iteration has ended."""
        return [landed.request for landed in self._flight.collect() if landed.is_sampled]

    def _runs(self, request: DecodeRequest) -> bool:
        """A router that does not read its stream pauses what is its own, and nothing else.

        What is about to move comes to rest, with its newest token known.
        """
        sequence = request.sequence
        return (
            request.state is DecodeState.RUNNING
            and request.router_id not in self._paused_routers
            and sequence.num_pending > 0
            and self._engine.can_continue(sequence)
            and (request.move is None or sequence.num_pending > 1)
        )

    def _rows(self) -> list[tuple[DecodeRequest, int]]:
        """How many tokens of every running sequence that has room for them, oldest first."""
        rows: list[tuple[DecodeRequest, int]] = []
        requests = [self._requests[key] for key in self._scheduler.plan()]
        requests = [request for request in requests if self._runs(request)]
        # Prompts that are computed here take what decodes leave, so that they stall nobody.
        num_decodes = sum(request.sequence.num_pending == 1 for request in requests)
        left = max(1, self._budget - num_decodes)
        for request in requests:
            num_tokens = min(left, request.sequence.num_pending)
            if request.sequence.num_pending == 1:
                num_tokens = 1
            else:
                left -= num_tokens
            # A victim of an older one runs no more.
            if num_tokens == 0 or request.state is not DecodeState.RUNNING:
                continue
            if self._make_room(request, request.sequence.num_launched + num_tokens):
                rows.append((request, num_tokens))
        return rows

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
        request.state = DecodeState.WAITING
        self._scheduler.preempt(request.key, accepted_at=request.accepted_at)
