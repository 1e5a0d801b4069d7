"""A fleet of one worker, and all that it reports."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from support.cluster import until
from support.control_streams import FAST, IDENTITY

from baton.common.clock import Clock, SystemClock
from baton.common.errors import BatonError
from baton.common.ids import RequestKey, RouterId, WorkerIdentity
from baton.common.messages import LiveRequest, OutputRecord, RouterHello, Submit
from baton.common.sampling import Role
from baton.common.timing import Timing
from baton.metadata.registry import Registry, WorkerRecord, connect
from baton.router.fleet import AttachedWorker, Fleet, FleetEvents, WorkerState


@dataclass
class Watched:
    """Stands for the dispatcher: what it was told, and what it waits for."""

    fleet: Fleet
    registry: Registry
    joined: list[AttachedWorker] = field(default_factory=list)
    gone: list[AttachedWorker] = field(default_factory=list)
    draining: list[AttachedWorker] = field(default_factory=list)
    tokens: dict[RequestKey, list[int]] = field(default_factory=dict)
    ended: set[RequestKey] = field(default_factory=set)
    errors: dict[RequestKey, BatonError] = field(default_factory=dict)
    # Records that repeat a token, or leave one out.
    misplaced: list[OutputRecord] = field(default_factory=list)

    def submit(self, submit: Submit) -> None:
        self.tokens[submit.key] = []
        self.fleet.send(IDENTITY, submit)

    @property
    def state(self) -> WorkerState | None:
        worker = self.fleet.get(IDENTITY)
        return None if worker is None else worker.state

    async def until_ready(self) -> None:
        await until(lambda: self.state is WorkerState.READY, "the worker is not ready")

    # --- what the fleet asks and tells ---

    def live_on(self, identity: WorkerIdentity) -> Sequence[LiveRequest]:
        assert identity == IDENTITY
        return [
            LiveRequest(key, len(tokens))
            for key, tokens in self.tokens.items()
            if key not in self.ended
        ]

    def take_gone(self, worker: AttachedWorker) -> None:
        """Its requests go on elsewhere."""
        self.gone.append(worker)
        self.ended.update(self.tokens)

    def take_records(self, _: AttachedWorker, records: list[OutputRecord]) -> None:
        for record in records:
            if record.error is not None:
                self.errors[record.key] = record.error
                self.ended.add(record.key)
                continue
            tokens = self.tokens[record.key]
            if record.position != len(tokens):
                self.misplaced.append(record)
            tokens.extend(record.tokens)
            if record.finish is not None:
                self.ended.add(record.key)


@asynccontextmanager
async def fleet_of(
    address: str,
    redis_url: str,
    cluster: str,
    *,
    timing: Timing = FAST,
    clock: Clock | None = None,
) -> AsyncIterator[Watched]:
    redis = connect(redis_url)
    registry = Registry(redis, cluster)
    await registry.heartbeat(
        WorkerRecord(
            identity=IDENTITY,
            role=Role.DECODE,
            address=address,
            fingerprint="f",
            model="m",
            state="ready",
        )
    )
    events = FleetEvents(
        joined=lambda worker: watched.joined.append(worker),
        records=lambda worker, records: watched.take_records(worker, records),
        gone=lambda worker: watched.take_gone(worker),
        draining=lambda worker: watched.draining.append(worker),
    )
    fleet = Fleet(
        registry,
        RouterHello(RouterId("r"), 1),
        events,
        clock or SystemClock(),
        timing=timing,
        live_requests=lambda identity: watched.live_on(identity),
    )
    watched = Watched(fleet, registry)
    fleet.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(redis.aclose)
        stack.push_async_callback(fleet.stop)
        yield watched
