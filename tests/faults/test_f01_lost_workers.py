"""F01 to F03 within one process: a worker is gone at an exact place, and answers go on."""

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cluster import transports, until
from support.fault_transport import FaultScript, faulty
from support.faults import Hold
from support.figures import Figure
from support.trials import Trial, crash, prompt_of, trial

from baton.common.metric_names import RECOVERIES
from baton.worker.server import WorkerServer

OUTPUT = 64
PROMPT = 150
# What one step of prefill takes, so that a prompt needs several.
CHUNK = 64
GAP_S = 3.0


async def is_serving(worker: WorkerServer) -> bool:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        asked = health_pb2.HealthCheckRequest()
        answer = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=2.0)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def expect_others_serve(run: Trial) -> None:
    for worker in run.cluster.workers:
        if worker not in run.cluster.stopped:
            assert await is_serving(worker), f"{worker.identity} is not serving"


@pytest.mark.parametrize(
    ("failpoint", "times"),
    [
        ("d.submitted", 1),
        ("d.after_reserve", 1),
        ("d.mid_pull", 1),
        ("d.before_join", 1),
        ("d.after_join", 1),
        ("d.after_emit", 1),
        ("d.after_emit", OUTPUT // 2),
        ("d.after_emit", OUTPUT - 2),
    ],
)
async def test_f01_a_lost_decode_worker_costs_no_token(
    failpoint: str, times: int, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """The stream continues where it was: nothing lost, nothing twice, within 3 s at real time.

    The prompt is computed at most once more, and the other workers stay SERVING.
    """
    async with trial(oracle_model, redis_url, prefill=2, decode=2) as run:
        kill = run.kill_at(failpoint, times)
        log = await run.ask(prompt_of(PROMPT, times), max_tokens=OUTPUT)
        await asyncio.wait_for(kill.is_done.wait(), 5)
        assert kill.victim in run.cluster.decodes
        assert run.report(log).attempts == 2
        assert run.counter(RECOVERIES) == 1
        assert log.longest_gap_s <= GAP_S
        computed = sum(each.engine.runner.tokens_forwarded for each in run.cluster.prefills)
        assert computed <= 2 * PROMPT + OUTPUT
        await expect_others_serve(run)
        figure("F01 memory: gap in the stream when D is lost", log.longest_gap_s, "s")


@pytest.mark.parametrize(
    "failpoint",
    [
        "p.submitted",
        "p.before_lease",
        "p.after_lease",
        "p.mid_prefill",
        "p.before_first_token",
        "p.after_first_token",
    ],
)
async def test_f02_a_lost_prefill_worker_costs_one_more_prefill(
    failpoint: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """The prompt is computed once more by the other one, and the decode workers stay SERVING."""
    async with trial(
        oracle_model, redis_url, prefill=2, decode=2, max_num_batched_tokens=CHUNK
    ) as run:
        kill = run.kill_at(failpoint)
        log = await run.ask(prompt_of(PROMPT, 1), max_tokens=OUTPUT)
        await asyncio.wait_for(kill.is_done.wait(), 5)
        victim = kill.victim
        assert victim in run.cluster.prefills
        (other,) = [each for each in run.cluster.prefills if each is not victim]
        assert run.report(log).attempts == 2
        assert run.report(log).prefill_worker == str(other.identity)
        assert other.engine.runner.tokens_forwarded == PROMPT
        for decode in run.cluster.decodes:
            assert await is_serving(decode)
        first_token_s = log.times_s[0] - log.submitted_s
        assert first_token_s <= GAP_S
        figure("F02 memory: first token when P is lost before it", first_token_s, "s")


async def test_f03_a_prefill_worker_that_is_lost_in_a_transfer(
    oracle_model: Path, redis_url: str
) -> None:
    """What was being read is in quarantine until its agent is destroyed, and never cached."""
    script, held = FaultScript(), Hold()
    script.next(held)
    factory = faulty(transports("memory"), script)
    async with trial(oracle_model, redis_url, prefill=2, decode=2, factory=factory) as run:
        asking = asyncio.create_task(run.ask(prompt_of(PROMPT, 3), max_tokens=OUTPUT))
        await until(lambda: bool(held.reads), "no read was posted")
        (reading,) = [each for each in run.cluster.decodes if each.core.handovers.reads]
        (victim,) = [each for each in run.cluster.prefills if each.core.num_requests]
        await crash(run.cluster, victim)
        log = await asking
        assert run.report(log).attempts == 2
        await until(lambda: not reading.core.handovers.reads, "the read is kept in quarantine")
        # No late write is left that could reach what the slots have become.
        assert script.land(held) == 0


@pytest.mark.parametrize("failpoint", ["p.mid_prefill", "d.after_emit"])
async def test_f01_f02_under_load(
    failpoint: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Every request that the lost worker held goes on; those that it did not hold notice nothing.

    At a tenth of the time-outs; the worker is lost in the middle of 24 requests at once.
    """
    flags = {"max_num_batched_tokens": CHUNK, "time_scale": 0.1}
    async with trial(oracle_model, redis_url, prefill=2, decode=2, **flags) as run:
        kill = run.kill_at(failpoint, 20)
        logs = await asyncio.gather(
            *(run.ask(prompt_of(40 + 9 * seed, seed), max_tokens=OUTPUT) for seed in range(24))
        )
        await asyncio.wait_for(kill.is_done.wait(), 5)
        attempts = [run.report(log).attempts for log in logs]
        assert max(attempts) == 2
        assert attempts.count(2) == run.counter(RECOVERIES)
        role = "D" if failpoint.startswith("d.") else "P"
        figure(
            f"F01 F02 memory: longest gap of 24 streams, {role} lost",
            run.history.longest_gap_s,
            "s",
        )
        await expect_others_serve(run)
