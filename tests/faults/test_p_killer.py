"""Requests from many clients while random workers are killed again and again, and come back.

The promise of Baton in one test: every answer is whole and right, nothing is held at the end, and
nobody has grown.
"""

import asyncio
import random
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.history import History
from support.oracle_model import write_oracle_model
from support.process_trials import Asked, Trials, ask, prompt_of
from support.processes import ProcessCluster, ServedProcess, run_processes
from support.rest_checks import Usage, usage

from baton.client.client import BatonClient
from baton.common.clock import SystemClock
from baton.common.periodic import wait_for

Figure = Callable[[str, float, str], None]

MAX_PROMPT = 400
DEADLINE_S = 120.0
# A life that has been ready for so long has met its peers: its memory is measured from then on.
WARM_AFTER_S = 1.5


@dataclass
class Story:
    """What happened: the answers, the victims, and the memory of each life when warm and last."""

    answers: list[Asked] = field(default_factory=list)
    victims: list[str] = field(default_factory=list)
    warm: dict[int, Usage] = field(default_factory=dict)
    last: dict[int, Usage] = field(default_factory=dict)
    num_asked: int = 0

    def note_memory(self, processes: list[ServedProcess]) -> None:
        for process in processes:
            self.last[process.pid] = usage(process.pid)
            self.warm.setdefault(process.pid, self.last[process.pid])

    def grown(self) -> list[str]:
        return [
            f"pid {pid}: {grown}"
            for pid, warm in self.warm.items()
            for grown in self.last[pid].grown_from(warm)
            # Requests come and go meanwhile, and connections with them.
            if "MiB" in grown
        ]


@dataclass(frozen=True)
class Plan:
    """So many requests, more of them if so many kills take longer; the pause between kills."""

    num_clients: int
    num_requests: int
    num_kills: int
    max_tokens: int
    pause_s: tuple[float, float]


async def kill_again_and_again(
    cluster: ProcessCluster, story: Story, plan: Plan, source: random.Random, over: asyncio.Event
) -> None:
    """Until `over`, which comes no earlier than the last kill of the plan."""
    while not over.is_set():
        pause_s = source.uniform(*plan.pause_s)
        warm_s = min(WARM_AFTER_S, pause_s)
        await wait_for(over, warm_s)
        story.note_memory(cluster.processes)
        await wait_for(over, pause_s - warm_s)
        if over.is_set():
            return
        story.note_memory(cluster.processes)
        victim = source.choice(cluster.workers)
        victim.kill()
        story.victims.append(victim.name)
        await cluster.restart(victim.name)


async def run_client(
    cluster: ProcessCluster, history: History, story: Story, plan: Plan, source: random.Random
) -> None:
    """One request after the other, until the plan is fulfilled."""
    async with BatonClient(cluster.client.address) as client:
        while story.num_asked < plan.num_requests or len(story.victims) < plan.num_kills:
            story.num_asked += 1
            asked = await ask(
                cluster,
                history,
                prompt_of(source.randint(16, MAX_PROMPT), source),
                max_tokens=source.randint(plan.max_tokens // 4, plan.max_tokens),
                deadline_s=DEADLINE_S,
                client=client,
            )
            story.answers.append(asked)


def note_figures(story: Story, total_s: float, figure: Figure, name: str) -> None:
    logs = [asked.log for asked in story.answers]
    times_s = [log.ends[0].at_s - log.submitted_s for log in logs]
    cuts = statistics.quantiles(times_s, n=100)
    figure(f"{name}: requests", len(logs), "requests")
    figure(f"{name}: kills", len(story.victims), "kills")
    recoveries = sum(asked.report.attempts - 1 for asked in story.answers)
    figure(f"{name}: recoveries", recoveries, "recoveries")
    figure(f"{name}: longest gap in a stream", max(log.longest_gap_s for log in logs), "s")
    recovered = [each.log for each in story.answers if each.report.attempts > 1]
    gap_s = max((log.longest_gap_s for log in recovered), default=0.0)
    figure(f"{name}: longest gap in a recovered stream", gap_s, "s")
    figure(f"{name}: median time of a request", cuts[49], "s")
    figure(f"{name}: 99th percentile", cuts[98], "s")
    figure(f"{name}: in all", total_s, "s")


async def run_plan(plan: Plan, folder: Path, redis_url: str, figure: Figure, name: str) -> Story:
    model = write_oracle_model(folder / "model")
    story, source, over = Story(), random.Random(5), asyncio.Event()
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(
            run_processes(model, folder, redis_url, prefill=2, decode=2)
        )
        trials = Trials(cluster)
        await trials.warm_up(prompt_len=MAX_PROMPT, num_requests=plan.num_clients)
        async with trials.one(rest_deadline_s=30.0) as history:
            began = SystemClock().monotonic()
            killing = asyncio.create_task(kill_again_and_again(cluster, story, plan, source, over))
            clients = [
                run_client(cluster, history, story, plan, random.Random(number))
                for number in range(plan.num_clients)
            ]
            await asyncio.gather(*clients)
            total_s = SystemClock().monotonic() - began
            over.set()
            await killing
            story.note_memory(cluster.processes)
    note_figures(story, total_s, figure, name)
    assert story.grown() == []
    return story


async def test_killed_workers_cost_no_answer(
    tmp_path: Path, redis_url: str, figure: Figure
) -> None:
    """The short form: three kills under load."""
    plan = Plan(num_clients=4, num_requests=60, num_kills=3, max_tokens=192, pause_s=(0.3, 0.6))
    story = await run_plan(plan, tmp_path, redis_url, figure, "3 kills")
    assert len(story.answers) >= plan.num_requests
    assert len(story.victims) >= plan.num_kills
    assert any(asked.report.attempts > 1 for asked in story.answers), "nobody was hit"


@pytest.mark.slow_fault
@pytest.mark.timeout(1200)
async def test_a_thousand_answers_while_workers_die(
    tmp_path: Path, redis_url: str, figure: Figure
) -> None:
    """A random worker dies 2 to 5 s after the last victim is ready again."""
    plan = Plan(num_clients=32, num_requests=1000, num_kills=5, max_tokens=400, pause_s=(2.0, 5.0))
    story = await run_plan(plan, tmp_path, redis_url, figure, "killer")
    assert len(story.answers) >= plan.num_requests
    assert len(story.victims) >= plan.num_kills
