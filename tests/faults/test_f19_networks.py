"""F19 and F20: a pair of workers that cannot reach each other, lossy and broken connections."""

import asyncio
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.cluster import TransportFactory, transports, until
from support.fault_transport import FaultScript, FaultyReader, FaultyTransport
from support.faults import Fail, Hold
from support.figures import Figure
from support.ports import free_port
from support.tcp_proxy import TcpProxy, tcp_proxy
from support.trials import Trial, prompt_of, trial

from baton.common.ids import WorkerIdentity
from baton.common.metric_names import RECOVERIES, STREAMS_RESUMED
from baton.kvtransfer.transport.base import ArenaDescriptor, Transport
from baton.worker.server import WorkerServer

SCALE = 0.2
GAP_S = 3.0


class PairTransport(FaultyTransport):
    """Reads go wrong between one reader and one owner, both by their ids."""

    def __init__(self, inner: Transport, script: FaultScript, owner: str) -> None:
        super().__init__(inner, script)
        self._owner = owner

    def connect(self, owner: WorkerIdentity, remote: ArenaDescriptor) -> FaultyReader:
        script = self._script if owner.worker_id == self._owner else FaultScript()
        return FaultyReader(self._inner.connect(owner, remote), self._local, script)


def between(owner: str, reader: str, script: FaultScript) -> TransportFactory:
    inner = transports("memory")

    def factory(name: str, identity: WorkerIdentity) -> Transport:
        transport = inner(name, identity)
        if identity.worker_id == reader:
            transport = PairTransport(transport, script, owner)
        return transport

    return factory


async def dial_through(proxy: TcpProxy, reader: WorkerServer, owner: WorkerServer) -> None:
    """From now on the reader reaches the owner through the proxy."""
    links, dial = reader._links, reader._links.dial

    def redirected(who: WorkerIdentity, address: str) -> None:
        dial(who, f"127.0.0.1:{proxy.port}" if who == owner.identity else address)

    links.dial = redirected  # type: ignore[method-assign]
    links.hang_up(owner.identity)
    await until(lambda: owner.identity not in reader.core.handovers.peers, "the direct link stays")


@asynccontextmanager
async def proxied_decode(
    model: Path, redis_url: str, **flags: object
) -> AsyncIterator[tuple[Trial, TcpProxy]]:
    """2 P and 2 D; routers reach d0 through the proxy, and it alone."""
    port = free_port()
    async with tcp_proxy(port) as proxy:
        address = {"listen": f"127.0.0.1:{port}", "advertise": f"127.0.0.1:{proxy.port}"}
        async with trial(
            model,
            redis_url,
            prefill=2,
            decode=2,
            per_worker=[{}, {}, address, {}],
            time_scale=SCALE,
            **flags,
        ) as run:
            yield run, proxy


