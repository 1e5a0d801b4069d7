"""The control stream's servicer alone: which stream of a router is heard, and what it hears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest
from support.cluster import until
from support.control_streams import FAST, key_of, submit_of, worker_hello

from baton.common.clock import ManualClock
from baton.common.codec import key_to_pb
from baton.common.control_codec import router_hello_to_pb, router_message_to_pb, submit_to_pb
from baton.common.errors import InvalidRequest, NoWorker
from baton.common.frames import OutgoingSubmit
from baton.common.ids import RouterId
from baton.common.messages import (
    Cancel,
    LiveRequest,
    LoadReport,
    OutputRecord,
    RouterHello,
    RouterMessage,
)
from baton.common.timing import Timing
from baton.v1 import worker_pb2 as pb
from baton.worker.control import ControlServicer
from baton.worker.core import Event, FromRouter, RouterAttached, RouterGone

ROUTER = RouterId("r")
LIVE = (LiveRequest(key_of(7), 3),)


@dataclass
class Engine:
    """Where events go; takes a hello when the test says so."""

    events: list[Event] = field(default_factory=list)
    untaken: list[Callable[[], None]] = field(default_factory=list)

    def post(self, event: Event, handled: Callable[[], None] | None = None) -> None:
        self.events.append(event)
        if handled is not None:
            self.untaken.append(handled)

    def take_hello(self) -> None:
        self.untaken.pop(0)()


class Bench:
    """A servicer, its engine, its clock."""

    def __init__(self, timing: Timing = FAST) -> None:
        self.engine = Engine()
        self.clock = ManualClock()
        self.servicer = ControlServicer(
            worker_hello, self.engine.post, timing=timing, clock=self.clock
        )


class Router:
    """One stream of a router; the answers are read only when the test asks for one."""

    def __init__(self, bench: Bench) -> None:
        self.sent: asyncio.Queue[pb.AttachRequest | None] = asyncio.Queue()
        self.answers = bench.servicer.Attach(self._requests(), None)  # type: ignore[arg-type]

    async def _requests(self) -> AsyncIterator[pb.AttachRequest]:
        while (request := await self.sent.get()) is not None:
            yield request

    async def attach(self, live: tuple[LiveRequest, ...] = ()) -> None:
        hello = router_hello_to_pb(RouterHello(ROUTER, 1, live))
        self.sent.put_nowait(pb.AttachRequest(hello=hello))
        assert (await anext(self.answers)).HasField("hello")

    def say(self, message: RouterMessage) -> None:
        self.sent.put_nowait(router_message_to_pb(message))

    async def next_records(self) -> list[pb.OutputRecord]:
        async with asyncio.timeout(5):
            return list((await anext(self.answers)).frame.records)

    async def expect_end(self) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(StopAsyncIteration):
                await anext(self.answers)


async def settle(router: Router) -> None:
    """The servicer has taken everything that was sent."""
    router.sent.put_nowait(None)
    await router.expect_end()


def tokens(position: int, count: int) -> OutputRecord:
    return OutputRecord(
        key=key_of(7), position=position, tokens=tuple(range(position, position + count))
    )


async def test_an_older_stream_is_not_heard_once_a_newer_is_attached() -> None:
    """Whatever it still holds came before the newer hello, which disowned it."""
    bench = Bench()
    older, newer = Router(bench), Router(bench)
    await older.attach()
    await newer.attach(LIVE)
    older.say(Cancel(key_of(1)))
    newer.say(Cancel(key_of(2)))
    await settle(newer)
    await settle(older)
    bench.servicer.close()
    assert bench.engine.events == [
        RouterAttached(ROUTER, ()),
        RouterAttached(ROUTER, LIVE),
        FromRouter(ROUTER, Cancel(key_of(2))),
    ]


async def test_a_stream_without_a_hello_is_refused() -> None:
    router = Router(Bench())
    router.say(Cancel(key_of(1)))
    with pytest.raises(InvalidRequest, match="hello"):
        await anext(router.answers)


async def test_a_worker_that_stops_takes_no_stream() -> None:
    bench = Bench()
    bench.servicer.close()
    router = Router(bench)
    with pytest.raises(NoWorker):
        await router.attach()
    assert bench.engine.events == []


async def test_what_the_engine_told_the_older_stream_never_reaches_the_newer() -> None:
    """Positions 3 and 4 were lost with the older stream; 5 would come before they are resent."""
    bench = Bench()
    older, newer = Router(bench), Router(bench)
    await older.attach()
    bench.engine.take_hello()
    bench.servicer.send_records(ROUTER, [tokens(3, 2)])
    await newer.attach(LIVE)
    # On its way to the event loop when the newer stream was opened.
    bench.servicer.send_records(ROUTER, [tokens(5, 1)])
    bench.engine.take_hello()
    bench.servicer.send_records(ROUTER, [tokens(3, 4)])
    (record,) = await newer.next_records()
    assert (record.position, list(record.token_ids)) == (3, [3, 4, 5, 6])
    await older.expect_end()
    bench.servicer.close()


async def test_the_hello_of_an_older_stream_opens_no_newer_one() -> None:
    bench = Bench()
    older, newer = Router(bench), Router(bench)
    await older.attach()
    await newer.attach(LIVE)
    bench.engine.take_hello()
    bench.servicer.send_records(ROUTER, [tokens(5, 1)])
    bench.engine.take_hello()
    bench.servicer.send_records(ROUTER, [tokens(3, 3)])
    (record,) = await newer.next_records()
    assert record.position == 3
    bench.servicer.close()


async def test_a_router_that_stays_away_is_gone_and_one_that_returns_is_not() -> None:
    bench = Bench(replace(FAST, router_grace_s=0.05))
    first, second = Router(bench), Router(bench)
    await first.attach()
    await settle(first)
    await second.attach()
    assert RouterGone(ROUTER) not in bench.engine.events
    await settle(second)
    await until(lambda: RouterGone(ROUTER) in bench.engine.events, "its requests stay for ever")
    assert bench.engine.events.count(RouterGone(ROUTER)) == 1
    bench.servicer.close()


async def test_a_silent_router_loses_its_stream() -> None:
    bench = Bench()
    router = Router(bench)
    await router.attach()
    beats = int(FAST.dead_after_s / FAST.heartbeat_every_s) + 1
    for _ in range(beats):
        bench.clock.advance(FAST.heartbeat_every_s)
        bench.servicer.send_load(LoadReport())
    await router.expect_end()
    bench.servicer.close()


async def test_silence_does_not_count_while_this_loop_was_late() -> None:
    bench = Bench()
    router = Router(bench)
    await router.attach()
    bench.clock.advance(10 * FAST.dead_after_s)
    bench.servicer.send_load(LoadReport(steps=5))
    assert (await anext(router.answers)).load.steps == 5
    bench.servicer.close()


async def test_a_submit_in_parts_is_taken_when_its_last_part_is_here() -> None:
    bench = Bench()
    router = Router(bench)
    await router.attach()
    submit = submit_of(1, prompt_len=60_000)
    outgoing = OutgoingSubmit(submit, now=0.0)
    while not outgoing.is_done:
        router.sent.put_nowait(outgoing.next_frame(0.0))
    await settle(router)
    bench.servicer.close()
    assert bench.engine.events[1:] == [FromRouter(ROUTER, submit)]


async def test_a_cancel_between_the_parts_ends_the_submit() -> None:
    bench = Bench()
    router = Router(bench)
    await router.attach()
    outgoing = OutgoingSubmit(submit_of(1, prompt_len=60_000), now=0.0)
    router.sent.put_nowait(outgoing.next_frame(0.0))
    router.say(Cancel(key_of(1)))
    while not outgoing.is_done:
        router.sent.put_nowait(outgoing.next_frame(0.0))
    await settle(router)
    bench.servicer.close()
    assert bench.engine.events[1:] == [FromRouter(ROUTER, Cancel(key_of(1)))]


@pytest.mark.parametrize(
    "nonsense",
    [
        pb.AttachRequest(
            submit_part=pb.SubmitPart(key=key_to_pb(key_of(1)), data=b"\xff", is_last=True)
        ),
        pb.AttachRequest(
            submit_part=pb.SubmitPart(
                key=key_to_pb(key_of(1)),
                data=submit_to_pb(submit_of(2)).SerializeToString(),
                is_last=True,
            )
        ),
        pb.AttachRequest(submit=pb.Submit(key=key_to_pb(key_of(1)))),
    ],
    ids=["no protobuf", "another key", "no job"],
)
async def test_a_malformed_submit_is_answered_and_costs_no_stream(
    nonsense: pb.AttachRequest,
) -> None:
    """Also before the engine has taken the hello: the answer leaves no gap."""
    bench = Bench()
    router = Router(bench)
    await router.attach()
    router.sent.put_nowait(nonsense)
    (record,) = await router.next_records()
    assert record.key == key_to_pb(key_of(1))
    assert record.error.reason == "invalid_request"
    router.say(Cancel(key_of(3)))
    await settle(router)
    bench.servicer.close()
    assert bench.engine.events[1:] == [FromRouter(ROUTER, Cancel(key_of(3)))]
