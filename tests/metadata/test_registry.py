"""Discovery on a real Redis: whatever else lies under its keys, the true records are found."""

from dataclasses import replace

import pytest

from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.sampling import Role
from baton.metadata.keys import Keys
from baton.metadata.registry import Registry, WorkerRecord, connect

RECORD = WorkerRecord(
    identity=WorkerIdentity(WorkerId("p0"), Epoch(7), "a"),
    role=Role.PREFILL,
    address="127.0.0.1:7000",
    fingerprint="f",
    model="m",
    state="ready",
)


@pytest.mark.parametrize("worker_id", ["p0", "rack:3:p0", "ß"])
async def test_a_record_comes_back_under_its_whole_id(worker_id: str, redis_url: str) -> None:
    redis = connect(redis_url)
    registry = Registry(redis, f"whole-id-{worker_id}")
    record = replace(RECORD, identity=replace(RECORD.identity, worker_id=WorkerId(worker_id)))
    await registry.heartbeat(record)
    assert await registry.workers() == [record]
    await redis.aclose()


async def test_foreign_keys_hide_no_worker(redis_url: str) -> None:
    redis = connect(redis_url)
    registry, keys = Registry(redis, "foreign"), Keys("foreign")
    await registry.heartbeat(RECORD)
    fields = {**await redis.hgetall(keys.worker("p0"))}
    await redis.set(keys.worker("a-string"), "x")
    await redis.hset(keys.worker("no-text"), mapping={**fields, "address": b"\xff\xfe"})
    await redis.hset(keys.worker("half"), "epoch", "3")
    for epoch in ("0", "-1", str(2**64), "x"):
        await redis.hset(keys.worker(f"epoch{epoch}"), mapping={**fields, "epoch": epoch})
    found = await registry.workers()
    assert RECORD in found
    assert {record.identity.worker_id for record in found} <= {"p0", "no-text"}
    await redis.aclose()
