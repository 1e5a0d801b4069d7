"""F30: nine of ten clients hang up within a second; those that come next notice nothing."""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster import until
from support.figures import Figure
from support.trials import Trial, prompt_of, trial

from baton.common.ids import RequestKey

FREED_WITHIN_S = 1.0
# Of the goodput before the storm: answers by the work that they cost.
GOODPUT = 0.95
BATCH = 24


@dataclass
class Load:
    """A normal load: what it cost in tokens that the workers forwarded, and how long it took.

    The work is what is compared: on a machine that does other things time says little.
    """

    forwarded: int
    seconds: float


async def normal_load(run: Trial, first: int) -> Load:
    loop = asyncio.get_running_loop()
    began, before = loop.time(), forwarded(run)
    await asyncio.gather(
        *(run.ask(prompt_of(60, seed), max_tokens=32) for seed in range(first, first + BATCH))
    )
    return Load(forwarded(run) - before, loop.time() - began)


def forwarded(run: Trial) -> int:
    return sum(each.engine.runner.tokens_forwarded for each in run.cluster.workers)


def orphans(run: Trial) -> list[RequestKey]:
    """What workers hold although the router has ended it."""
    knows = run.cluster.router.dispatch.knows
    return [
        key
        for worker in run.cluster.workers
        for key in list(worker.core._requests)
        if not knows(key.transfer_id)
    ]


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow_fault)])
async def test_f30_a_storm_of_aborts_leaves_nothing(
    count: int, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """No slot is held a second after the last one went, and goodput is what it was."""
    async with trial(oracle_model, redis_url, prefill=2, decode=2, num_blocks=1024) as run:
        loop, draw = asyncio.get_running_loop(), random.Random(30)
        before = await normal_load(run, 0)
        storm = [
            asyncio.create_task(run.ask(prompt_of(draw.randrange(20, 200), 1000 + number)))
            for number in range(count)
        ]
        staying = set(storm[::10])
        leaving = [each for each in storm if each not in staying]
        await until(lambda: len(run.history.requests) >= BATCH + count, "nobody asks")
        gone_at = loop.time()
        for asking in leaving:
            loop.call_later(draw.uniform(0, 1.0), asking.cancel)
        await asyncio.wait(leaving)
        storm_s = loop.time() - gone_at
        last_at = loop.time()
        await until(lambda: not orphans(run), "workers go on for clients that have gone")
        freed_s = loop.time() - last_at
        await asyncio.gather(*staying)
        assert freed_s <= FREED_WITHIN_S
        after = await normal_load(run, 5000)
        assert after.forwarded <= before.forwarded / GOODPUT
        figure(f"F30: storm of {count} aborts lasted", storm_s, "s")
        figure(f"F30: until no slot is held, after a storm of {count}", freed_s, "s")
        figure(f"F30: a normal load before a storm of {count}", before.seconds, "s")
        figure(f"F30: a normal load after a storm of {count}", after.seconds, "s")
