"""F26: workers that are alive and get nowhere; answers to pings do not keep them alive."""

import asyncio
import threading
import time
from pathlib import Path

import pytest
from support.cluster import transports, until
from support.fault_transport import FaultScript, faulty
from support.faults import Hold
from support.figures import Figure
from support.trials import Trial, prompt_of, trial

from baton.common.metric_names import RECOVERIES
from baton.common.timing import DEFAULT_TIMING
from baton.router.fleet import WorkerState
from baton.worker.server import WorkerServer

SCALE = 0.02
STUCK_LIMIT_S = 30.0
# Beside the detection: a new prefill, and what the test's own machine takes.
GAP_S = 3.0


class Stuck:
    """The engine thread of the first worker that comes by stays there until it is released."""

    def __init__(self, run: Trial, times: int) -> None:
        self.worker: WorkerServer | None = None
        self._run = run
        self._left = times
        self._released = threading.Event()

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            here = threading.current_thread()
            (self.worker,) = (
                each for each in self._run.cluster.workers if each._thread._thread is here
            )
            assert self._released.wait(STUCK_LIMIT_S), "nobody releases it"

    def release(self) -> None:
        self._released.set()


def state_of(run: Trial, worker: WorkerServer) -> WorkerState | None:
    attached = run.cluster.router.fleet.get(worker.identity)
    return None if attached is None else attached.state


@pytest.mark.parametrize("failpoint", ["d.after_emit", "p.mid_prefill"])
async def test_f26_an_engine_thread_that_hangs(
    failpoint: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Its event loop goes on answering; its requests go on elsewhere, it is given nothing, and
    once it moves again it is."""
    async with trial(
        oracle_model, redis_url, prefill=2, decode=2, time_scale=SCALE, max_num_batched_tokens=64
    ) as run:
        stuck = Stuck(run, 30 if failpoint == "d.after_emit" else 2)
        run.at(failpoint, stuck)
        try:
            logs = await asyncio.gather(
                *(run.ask(prompt_of(150, seed), max_tokens=64) for seed in range(8))
            )
            worker = stuck.worker
            assert worker is not None
            assert max(run.report(log).attempts for log in logs) == 2
            detection_s = SCALE * DEFAULT_TIMING.stalled_after_s
            gap_s = max(
                run.history.longest_gap_s, *(log.times_s[0] - log.submitted_s for log in logs)
            )
            assert gap_s <= detection_s + GAP_S
            figure(
                f"F26: gap when an engine hangs, beyond {detection_s:g} s of patience",
                gap_s - detection_s,
                "s",
            )
            await until(
                lambda: state_of(run, worker) is WorkerState.STALLED, "it is not seen as stalled"
            )
            before = worker.engine.runner.steps
            await asyncio.gather(*(run.ask(prompt_of(60, 50 + seed)) for seed in range(4)))
            assert worker.engine.runner.steps == before
        finally:
            stuck.release()
        await until(lambda: state_of(run, worker) is WorkerState.READY, "it is not taken back")
        await until(lambda: worker.core.num_requests == 0, "it keeps what went on elsewhere")
        await asyncio.gather(*(run.ask(prompt_of(60, 100 + seed)) for seed in range(8)))
        assert worker.engine.runner.steps > before


async def test_f26_a_loop_that_was_blocked_blames_nobody(
    oracle_model: Path, redis_url: str
) -> None:
    """Everybody's event loop stands still for longer than a worker may be silent.

    Silence counts only while the observer's own loop is on time: nobody is lost.
    """
    async with trial(oracle_model, redis_url, prefill=2, decode=2, time_scale=0.2) as run:
        asking = [
            asyncio.create_task(run.ask(prompt_of(60, seed), max_tokens=300)) for seed in range(6)
        ]
        await until(
            lambda: sum(each.core._scheduler.num_running for each in run.cluster.decodes) == 6,
            "nothing decodes",
        )
        time.sleep(1.5 * 0.2 * DEFAULT_TIMING.dead_after_s)  # noqa: ASYNC251
        logs = await asyncio.gather(*asking)
        assert [run.report(log).attempts for log in logs] == [1] * 6
        assert run.counter(RECOVERIES) == 0


async def test_f26_a_queue_whose_head_finds_no_room(oracle_model: Path, redis_url: str) -> None:
    """p0's pool is leased to a reader that gets nowhere; who waits behind it goes elsewhere.

    The deadline of the state ends the wait: no token came, although all streams are well.
    """
    script, hold = FaultScript(), Hold()
    async with trial(
        oracle_model,
        redis_url,
        prefill=2,
        factory=faulty(transports("memory"), script),
        per_worker=[{"num_blocks": 40}, {"num_blocks": 40}, {}],
        time_scale=SCALE,
    ) as run:
        script.every(hold)
        full = [asyncio.create_task(run.ask(prompt_of(1200, seed))) for seed in range(2)]
        await until(lambda: len(hold.reads) == 2, "the pools are not full")
        waiting = [asyncio.create_task(run.ask(prompt_of(1200, 10 + seed))) for seed in range(2)]
        await until(lambda: run.counter(RECOVERIES) >= 1, "nobody gives up waiting", STUCK_LIMIT_S)
        script.clear()
        hold.release()
        await asyncio.gather(*full, *waiting)
