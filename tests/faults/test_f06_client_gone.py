"""F06: a client hangs up, in each phase of its request, over either front.

P and D let go of everything within a second. Only what a transfer may still write stays in
quarantine until the transfer has ended.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.answer_streams import FRONTS, AnswerStream
from support.cluster import Cluster, transports, until
from support.fault_transport import FaultScript, faulty
from support.faults import Hold
from support.figures import Figure
from support.trials import Trial, prompt_of, trial

from baton.common.ids import WorkerIdentity
from baton.common.messages import LeaseClaim
from baton.kvtransfer.link_codec import ReaderMessage
from baton.prefill_worker.request import PrefillState

FREED_WITHIN_S = 1.0
PROMPT = 150
LONG = 3000
# No answer here comes to its end by itself while a test looks at it.
OUTPUT = 900


@dataclass
class Scene:
    """A cluster, the client that is about to go, and what holds its request where it is."""

    run: Trial
    open_answer: Callable[[list[int], int], Any]
    script: FaultScript
    held: list[Hold] = field(default_factory=list)
    # Undo what holds the request and is no read.
    undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def cluster(self) -> Cluster:
        return self.run.cluster

    def hold_reads(self) -> None:
        hold = Hold()
        self.held.append(hold)
        self.script.every(hold)

    def let_go(self) -> None:
        self.script.clear()
        for hold in self.held:
            hold.release()
        for undo in self.undo:
            undo()

    def prefilling(self) -> list[PrefillState]:
        (prefill,) = self.cluster.prefills
        return [request.state for request in list(prefill.core._requests.values())]

    def decoding(self) -> list[str]:
        (decode,) = self.cluster.decodes
        return [request.state.value for request in list(decode.core._requests.values())]

    def at_rest(self) -> bool:
        return all(
            not each.core.num_requests
            and each.engine.pool.num_free + each.engine.prefix.num_evictable
            == each.engine.num_blocks
            for each in self.cluster.workers
        )


async def queued(scene: Scene) -> AnswerStream:
    """P has no room: another request's prompt is leased to a reader that does not get on."""
    scene.hold_reads()
    first = await scene.open_answer(prompt_of(LONG, 1), OUTPUT)
    await until(lambda: scene.prefilling() == [PrefillState.LEASED], "the pool of P is not full")
    answer: AnswerStream = await scene.open_answer(prompt_of(LONG, 2), OUTPUT)
    await until(
        lambda: scene.prefilling() == [PrefillState.LEASED, PrefillState.WAITING], "not queued"
    )
    await first.hang_up()
    return answer


async def tokenising(scene: Scene) -> AnswerStream:
    """The router has the bytes of the request and has not submitted it."""
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 1), OUTPUT)
    return answer


async def prefill(scene: Scene) -> AnswerStream:
    """Chunk after chunk, each slowed down so that the prompt is not done before the client goes."""
    pause = threading.Event()
    scene.run.at("p.mid_prefill", lambda: pause.wait(0.02) and None)
    answer: AnswerStream = await scene.open_answer(prompt_of(LONG, 1), OUTPUT)
    await until(lambda: scene.prefilling() == [PrefillState.RUNNING], "P does not compute")
    return answer


async def prefilled(scene: Scene) -> AnswerStream:
    """P is done, and D's claim of the lease never reached it."""
    (decode,) = scene.cluster.decodes
    links, send = decode._links, decode._links.send

    def lose_claims(owner: WorkerIdentity, message: ReaderMessage) -> None:
        if not isinstance(message, LeaseClaim):
            send(owner, message)

    links.send = lose_claims  # type: ignore[method-assign]
    scene.undo.append(lambda: setattr(links, "send", send))
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 1), OUTPUT)
    await until(lambda: scene.prefilling() == [PrefillState.LEASED], "P is not done")
    assert scene.decoding() == ["claiming"]
    return answer


async def decode_queued(scene: Scene) -> AnswerStream:
    """D has no room: another request pulls its prompt and does not get on."""
    scene.hold_reads()
    first = await scene.open_answer(prompt_of(PROMPT, 1), OUTPUT)
    await until(lambda: scene.decoding() == ["pulling"], "the place on D is not taken")
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 2), OUTPUT)
    await until(lambda: scene.decoding() == ["pulling", "queued"], "not queued on D")
    await first.hang_up()
    return answer


async def transferring(scene: Scene) -> AnswerStream:
    scene.hold_reads()
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 1), OUTPUT)
    await until(lambda: scene.decoding() == ["pulling"], "D does not pull")
    return answer


async def decoding(scene: Scene) -> AnswerStream:
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 1), OUTPUT)
    await answer.read()
    await until(lambda: scene.decoding() == ["running"], "D does not decode")
    return answer


async def final_flush(scene: Scene) -> AnswerStream:
    """The workers are done; the client has not read what the router holds for it."""
    answer: AnswerStream = await scene.open_answer(prompt_of(PROMPT, 1), 8)
    submitted = scene.cluster.prefills[0].engine.runner
    await until(lambda: submitted.steps > 0 and scene.at_rest(), "the workers are not done")
    return answer


PHASES = [
    queued,
    tokenising,
    prefill,
    prefilled,
    decode_queued,
    transferring,
    decoding,
    final_flush,
]


@asynccontextmanager
async def scene_of(front: str, model: Path, redis_url: str) -> AsyncIterator[Scene]:
    script = FaultScript()
    async with trial(
        model,
        redis_url,
        factory=faulty(transports("memory"), script),
        max_num_batched_tokens=64,
        # One prompt of LONG fills P; one sequence fills D.
        per_worker=[{"num_blocks": 128}, {"max_num_seqs": 1}],
    ) as run:
        yield Scene(run, lambda *asked: FRONTS[front].open(run.cluster, *asked), script)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
async def test_f06_a_client_that_hangs_up_frees_its_blocks(
    phase: Callable[[Scene], Any],
    front: str,
    oracle_model: Path,
    redis_url: str,
    figure: Figure,
) -> None:
    """Both workers are at rest at most a second later, and the next client is served."""
    async with scene_of(front, oracle_model, redis_url) as scene:
        answer = await phase(scene)
        loop = asyncio.get_running_loop()
        gone_at = loop.time()
        await answer.hang_up()
        await until(lambda: scene.cluster.router.dispatch.num_requests == 0, "the router goes on")
        # Whoever reads now reads into quarantine; what is left of a transfer ends here.
        await until(
            lambda: not any(each.core.num_requests for each in scene.cluster.workers),
            "a worker goes on",
        )
        scene.let_go()
        await until(scene.at_rest, "blocks are held")
        freed_s = loop.time() - gone_at
        assert freed_s <= FREED_WITHIN_S
        figure("F06: blocks are free after a client is gone", freed_s, "s")
        await scene.run.ask(prompt_of(PROMPT, 9), max_tokens=8)
