"""F29 on real processes: SIGTERM under load, twice, too late, and of every worker in turn.

A drain moves running answers with their KV; what cannot be moved in time is computed again.
"""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from support.history import History
from support.oracle_model import write_oracle_model
from support.process_trials import Asked, Trials, ask, life_of, prompt_of
from support.processes import ProcessCluster, run_processes
from support.waiting import eventually

from baton.client.replies import Worker
from baton.common import metric_names as names
from baton.common.clock import SystemClock
from baton.common.timing import DEFAULT_TIMING

pytestmark = pytest.mark.asyncio(loop_scope="module")

Figure = Callable[[str, float, str], None]

PROMPT = 150
TIME_SCALE = 0.1
NUM_CLIENTS = 6
# Some seconds of decoding: long enough to be under way when its worker drains.
LONG = 1200
# Room on one worker for all that run on both.
NUM_BLOCKS = 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> AsyncIterator[Trials]:
    folder = tmp_path_factory.mktemp("drain")
    model = write_oracle_model(folder / "model")
    async with run_processes(
        model, folder, redis_url, prefill=2, decode=2, num_blocks=NUM_BLOCKS
    ) as cluster:
        trials = Trials(cluster)
        await trials.warm_up(prompt_len=PROMPT)
        yield trials


async def counters(cluster: ProcessCluster) -> dict[str, int]:
    """Summed over the workers that the router has now."""
    total: dict[str, int] = {}
    for worker in await cluster.admin.workers():
        for name, count in worker.counters.items():
            total[name] = total.get(name, 0) + count
    return total


async def running_on(cluster: ProcessCluster, role: str) -> list[Worker]:
    """Waits until every worker of the role has requests."""
    found: list[Worker] = []

    async def missing() -> str:
        found[:] = [one for one in await cluster.admin.workers() if one.role == role]
        idle = [one.id for one in found if not one.requests_running]
        return f"{idle} run nothing" if idle else ""

    await eventually(missing, f"every {role} worker runs something")
    return found


def load(
    cluster: ProcessCluster, history: History, source: random.Random, count: int = NUM_CLIENTS
) -> list["asyncio.Task[Asked]"]:
    return [ask(cluster, history, prompt_of(PROMPT, source), max_tokens=LONG) for _ in range(count)]


async def test_f29_a_decode_worker_that_is_terminated_hands_its_answers_on(
    trials: Trials, figure: Figure
) -> None:
    """No error, no token lost, and the KV crosses instead of being computed again."""
    cluster = trials.cluster
    async with trials.one() as history:
        asking = load(cluster, history, random.Random(1))
        await running_on(cluster, "decode")
        before = await life_of(cluster, "d0")
        target = await life_of(cluster, "d1")
        began = SystemClock().monotonic()
        cluster["d0"].terminate()
        assert await cluster["d0"].wait_until_ended() == 0
        figure("F29 SIGTERM of a busy D until it has ended", SystemClock().monotonic() - began, "s")
        answers = await asyncio.gather(*asking)
        said = [line for line in cluster.router.log_text.splitlines() if "moved as attempt" in line]
        moved = [one for one in answers if any(f"request {one.log.id} " in line for line in said)]
        assert moved, "nothing ran there when it was told to end"
        assert {one.report.decode_worker.partition("@")[0] for one in answers} == {"d1"}
        # A move is no attempt that failed.
        assert {asked.report.attempts for asked in answers} == {1}

        async def missing() -> str:
            now = await life_of(cluster, "d1")
            pulled = now.counters.get(names.KV_BYTES_PULLED, 0)
            return "" if pulled > target.counters.get(names.KV_BYTES_PULLED, 0) else "no KV came"

        await eventually(missing, "d1")
        recomputed = sum(
            asked.report.prefill_computed_tokens - PROMPT
            for asked in answers
            if asked.report.prefill_computed_tokens > PROMPT
        )
        pulled = (await life_of(cluster, "d1")).counters[names.KV_BYTES_PULLED]
        figure("F29 moved answers", len(moved), "requests")
        figure("F29 KV that d1 pulled", pulled - target.counters[names.KV_BYTES_PULLED], "bytes")
        figure("F29 tokens computed again", recomputed, "tokens")
        figure("F29 gap while moving", max(one.log.longest_gap_s for one in moved), "s")
        assert recomputed == 0
        await expect_nothing_routed(cluster, history, before)
        await cluster.restart("d0")


async def expect_nothing_routed(cluster: ProcessCluster, history: History, gone: Worker) -> None:
    """A life that has left gets nothing any more."""
    source = random.Random(2)
    for asking in load(cluster, history, source, count=4):
        report = (await asking).report
        assert gone.life not in (report.prefill_worker, report.decode_worker)


