"""F27: the wall clock jumps by an hour, to and fro; nothing but an epoch comes from it."""

import asyncio
import random
from pathlib import Path

import pytest
from support.trials import counters, prompt_of, trial

from baton.common import metric_names as names
from baton.common.clock import SystemClock

HOUR_MS = 3_600_000


async def test_f27_no_lease_and_no_timeout_hears_the_wall_clock(
    oracle_model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the wall clock of any part is off by up to an hour: nobody is lost, no lease
    ends early, nothing is computed twice."""
    draw, look = random.Random(27), SystemClock.unix_ms
    looks = []

    def jumping(clock: SystemClock) -> int:
        looks.append(draw.choice([-HOUR_MS, 0, HOUR_MS]))
        return look(clock) + looks[-1]

    monkeypatch.setattr(SystemClock, "unix_ms", jumping)
    async with trial(oracle_model, redis_url, prefill=2, decode=2, time_scale=0.2) as run:
        workers = {each.identity for each in run.cluster.workers}
        logs = []
        for round_ in range(3):
            logs += await asyncio.gather(
                *(run.ask(prompt_of(150, 10 * round_ + seed)) for seed in range(8))
            )
        assert [run.report(log).attempts for log in logs] == [1] * len(logs)
        assert {each.identity for each in run.cluster.router.fleet.workers()} == workers
        for worker in run.cluster.prefills:
            assert counters(worker)[names.LEASES_EXPIRED] == 0
        assert run.counter(names.RECOVERIES) == 0
        assert len(set(looks)) > 1
