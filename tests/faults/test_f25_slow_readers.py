"""F25: clients that read slowly or not at all, over either front."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from support.answer_streams import FRONTS, SMALL_BUFFER_BYTES, AnswerStream
from support.cluster import until
from support.figures import Figure
from support.rest_checks import PAGE_BYTES
from support.trials import Trial, prompt_of, trial

from baton.common.metric_names import SLOW_CLIENTS
from baton.common.periodic import wait_for
from baton.common.timing import DEFAULT_TIMING

# Of the time-outs: 500 answers at once on a small machine need more than a cluster has, because one
# event loop serves the router, both workers and all clients here.
SCALE, CROWD_SCALE = 0.05, 3.0
TOKEN_BYTES = 4
STREAM_BYTES = 64 * 1024
OUTPUT = 120
# More than all buffers between a router and a client that does not read.
LONG = {"grpc": 2000, "http": 3900}


def small_buffers(run: Trial) -> None:
    """The HTTP front's side of new connections: the kernel would keep megabytes for a client."""
    listener = run.cluster.router._socket
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Unread:
    """The most that the router held for clients at any look."""

    def __init__(self, run: Trial) -> None:
        self._source = run.cluster.router.source
        self._before = rss_bytes()
        self.tokens = 0
        self.rss_growth = 0

    def look(self) -> None:
        held = [len(unread.tokens) for unread in list(self._source._unread.values())]
        self.tokens = max(self.tokens, *held, 0)
        self.rss_growth = max(self.rss_growth, rss_bytes() - self._before)


@asynccontextmanager
async def opened(
    run: Trial, front: str, prompts: list[list[int]], max_tokens: int
) -> AsyncIterator[list[AnswerStream]]:
    """Answers, one for each prompt; every client hangs up at the end."""
    async with AsyncExitStack() as stack:
        answers: list[AnswerStream] = []
        for prompt in prompts:
            answers.append(await FRONTS[front].open(run.cluster, prompt, max_tokens))
            stack.push_async_callback(answers[-1].hang_up)
        yield answers


@contextmanager
def looking(run: Trial) -> Iterator[Unread]:
    unread = Unread(run)
    loop = asyncio.get_running_loop()
    is_over = False

    def again() -> None:
        unread.look()
        if not is_over:
            loop.call_later(0.02, again)

    again()
    try:
        yield unread
    finally:
        is_over = True


SLOW = [pytest.mark.slow_fault, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("front", "count", "scale"),
    [
        ("grpc", 12, SCALE),
        pytest.param("http", 12, SCALE, marks=SLOW),
        pytest.param("grpc", 500, CROWD_SCALE, marks=SLOW),
        pytest.param("http", 500, CROWD_SCALE, marks=SLOW),
    ],
)
async def test_f25_readers_of_a_token_a_second(
    front: str, count: int, scale: float, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """What waits for each of them stays below 64 KiB, and those who read are served as ever."""
    async with trial(
        oracle_model,
        redis_url,
        is_crowd=count > 100,
        time_scale=scale,
        num_blocks=4096,
        max_num_seqs=512,
    ) as run:
        small_buffers(run)
        prompts = [prompt_of(20, seed) for seed in range(count)]
        with looking(run) as unread:
            async with opened(run, front, prompts, OUTPUT) as answers:
                # The crowd has come before those who read as ever do, and the workers are done long
                # before who reads a token a second.
                await asyncio.gather(*(answer.read() for answer in answers))
                slow = [asyncio.create_task(read_for_a_while(answer, scale)) for answer in answers]
                (decode,) = run.cluster.decodes
                limit_s = 60.0 * max(1.0, scale)
                await until(lambda: not decode.core.num_requests, "D does not get on", limit_s)
                logs = await asyncio.gather(
                    *(run.ask(prompt_of(60, 10_000 + seed), max_tokens=32) for seed in range(8))
                )
                assert [log.ends[0].error for log in logs] == [None] * 8
                await asyncio.gather(*slow)
        assert unread.tokens * TOKEN_BYTES <= STREAM_BYTES
        assert run.counter(SLOW_CLIENTS) == 0
        figure(
            f"F25: router's buffer of a slow reader on {front}, of {count}",
            unread.tokens * TOKEN_BYTES,
            "bytes",
        )
        if count > 100:
            figure(
                f"F25: router, workers and clients together, for each of {count} on {front}",
                unread.rss_growth / count / 1024,
                "KiB",
            )


async def read_for_a_while(answer: AnswerStream, scale: float) -> None:
    """A piece a second of scaled time, for longer than the router waits for who takes nothing."""
    loop, never = asyncio.get_running_loop(), asyncio.Event()
    deadline = loop.time() + 1.2 * scale * DEFAULT_TIMING.slow_client_s
    while loop.time() < deadline:
        if await answer.read() is None:
            return
        await wait_for(never, scale)


@pytest.mark.parametrize("front", ["grpc", pytest.param("http", marks=pytest.mark.slow_fault)])
async def test_f25_a_reader_that_stops_is_cancelled(
    front: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """After the limit, not before; its workers are free, and those who read notice nothing."""
    limit_s = SCALE * DEFAULT_TIMING.slow_client_s
    async with trial(oracle_model, redis_url, time_scale=SCALE) as run:
        small_buffers(run)
        loop = asyncio.get_running_loop()
        prompts = [prompt_of(60, seed) for seed in range(2)]
        async with opened(run, front, prompts, LONG[front]) as answers:
            for answer in answers:
                assert await answer.read() is not None
            stopped_at = loop.time()
            logs = await asyncio.gather(
                *(run.ask(prompt_of(60, 100 + seed), max_tokens=64) for seed in range(8))
            )
            assert [run.report(log).attempts for log in logs] == [1] * 8
            await until(lambda: run.counter(SLOW_CLIENTS) == 2, "nobody is cancelled", 90.0)
            cancelled_s = loop.time() - stopped_at
            assert cancelled_s >= limit_s
            await until(lambda: not run.cluster.decodes[0].core.num_requests, "D decodes on", 1.0)
            figure(f"F25: a reader that stops is cancelled after, on {front}", cancelled_s, "s")
