"""Tests of faults on a cluster of processes that serves the oracle model, and what ends each.

    trials = Trials(cluster)
    await trials.warm_up(prompt_len=100)
    async with trials.one() as history:
        ... break something while requests run ...

A trial begins and ends at rest, and every answer in it is checked against the oracle, so that many
of them can share one cluster.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from support.history import History, Oracle, RequestLog
from support.processes import ProcessCluster, ServedProcess
from support.rest_checks import Usage, expect_back_to, expect_rest, expect_secret
from support.waiting import eventually

from baton.client.client import BatonClient
from baton.client.replies import Chunk, Finish, Worker
from baton.common.errors import BatonError
from baton.engine.oracle import oracle_answer

VOCAB = 512
# Ids of three digits: three of them in a row are in no log by chance.
_FIRST_ID = 100
_CANARY_LENGTH = 8


def prompt_of(length: int, source: random.Random) -> list[int]:
    return [source.randrange(_FIRST_ID, VOCAB) for _ in range(length)]


def oracle_of(num_words: int = 8) -> Oracle:
    """The answers of an oracle model whose KV of a token is so many 8-byte words.

    Of a request that ended with an error one token more than it got, for that is all that counts.
    """

    def oracle(log: RequestLog) -> list[int]:
        has_failed = any(end.error is not None for end in log.ends)
        length = min(log.max_tokens, len(log.tokens) + 1) if has_failed else log.max_tokens
        return oracle_answer(log.prompt, length, VOCAB, num_words=num_words)

    return oracle


class Trials:
    """Many tests on one cluster of the oracle model, one after the other.

    `num_words`: what the model keeps of a token, in 8-byte words. `scratch_bytes`: what a step
    needs beside the arena, of which allocators keep now more, now less.
    """

    def __init__(
        self, cluster: ProcessCluster, *, num_words: int = 8, scratch_bytes: int = 0
    ) -> None:
        self.cluster = cluster
        self._oracle = oracle_of(num_words)
        self._scratch_bytes = scratch_bytes
        # Of a warm life by name: what a later life must come back to.
        self._warm: dict[str, Usage] = {}

    async def warm_up(self, *, prompt_len: int, num_requests: int = 16) -> None:
        """Every pair of workers has met, and every path was taken once: the baseline of G6."""
        source = random.Random(0)
        history = History()
        prompts = [prompt_of(prompt_len, source) for _ in range(num_requests)]
        await asyncio.gather(
            *(ask(self.cluster, history, prompt, max_tokens=4) for prompt in prompts)
        )
        history.check(self._oracle)
        await self.cluster.expect_rest()
        usage = self.cluster.usage()
        for process in self.cluster.processes:
            warm = usage[process.pid]
            self._warm[process.name] = replace(warm, rss_bytes=warm.rss_bytes + self._scratch_bytes)

    @asynccontextmanager
    async def one(
        self, *, allowed: Collection[type[BatonError]] = (), rest_deadline_s: float = 15.0
    ) -> AsyncIterator[History]:
        """G1 to G8 of everything that is asked inside; processes that have ended are let be."""
        cluster = self.cluster
        for process in cluster.processes:
            # As a test that failed may have left it.
            process.disarm_all()
            if process.is_alive:
                process.thaw()
            else:
                await cluster.restart(process.name)
        await cluster.wait_until_attached()
        await expect_rest(cluster.admin)
        history = History()
        yield history
        history.check(self._oracle, allowed)
        await cluster.expect_rest(deadline_s=rest_deadline_s)
        alive = [process for process in cluster.processes if process.is_alive]
        await expect_back_to({one.pid: self._warm[one.name] for one in alive})
        canaries = [log.prompt[:_CANARY_LENGTH] for log in history.requests]
        expect_secret(cluster.logs, tokens=canaries)


@dataclass(eq=False)
class Asked:
    """A request that runs by itself: what its client saw, and the report at its end."""

    log: RequestLog
    client: BatonClient
    finish: Finish | None = None

    @property
    def report(self) -> Finish:
        assert self.finish is not None, f"{self.log.id} has no whole answer: {self.log.ends}"
        return self.finish

    async def run(self, *, deadline_s: float) -> "Asked":
        await self.log.follow(self._chunks(deadline_s))
        return self

    async def _chunks(self, deadline_s: float) -> AsyncIterator[Chunk]:
        async for chunk in self.client.generate(
            self.log.prompt,
            max_tokens=self.log.max_tokens,
            timeout_s=deadline_s,
            request_id=self.log.id,
            temperature=0.0,
            ignore_eos=True,
        ):
            self.finish = chunk.finish or self.finish
            yield chunk


def ask(
    cluster: ProcessCluster,
    history: History,
    prompt: list[int],
    *,
    max_tokens: int,
    deadline_s: float = 60.0,
    client: BatonClient | None = None,
) -> "asyncio.Task[Asked]":
    """Send one greedy request, which runs on as a task."""
    name = f"request-{len(history.requests)}"
    log = history.submit(name, prompt, max_tokens=max_tokens, deadline_s=deadline_s)
    asked = Asked(log, client or cluster.client)
    return asyncio.create_task(asked.run(deadline_s=deadline_s), name=name)


async def who_is_at(processes: Iterable[ServedProcess], place: str) -> ServedProcess:
    """All of them are armed; the one that comes there first, and the others are disarmed."""
    found: list[ServedProcess] = []

    async def missing() -> str:
        found.extend(process for process in processes if process.was_hit(place))
        return "" if found else "nobody came there"

    await eventually(missing, place, deadline_s=30.0)
    for process in processes:
        if process is not found[0]:
            process.disarm(place)
    return found[0]


async def life_of(cluster: ProcessCluster, name: str) -> Worker:
    """The newest life of a worker, as the router sees it."""
    lives = [worker for worker in await cluster.admin.workers() if worker.id == name]
    assert lives, f"the router knows no {name}"
    return max(lives, key=lambda worker: worker.epoch)


async def holder(cluster: ProcessCluster, role: str) -> ServedProcess:
    """The worker of a role that has the router's only request."""
    found: list[str] = []

    async def missing() -> str:
        workers = await cluster.admin.workers()
        found[:] = [one.id for one in workers if one.role == role and one.requests]
        return "" if len(found) == 1 else f"{found} have requests"

    await eventually(missing, f"one {role} worker with a request")
    return cluster[found[0]]
