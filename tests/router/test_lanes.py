"""Two lanes to one worker: what is urgent first, bounded, and nothing unsent is lost."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.control_streams import IDENTITY, key_of, submit_of

from baton.common.clock import ManualClock
from baton.common.control_codec import router_message_from_pb, submit_from_pb
from baton.common.errors import QueueFull
from baton.common.frames import SubmitAssembly
from baton.common.messages import Cancel, Move, RouterMessage, SetDraining, Stay, Submit
from baton.router import lanes as lanes_module
from baton.router.lanes import Lanes
from baton.v1 import worker_pb2 as pb

LARGE = 60_000
MOVE = Move(key_of(1), key_of(1, 2), IDENTITY, b"k")


async def write(lanes: Lanes, count: int = 1) -> list[pb.AttachRequest]:
    """So many frames, each written."""
    frames = []
    for _ in range(count):
        async with asyncio.timeout(1):
            frames.append(await lanes.next_frame())
        lanes.written()
    return frames


def kinds(frames: list[pb.AttachRequest]) -> list[str | None]:
    return [frame.WhichOneof("message") for frame in frames]


async def test_what_is_urgent_waits_for_one_part_at_most() -> None:
    lanes = Lanes(ManualClock())
    lanes.put(submit_of(1, prompt_len=LARGE))
    frames = await write(lanes)
    for message in (Cancel(key_of(5)), MOVE, Stay(key_of(1)), SetDraining(True)):
        lanes.put(message)
    frames += await write(lanes, 6)
    assert kinds(frames) == [
        "submit_part",
        "cancel",
        "move",
        "stay",
        "set_draining",
        "submit_part",
        "submit_part",
    ]


async def test_the_time_in_the_lane_is_taken_off_the_time_left() -> None:
    clock = ManualClock()
    lanes = Lanes(clock)
    lanes.put(submit_of(1))
    clock.advance(5.0)
    (frame,) = await write(lanes)
    assert frame.submit.time_left_s == pytest.approx(55.0)
    assert frame.submit.age_s == pytest.approx(5.0)


async def test_a_cancel_withdraws_a_submit_that_was_not_sent() -> None:
    lanes = Lanes(ManualClock())
    lanes.put(submit_of(1))
    lanes.put(submit_of(2))
    lanes.put(Cancel(key_of(1)))
    (frame,) = await write(lanes)
    assert submit_from_pb(frame.submit) == submit_of(2)
    assert lanes.unsent_submits == frozenset()


async def test_a_cancel_of_a_submit_that_was_begun_is_sent_and_the_rest_is_not() -> None:
    lanes = Lanes(ManualClock())
    lanes.put(submit_of(1, prompt_len=LARGE))
    await write(lanes)
    lanes.put(Cancel(key_of(1)))
    lanes.put(submit_of(2))
    assert kinds(await write(lanes, 2)) == ["cancel", "submit"]


async def test_full_lanes_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_URGENT", 2)
    monkeypatch.setattr(lanes_module, "MAX_SUBMIT_BYTES", 5 * LARGE)
    lanes = Lanes(ManualClock())
    lanes.put(Stay(key_of(1)))
    lanes.put(Stay(key_of(2)))
    with pytest.raises(QueueFull):
        lanes.put(Stay(key_of(3)))
    lanes.put(submit_of(1, prompt_len=LARGE))
    with pytest.raises(QueueFull):
        lanes.put(submit_of(2, prompt_len=LARGE))
    await write(lanes, 5)
    lanes.put(submit_of(2, prompt_len=LARGE))
    lanes.put(Cancel(key_of(2)))
    assert lanes.unsent_submits == frozenset()


async def test_an_urgent_message_that_may_not_have_arrived_is_sent_again() -> None:
    lanes = Lanes(ManualClock())
    lanes.put(SetDraining(True))
    await lanes.next_frame()
    lanes.rewind()
    assert kinds(await write(lanes)) == ["set_draining"]


async def test_a_whole_submit_that_may_have_arrived_is_not_sent_again() -> None:
    """The hello names it: a worker that does not know it says so."""
    lanes = Lanes(ManualClock())
    lanes.put(submit_of(1))
    await lanes.next_frame()
    lanes.rewind()
    lanes.put(SetDraining(True))
    assert lanes.unsent_submits == frozenset()
    assert kinds(await write(lanes)) == ["set_draining"]


async def test_lanes_of_a_worker_that_is_gone_are_empty() -> None:
    lanes = Lanes(ManualClock())
    lanes.put(submit_of(1, prompt_len=LARGE))
    await write(lanes)
    lanes.put(Stay(key_of(1)))
    lanes.clear()
    lanes.rewind()
    lanes.put(Cancel(key_of(7)))
    assert kinds(await write(lanes)) == ["cancel"]
    assert lanes.unsent_submits == frozenset()


actions = st.one_of(
    st.integers(0, 5).map(lambda number: Cancel(key_of(number))),
    st.integers(0, 5).map(lambda number: Stay(key_of(number))),
    st.booleans().map(lambda is_large: "large" if is_large else "small"),
    st.sampled_from(["write", "write", "write", "break"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=40))
def test_every_message_arrives_over_however_many_streams(script: list[RouterMessage | str]) -> None:
    """Each submit once, unless it was withdrawn; others at least once, in order."""
    asyncio.run(_play(script))


async def _play(script: list[RouterMessage | str]) -> None:
    lanes = Lanes(ManualClock())
    assembly = SubmitAssembly()
    submitted: list[Submit] = []
    cancelled = set()
    urgent: list[RouterMessage] = []
    arrived: list[RouterMessage] = []

    async def deliver() -> None:
        nonlocal assembly
        frame = (await write(lanes))[0]
        if frame.HasField("submit_part"):
            part = frame.submit_part
            key = submitted[int.from_bytes(part.key.transfer_id, "big") - 100].key
            whole = assembly.add(key, part.data, is_last=part.is_last)
            if whole is not None:
                arrived.append(submit_from_pb(whole))
            return
        message = router_message_from_pb(frame)
        assert message is not None
        if isinstance(message, Cancel):
            assembly.cancel(message.key)
        arrived.append(message)

    waiting = True
    for action in script:
        if action in ("large", "small"):
            number = 100 + len(submitted)
            submit = submit_of(number, prompt_len=LARGE if action == "large" else 3)
            submitted.append(submit)
            lanes.put(submit)
        elif action == "write":
            if lanes.unsent_submits or lanes._urgent:
                await deliver()
        elif action == "break":
            lanes.rewind()
            assembly = SubmitAssembly()
        else:
            assert not isinstance(action, str)
            message = action
            if isinstance(action, Cancel) and submitted:
                key = submitted[int(action.key.transfer_id[-1]) % len(submitted)].key
                message = Cancel(key)
                cancelled.add(key)
            else:
                urgent.append(message)
            lanes.put(message)
    while waiting:
        waiting = bool(lanes.unsent_submits or lanes._urgent)
        if waiting:
            await deliver()
    received = [message for message in arrived if isinstance(message, Submit)]
    assert [m.key for m in received if m.key not in cancelled] == [
        m.key for m in submitted if m.key not in cancelled
    ]
    assert len({message.key for message in received}) == len(received)
    others = [m for m in arrived if not isinstance(m, Submit)]
    assert [m for m in others if getattr(m, "key", None) not in cancelled] == urgent
    assert assembly.num_bytes == 0
