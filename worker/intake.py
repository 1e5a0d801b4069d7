"""What routers ask of a worker, alike in both roles: which requests it takes, knows and ends.

A request that ended is remembered for a while, also one that was never known: a cancel may overtake
its submit, and a submit may come twice.
"""

import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from baton.common.clock import Clock
from baton.common.errors import BatonError, Cancelled, WorkerLost
from baton.common.ids import RequestKey, RouterId
from baton.common.messages import OutputRecord, Submit
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
        self, limits: Limits, clock: Clock, *, end: Callable[[Request, BatonError], None]
    ) -> None:
        self.requests: dict[RequestKey, Request] = {}
        self.is_draining = False
        self._limits = limits
        self._clock = clock
        self._end = end
        self._endings = Endings()

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
            has_ended=self._endings.has_ended(submit.key),
            is_draining=self.is_draining,
        )
        error = error or role_refusal
        if error is None:
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

    def abort_router(self, router_id: RouterId, *, keep: frozenset[RequestKey]) -> None:
        """End what this router does not name any more."""
        for request in list(self.requests.values()):
            if request.router_id == router_id and request.key not in keep:
                self._end(request, WorkerLost("the request's router is gone"))

    def forget(self, key: RequestKey) -> None:
        """The request is over: what is left of it is its ending."""
        del self.requests[key]
        self._remember(key)

    def has_ended(self, key: RequestKey) -> bool:
        return self._endings.has_ended(key)

    def _remember(self, key: RequestKey) -> None:
        self._endings.remember(key, now=self._clock.monotonic())
