"""However a request ends, it ends once, with its tokens or one clear error, and leaves nothing."""

import asyncio
import signal
from pathlib import Path

import pytest
from support.cluster import READY_DEADLINE_S, Cluster, run_cluster, until
from support.oracle import Oracle
from support.redis_process import redis_process

from baton.common.errors import (
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    ExceedsKvCapacity,
    InvalidRequest,
    NoWorker,
)
from baton.common.ids import RequestKey, TransferId
from baton.common.messages import PrefillJob, Submit
from baton.common.sampling import Mode, SamplingParams
from baton.router.generation import GenerationSpec
from baton.router.token_stream import DispatchStream

PROMPT = list(range(10, 110))
LONG = 600


def start(cluster: Cluster, prompt: list[int], max_tokens: int) -> DispatchStream:
    spec = GenerationSpec(
        request_id="test",
        model=cluster.router.catalog.models()[0].name,
        prompt_tokens=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        stop=(),
        tenant_key=b"",
        timeout_s=60.0,
    )
    return cluster.router.source.submit(spec)


async def read_until(stream: DispatchStream, count: int) -> list[int]:
    """The first tokens of a stream that goes on."""
    tokens: list[int] = []
    async for event in stream:
        tokens.extend(event.token_ids)
        if len(tokens) >= count:
            return tokens
    raise AssertionError("the stream ended early")


@pytest.mark.parametrize("after_tokens", [0, 1, 20])
async def test_a_cancelled_request_leaves_nothing(
    after_tokens: int, tiny_llama: Path, redis_url: str
) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        stream = start(cluster, PROMPT, LONG)
        if after_tokens:
            await read_until(stream, after_tokens)
        await stream.aclose()
        await stream.aclose()
        await cluster.expect_rest()
        assert cluster.router.dispatch.num_requests == 0


async def test_a_stop_string_ends_the_request_with_its_report(
    tiny_llama: Path, redis_url: str
) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        stream = start(cluster, PROMPT, LONG)
        await read_until(stream, 5)
        last = await stream.finish_early()
        assert last.finish is not None
        assert last.finish.value == "stop"
        assert last.usage is not None
        assert last.usage.completion_tokens >= 5
        assert last.report is not None
        assert last.report.mode.value == "disagg"
        await cluster.expect_rest()


async def test_a_deadline_ends_the_request(tiny_llama: Path, redis_url: str) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        with pytest.raises(DeadlineExceeded):
            await cluster.generate(PROMPT, max_tokens=900, timeout_s=0.3)
        await cluster.expect_rest()


async def test_losing_the_prefill_worker_after_the_join_is_nothing_to_the_request(
    tiny_llama: Path, redis_url: str
) -> None:
    expected = Oracle(tiny_llama).greedy([PROMPT], LONG)[0]
    async with run_cluster(tiny_llama, redis_url) as cluster:
        stream = start(cluster, PROMPT, LONG)
        tokens = await read_until(stream, 3)
        await cluster.prefills[0].stop()
        async for event in stream:
            tokens.extend(event.token_ids)
        assert tokens == expected
        cluster.stopped.add(cluster.prefills[0])


async def test_without_any_prefill_worker_the_decode_worker_computes_the_prompt(
    tiny_llama: Path, redis_url: str
) -> None:
    expected = Oracle(tiny_llama).greedy([PROMPT], 20)[0]
    async with run_cluster(tiny_llama, redis_url) as cluster:
        await cluster.prefills[0].stop()
        cluster.stopped.add(cluster.prefills[0])
        await until(
            lambda: len(cluster.router.fleet.workers()) == 1,
            "the loss is not seen",
            READY_DEADLINE_S,
        )
        answer = await cluster.generate(PROMPT, max_tokens=20)
        assert answer.tokens == expected
        assert answer.report.mode is Mode.LOCAL
        assert answer.report.kv_bytes == 0


