"""Discovery: workers write a record with a TTL, routers and readers list the records.

Redis is a hint. A record that vanishes removes nobody: liveness is the control stream's business.
Every write is one Lua script, fenced by the worker's epoch and idempotent.
"""

import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from baton.common.errors import ConfigError
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.sampling import Role
from baton.metadata.keys import Keys

log = logging.getLogger(__name__)

RECORD_TTL_MS = 3_000
EPOCH_TTL_MS = 24 * 3600 * 1000
HEARTBEAT_EVERY_S = 1.0
SOCKET_TIMEOUT_S = 0.5
SCAN_COUNT = 512
# What the wire's unsigned 64 bits hold.
MAX_EPOCH = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a worker tells the cluster. `address` is where routers and peers dial."""

    identity: WorkerIdentity
    role: Role
    address: str
    fingerprint: str
    model: str
    state: str


def connect(url: str) -> "Redis":
    """A client that never retries by itself: a script may have run although the reply was lost.

    Raises ConfigError for a URL that redis-py does not understand.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            # Foreign bytes under our keys make a malformed record, not an error of every listing.
            encoding_errors="replace",
        )
    except ValueError as error:
        raise ConfigError(f"{url!r} is no Redis URL: {error}") from error


class Registry:
    """The worker records of one cluster. Methods raise RedisError when Redis does."""

    def __init__(self, redis: "Redis", cluster: str) -> None:
        self._redis = redis
        self._keys = Keys(cluster)
        self._heartbeat = redis.register_script(_script("heartbeat"))
        self._leave = redis.register_script(_script("leave"))

    async def heartbeat(self, record: WorkerRecord) -> Epoch:
        """Write the record for another TTL; returns the highest epoch of this worker id.

        A higher one than the record's own means that another life of this id runs.
        """
        identity = record.identity
        fields = {
            "role": record.role.value,
            "address": record.address,
            "fingerprint": record.fingerprint,
            "model": record.model,
            "state": record.state,
        }
        highest = await self._heartbeat(
            keys=[
                self._keys.worker(identity.worker_id),
                self._keys.epoch(identity.worker_id),
                self._keys.members,
            ],
            args=[
                identity.epoch,
                RECORD_TTL_MS,
                EPOCH_TTL_MS,
                identity.incarnation,
                *(part for entry in fields.items() for part in entry),
            ],
        )
        return Epoch(int(cast(int, highest)))

    async def highest_epoch(self, worker_id: WorkerId) -> int:
        """The highest epoch that this worker id has had; 0 if none is remembered."""
        stored = await self._redis.get(self._keys.epoch(worker_id))
        return int(stored) if stored is not None else 0

    async def leave(self, identity: WorkerIdentity) -> None:
        """Remove the record, unless a newer life wrote it."""
        await self._leave(
            keys=[self._keys.worker(identity.worker_id), self._keys.members],
            args=[identity.epoch],
        )

    async def workers(self) -> list[WorkerRecord]:
        """All records that are alive; malformed ones are left out."""
        found = []
        prefix = self._keys.worker("")
        async for key in self._redis.scan_iter(match=self._keys.worker_pattern, count=SCAN_COUNT):
            try:
                fields = await cast("Awaitable[dict[str, str]]", self._redis.hgetall(key))
            except ResponseError as error:
                log.warning("%s is no worker record: %s", key, error)
                continue
            record = _record(key.removeprefix(prefix), fields)
            if record is not None:
                found.append(record)
        return found


def _record(worker_id: str, fields: dict[str, Any]) -> WorkerRecord | None:
    try:
        epoch = int(fields["epoch"])
        if not 0 < epoch <= MAX_EPOCH:
            return None
        return WorkerRecord(
            identity=WorkerIdentity(WorkerId(worker_id), Epoch(epoch), fields["incarnation"]),
            role=Role(fields["role"]),
            address=fields["address"],
            fingerprint=fields["fingerprint"],
            model=fields["model"],
            state=fields["state"],
        )
    except (KeyError, ValueError):
        return None


def _script(name: str) -> str:
    return resources.files("baton.metadata").joinpath("lua", f"{name}.lua").read_text()


__all__ = ["RedisError", "Registry", "WorkerRecord", "connect"]