@pytest.mark.parametrize(
    "fault", [Fail(may_write=False), Fail(), Hold()], ids=["fails", "may land", "hangs"]
)
async def test_f19_a_pair_that_cannot_read_is_left(
    fault: Fail | Hold, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Each request of that pair goes on with another one; those of other pairs notice nothing."""
    script = FaultScript()
    script.every(fault)
    async with trial(
        oracle_model,
        redis_url,
        prefill=2,
        factory=between("p0", "d0", script),
        time_scale=SCALE,
    ) as run:
        logs = await asyncio.gather(
            *(run.ask(prompt_of(150, seed), max_tokens=32) for seed in range(24))
        )
        hit = [log for log in logs if run.report(log).attempts > 1]
        assert hit
        for log in hit:
            report = run.report(log)
            pair = report.prefill_worker.split("@")[0], report.decode_worker.split("@")[0]
            assert pair != ("p0", "d0")
            assert report.attempts <= 3
        spared = [log.longest_gap_s for log in logs if log not in hit]
        figure("F19: gap in a stream of the pair", max(log.longest_gap_s for log in hit), "s")
        figure("F19: median gap in the other streams", statistics.median(spared), "s")
        script.clear()
        if isinstance(fault, Hold):
            fault.release()


@pytest.mark.slow_fault
async def test_f19_a_silent_link_between_two_workers(
    oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Nothing passes between p0 and d0, and neither is told: pings find out."""
    async with trial(oracle_model, redis_url, prefill=2, time_scale=SCALE) as run:
        (owner, _), (reader,) = run.cluster.prefills, run.cluster.decodes
        async with tcp_proxy(owner.port) as proxy:
            await dial_through(proxy, reader, owner)
            await asyncio.gather(*(run.ask(prompt_of(60, seed)) for seed in range(12)))
            assert proxy.num_connections >= 1, "nothing goes through the proxy"
            proxy.stall()
            logs = await asyncio.gather(
                *(run.ask(prompt_of(60, 100 + seed), max_tokens=32) for seed in range(12))
            )
            hit = [log for log in logs if run.report(log).attempts > 1]
            assert hit
            gap_s = max(log.longest_gap_s for log in hit)
            figure("F19: gap in a stream when the link of its pair is silent", gap_s, "s")
            proxy.heal()


@pytest.mark.parametrize("way", ["to the router", "to the worker", "both"])
async def test_f20_a_control_stream_that_loses_everything(
    way: str, oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """Silence is noticed after 6 s of the default time-outs: its requests go on elsewhere."""
    async with proxied_decode(oracle_model, redis_url) as (run, proxy):
        asking = [
            asyncio.create_task(run.ask(prompt_of(60, seed), max_tokens=400)) for seed in range(8)
        ]
        (lossy, _) = run.cluster.decodes
        await until(lambda: lossy.core._scheduler.num_running >= 2, "nothing decodes there")
        if way != "to the worker":
            proxy.to_client.stall()
        if way != "to the router":
            proxy.to_server.stall()
        logs = await asyncio.gather(*asking)
        hit = [log for log in logs if run.report(log).attempts > 1]
        if way != "to the worker":
            assert hit
            # Beside the detection a step or two, and a new prefill.
            gap_s = max(log.longest_gap_s for log in hit)
            assert gap_s <= SCALE * 6.0 + GAP_S
            figure(f"F20: gap at {SCALE:g} of the time-outs, stream lost {way}", gap_s, "s")
        proxy.heal()
        await until(
            lambda: (
                sum(each.state.value == "ready" for each in run.cluster.router.fleet.workers()) == 4
            ),
            "the worker does not come back",
        )


async def test_f20_a_reset_control_stream_is_resumed(
    oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """RST in the middle of answers: the stream is dialled again, and no attempt is lost."""
    async with proxied_decode(oracle_model, redis_url) as (run, proxy):
        asking = [
            asyncio.create_task(run.ask(prompt_of(60, seed), max_tokens=300)) for seed in range(8)
        ]
        (broken, _) = run.cluster.decodes
        for _ in range(3):
            await until(lambda: broken.core._scheduler.num_running >= 1, "nothing decodes there")
            resumed = run.counter(STREAMS_RESUMED)
            proxy.reset()
            await until(lambda: run.counter(STREAMS_RESUMED) > resumed, "not resumed")  # noqa: B023
        logs = await asyncio.gather(*asking)
        assert [run.report(log).attempts for log in logs] == [1] * 8
        figure("F20: gap in a stream whose control stream is reset", run.history.longest_gap_s, "s")


async def test_f20_a_half_open_control_stream(
    oracle_model: Path, redis_url: str, figure: Figure
) -> None:
    """The worker's end is gone, and the router's does not know: its silence tells."""
    async with proxied_decode(oracle_model, redis_url) as (run, proxy):
        asking = [
            asyncio.create_task(run.ask(prompt_of(60, seed), max_tokens=300)) for seed in range(8)
        ]
        (broken, _) = run.cluster.decodes
        await until(lambda: broken.core._scheduler.num_running >= 2, "nothing decodes there")
        proxy.leave_half_open()
        logs = await asyncio.gather(*asking)
        assert max(run.report(log).attempts for log in logs) == 2
        gap_s = run.history.longest_gap_s
        assert gap_s <= SCALE * 6.0 + GAP_S
        figure(f"F20: gap at {SCALE:g} of the time-outs, stream half open", gap_s, "s")


async def test_f20_a_slow_control_stream_hurts_its_own_requests_alone(
    oracle_model: Path, redis_url: str
) -> None:
    """20 kB a second with 50 ms of latency: everything arrives, and the others are done before."""
    async with proxied_decode(oracle_model, redis_url) as (run, proxy):
        proxy.to_client.limit(20_000)
        proxy.to_client.delay(0.05)
        logs = await asyncio.gather(
            *(run.ask(prompt_of(60, seed), max_tokens=100) for seed in range(8))
        )
        assert [run.report(log).attempts for log in logs] == [1] * 8


@pytest.mark.parametrize("how", ["reset", "slow", "cut"])
async def test_f20_a_link_that_breaks_in_the_middle_of_hand_overs(
    how: str, oracle_model: Path, redis_url: str
) -> None:
    """The link is dialled again and its leases are claimed again: no attempt is lost."""
    async with trial(oracle_model, redis_url, max_num_batched_tokens=64, time_scale=SCALE) as run:
        (owner,), (reader,) = run.cluster.prefills, run.cluster.decodes
        async with tcp_proxy(owner.port) as proxy:
            await dial_through(proxy, reader, owner)
            await run.ask(prompt_of(60, 99))
            if how == "slow":
                proxy.to_client.limit(50_000)
                proxy.to_client.delay(0.02)
            asking = [
                asyncio.create_task(run.ask(prompt_of(400, seed), max_tokens=16))
                for seed in range(12)
            ]
            for number in range(4 if how != "slow" else 0):
                await until(
                    lambda: (
                        any(
                            not request.has_joined
                            for request in list(reader.core._requests.values())
                        )
                        or all(each.done() for each in asking)
                    ),
                    "nothing is handed over",
                )
                connections = proxy.num_connections
                if how == "reset":
                    proxy.reset()
                else:
                    proxy.to_client.cut_after(100 + 37 * number)
                await until(
                    lambda: (
                        proxy.num_connections > connections  # noqa: B023
                        or all(each.done() for each in asking)
                    ),
                    "the link is not dialled again",
                )
            logs = await asyncio.gather(*asking)
            assert [run.report(log).attempts for log in logs] == [1] * 12
            assert run.counter(RECOVERIES) == 0
