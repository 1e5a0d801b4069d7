"""Tests of faults in one process: a cluster, what its clients saw, and what must hold at the end.

    async with trial(model, redis_url, prefill=2, decode=2, time_scale=0.1) as run:
        kill = run.kill_at("d.after_emit", 20)      # the first worker that comes by 20 times
        log = await run.ask(prompt, max_tokens=64)
        ...

At the end of the block G1 to G3, G5 and G6 are checked (`support.history`, `support.rest_checks`).
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.cluster import Cluster, run_cluster, until
from support.history import History, RequestLog
from support.rest_checks import Usage, expect_rest_inside, usage
from support.waiting import eventually

from baton.common.errors import BatonError
from baton.common.failpoints import armed
from baton.common.sampling import SamplingParams
from baton.engine.oracle import oracle_answer
from baton.router.generation import GenerationSpec, Report, Stream, TokenEvent
from baton.worker.server import WorkerServer

VOCAB_SIZE = 512


class WorkerKilled(BaseException):
    """Ends an engine thread where it stands, as SIGKILL would."""


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens; another seed shares no block with it."""
    return random.Random(seed).choices(range(4, VOCAB_SIZE), k=length)


def oracle(log: RequestLog) -> list[int]:
    return oracle_answer(log.prompt, log.max_tokens, VOCAB_SIZE)


class Kill:
    """The worker that comes by a failpoint for the n-th time stops there, and all of it is gone.

    Its engine thread ends at that very place; streams are cut, its arena is out of reach, Redis is
    not told. `victim` is set when that is done.
    """

    def __init__(self, cluster: Cluster, times: int) -> None:
        self.victim: WorkerServer | None = None
        self.is_done = asyncio.Event()
        self._cluster = cluster
        self._left = times
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []

    def __call__(self) -> None:
        """On the engine thread of whoever comes by."""
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return
        here = threading.current_thread()
        (victim,) = (each for each in self._cluster.workers if each._thread._thread is here)
        self._loop.call_soon_threadsafe(self._begin, victim)
        raise WorkerKilled

    def _begin(self, victim: WorkerServer) -> None:
        self._tasks.append(asyncio.create_task(self._crash(victim)))

    async def _crash(self, victim: WorkerServer) -> None:
        await crash(self._cluster, victim)
        self.victim = victim
        self.is_done.set()


async def crash(cluster: Cluster, worker: WorkerServer) -> None:
    """Take a worker away as SIGKILL does: nobody is told, nothing is handed over."""
    cluster.stopped.add(worker)
    # First: no peer reads its arena any more, and what its engine still does reaches nobody.
    worker._transport.close()
    worker._control.close()
    worker._link_server.close()
    await worker._grpc.server.stop(0)
    worker._stopping.set()
    for task in worker._tasks:
        task.cancel()
    await asyncio.gather(*worker._tasks, return_exceptions=True)
    await worker._links.close()
    await worker._thread.stop()
    await worker._redis.aclose()


