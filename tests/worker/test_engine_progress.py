"""The engine thread tells when its loop last came round, and in which order it was told what."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from support.cluster import until
from support.control_streams import CountingCore, submit_of

from baton.common.clock import ManualClock
from baton.common.ids import RouterId
from baton.common.messages import LiveRequest
from baton.worker.core import Effects, FromRouter, RouterAttached
from baton.worker.engine_thread import EngineThread

ROUTER = RouterId("r")


@asynccontextmanager
async def engine_thread(
    core: CountingCore,
    clock: ManualClock,
    deliver: Callable[[Effects], None] = lambda _: None,
    frame_interval_s: float = 0.0,
) -> AsyncIterator[EngineThread]:
    failures: list[BaseException] = []
    thread = EngineThread(
        core,
        deliver=deliver,
        failed=failures.append,
        clock=clock,
        frame_interval_s=frame_interval_s,
    )
    thread.start()
    try:
        yield thread
    finally:
        await thread.stop()
    assert failures == []


async def test_a_step_that_does_not_end_is_a_stall_and_waiting_for_events_is_none() -> None:
    core, clock = CountingCore(step_every_s=0.001), ManualClock()
    entered, release = threading.Event(), threading.Event()

    def long_step() -> None:
        entered.set()
        assert release.wait(30)

    async with engine_thread(core, clock) as thread:
        await until(lambda: core.num_steps > 2, "it does not run")
        core.before_step = long_step
        await until(entered.is_set, "no step began")
        clock.advance(70.0)
        assert thread.stalled_s >= 70.0
        core.before_step = lambda: None
        release.set()
        await until(lambda: thread.stalled_s < 1.0, "it came round and nobody says so")


async def test_an_idle_engine_is_not_stalled() -> None:
    core, clock = CountingCore(step_every_s=0.01), ManualClock()
    async with engine_thread(core, clock) as thread:
        await until(lambda: core.num_steps > 2, "it does not run")
        # Whether it waits just now or not: at the next look it does.
        clock.advance(1000.0)
        await until(lambda: thread.stalled_s == 0.0, "waiting counts as a stall")


async def test_a_step_that_the_device_does_not_end_is_a_stall() -> None:
    """The loop comes round and looks for it, which is no progress."""
    core, clock = CountingCore(step_every_s=0.001), ManualClock()
    core.step_in_flight = 1
    async with engine_thread(core, clock) as thread:
        await until(lambda: core.num_steps > 2, "it does not run")
        clock.advance(70.0)
        seen = core.num_steps
        await until(lambda: core.num_steps > seen + 2, "it does not look")
        assert thread.stalled_s >= 70.0
        core.step_in_flight = 2
        await until(lambda: thread.stalled_s < 1.0, "the next step is progress")


async def test_handled_stands_between_what_was_left_behind_before_and_after() -> None:
    """What waited to be handed out is of the older stream, although it was not due yet."""
    core, clock = CountingCore(step_every_s=0.001), ManualClock()
    # Not idle, and time stands still: tokens are handed out with the end alone.
    core.step_in_flight = 1
    told: list[str | int] = []
    submit = submit_of(1, max_tokens=200)

    def deliver(effects: Effects) -> None:
        told.extend(record.position for record in effects.records.get(ROUTER, []))

    async with engine_thread(core, clock, deliver, frame_interval_s=1.0) as thread:
        await until(lambda: core.num_steps > 1, "it does not run")
        thread.post(FromRouter(ROUTER, submit))
        seen = core.num_steps
        await until(lambda: core.num_steps > seen + 5, "it does not run")
        thread.post(
            RouterAttached(ROUTER, (LiveRequest(submit.key, 2),)), lambda: told.append("attached")
        )
        await until(lambda: core.num_requests == 0, "it does not end")
        await until(lambda: len(told) >= 4, "the end is not told")
    assert told == [0, "attached", 2, 199], "one record of tokens each time, and the end"
