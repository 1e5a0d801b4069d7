"""Streams that break between a fleet and a worker: resumed within the grace, and nothing is lost.

Both ends are real, with an engine thread behind the worker's and a proxy that cuts between them.
"""

import threading
from dataclasses import replace

import pytest
from support.cluster import until
from support.control_streams import FAST, IDENTITY, counting_worker, key_of, submit_of
from support.fleets import Watched, fleet_of
from support.tcp_proxy import tcp_proxy

from baton.common.errors import UnknownRequest
from baton.common.messages import Cancel, LiveRequest, SetDraining
from baton.common.metric_names import STREAMS_RESUMED
from baton.router.fleet import WorkerState
from baton.worker.core import FromRouter, RouterAttached, RouterGone

# Nobody is suspect on a busy machine, and a grace that no test waits for.
PATIENT = replace(
    FAST, suspect_after_s=30.0, dead_after_s=60.0, reconnect_grace_s=15.0, router_grace_s=20.0
)


async def until_each_has_tokens(watched: Watched, more_than: int = 0) -> None:
    await until(
        lambda: all(len(tokens) > more_than for tokens in watched.tokens.values()), "no tokens"
    )


async def test_no_token_is_lost_or_told_twice_however_often_the_line_is_cut(
    redis_url: str,
) -> None:
    async with (
        counting_worker(timing=PATIENT) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "cuts", timing=PATIENT) as watched,
    ):
        await watched.until_ready()
        for number in range(20):
            watched.submit(submit_of(number, max_tokens=6000))
        await until_each_has_tokens(watched)
        resumed = watched.fleet.counters
        for cut in range(12):
            before = resumed[STREAMS_RESUMED]
            # In the middle of a frame, mostly; sometimes while the router writes.
            if cut % 4 == 3:
                proxy.to_server.cut_after(1 + cut)
            else:
                proxy.to_client.cut_after(1 + 977 * cut)
            await until(lambda before=before: resumed[STREAMS_RESUMED] > before, "not resumed")  # type: ignore[misc]
        assert watched.ended == set(), "all cuts fell into the streams"
        await until(lambda: len(watched.ended) == 20, "requests do not end", 60.0)
        assert watched.misplaced == []
        assert watched.errors == {}
        assert all(tokens == list(range(6000)) for tokens in watched.tokens.values())
        assert watched.gone == []
        assert len(watched.joined) == 1
        assert not any(isinstance(event, RouterGone) for event in worker.core.events)


async def test_what_was_not_sent_before_the_break_arrives_after_it(redis_url: str) -> None:
    """A submit and messages that were queued while there was no stream, and no unknown request."""
    async with (
        counting_worker(timing=PATIENT) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "queued", timing=PATIENT) as watched,
    ):
        await watched.until_ready()
        watched.submit(submit_of(1, max_tokens=100_000))
        await until_each_has_tokens(watched)
        proxy.to_client.stall()
        proxy.reset()
        await until(lambda: watched.state is WorkerState.RECONNECTING, "the break is not seen")
        watched.submit(submit_of(2, max_tokens=50))
        watched.submit(submit_of(3, max_tokens=50))
        watched.fleet.send(IDENTITY, Cancel(key_of(3)))
        watched.ended.add(key_of(3))
        watched.fleet.send(IDENTITY, SetDraining(False))
        proxy.to_client.heal()
        await until(lambda: key_of(2) in watched.ended, "the submit was lost")
        assert watched.tokens[key_of(2)] == list(range(50))
        assert watched.errors == {}
        assert watched.misplaced == []
        assert worker.core.messages.count(SetDraining(False)) == 1
        # Withdrawn before any of it was sent.
        assert key_of(3) not in {getattr(message, "key", None) for message in worker.core.messages}


