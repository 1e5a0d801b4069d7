"""A worker's presence in Redis: its epoch at the start, its record while it lives.

epoch = max(Unix ms at start, 1 + the highest that Redis knows of this worker id). Losing Redis
later stops nobody: the record lapses and is written again when Redis is back.
"""

import asyncio
import logging
from collections.abc import Callable

from baton.common.clock import Clock
from baton.common.errors import ConfigError
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.periodic import every
from baton.common.randomness import Randomness, incarnation
from baton.metadata.registry import HEARTBEAT_EVERY_S, RedisError, Registry, WorkerRecord

log = logging.getLogger(__name__)


def first_identity(worker_id: WorkerId, clock: Clock, randomness: Randomness) -> WorkerIdentity:
    """An identity by this machine's clock alone; `settle_epoch` raises it if Redis knows more."""
    return WorkerIdentity(worker_id, Epoch(clock.unix_ms()), incarnation(randomness))


async def settle_epoch(registry: Registry, identity: WorkerIdentity) -> WorkerIdentity:
    """The identity with an epoch above all that Redis has seen of this id.

    Raises ConfigError when Redis cannot be reached: a worker that nobody can discover must not
    start in silence.
    """
    try:
        highest = await registry.highest_epoch(identity.worker_id)
    except RedisError as error:
        raise ConfigError(
            f"cannot reach Redis ({error}); start one, or name it with --redis URL"
        ) from error
    epoch = Epoch(max(identity.epoch, highest + 1))
    return WorkerIdentity(identity.worker_id, epoch, identity.incarnation)


class Heartbeat:
    """Writes the record each second until stopped, then removes it."""

    def __init__(
        self,
        registry: Registry,
        record: Callable[[], WorkerRecord],
        superseded: Callable[[Epoch], None],
    ) -> None:
        self._registry = registry
        self._record = record
        self._superseded = superseded
        self._stop = asyncio.Event()
        self._reachable = True

    async def run(self) -> None:
        async for _ in every(HEARTBEAT_EVERY_S, self._stop):
            await self._beat()
        try:
            await self._registry.leave(self._record().identity)
        except RedisError as error:
            log.warning("could not sign off from Redis: %s", error)

    def stop(self) -> None:
        self._stop.set()

    async def _beat(self) -> None:
        record = self._record()
        try:
            highest = await self._registry.heartbeat(record)
        except RedisError as error:
            if self._reachable:
                log.warning("Redis is out of reach, serving goes on: %s", error)
            self._reachable = False
            return
        if not self._reachable:
            log.info("Redis is back")
        self._reachable = True
        if highest > record.identity.epoch:
            self._superseded(highest)
