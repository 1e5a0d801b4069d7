"""A unified worker computes prompts and answers in one batch, and no KV crosses until it drains."""

import asyncio
import random
from pathlib import Path

import pytest
from support.cluster import Answer, Cluster, run_cluster, until
from support.hf_models import FAMILIES, VOCAB, greedy, write_family
from support.oracle import Oracle

from baton.cli import cluster as processes
from baton.client.admin import AdminClient
from baton.client.client import BatonClient
from baton.client.replies import Finish
from baton.common.metric_names import MOVES
from baton.worker.server import WorkerServer

BLOCK = 32
OUTPUT = 64
LONG = 600


def prompts(lengths: list[int], *, seed: int = 7) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(5, VOCAB) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Oracle:
    return Oracle(tiny_llama)


async def test_answers_equal_one_engine_and_second_round_comes_from_the_cache(
    tiny_llama: Path, redis_url: str, oracle: Oracle
) -> None:
    asked = prompts([1, 2, 31, 32, 33, 64, 65, 100, 150, 200, 257, 300])
    expected = oracle.greedy(asked, OUTPUT)
    cluster = run_cluster(
        tiny_llama, redis_url, prefill=0, decode=0, unified=1, max_num_batched_tokens=64
    )
    async with cluster as running:
        runner = running.unified[0].engine.runner
        num_forwarded = num_steps = 0
        for is_again in (False, True):
            answers = await asyncio.gather(
                *(running.generate(prompt, max_tokens=OUTPUT) for prompt in asked)
            )
            await running.expect_rest()
            assert [answer.tokens for answer in answers] == expected
            for prompt, answer in zip(asked, answers, strict=True):
                expect_local(answer)
                if is_again:
                    assert answer.usage.cached_tokens >= (len(prompt) - 1) // BLOCK * BLOCK
            num_forwarded += sum(
                len(prompt) - answer.usage.cached_tokens + OUTPUT - 1
                for prompt, answer in zip(asked, answers, strict=True)
            )
            assert runner.tokens_forwarded == num_forwarded, "something was computed twice"
            # One after the other they would take more than OUTPUT steps each.
            num_steps, steps = runner.steps, runner.steps - num_steps
            assert steps < len(asked) * OUTPUT / 4
        assert running.bytes_read() == 0


def expect_local(answer: Answer) -> None:
    report = answer.report
    assert (report.mode.value, report.kv_bytes, report.transport) == ("local", 0, "")
    assert (report.prefill_worker, report.attempts) == ("", 1)
    assert report.decode_worker.startswith("u0@")
    assert report.prefill_computed_tokens == 0


async def test_one_token_is_answered_by_the_unified_worker(
    tiny_llama: Path, redis_url: str, oracle: Oracle
) -> None:
    prompt = prompts([100])[0]
    async with run_cluster(tiny_llama, redis_url, prefill=0, decode=0, unified=1) as cluster:
        answer = await cluster.generate(prompt, max_tokens=1)
        assert answer.tokens == oracle.greedy([prompt], 1)[0]
        expect_local(answer)
        await cluster.expect_rest()


async def test_a_pair_and_a_unified_worker_serve_side_by_side(
    tiny_llama: Path, redis_url: str, oracle: Oracle
) -> None:
    asked = prompts([33, 64, 100, 150, 70, 90, 120, 45], seed=3)
    expected = oracle.greedy(asked, OUTPUT)
    async with run_cluster(tiny_llama, redis_url, unified=1) as cluster:
        answers = await asyncio.gather(
            *(cluster.generate(prompt, max_tokens=OUTPUT) for prompt in asked)
        )
        await cluster.expect_rest()
    assert [answer.tokens for answer in answers] == expected
    by_mode = {
        mode: {answer.report.decode_worker.partition("@")[0] for answer in found}
        for mode in ("disagg", "local")
        if (found := [answer for answer in answers if answer.report.mode.value == mode])
    }
    assert by_mode == {"disagg": {"d0"}, "local": {"u0"}}
    assert sum(answer.report.mode.value == "local" for answer in answers) == len(asked) / 2


@pytest.mark.parametrize("transport", ["memory", "nixl"])
async def test_a_unified_worker_that_drains_hands_its_answer_on(
    transport: str, tiny_llama: Path, redis_url: str, oracle: Oracle
) -> None:
    """Every token of prompt and answer is computed once, on one of the two."""
    prompt = prompts([150], seed=9)[0]
    cluster = run_cluster(
        tiny_llama, redis_url, prefill=0, decode=0, unified=2, transport=transport
    )
    async with cluster as running:
        asking = asyncio.create_task(running.generate(prompt, max_tokens=LONG))
        source, target = await holder_first(running, len(prompt) + 20)
        await source.drain()
        answer = await asking
        await running.expect_rest()
        assert answer.tokens == oracle.greedy([prompt], LONG)[0]
        assert running.router.dispatch.counters[MOVES] == 1
        counted = [worker.engine.runner.tokens_forwarded for worker in (source, target)]
        assert min(counted) > 0
        assert sum(counted) == len(prompt) + LONG - 1
        assert answer.report.decode_worker == str(target.identity)
        assert (answer.report.mode.value, answer.report.attempts) == ("local", 1)
        assert answer.report.kv_bytes == running.bytes_read() > 0


async def holder_first(cluster: Cluster, num_forwarded: int) -> tuple[WorkerServer, WorkerServer]:
    """Both workers, once the one that has the request has forwarded that many tokens."""

    def holders() -> list[WorkerServer]:
        return [
            worker
            for worker in cluster.unified
            if worker.engine.runner.tokens_forwarded >= num_forwarded
        ]

    await until(lambda: bool(holders()), "nobody computes the answer")
    (source,) = holders()
    (target,) = [worker for worker in cluster.unified if worker is not source]
    return source, target


async def test_a_process_that_serves_alone_answers_as_transformers(tmp_path: Path) -> None:
    family = sorted(FAMILIES)[0]
    folder, model = write_family(family, tmp_path)
    asked = prompts([1, 33, 64, 200, 301])
    expected = [greedy(model, prompt, OUTPUT) for prompt in asked]
    plan = processes.Plan(
        model=str(folder),
        num_prefill=0,
        num_decode=0,
        num_unified=1,
        router_flags={"http_port": 0, "grpc_port": 0, "admin_port": 0},
        worker_flags={
            "max_num_batched_tokens": 128,
            "num_threads": 1,
            "num_blocks": 200,
            "check_invariants": True,
        },
    )
    cluster = processes.Cluster(plan)
    try:
        await cluster.start()
        async with (
            BatonClient(cluster.endpoints.grpc) as client,
            AdminClient(cluster.endpoints.admin) as admin,
        ):
            answers = await asyncio.gather(*(ask(client, prompt) for prompt in asked))
            workers = await admin.workers()
    finally:
        await cluster.stop()
    assert cluster.num_deaths == 0
    assert [tokens for tokens, _ in answers] == expected
    assert {finish.mode.value for _, finish in answers} == {"local"}
    assert [(worker.id, worker.role, worker.state) for worker in workers] == [
        ("unified-0", "unified", "ready")
    ]


async def ask(client: BatonClient, prompt: list[int]) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    finish = None
    async for chunk in client.generate(prompt, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True):
        tokens.extend(chunk.token_ids)
        finish = chunk.finish or finish
    assert finish is not None
    return tokens, finish