async def test_a_submit_that_was_cut_in_the_middle_arrives_once(redis_url: str) -> None:
    async with (
        counting_worker(timing=PATIENT) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "half", timing=PATIENT) as watched,
    ):
        await watched.until_ready()
        large = submit_of(1, prompt_len=400_000, max_tokens=20)
        proxy.to_server.cut_after(300_000)
        watched.submit(large)
        await until(lambda: key_of(1) in watched.ended, "it does not arrive")
        assert watched.errors == {}
        assert watched.tokens[key_of(1)] == list(range(20))
        assert watched.fleet.counters[STREAMS_RESUMED] == 1
        (message,) = worker.core.messages
        assert message == replace(
            large, age_s=pytest.approx(0, abs=20), time_left_s=pytest.approx(60, abs=20)
        )
        (event,) = [event for event in worker.core.events if isinstance(event, FromRouter)]
        attached = RouterAttached(event.router_id, ())
        assert worker.core.events.count(attached) == 2, "no hello names what was not sent"


async def test_what_the_worker_does_not_know_is_answered(redis_url: str) -> None:
    async with (
        counting_worker(timing=PATIENT) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "unknown", timing=PATIENT) as watched,
    ):
        await watched.until_ready()
        watched.tokens[key_of(9)] = [0, 1]
        proxy.reset()
        await until(lambda: key_of(9) in watched.errors, "the request waits for ever")
        assert isinstance(watched.errors[key_of(9)], UnknownRequest)
        attached = [event for event in worker.core.events if isinstance(event, RouterAttached)]
        assert attached[-1].live == (LiveRequest(key_of(9), 2),)


async def test_a_worker_whose_port_refuses_is_gone_at_once(redis_url: str) -> None:
    async with (
        counting_worker(timing=PATIENT) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "refused", timing=PATIENT) as watched,
    ):
        await watched.until_ready()
        proxy.refuse()
        proxy.reset()
        await until(lambda: bool(watched.gone), "a dead process is waited for", 5.0)


async def test_a_stream_that_does_not_come_back_is_lost_after_the_grace(redis_url: str) -> None:
    timing = replace(PATIENT, reconnect_grace_s=0.6)
    async with (
        counting_worker(timing=timing) as worker,
        tcp_proxy(worker.port) as proxy,
        fleet_of(f"127.0.0.1:{proxy.port}", redis_url, "grace", timing=timing) as watched,
    ):
        await watched.until_ready()
        watched.submit(submit_of(1, max_tokens=100_000))
        await until_each_has_tokens(watched)
        proxy.stall()
        proxy.reset()
        await until(lambda: watched.state is WorkerState.RECONNECTING, "the break is not seen")
        assert watched.gone == []
        await until(lambda: bool(watched.gone), "the grace does not end", 5.0)
        proxy.heal()
        await until(lambda: len(watched.joined) == 2, "it is not attached anew")
        await until(lambda: worker.core.num_requests == 0, "the new hello names nothing")
        assert watched.joined[0] is watched.gone[0]
        assert watched.joined[1] is not watched.gone[0]


async def test_an_engine_that_stops_loses_its_requests_and_is_used_again_when_it_comes_round(
    redis_url: str,
) -> None:
    """Heartbeats alone keep nobody alive."""
    timing = replace(PATIENT, stalled_after_s=0.5, suspect_after_s=0.3)
    entered, release = threading.Event(), threading.Event()

    def freeze() -> None:
        entered.set()
        assert release.wait(30)

    async with (
        counting_worker(timing=timing) as worker,
        fleet_of(worker.address, redis_url, "freeze", timing=timing) as watched,
    ):
        await watched.until_ready()
        watched.submit(submit_of(1, max_tokens=100_000))
        await until_each_has_tokens(watched)
        worker.core.before_step = freeze
        await until(entered.is_set, "it does not freeze")
        try:
            await until(lambda: bool(watched.gone), "a frozen engine keeps its requests")
            assert watched.state is WorkerState.STALLED
            await until(lambda: watched.gone[0].is_connected, "its stream is not dialled again")
            assert watched.state is WorkerState.STALLED
            worker.core.before_step = lambda: None
        finally:
            release.set()
        await watched.until_ready()
        assert watched.joined == [watched.gone[0]] * 2
        await until(lambda: worker.core.num_requests == 0, "it still works for requests elsewhere")
        watched.submit(submit_of(2, max_tokens=10))
        await until(lambda: key_of(2) in watched.ended, "it is of no use")
        assert watched.errors == {}
