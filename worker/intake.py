"""What routers ask of a worker, alike in all roles: which requests it takes, knows and ends.

A request that ended is remembered for a while, also one that was never known: a cancel may overtake
its submit, and a submit may come twice.
"""

import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from baton.common.clock import Clock
from baton.common.errors import BatonError, Cancelled, UnknownRequest, WorkerLost
from baton.common.ids import RequestKey, RouterId, TransferId
from baton.common.messages import LiveRequest, OutputRecord, Submit
from baton.common.timing import Timing
from baton.kvtransfer.endings import Endings
from baton.worker.admission import Limits, refusal
from baton.worker.core import Effects

log = logging.getLogger(__name__)


class Taken(Protocol):
    """What a role's own request must tell."""

    @property
    def key(self) -> RequestKey: ...

    @property
    def router_id(self) -> RouterId: ...


Request = TypeVar("Request", bound=Taken)


class Intake(Generic[Request]):
    """The requests of a worker. `end` lets go of one and calls `forget` for it."""

    def __init__(
        self,
        limits: Limits,
        clock: Clock,
        timing: Timing,
        *,
        end: Callable[[Request, BatonError], None],
    ) -> None:
        self.requests: dict[RequestKey, Request] = {}
        self.is_draining = False
        self.endings = Endings(timing.lease_term_s)
        self.paused_routers: set[RouterId] = set()
        self._limits = limits
        self._clock = clock
        self._end = end
        # The live attempt of each transfer, the highest where a move has two of them here.
        self._attempts: dict[TransferId, int] = {}

    def takes(
        self,
        router_id: RouterId,
        submit: Submit,
        effects: Effects,
        *,
        kv_tokens: int,
        role_refusal: BatonError | None,
    ) -> bool:
        """Whether the role is to make a request of this; if not, the router has its answer.

        `kv_tokens` is what the request's blocks must hold here, `role_refusal` what the role itself
        has against the job.
        """
        if submit.key in self.requests:
            log.warning("request %s was submitted twice; the first one stays", submit.key)
            return False
        error = refusal(
            submit,
            self._limits,
            kv_tokens=kv_tokens,
            num_requests=len(self.requests),
            has_ended=self._is_over(submit.key),
            is_draining=self.is_draining,
        )
        error = error or role_refusal
        if error is None:
            self._attempts[submit.key.transfer_id] = submit.key.attempt
            return True
        self._remember(submit.key)
        effects.record(router_id, OutputRecord(key=submit.key, error=error))
        return False

    def cancel(self, key: RequestKey) -> None:
        request = self.requests.get(key)
        if request is None:
            self._remember(key)
        else:
            self._end(request, Cancelled("the router cancelled the request"))

    def router_attached(
        self, router_id: RouterId, live: tuple[LiveRequest, ...], effects: Effects
    ) -> list[tuple[Request, int]]:
        """A router's new stream: the requests that go on, each with its next output position.

        What an older stream was to carry is dropped, since the positions say what is missing. Live
        requests that are not here are answered, and what the router does not name is ended.
        """
        effects.drop_records(router_id)
        self.paused_routers.discard(router_id)
        known = [
            (self.requests[each.key], each.next_position)
            for each in live
            if each.key in self.requests
        ]
        self.abort_router(router_id, keep=frozenset(each.key for each in live))
        for each in live:
            if each.key not in self.requests:
                unknown = UnknownRequest("this worker does not know the request")
                effects.record(router_id, OutputRecord(key=each.key, error=unknown))
        return known

    def abort_router(self, router_id: RouterId, *, keep: frozenset[RequestKey]) -> None:
        """End what this router does not name any more."""
        for request in list(self.requests.values()):
            if request.router_id == router_id and request.key not in keep:
                self._end(request, WorkerLost("the request's router is gone"))
        if not keep:
            self.paused_routers.discard(router_id)

    def forget(self, key: RequestKey) -> None:
        """The request is over: what is left of it is its ending."""
        del self.requests[key]
        if self._attempts.get(key.transfer_id) == key.attempt:
            del self._attempts[key.transfer_id]
        self._remember(key)

    def _is_over(self, key: RequestKey) -> bool:
        """Whether this attempt ended, or a later one is here already."""
        return self.endings.has_ended(key) or key.attempt < self._attempts.get(key.transfer_id, 0)

    def _remember(self, key: RequestKey) -> None:
        self.endings.remember(key, now=self._clock.monotonic())
