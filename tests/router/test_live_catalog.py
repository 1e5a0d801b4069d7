"""Which models a router serves follows its workers, and a worker that is away takes none along."""

from pathlib import Path

import pytest
from support.oracle_model import write_oracle_model
from support.waiting import eventually

from baton.common.clock import ManualClock
from baton.common.errors import ModelNotFound, NoWorker
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.common.messages import LoadReport, ModelInfo, WorkerHello
from baton.common.sampling import Role
from baton.common.timing import DEFAULT_TIMING
from baton.metadata.registry import WorkerRecord
from baton.router.attached import AttachedWorker
from baton.router.live_catalog import LiveCatalog


def worker_of(name: str, folder: Path, clock: ManualClock) -> AttachedWorker:
    identity = WorkerIdentity(WorkerId(f"d-{name}"), Epoch(1), "life")
    record = WorkerRecord(
        identity=identity,
        role=Role.DECODE,
        address="127.0.0.1:1",
        fingerprint="f",
        model=name,
        state="ready",
    )
    model = ModelInfo(
        name=name,
        path=str(folder),
        fingerprint="f",
        max_model_len=4096,
        vocab_size=512,
        block_size=32,
    )
    worker = AttachedWorker(record, clock, DEFAULT_TIMING)
    worker.connected(
        WorkerHello(
            identity=identity,
            role=Role.DECODE,
            model=model,
            link_address="127.0.0.1:1",
            pid=1,
            load=LoadReport(blocks_total=8),
        )
    )
    return worker


async def test_a_model_whose_workers_are_away_is_asked_for_later(tmp_path: Path) -> None:
    """It is not said to be unknown: a client would not try again."""
    clock = ManualClock(0.0)
    folder = write_oracle_model(tmp_path / "model")
    workers = [worker_of(name, folder, clock) for name in ("one", "two")]
    live: list[AttachedWorker] = []
    catalog = LiveCatalog(lambda: live, clock)
    with pytest.raises(NoWorker):
        catalog.get("one")
    live[:] = workers
    for worker in workers:
        assert worker.hello is not None
        catalog.learn(worker.hello.model)

    async def missing() -> str:
        return "" if len(catalog.models()) == 2 else "not loaded"

    await eventually(missing, "both models")
    assert catalog.get("one").name == "one"
    live[:] = workers[1:]
    with pytest.raises(NoWorker) as away:
        catalog.get("one")
    assert away.value.retry_after_s == 1.0
    assert catalog.get("").name == "two"
    with pytest.raises(ModelNotFound):
        catalog.get("three")
    live.clear()
    with pytest.raises(NoWorker):
        catalog.get("")
    await catalog.close()
