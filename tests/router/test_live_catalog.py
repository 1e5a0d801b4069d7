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


def worker_of(
    name: str, folder: Path, clock: ManualClock, role: Role = Role.DECODE, *, blocks: int = 8
) -> AttachedWorker:
    identity = WorkerIdentity(WorkerId(f"{role.value}-{name}"), Epoch(1), "life")
    record = WorkerRecord(
        identity=identity,
        role=role,
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
            role=role,
            model=model,
            link_address="127.0.0.1:1",
            pid=1,
            load=LoadReport(blocks_total=blocks),
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


@pytest.mark.parametrize(
    ("roles", "is_ready"),
    [
        ([Role.PREFILL], False),
        ([Role.DECODE], False),
        ([Role.PREFILL, Role.DECODE], True),
        ([Role.UNIFIED], True),
        ([Role.PREFILL, Role.UNIFIED], True),
        ([Role.PREFILL, Role.DECODE, Role.UNIFIED], True),
    ],
)
async def test_a_pair_or_a_unified_worker_is_ready_to_serve(
    roles: list[Role], is_ready: bool, tmp_path: Path
) -> None:
    clock = ManualClock(0.0)
    folder = write_oracle_model(tmp_path / "model")
    live = [worker_of("one", folder, clock, role, blocks=8 + len(role.value)) for role in roles]
    catalog = LiveCatalog(lambda: live, clock)
    assert live[0].hello is not None
    catalog.learn(live[0].hello.model)
    await catalog.close()
    assert catalog.is_ready() is is_ready
    sizes = [32 * (8 + len(role.value)) for role in roles if role is not Role.PREFILL]
    assert catalog.get("one").kv_tokens == max(sizes, default=None), "of whoever decodes"
    catalog.stop_serving()
    assert not catalog.is_ready()