async def test_f29_a_prefill_worker_that_is_terminated_waits_for_its_readers(
    trials: Trials, figure: Figure
) -> None:
    """Prompts that it holds are computed and pulled to the end; nobody notices."""
    cluster = trials.cluster
    async with trials.one() as history:
        decodes = [worker for worker in cluster.workers if worker.role == "decode"]
        for worker in decodes:
            worker.arm("d.after_reserve", "wait*1")
        asking = load(cluster, history, random.Random(3), count=4)
        for worker in decodes:
            await worker.wait_until_hit("d.after_reserve")
        prefill = cluster["p0"]
        prefill.terminate()
        draining = asyncio.create_task(prefill.wait_until_ended())
        done, _ = await asyncio.wait([draining], timeout=0.5)
        assert not done, "it left while somebody was about to read from it"
        for worker in decodes:
            worker.release("d.after_reserve")
        assert await draining == 0
        answers = await asyncio.gather(*asking)
        assert [asked.report.attempts for asked in answers] == [1] * len(answers)
        await cluster.restart("p0")


@pytest.mark.slow_fault
async def test_f29_a_second_sigterm_ends_a_drain_at_once(trials: Trials, figure: Figure) -> None:
    cluster = trials.cluster
    async with trials.one() as history:
        victim = cluster["d0"]
        victim.arm("move.source_stopped", "wait")
        asking = load(cluster, history, random.Random(4))
        await running_on(cluster, "decode")
        victim.terminate()
        await victim.wait_until_hit("move.source_stopped")
        began = SystemClock().monotonic()
        victim.terminate()
        assert await victim.wait_until_ended() == 128 + signal.SIGTERM
        figure("F29 second SIGTERM until the end", SystemClock().monotonic() - began, "s")
        await asyncio.gather(*asking)
        await cluster.restart("d0")


@pytest.mark.slow_fault
@pytest.mark.timeout(600)
async def test_f29_every_worker_is_restarted_in_turn_under_load(
    trials: Trials, figure: Figure
) -> None:
    """A rolling restart: no client hears of it, while one worker per role remains."""
    cluster = trials.cluster
    async with trials.one(rest_deadline_s=30.0) as history:
        over = asyncio.Event()
        answers: list[Asked] = []

        async def client(number: int) -> None:
            source = random.Random(f"roll {number}")
            while not over.is_set():
                prompt = prompt_of(PROMPT, source)
                answers.append(await ask(cluster, history, prompt, max_tokens=LONG // 4))

        clients = [asyncio.create_task(client(number)) for number in range(NUM_CLIENTS)]
        pulled = 0
        began = SystemClock().monotonic()
        for name in ("p0", "d0", "p1", "d1"):
            cluster[name].terminate()
            assert await cluster[name].wait_until_ended() == 0
            pulled += (await counters(cluster)).get(names.KV_BYTES_PULLED, 0)
            await cluster.restart(name)
        figure("F29 rolling restart of four workers", SystemClock().monotonic() - began, "s")
        over.set()
        await asyncio.gather(*clients)
        recomputed = sum(max(0, asked.report.prefill_computed_tokens - PROMPT) for asked in answers)
        figure("F29 rolling: requests", len(answers), "requests")
        figure("F29 rolling: longest gap", history.longest_gap_s, "s")
        figure("F29 rolling: tokens computed again", recomputed, "tokens")
        assert pulled > 0


@pytest.mark.slow_fault
async def test_f29_what_is_left_at_the_deadline_of_a_drain_goes_on_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, figure: Figure
) -> None:
    """Nobody takes the answers while it drains; it leaves in time, and they are recovered."""
    folder = tmp_path_factory.mktemp("late-drain")
    model = write_oracle_model(folder / "model")
    async with run_processes(
        model, folder, redis_url, decode=2, time_scale=TIME_SCALE, num_blocks=NUM_BLOCKS
    ) as cluster:
        trials = Trials(cluster)
        await trials.warm_up(prompt_len=PROMPT)
        async with trials.one(rest_deadline_s=30.0) as history:
            # Its engine is held there, so that no move to it joins in time.
            cluster["d1"].arm("move.before_join", "wait*1")
            source = random.Random(5)
            asking = [
                ask(cluster, history, prompt_of(PROMPT, source), max_tokens=2 * LONG)
                for _ in range(6)
            ]
            await running_on(cluster, "decode")
            began = SystemClock().monotonic()
            cluster["d0"].terminate()
            assert await cluster["d0"].wait_until_ended() == 0
            spent_s = SystemClock().monotonic() - began
            assert spent_s >= DEFAULT_TIMING.scaled(TIME_SCALE).drain_deadline_s
            figure(f"F29 drain past its deadline, times {TIME_SCALE}", spent_s, "s")
            cluster["d1"].release("move.before_join")
            answers = await asyncio.gather(*asking)
            assert any(asked.report.attempts > 1 for asked in answers)
            await cluster.restart("d0")
