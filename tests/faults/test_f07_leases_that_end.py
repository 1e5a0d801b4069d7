"""F07 to F09: nobody pulls, leases end before the read does, destinations are wanted at once."""

import asyncio
import random
from pathlib import Path

import pytest
from support.cluster import transports, until
from support.core_mesh import D, P
from support.fault_transport import FaultScript, faulty
from support.faults import Fail, Hold
from support.faulty_mesh import MeshMaker, shorten_leases
from support.figures import Figure
from support.trials import counters, prompt_of, trial

from baton.common import metric_names as names
from baton.common.errors import QueueFull, TransferError
from baton.common.timing import DEFAULT_TIMING

BLOCK = 32


def test_f07_a_prompt_that_nobody_pulls_is_let_go_at_the_end_of_its_lease(
    faulty_mesh: MeshMaker,
) -> None:
    """P takes other work meanwhile, and the lease that nobody claimed counts as expired."""
    mesh = faulty_mesh(prefill_blocks=12)
    mesh.ask(prompt_of(5 * BLOCK, 1), 8, to_decode=False)
    mesh.advance(0.5)
    assert [len(slots) for slots in mesh.prefill._owner.leased] == [5]
    others = [mesh.ask(prompt_of(5 * BLOCK, seed), 8) for seed in range(2, 6)]
    mesh.advance(3.5)
    assert all(mesh.tokens(key) == mesh.answer(key) for key in others)
    assert [len(slots) for slots in mesh.prefill._owner.leased] == [5]
    mesh.advance(DEFAULT_TIMING.lease_first_term_s - 4 + 0.2)
    assert mesh.prefill._owner.counters[names.LEASES_EXPIRED] == 1
    mesh.expect_rest()


async def test_f07_a_decode_worker_that_rejects_before_admission(
    oracle_model: Path, redis_url: str
) -> None:
    """The lease on P ends at once, by the router's cancel, and the answer is clear.

    Three rejections without a token between them are the end of a request.
    """
    per_worker = [{}, {"max_requests": 1}]
    async with trial(
        oracle_model, redis_url, allowed=(QueueFull,), per_worker=per_worker, time_scale=0.2
    ) as run:
        busy = asyncio.create_task(run.ask(prompt_of(100, 1), max_tokens=600))
        (prefill,), (decode,) = run.cluster.prefills, run.cluster.decodes
        await until(lambda: decode.core._scheduler.num_running == 1, "D does not decode")
        rejected = asyncio.create_task(run.ask(prompt_of(100, 2), max_tokens=8))
        await until(lambda: run.counter(names.RECOVERIES) >= 1, "D rejects nothing")
        await until(lambda: not prefill.core.num_requests, "P keeps what D rejected", 1.0)
        await asyncio.gather(busy, rejected)
        assert run.report(busy.result()).attempts == 1
        (end,) = rejected.result().ends
        assert end.error is None or isinstance(end.error, QueueFull)


