"""F12 on real processes: the router is killed with 200 streams, and comes back."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from support.command import BATON
from support.history import History
from support.oracle_model import write_oracle_model
from support.process_trials import ask, oracle_of, prompt_of
from support.processes import ProcessCluster, ServedProcess, run_processes
from support.rest_checks import expect_rest, expect_secret
from support.waiting import eventually

from baton.cli.cluster import to_arguments
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.failures import RouterUnreachable
from baton.common.clock import SystemClock
from baton.common.errors import NoWorker
from baton.common.timing import DEFAULT_TIMING

Figure = Callable[[str, float, str], None]

NUM_STREAMS = 200
PROMPT = 64
LONG = 1000
SERVES_WITHIN_S = 2.0
# Two load reports, and the time that a busy machine takes for what has no wait in it.
SLACK_S = 2 * DEFAULT_TIMING.heartbeat_every_s + 1.5


@asynccontextmanager
async def witness_of(folder: Path, redis_url: str) -> AsyncIterator[AdminClient]:
    """A second router of the cluster, which sees what the workers do without the first."""
    flags = to_arguments({"redis": redis_url, "cluster": folder.name, "log_level": "INFO"})
    router = ServedProcess("witness", "router", [*BATON, "serve", "router", *flags], folder)
    router.start()
    try:
        await router.wait_until_ready()
        async with AdminClient(f"127.0.0.1:{router.said['admin_port']}") as admin:

            async def missing() -> str:
                states = [worker.state for worker in await admin.workers()]
                return "" if states == ["ready"] * 2 else f"its workers are {states}"

            await eventually(missing, "the witness", deadline_s=30.0)
            yield admin
    finally:
        router.kill()


async def expect_first_answer(cluster: ProcessCluster, history: History) -> float:
    """Seconds from the router's being ready to the end of its first answer."""
    ready_at = SystemClock().monotonic()
    while True:
        async with BatonClient(f"127.0.0.1:{cluster.router.said['grpc_port']}") as client:
            if await client.models():
                prompt = prompt_of(PROMPT, random.Random(2))
                asked = await ask(cluster, history, prompt, max_tokens=4, client=client)
                if asked.finish is not None:
                    return SystemClock().monotonic() - ready_at
        assert SystemClock().monotonic() - ready_at < 10 * SERVES_WITHIN_S, "it does not serve"


async def test_f12_a_router_dies_with_200_streams_and_another_one_serves(
    tmp_path: Path, redis_url: str, figure: Figure
) -> None:
    """Its clients get right tokens and one error; its workers stop by themselves, and soon."""
    model = write_oracle_model(tmp_path / "model")
    folder = tmp_path / "cluster"
    folder.mkdir()
    history, source = History(), random.Random(12)
    async with (
        run_processes(model, folder, redis_url, num_blocks=8192) as cluster,
        witness_of(folder, redis_url) as admin,
    ):
        asking = [
            ask(cluster, history, prompt_of(PROMPT, source), max_tokens=LONG)
            for _ in range(NUM_STREAMS)
        ]

        async def missing() -> str:
            running = [worker.requests_running for worker in await admin.workers()]
            return "" if max(running) >= NUM_STREAMS // 2 else f"{running} run"

        await eventually(missing, "200 streams", deadline_s=30.0)
        killed_at = SystemClock().monotonic()
        cluster.router.kill()
        answers = await asyncio.gather(*asking)
        assert all(asked.finish is None for asked in answers), "the router was gone"
        await expect_rest(admin)
        rest_s = SystemClock().monotonic() - killed_at
        assert rest_s <= DEFAULT_TIMING.router_grace_s + SLACK_S
        figure("F12 workers idle after their router was killed", rest_s, "s")

        cluster.router.start()
        await cluster.router.wait_until_ready()
        first_s = await expect_first_answer(cluster, history)
        assert first_s <= SERVES_WITHIN_S
        figure("F12 first answer of a new router, after it was ready", first_s, "s")
        # A router that has not found its workers yet asks to be asked again.
        history.check(oracle_of(), allowed=[RouterUnreachable, NoWorker])
        await expect_rest(admin)
        cluster.expect_clean_logs()
        expect_secret(cluster.logs, tokens=[log.prompt[:8] for log in history.requests[:20]])