class Trial:
    """A cluster under test and the history of its requests."""

    def __init__(self, cluster: Cluster, stack: AsyncExitStack) -> None:
        self.cluster = cluster
        self.history = History()
        # Of the requests that `ask` brought to a whole answer, by the name in their log.
        self.reports: dict[str, Report] = {}
        self._stack = stack

    def kill_at(self, failpoint: str, times: int = 1) -> Kill:
        """Kill the worker that reaches the failpoint for the n-th time, counted over all."""
        kill = Kill(self.cluster, times)
        self.at(failpoint, kill)
        return kill

    def at(self, failpoint: str, action: Callable[[], object]) -> None:
        """Call `action` at the failpoint until the trial ends."""
        self._stack.enter_context(armed(failpoint, action))

    async def ask(
        self,
        prompt: list[int],
        *,
        max_tokens: int = 64,
        deadline_s: float = 30.0,
        request_id: str = "",
        **sampling: Any,
    ) -> RequestLog:
        """One request to its end, greedy unless told otherwise."""
        log = self.begin(prompt, max_tokens=max_tokens, deadline_s=deadline_s)
        spec = self.spec(log, request_id=request_id, **sampling)
        try:
            stream = self.cluster.router.source.submit(spec)
        except BatonError as error:
            log.failed(error)
            return log
        try:
            await log.follow(self._noted(log, stream))
        except asyncio.CancelledError:
            log.cancelled()
            raise
        finally:
            # As both fronts do: a client that goes away takes its request along.
            await stream.aclose()
        return log

    def begin(
        self, prompt: list[int], *, max_tokens: int = 64, deadline_s: float = 30.0
    ) -> RequestLog:
        """A request that the test itself follows."""
        name = f"r{len(self.history.requests)}"
        return self.history.submit(name, prompt, max_tokens=max_tokens, deadline_s=deadline_s)

    def spec(self, log: RequestLog, *, request_id: str = "", **sampling: Any) -> GenerationSpec:
        params = {"temperature": 0.0, "ignore_eos": True, **sampling}
        return GenerationSpec(
            request_id=request_id or log.id,
            model=self.cluster.router.catalog.models()[0].name,
            prompt_tokens=list(log.prompt),
            sampling=SamplingParams(max_tokens=log.max_tokens, **params),
            stop=(),
            tenant_key=b"",
            timeout_s=log.deadline_s,
        )

    async def _noted(self, log: RequestLog, stream: Stream) -> AsyncIterator[TokenEvent]:
        async for event in aiter(stream):
            if event.report is not None:
                self.reports[log.id] = event.report
            yield event

    def report(self, log: RequestLog) -> Report:
        return self.reports[log.id]

    def counter(self, name: str) -> int:
        """Of the router and of all workers that run, as they count now."""
        router = self.cluster.router
        total = router.dispatch.counters.get(name, 0) + router.fleet.counters.get(name, 0)
        for worker in self.cluster.workers:
            total += counters(worker)[name]
        return total

    async def until_lost(self, worker: WorkerServer) -> None:
        await until(
            lambda: self.cluster.router.fleet.get(worker.identity) is None,
            f"the router does not see that {worker.identity} is gone",
        )


def counters(worker: WorkerServer) -> Counter[str]:
    """What a worker's parts have counted, also since its last report."""
    core: Any = worker.core
    counted: Counter[str] = Counter(core._counters)
    for part in ("_owner", "handovers", "_moves", "_integrity"):
        counted.update(getattr(getattr(core, part, None), "counters", {}))
    return counted


@asynccontextmanager
async def trial(
    model: Path,
    redis_url: str,
    *,
    allowed: Collection[type[BatonError]] = (),
    is_crowd: bool = False,
    **flags: Any,
) -> AsyncIterator[Trial]:
    """A cluster of `run_cluster`; `allowed` errors may end a request, everything else may not.

    `is_crowd`: hundreds of clients live in this process, whose allocators keep what they took.
    """
    before = _own_usage()
    async with AsyncExitStack() as stack, run_cluster(model, redis_url, **flags) as cluster:
        run = Trial(cluster, stack)
        yield run
        run.history.check(oracle, allowed)
        await until(
            lambda: cluster.router.dispatch.num_requests == 0, "the router keeps a request", 5.0
        )
        await expect_rest_inside(cluster)
    await _expect_nothing_kept(before, counts_memory=not is_crowd)


# What this process keeps of the first cluster for all later ones: gRPC's threads, torch's.
_warm: list[Usage] = []


def _own_usage() -> Usage:
    """Without the threads of the loop's executor, which stay until the loop ends."""
    used = usage()
    idle = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    return replace(used, threads=used.threads - idle)


async def _expect_nothing_kept(before: Usage, *, counts_memory: bool) -> None:
    """G6: files, threads, tasks and memory are back where they were."""
    if not _warm:
        _warm.append(_own_usage())
        return
    (warm,) = _warm
    allowed = Usage(
        fds=max(before.fds, warm.fds),
        threads=max(before.threads, warm.threads),
        rss_bytes=max(before.rss_bytes, warm.rss_bytes),
        tasks=before.tasks,
    )

    async def missing() -> list[str]:
        used = _own_usage()
        if not counts_memory:
            used = replace(used, rss_bytes=0)
        return used.grown_from(allowed)

    await eventually(missing, "resources are not back")
