"""Work that the event loop asks of the engine thread: done there, answered here, or withdrawn."""

import threading

import pytest
from support.cluster import until
from support.control_streams import CountingCore

from baton.common.clock import ManualClock
from baton.common.errors import DeadlineExceeded
from baton.worker.engine_thread import EngineThread


def make_thread(core: CountingCore, failures: list[BaseException]) -> EngineThread:
    return EngineThread(core, deliver=lambda _: None, failed=failures.append, clock=ManualClock())


async def test_a_call_runs_on_the_engine_thread_and_its_error_is_the_callers_alone() -> None:
    failures: list[BaseException] = []
    core = CountingCore()
    thread = make_thread(core, failures)

    def wrong() -> None:
        raise ValueError("not there")

    thread.start()
    try:
        assert await thread.call(lambda: threading.current_thread().name, 30.0) == "engine"
        with pytest.raises(ValueError, match="not there"):
            await thread.call(wrong, 30.0)
        seen = core.num_steps
        await until(lambda: core.num_steps > seen, "the engine does not go on")
    finally:
        await thread.stop()
    assert failures == []


async def test_a_call_that_a_stuck_engine_does_not_take_is_withdrawn() -> None:
    failures: list[BaseException] = []
    core = CountingCore()
    entered, release = threading.Event(), threading.Event()
    done: list[str] = []

    def long_step() -> None:
        entered.set()
        assert release.wait(30)

    core.before_step = long_step
    thread = make_thread(core, failures)
    thread.start()
    try:
        await until(entered.is_set, "no step began")
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s.*try again"):
            await thread.call(lambda: done.append("late"), 0.05)
        core.before_step = lambda: None
        release.set()
        await thread.call(lambda: done.append("next"), 30.0)
    finally:
        release.set()
        await thread.stop()
    assert done == ["next"]
    assert failures == []
