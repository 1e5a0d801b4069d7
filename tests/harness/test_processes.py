"""The cluster of processes obeys: kill, freeze, terminate and restart reach the process meant."""

import asyncio
from pathlib import Path

from support.history import History, RequestLog
from support.oracle_model import write_oracle_model
from support.processes import ProcessCluster, run_processes
from support.rest_checks import expect_back_to, expect_secret

from baton.engine.oracle import oracle_answer

VOCAB = 512
CANARY = [431, 287, 305, 199, 77, 402, 350, 118]


def oracle(log: RequestLog) -> list[int]:
    return oracle_answer(log.prompt, log.max_tokens, VOCAB)


def prompts(count: int) -> list[list[int]]:
    return [[*CANARY * 8, 5 + number] for number in range(count)]


async def ask_all(cluster: ProcessCluster, history: History, count: int) -> None:
    await asyncio.gather(
        *(cluster.ask(history, prompt, max_tokens=32) for prompt in prompts(count))
    )


async def test_a_cluster_of_processes_lives_through_its_lives(
    tmp_path: Path, redis_url: str
) -> None:
    model = write_oracle_model(tmp_path / "model")
    history = History()
    folder = tmp_path / "cluster"
    folder.mkdir()
    async with run_processes(model, folder, redis_url) as cluster:
        await ask_all(cluster, history, 4)
        await cluster.expect_rest()
        before = cluster.usage()
        await ask_all(cluster, history, 4)
        await cluster.expect_rest()
        await expect_back_to(before)

        # Frozen for a while that nobody minds.
        decode = cluster["d0"]
        decode.freeze()
        asking = asyncio.create_task(cluster.ask(history, prompts(1)[0], max_tokens=16))
        done, _ = await asyncio.wait([asking], timeout=0.5)
        assert not done
        decode.thaw()
        await asking

        # Killed, and back as another life at the same address.
        prefill = cluster["p0"]
        address, epoch = prefill.said["address"], prefill.epoch
        prefill.kill()
        await cluster.restart("p0")
        assert prefill.said["address"] == address
        assert prefill.epoch > epoch
        await ask_all(cluster, history, 2)

        # Asked to end.
        decode.terminate()
        assert await decode.wait_until_ended() == 0
        await cluster.restart("d0")
        await ask_all(cluster, history, 2)
        await cluster.expect_rest()
        assert [life.was_killed for life in prefill.lives] == [True, False]
        assert cluster.router.is_alive

        # A place that is armed with nonsense is refused at the start, in one line.
        prefill.terminate()
        assert await prefill.wait_until_ended() == 0
        prefill.arm("p.submitted", "kill")
        (folder / "failpoints" / "p0" / "p.submited.arm").write_text("kill")
        prefill.start()
        assert await prefill.wait_until_ended() == 1
        assert "p.submited.arm arms no failpoint" in prefill.log_text
        history.check(oracle)
        expect_secret(cluster.logs, tokens=[CANARY])
    assert not any(process.is_alive for process in cluster.processes)
