"""The source's side of a move: a running sequence stops, and another worker pulls its KV.

The source stops between two steps of the sequence and leases all that it has computed. When the
target releases the lease because it has joined, the request is over here; when the lease ends in
any other way, or the router says stay, the sequence runs again, as if nothing had been.
"""

import logging
from collections.abc import Callable

from baton.common.errors import BatonError, Cancelled
from baton.common.failpoints import reach
from baton.common.ids import RequestKey
from baton.common.messages import LeaseRelease, Move
from baton.decode_worker.request import DecodeRequest, DecodeState
from baton.decode_worker.scheduler import DecodeScheduler
from baton.engine.engine import Engine
from baton.kvtransfer.ledger import LeaseEnd
from baton.kvtransfer.owner import LeaseOwner, Offer
from baton.worker.integrity import Integrity

log = logging.getLogger(__name__)


class Moves:
    """Requests that are leaving, by the key of the attempt that they become. Engine thread only."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        requests: dict[RequestKey, DecodeRequest],
        owner: LeaseOwner,
        integrity: Integrity,
        *,
        end: Callable[[DecodeRequest, BatonError | None], None],
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._requests = requests
        self._owner = owner
        self._integrity = integrity
        self._end = end
        self._moving: dict[RequestKey, DecodeRequest] = {}
        # Moves that begin once the sequence is in no step.
        self._asked: dict[RequestKey, DecodeRequest] = {}

    def ask(self, move: Move) -> None:
        """The router wants the request elsewhere. What does not run here cannot be moved."""
        request = self._requests.get(move.key)
        if request is None or request.state is not DecodeState.RUNNING or request.move is not None:
            log.info("no move of %s: it does not run here", move.key)
            return
        request.move = move
        self._asked[request.key] = request

    def begin(self) -> None:
        """Lease what was asked for and has come to rest."""
        asked, self._asked = self._asked, {}
        for request in asked.values():
            assert request.move is not None, "what ended or stays was taken off the list"
            if request.state is not DecodeState.RUNNING:
                # Preempted meanwhile: it holds nothing that could be pulled.
                request.move = None
            elif request.sequence.num_in_flight or request.sequence.num_pending > 1:
                # In a step, or computed again after a preemption: it goes once only its newest
                # token is left.
                self._asked[request.key] = request
            else:
                self._lease(request, request.move)

    def stay(self, key: RequestKey) -> bool:
        """The router's word that the move came to nothing; False: the request is not here."""
        request = self._requests.get(key)
        if request is None:
            return False
        if request.move is not None:
            self._owner.end(request.move.to, Cancelled("the move was called off"))
            self._run_again(request)
        return True

    def lease_ended(self, key: RequestKey, how: LeaseEnd, release: LeaseRelease | None) -> None:
        """The lease of a move ended from outside."""
        request = self._moving[key]
        if release is not None and release.bad_slots:
            self._integrity.drop(request.key, release.bad_slots)
        if how is LeaseEnd.JOINED:
            self._end(request, None)
        else:
            log.info("the move of %s ended: %s", request.key, how.value)
            self._run_again(request)

    def forget(self, request: DecodeRequest) -> None:
        """The request is over here: nothing of it can be pulled any more. Idempotent."""
        self._asked.pop(request.key, None)
        if request.move is not None:
            self._moving.pop(request.move.to, None)
            self._owner.end(request.move.to, Cancelled("the request ended on its source"))
            request.move = None

    def _lease(self, request: DecodeRequest, move: Move) -> None:
        sequence = request.sequence
        assert sequence.num_pending == 1, "a running sequence has one token that was not fed"
        slots = sequence.slots[: self._engine.kv.num_blocks(sequence.num_computed)]
        request.state = DecodeState.MOVING
        self._scheduler.suspend(request.key)
        self._moving[move.to] = request
        self._owner.offer(
            Offer(
                key=move.to,
                reader=move.reader,
                grant_key=move.grant_key,
                router_id=request.router_id,
                request_id=request.request_id,
                why="move",
            )
        )
        self._owner.open(move.to, slots, kv_tokens=sequence.num_computed, cached_tokens=0)
        self._owner.complete(
            move.to,
            output_position=0,
            output_tokens=sequence.tokens[sequence.prompt_len :],
            digests=self._integrity.digests(slots),
        )
        reach("move.source_stopped")

    def _run_again(self, request: DecodeRequest) -> None:
        assert request.move is not None, "only what moves can come back"
        self._asked.pop(request.key, None)
        self._moving.pop(request.move.to, None)
        request.move = None
        if request.state is DecodeState.MOVING:
            request.state = DecodeState.RUNNING
            self._scheduler.unsuspend(request.key)
            self._disown_last_block(request)

    def _disown_last_block(self, request: DecodeRequest) -> None:
        """The next step writes into a block that the target was told: its word is raised first."""
        sequence = request.sequence
        if sequence.num_computed % self._engine.block_size:
            last = sequence.slots[self._engine.kv.num_blocks(sequence.num_computed) - 1]
            self._engine.generations.raise_words([last])
