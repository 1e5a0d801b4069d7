"""The engine thread's ends, with a real core."""

import asyncio
from pathlib import Path

import pytest
from support.core_mesh import CoreMesh, P

from baton.common.clock import SystemClock
from baton.common.errors import TransferError
from baton.common.ids import Slot
from baton.worker.engine_thread import EngineThread


async def test_a_failed_engine_reports_it_and_leaves_no_reader_behind(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its open reads would write to an arena that is about to be torn down."""
    core = CoreMesh(tiny_llama).decode
    peer = core.handovers.peers[P]
    failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def broken() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(core, "step", broken)
    thread = EngineThread(
        core, deliver=lambda _: None, failed=failure.set_result, clock=SystemClock()
    )
    thread.start()
    assert str(await failure) == "the device is gone"
    await thread.stop()
    with pytest.raises(TransferError, match="closed"):
        peer.post_generations([Slot(0)])
