"""F01, F02 and F10 on real processes: workers are killed at exact places, and come back.

The router hears of a process that dies at once: nobody listens at its address any more.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.history import History
from support.oracle_model import write_oracle_model
from support.process_trials import (
    Asked,
    Trials,
    ask,
    holder,
    life_of,
    prompt_of,
    who_is_at,
)
from support.processes import ProcessCluster, ServedProcess, run_processes

from baton.client.replies import Worker
from baton.common.clock import SystemClock
from baton.common.codec import error_from_pb
from baton.common.errors import BatonError, HandshakeMismatch
from baton.common.ids import Epoch, WorkerId, WorkerIdentity
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.link_codec import reader_hello_to_pb
from baton.v1 import kv_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

Figure = Callable[[str, float, str], None]

OUTPUT = 64
PROMPT = 150
# What one step of prefill takes, so that a prompt needs several.
CHUNK = 64
GAP_S = 3.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trials(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> AsyncIterator[Trials]:
    folder = tmp_path_factory.mktemp("lost-workers")
    model = write_oracle_model(folder / "model")
    async with run_processes(
        model, folder, redis_url, prefill=2, decode=2, max_num_batched_tokens=CHUNK
    ) as cluster:
        trials = Trials(cluster)
        await trials.warm_up(prompt_len=PROMPT)
        yield trials


def of_role(cluster: ProcessCluster, role: str) -> list[ServedProcess]:
    return [worker for worker in cluster.workers if worker.role == role]


async def expect_recovery(
    cluster: ProcessCluster,
    victim: ServedProcess,
    asking: "asyncio.Task[Asked]",
    *,
    what: str,
    figure: Figure,
) -> None:
    """Kills a prefill worker; its request is computed once more by another one."""
    killed_at = SystemClock().monotonic()
    victim.kill()
    asked = await asking
    report = asked.report
    assert report.attempts == 2
    assert report.prefill_worker.partition("@")[0] != victim.name
    # Computed once: what an earlier attempt may have left is nobody's business but its own.
    assert report.prefill_computed_tokens <= PROMPT + 1
    assert report.decode_forwarded_tokens <= OUTPUT
    for worker in of_role(cluster, "decode"):
        assert await health_of(worker) == health_pb2.HealthCheckResponse.SERVING
    next_at = min(at for at in asked.log.times_s if at > killed_at)
    assert next_at - killed_at <= GAP_S
    figure(what, next_at - killed_at, "s")
    await cluster.restart(victim.name)


async def health_of(worker: ServedProcess) -> int:
    async with grpc.aio.insecure_channel(worker.said["address"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    status: int = answer.status
    return status


async def refusal_of(address: str, wanted: Worker) -> BatonError:
    """What a reader is told that dials a life which is no longer there."""
    owner = WorkerIdentity(WorkerId(wanted.id), Epoch(wanted.epoch), wanted.incarnation)
    ours = LocalSide(
        identity=WorkerIdentity(WorkerId("reader"), Epoch(1), "life"),
        fingerprint=wanted.fingerprint,
        fields={},
        transport="nixl",
    )
    async with grpc.aio.insecure_channel(address) as channel:
        call = kv_pb2_grpc.KvServiceStub(channel).Link(timeout=5)
        await call.write(reader_hello_to_pb(ours, owner))
        response = await call.read()
    assert response.HasField("refusal"), "the new life takes itself for the old one"
    return error_from_pb(response.refusal.error)


@pytest.mark.parametrize("emitted", [1, OUTPUT // 2, OUTPUT - 1])
async def test_f01_a_decode_worker_is_killed_and_its_answer_goes_on_elsewhere(
    trials: Trials, emitted: int, figure: Figure
) -> None:
    """After token 1, in the middle, before the last one: nothing lost, nothing twice, soon."""
    cluster = trials.cluster
    async with trials.one() as history:
        decodes = of_role(cluster, "decode")
        for worker in decodes:
            worker.arm("d.after_emit", f"wait*{emitted}")
        asking = ask(cluster, history, prompt_of(PROMPT, random.Random(emitted)), max_tokens=OUTPUT)
        victim = await who_is_at(decodes, "d.after_emit")
        victim.kill()
        asked = await asking
        assert asked.report.attempts == 2
        assert asked.report.decode_worker.partition("@")[0] != victim.name
        assert asked.log.longest_gap_s <= GAP_S
        figure(f"F01 gap, D killed after token {emitted}", asked.log.longest_gap_s, "s")
        await cluster.restart(victim.name)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("p.submitted", marks=pytest.mark.slow_fault),
        pytest.param("p.mid_prefill", marks=pytest.mark.slow_fault),
        "p.before_first_token",
        pytest.param("p.after_first_token", marks=pytest.mark.slow_fault),
    ],
)
async def test_f02_a_prefill_worker_is_killed_before_the_transfer_has_ended(
    trials: Trials, place: str, figure: Figure
) -> None:
    """The prompt is computed once more elsewhere, and the decode worker stays in service."""
    cluster = trials.cluster
    async with trials.one() as history:
        prefills = of_role(cluster, "prefill")
        for worker in prefills:
            worker.arm(place, "wait")
        asking = ask(cluster, history, prompt_of(PROMPT, random.Random(place)), max_tokens=OUTPUT)
        victim = await who_is_at(prefills, place)
        what = f"F02 next token after P was killed at {place}"
        await expect_recovery(cluster, victim, asking, what=what, figure=figure)


async def held_before_its_reads(
    cluster: ProcessCluster, history: History, source: random.Random
) -> "tuple[asyncio.Task[Asked], ServedProcess, ServedProcess]":
    """A request whose reader has blocks, lease and handles, and is held there; with its owner."""
    decodes = of_role(cluster, "decode")
    for worker in decodes:
        worker.arm("d.after_reserve", "wait*1")
    asking = ask(cluster, history, prompt_of(PROMPT, source), max_tokens=OUTPUT)
    reader = await who_is_at(decodes, "d.after_reserve")
    return asking, reader, await holder(cluster, "prefill")


async def test_f02_a_prefill_worker_is_killed_before_anything_was_read(
    trials: Trials, figure: Figure
) -> None:
    """The decode worker has its blocks, the lease and the handles, and its owner dies."""
    cluster = trials.cluster
    async with trials.one() as history:
        asking, reader, victim = await held_before_its_reads(cluster, history, random.Random(2))
        asyncio.get_running_loop().call_later(0.1, reader.release, "d.after_reserve")
        what = "F02 next token after P was killed before the transfer"
        await expect_recovery(cluster, victim, asking, what=what, figure=figure)


async def test_f10_a_worker_comes_back_at_its_address_while_its_old_handles_are_in_flight(
    trials: Trials, figure: Figure
) -> None:
    """Another epoch is another worker: the old references are refused, the new life serves soon."""
    cluster = trials.cluster
    async with trials.one() as history:
        source = random.Random(10)
        asking, reader, victim = await held_before_its_reads(cluster, history, source)
        old = await life_of(cluster, victim.name)
        victim.kill()
        victim.disarm_all()
        victim.start()
        await victim.wait_until_ready()
        new = f"{victim.name}@{victim.epoch}"
        ready_at = SystemClock().monotonic()
        # The reader still holds the old life's handles, and now dials whoever is at its address.
        reader.release("d.after_reserve")
        served_by: list[str] = []
        while new not in served_by:
            pair = [
                ask(cluster, history, prompt_of(PROMPT, source), max_tokens=8) for _ in range(2)
            ]
            served_by = [(await each).report.prefill_worker for each in pair]
            assert SystemClock().monotonic() - ready_at <= GAP_S, served_by
        first_s = SystemClock().monotonic() - ready_at
        assert first_s <= 2.0
        figure("F10 first answer through a restarted P", first_s, "s")
        # Its reader was held for as long as a worker takes to start, which may outlast a lease.
        assert (await asking).report.attempts in (2, 3)
        refused = await refusal_of(victim.said["address"], old)
        assert isinstance(refused, HandshakeMismatch)
        assert f"looks for {old.life} " in refused.message
        assert f"but {new} " in refused.message