@pytest.mark.parametrize(
    "count", [100, pytest.param(1000, marks=[pytest.mark.slow_fault, pytest.mark.timeout(600)])]
)
def test_f08_a_lease_that_is_shorter_than_the_read(
    count: int, faulty_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """P's pool of 24 blocks is used for others while D's read waits: 0 wrong answers of all.

    The lease lives for 50 ms and D, which neither hears of its end nor renews, reads 100 ms later.
    Whether any of the slots was used again by then, and whether all of them were, is left to
    chance: what was reused is detected, what was not is right.
    """
    shorten_leases(monkeypatch, 0.05)
    mesh = faulty_mesh(prefill_blocks=24)
    draw = random.Random(8)
    outcomes: dict[str, int] = {}
    for number in range(count):
        hold = Hold()
        mesh.script.next(hold)
        key = mesh.ask(prompt_of(draw.randrange(40, 120), number), 6)
        while not (hold.reads and mesh.tokens(key)):
            mesh.exchange()
        late = []
        for step in range(8):
            mesh.clock.advance(0.0125)
            if step >= 5 and draw.random() < 0.5:
                # Somebody else wants some or all of P's blocks.
                mesh.take_blocks(draw.choice([2, 8, 23]) * BLOCK, 10_000 + 8 * number + step)
            mesh.step(P)
            late.append(mesh.prefill.take_effects())
        hold.release()
        for _ in range(4):
            mesh.step(D)
            mesh.deliver(D)
        for effects in late:
            mesh.replay(P, effects)
        mesh.advance(3.0)
        assert mesh.is_right(key), (
            f"{number}: {mesh.errors(key)} {mesh.tokens(key)}, not {mesh.answer(key)}"
        )
        end = "".join(mesh.errors(key)) or "right"
        outcomes[end] = outcomes.get(end, 0) + 1
    mesh.expect_rest()
    assert set(outcomes) <= {"right", "fence_failed", "lease_lost"}
    assert outcomes["fence_failed"] >= count // 10
    assert outcomes["right"] >= count // 20
    assert mesh.decode.handovers.counters[names.FENCE_FAILURES] == outcomes["fence_failed"]
    figure(f"F08: reused blocks that were detected, of {count} reads", outcomes["fence_failed"], "")
    figure(f"F08: wrong answers, of {count} reads", 0, "")


async def test_f08_late_reads_from_a_pool_that_churns(oracle_model: Path, redis_url: str) -> None:
    """The same through a whole cluster: answers are right, or end with a clear error."""
    script = FaultScript()
    async with trial(
        oracle_model,
        redis_url,
        allowed=(TransferError,),
        factory=faulty(transports("memory"), script),
        decode=2,
        per_worker=[{"num_blocks": 24}, {"num_blocks": 64}, {"num_blocks": 64}],
        time_scale=0.1,
    ) as run:
        loop, draw = asyncio.get_running_loop(), random.Random(3)

        async def client(seed: int) -> None:
            for number in range(5):
                if draw.random() < 0.4:
                    hold = Hold()
                    script.next(hold)
                    loop.call_later(draw.uniform(0.05, 0.6), hold.release)
                await run.ask(prompt_of(150, 100 * seed + number), max_tokens=12)

        await asyncio.gather(*(client(seed) for seed in range(6)))
        assert script.injected["Hold"] >= 5
        assert run.counter(names.RECOVERIES) >= 1


@pytest.mark.parametrize("transport", ["memory", "nixl"])
@pytest.mark.parametrize("is_told", [False, True], ids=["in flight", "failed"])
async def test_f09_a_destination_that_is_wanted_at_once(
    is_told: bool, transport: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Clients go away while D reads for them, and D's small pool is wanted by others at once.

    Whatever the reads still write, they write it into quarantine: every other answer is right.
    """
    script = FaultScript()
    fault = Fail(may_write=True) if is_told else Hold()
    factory = faulty(transports(transport), script)
    async with trial(
        oracle_model,
        redis_url,
        factory=factory,
        # Quarantine may hold one prompt of the greatest length: 32 blocks.
        per_worker=[{}, {"num_blocks": 64, "max_model_len": 1024}],
        time_scale=0.2,
    ) as run:
        (decode,) = run.cluster.decodes
        # A read each of 6 requests, which hold 30 of the 64 blocks.
        script.next(*[fault] * 6)
        gone = [asyncio.create_task(run.ask(prompt_of(150, seed))) for seed in range(6)]
        await until(lambda: len(fault.reads) == 6, "D does not read")
        if not is_told:
            for asking in gone:
                asking.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
        others = [asyncio.create_task(run.ask(prompt_of(300, 50 + seed))) for seed in range(12)]
        await until(
            lambda: decode.core.num_requests > 0 or all(each.done() for each in others),
            "D takes nothing",
        )
        if isinstance(fault, Hold):
            fault.release()
        else:
            landed = await asyncio.to_thread(script.land, fault)
            figure("F09: blocks written late, all into quarantine", landed, "")
        await asyncio.gather(*others, *(gone if is_told else []))


@pytest.mark.parametrize("transport", ["memory", "nixl"])
async def test_f09_reads_that_do_not_end_cost_their_agent(
    transport: str, oracle_model: Path, redis_url: str
) -> None:
    """Quarantine is bounded: the agent is destroyed, and after that nothing is written."""
    script = FaultScript()
    factory = faulty(transports(transport), script)
    async with trial(
        oracle_model, redis_url, factory=factory, prefill=2, decode=2, time_scale=0.1
    ) as run:
        held = Hold()
        script.next(held)
        log = await run.ask(prompt_of(150, 1))
        assert run.report(log).attempts == 2
        (reader,) = [each for each in run.cluster.decodes if counters(each)[names.PULLS_LATE] == 1]
        await until(lambda: not reader.core.handovers.reads, "the read is kept for ever")
        assert counters(reader)[names.AGENTS_DESTROYED] == 1
        held.release()
        assert script.land(held) == 0
        await asyncio.gather(*(run.ask(prompt_of(150, seed)) for seed in range(2, 10)))
