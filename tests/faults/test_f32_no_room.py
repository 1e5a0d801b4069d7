"""F32: there is no room in the middle of something: all of it is undone, nothing is half leased."""

import asyncio
from pathlib import Path

import pytest
from support.cluster import transports
from support.core_mesh import P
from support.fault_transport import FaultScript, faulty
from support.faults import FailPost, Kind
from support.faulty_mesh import MeshMaker
from support.trials import prompt_of, trial

from baton.common.errors import NoCapacity, QueueFull
from baton.common.metric_names import RECOVERIES
from baton.router import lanes

BLOCK = 32


@pytest.mark.parametrize("num_free", range(5))
def test_f32_a_prompt_that_lacks_k_of_its_blocks_on_p_has_none(
    num_free: int, faulty_mesh: MeshMaker
) -> None:
    """Five are wanted: no lease, no pin, no slot taken, until all five are there."""
    mesh = faulty_mesh(prefill_blocks=10)
    holder = mesh.ask(prompt_of((10 - num_free) * BLOCK, 1), 8, to_decode=False)
    mesh.advance(0.5)
    before = mesh.engines[P].pool.num_free + mesh.engines[P].prefix.num_evictable
    assert before == num_free
    waiting = mesh.ask(prompt_of(5 * BLOCK, 2), 8)
    mesh.advance(1.0)
    assert mesh.tokens(waiting) == []
    assert len(mesh.prefill._owner.leased) == 1
    assert mesh.engines[P].pool.num_free + mesh.engines[P].prefix.num_evictable == before
    # The lease that nobody claims ends.
    mesh.advance(6.0)
    assert mesh.tokens(waiting) == mesh.answer(waiting)
    assert mesh.tokens(holder) == mesh.answer(holder)[:1]
    mesh.expect_rest()


async def test_f32_pools_that_are_too_small_for_all(oracle_model: Path, redis_url: str) -> None:
    """P and D with room for two prompts each, eight clients: queues, preemptions, right answers."""
    async with trial(
        oracle_model, redis_url, num_blocks=14, max_model_len=14 * BLOCK, prefill=1, decode=1
    ) as run:
        await asyncio.gather(*(run.ask(prompt_of(150, seed), max_tokens=150) for seed in range(8)))
        assert run.cluster.decodes[0].core._decoding.num_preemptions > 0


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
async def test_f32_reads_that_cannot_be_posted(
    kind: Kind, oracle_model: Path, redis_url: str
) -> None:
    """The fabric takes no read, at the first or a later block: the pair is left, nothing stays."""
    script = FaultScript()
    async with trial(
        oracle_model,
        redis_url,
        prefill=2,
        decode=2,
        factory=faulty(transports("memory"), script),
        max_num_batched_tokens=BLOCK,
    ) as run:
        await run.ask(prompt_of(150, 0))
        for number in range(4):
            script.next(FailPost(kind))
            log = await run.ask(prompt_of(150, 1 + number))
            assert run.report(log).attempts == 2
        assert run.counter(RECOVERIES) == 4


@pytest.mark.parametrize("failpoint", ["p.before_lease", "p.after_lease", "d.after_reserve"])
async def test_f32_an_engine_that_fails_there_is_a_lost_worker(
    failpoint: str, oracle_model: Path, redis_url: str
) -> None:
    """An error that nobody expects inside a reservation ends its process, and no request."""
    async with trial(oracle_model, redis_url, prefill=2, decode=2) as run:
        kill = run.kill_at(failpoint, 3)
        logs = await asyncio.gather(*(run.ask(prompt_of(150, seed)) for seed in range(8)))
        await asyncio.wait_for(kill.is_done.wait(), 5)
        assert max(run.report(log).attempts for log in logs) == 2


async def test_f32_a_router_without_room_refuses_and_keeps_nothing(
    oracle_model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds its queue towards a worker full gets a clear error or another try."""
    monkeypatch.setattr(lanes, "MAX_SUBMITS", 4)
    async with trial(oracle_model, redis_url, allowed=(QueueFull, NoCapacity)) as run:
        logs = await asyncio.gather(*(run.ask(prompt_of(60, seed)) for seed in range(30)))
        refused = [log for log in logs if log.ends[0].error is not None]
        assert len(logs) - len(refused) > 0
        assert refused