async def test_losing_the_only_decode_worker_is_one_clear_error_and_the_lease_ends(
    tiny_llama: Path, redis_url: str
) -> None:
    """The request waits for another one as long as a request may be queued, and not longer."""
    async with run_cluster(tiny_llama, redis_url, time_scale=0.1) as cluster:
        stream = start(cluster, PROMPT, LONG)
        await read_until(stream, 3)
        await cluster.decodes[0].stop()
        cluster.stopped.add(cluster.decodes[0])
        with pytest.raises(BatonError) as failed:
            await read_until(stream, LONG)
        assert failed.value.reason in ("worker_lost", "no_worker")
        prefill = cluster.prefills[0]
        await until(lambda: prefill.core.num_requests == 0, "the prefill worker keeps a request")
        assert prefill.engine.pool.num_free + prefill.engine.prefix.num_evictable == 512


async def test_redis_may_die_and_come_back_empty_while_serving(tiny_llama: Path) -> None:
    expected = Oracle(tiny_llama).greedy([PROMPT], 32)[0]
    with redis_process() as redis:
        async with run_cluster(tiny_llama, redis.url) as cluster:
            redis.process.send_signal(signal.SIGSTOP)
            answers = [await cluster.generate(PROMPT, max_tokens=32) for _ in range(3)]
            redis.process.send_signal(signal.SIGCONT)
            assert [answer.tokens for answer in answers] == [expected] * 3
            redis.process.kill()
            redis.process.wait()
            # Longer than the TTL of the records would be too slow here: the records are gone at
            # once with their server, and nobody may be removed for it.
            answer = await cluster.generate(PROMPT, max_tokens=32)
            assert answer.tokens == expected
            states = [worker.state.value for worker in cluster.router.fleet.workers()]
            assert states == ["ready", "ready"]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "num_blocks", "error"),
    [
        ([], 8, 12, InvalidRequest),
        ([10**6], 8, 12, InvalidRequest),
        (PROMPT, 2000, 80, ContextLengthExceeded),
        (list(range(5, 400)), 100, 12, ExceedsKvCapacity),
    ],
)
async def test_workers_refuse_what_they_cannot_serve_and_stay_healthy(
    prompt: list[int],
    max_tokens: int,
    num_blocks: int,
    error: type[BatonError],
    tiny_llama: Path,
    redis_url: str,
) -> None:
    """Past the router's own validator, as an older router might let it through."""
    async with run_cluster(tiny_llama, redis_url, num_blocks=num_blocks) as cluster:
        with pytest.raises(error):
            await cluster.generate(prompt, max_tokens=max_tokens)
        await cluster.expect_rest()
        assert len((await cluster.generate(PROMPT, max_tokens=4)).tokens) == 4


async def test_a_job_of_the_wrong_role_is_refused(tiny_llama: Path, redis_url: str) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        seen: list[BatonError | None] = []
        router = cluster.router
        router.fleet._events.records = lambda _, records: seen.extend(r.error for r in records)
        sampling = SamplingParams(max_tokens=4)
        for worker in router.fleet.workers():
            worker.send(
                Submit(
                    key=RequestKey(TransferId(bytes(16)), 1),
                    prompt_tokens=[7],
                    sampling=sampling,
                    tenant_key=b"",
                    age_s=0.0,
                    time_left_s=5.0,
                    job=PrefillJob(reader=None),
                )
            )
        await until(lambda: len(seen) == 2, "no answer to a wrong job")
        assert {error.reason for error in seen if error} == {"invalid_request"}
        await cluster.expect_rest()


async def test_requests_without_a_worker_are_told_to_come_back(
    tiny_llama: Path, redis_url: str
) -> None:
    async with run_cluster(tiny_llama, redis_url) as cluster:
        await cluster.decodes[0].drain(deadline_s=1.0)
        await until(
            lambda: any(w.state.value == "drained" for w in cluster.router.fleet.workers()),
            "the drain is not seen",
        )
        with pytest.raises(NoWorker, match="decode") as refused:
            await cluster.generate(PROMPT)
        assert refused.value.retry_after_s is not None
        await asyncio.wait_for(cluster.expect_rest(), 10)
