"""The outbox of one router: nothing lost or reordered, bounded, and pausing in pairs."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.control_streams import key_of

from baton.common.clock import ManualClock
from baton.common.control_codec import record_from_pb
from baton.common.errors import LeaseLost, SlowReader
from baton.common.frames import MAX_FRAME_BYTES
from baton.common.ids import RouterId
from baton.common.messages import LoadReport, OutputRecord, PrefillReport
from baton.common.sampling import FinishReason
from baton.v1 import worker_pb2 as pb
from baton.worker.core import Event, RouterPaused, RouterResumed
from baton.worker.outbox import MAX_RECORD_TOKENS, Bounds, FrameOutbox

ROUTER = RouterId("r")
HIGH = Bounds(num_bytes=4000, num_frames=10)
PAUSED, RESUMED = RouterPaused(ROUTER), RouterResumed(ROUTER)


class Bench:
    def __init__(self, high: Bounds = HIGH) -> None:
        self.events: list[Event] = []
        self.clock = ManualClock()
        self.outbox = FrameOutbox(
            ROUTER, self.events.append, self.clock, slow_router_s=10.0, high=high
        )
        self.outbox.listen()

    async def take(self) -> pb.AttachResponse:
        async with asyncio.timeout(1):
            taken = await self.outbox.take()
        assert taken is not None, "the outbox is closed"
        return taken


def record(number: int, position: int = 0, num_tokens: int = 1) -> OutputRecord:
    tokens = tuple(range(position, position + num_tokens))
    return OutputRecord(key=key_of(number), position=position, tokens=tokens)


async def test_steps_that_wait_share_a_frame() -> None:
    bench = Bench()
    steps = [[record(1, step), record(2, step)] for step in range(5)]
    for step in steps:
        bench.outbox.put_records(step)
    frame = (await bench.take()).frame
    assert [record_from_pb(wire) for wire in frame.records] == [r for step in steps for r in step]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30_000)), min_size=1, max_size=4),
            st.just("take"),
            st.just("load"),
        ),
        max_size=30,
    )
)
def test_every_token_comes_out_once_and_in_order(script: list[list[tuple[int, int]] | str]) -> None:
    asyncio.run(_play(script))


async def _play(script: list[list[tuple[int, int]] | str]) -> None:
    bench = Bench(Bounds(num_bytes=10**9, num_frames=10**9))
    sent: dict[int, int] = dict.fromkeys(range(4), 0)
    got: dict[int, int] = dict.fromkeys(range(4), 0)

    def note(taken: pb.AttachResponse) -> None:
        assert taken.ByteSize() <= MAX_FRAME_BYTES + 16
        for wire in taken.frame.records:
            number = int.from_bytes(wire.key.transfer_id, "big")
            assert list(wire.token_ids) == list(
                range(got[number], got[number] + len(wire.token_ids))
            )
            assert wire.position == got[number]
            got[number] += len(wire.token_ids)

    waiting_loads = 0
    for action in script:
        if action == "load":
            bench.outbox.put_load(LoadReport())
            waiting_loads = 1
        elif action == "take":
            if waiting_loads or sent != got:
                taken = await bench.take()
                waiting_loads -= taken.HasField("load")
                note(taken)
        else:
            step = []
            for number, num_tokens in action:
                step.append(record(number, sent[number], num_tokens))
                sent[number] += num_tokens
            bench.outbox.put_records(step)
    while sent != got:
        note(await bench.take())


async def test_a_long_record_is_cut_and_ends_once() -> None:
    bench = Bench(Bounds(10**9, 10**9))
    report = PrefillReport(cached_tokens=1, computed_tokens=2, queue_s=0.0, compute_s=0.0)
    long = OutputRecord(
        key=key_of(1),
        position=5,
        tokens=tuple(range(2 * MAX_RECORD_TOKENS + 1)),
        finish=FinishReason.LENGTH,
        prefill=report,
        forwarded_tokens=3,
    )
    bench.outbox.put_records([long])
    pieces = [record_from_pb(wire) for wire in (await bench.take()).frame.records]
    assert [piece.position - 5 for piece in pieces] == [0, MAX_RECORD_TOKENS, 2 * MAX_RECORD_TOKENS]
    assert [piece.finish for piece in pieces] == [None, None, FinishReason.LENGTH]
    assert [piece.prefill for piece in pieces] == [report, None, None]
    assert [piece.forwarded_tokens for piece in pieces] == [0, 0, 3]


async def test_an_error_comes_through_whole() -> None:
    bench = Bench()
    bench.outbox.put_records([OutputRecord(key=key_of(1), error=LeaseLost("gone"))])
    (wire,) = (await bench.take()).frame.records
    assert wire.error.reason == "lease_lost"


async def test_only_the_newest_load_report_waits_and_it_goes_first() -> None:
    bench = Bench()
    bench.outbox.put_records([record(1)])
    bench.outbox.put_load(LoadReport(steps=1))
    bench.outbox.put_load(LoadReport(steps=2))
    assert (await bench.take()).load.steps == 2
    assert (await bench.take()).HasField("frame")


async def test_sequences_pause_above_high_water_and_go_on_below_low_water() -> None:
    bench = Bench(Bounds(num_bytes=10 * MAX_FRAME_BYTES, num_frames=10**9))
    position = 0
    while not bench.events:
        bench.outbox.put_records([record(1, position, 1000)])
        position += 1000
    assert bench.events == [PAUSED]
    bench.outbox.put_records([record(2)])
    taken = 0
    while len(bench.events) == 1:
        taken += (await bench.take()).ByteSize()
    assert bench.events == [PAUSED, RESUMED]
    assert taken >= 7 * MAX_FRAME_BYTES, "low water is a quarter of high water"


async def test_a_router_that_stays_slow_loses_its_stream() -> None:
    bench = Bench()
    bench.outbox.put_records([record(number) for number in range(200)])
    assert bench.events == [PAUSED]
    bench.clock.advance(10.0)
    bench.outbox.put_load(LoadReport())
    assert not bench.outbox.is_closed
    bench.clock.advance(0.5)
    bench.outbox.put_load(LoadReport())
    assert isinstance(bench.outbox.failure, SlowReader)
    assert await bench.outbox.take() is None
    assert bench.events == [PAUSED, RESUMED], "a pause ends with its stream"


async def test_a_router_that_recovers_in_time_keeps_it() -> None:
    bench = Bench()
    bench.outbox.put_records([record(number) for number in range(200)])
    bench.clock.advance(9.0)
    await bench.take()
    bench.clock.advance(9.0)
    bench.outbox.put_records([record(number) for number in range(200)])
    bench.clock.advance(9.0)
    bench.outbox.check_pace()
    assert not bench.outbox.is_closed
    assert bench.events == [PAUSED, RESUMED, PAUSED]


async def test_past_the_cap_the_stream_closes_and_one_burst_may_pass_it() -> None:
    bench = Bench()
    burst = [record(number) for number in range(1000)]
    bench.outbox.put_records(burst)
    assert not bench.outbox.is_closed, "the answer to a hello is as large as what was missed"
    bench.outbox.put_records([record(1, 1)])
    assert isinstance(bench.outbox.failure, SlowReader)
    assert await bench.outbox.take() is None


@pytest.mark.parametrize("how", ["records", "load"])
async def test_a_closed_outbox_takes_nothing(how: str) -> None:
    bench = Bench()
    bench.outbox.close()
    if how == "records":
        bench.outbox.put_records([record(1)])
    else:
        bench.outbox.put_load(LoadReport())
    assert await bench.outbox.take() is None
    assert bench.events == []
