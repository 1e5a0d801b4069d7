"""Peer links over real gRPC: who is let in, who is refused and why, what survives a reconnect."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
import pytest
from support.cluster import until
from support.kv_arenas import Arena, identity

from baton.common.errors import HandshakeMismatch, PeerLost
from baton.common.fingerprint import fingerprint
from baton.common.grpc_server import GrpcServer
from baton.common.ids import Generation, RequestKey, Slot, TransferId, WorkerIdentity
from baton.common.messages import LeaseClaim, LeaseRelease, LeaseRenew, LeaseState, LeaseStatus
from baton.kvtransfer.events import (
    FromOwner,
    FromReader,
    LinkClosed,
    LinkEvent,
    LinkOpened,
    PeerConnected,
    PeerDisconnected,
)
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.link_client import LinkClient
from baton.kvtransfer.link_codec import reader_hello_to_pb
from baton.kvtransfer.link_server import LinkServer
from baton.kvtransfer.transport.memory import MemoryFabric, MemoryTransport
from baton.v1 import kv_pb2, kv_pb2_grpc

FIELDS = {"model": "m", "dtype": "float32", "block_size": "32"}
KEY = RequestKey(TransferId(bytes(range(16))), 1)


def side(who: WorkerIdentity, **changed: str) -> LocalSide:
    fields = FIELDS | changed
    return LocalSide(
        identity=who, fingerprint=fingerprint(fields), fields=fields, transport="memory"
    )


@dataclass
class Pair:
    owner: WorkerIdentity
    address: str
    server: LinkServer
    client: LinkClient
    reader: WorkerIdentity
    at_owner: list[LinkEvent] = field(default_factory=list)
    at_reader: list[LinkEvent] = field(default_factory=list)

    def refused(self) -> PeerDisconnected | None:
        ends = [event for event in self.at_reader if isinstance(event, PeerDisconnected)]
        return ends[0] if ends else None

    async def connect(self) -> PeerConnected:
        self.client.dial(self.owner, self.address)
        await until(lambda: bool(self.at_reader), "the link neither opened nor failed")
        event = self.at_reader[0]
        assert isinstance(event, PeerConnected), event
        return event


@asynccontextmanager
async def link_pair(**reader_differs: str) -> AsyncIterator[Pair]:
    owner, reader = identity("p0"), identity("d0")
    fabric = MemoryFabric()
    arenas = {who: Arena(4, 64, seed=1) for who in (owner, reader)}
    transports = {who: MemoryTransport(who, fabric) for who in (owner, reader)}
    described = {who: arenas[who].open_on(transports[who]) for who in (owner, reader)}
    at_owner: list[LinkEvent] = []
    at_reader: list[LinkEvent] = []
    server = LinkServer(side(owner), described[owner], at_owner.append)
    client = LinkClient(side(reader, **reader_differs), transports[reader], at_reader.append)
    grpc_server = GrpcServer()
    kv_pb2_grpc.add_KvServiceServicer_to_server(server, grpc_server.server)
    port = grpc_server.listen("127.0.0.1:0")
    await grpc_server.start()
    try:
        yield Pair(owner, f"127.0.0.1:{port}", server, client, reader, at_owner, at_reader)
    finally:
        await client.close()
        for event in at_reader:
            if isinstance(event, PeerConnected):
                event.peer.close()
        await grpc_server.stop(0)
        for transport in transports.values():
            transport.close()


async def test_claims_go_up_and_announcements_come_down() -> None:
    async with link_pair() as pair:
        pair.client.dial(pair.owner, pair.address)
        # Sent while the link still connects: nothing is lost.
        for message in (LeaseClaim(KEY, b"mac"), LeaseRenew((KEY,)), LeaseRelease(KEY)):
            pair.client.send(pair.owner, message)
        await until(lambda: len(pair.at_owner) == 4, "not all messages came")
        assert pair.at_owner[0] == LinkOpened(pair.reader)
        assert [event.message for event in pair.at_owner[1:] if isinstance(event, FromReader)] == [
            LeaseClaim(KEY, b"mac"),
            LeaseRenew((KEY,)),
            LeaseRelease(KEY),
        ]
        status = LeaseStatus(
            key=KEY,
            state=LeaseState.OPEN,
            slots=(Slot(3), Slot(1)),
            generations=(Generation(2**61 + 7), Generation(5)),
            readable_tokens=32,
        )
        pair.server.send(pair.reader, status)
        await until(lambda: len(pair.at_reader) == 2, "no announcement came")
        assert pair.at_reader[1] == FromOwner(pair.owner, status)


async def test_unsent_announcements_coalesce_and_keep_the_handles() -> None:
    async with link_pair() as pair:
        await pair.connect()
        first = LeaseStatus(
            key=KEY, state=LeaseState.OPEN, slots=(Slot(2),), generations=(Generation(9),)
        )
        # All in one turn of the loop, so that the writer sees them together.
        for tokens in (0, 32, 64):
            handles = first if tokens == 0 else LeaseStatus(key=KEY, state=LeaseState.OPEN)
            pair.server.send(pair.reader, replace(handles, readable_tokens=tokens))
        await until(lambda: len(pair.at_reader) == 2, "no announcement came")
        assert pair.at_reader[1] == FromOwner(pair.owner, replace(first, readable_tokens=64))


@pytest.mark.parametrize("name", sorted(FIELDS))
async def test_another_fingerprint_is_refused_naming_the_field(name: str) -> None:
    async with link_pair(**{name: "other"}) as pair:
        pair.client.dial(pair.owner, pair.address)
        await until(lambda: pair.refused() is not None, "the link was not refused")
        refused = pair.refused()
        assert refused is not None
        assert isinstance(refused.error, HandshakeMismatch)
        assert f"{name}: {FIELDS[name]} here, other there" in refused.error.message
        assert not pair.at_owner, "a refused reader never reaches the engine"


async def test_another_incarnation_at_the_address_is_refused() -> None:
    async with link_pair() as pair:
        stale = replace(pair.owner, incarnation="an earlier life")
        pair.client.dial(stale, pair.address)
        await until(lambda: pair.refused() is not None, "the link was not refused")
        refused = pair.refused()
        assert refused is not None
        assert "an earlier life" in refused.error.message


async def test_nobody_at_the_address_is_a_lost_peer() -> None:
    async with link_pair() as pair:
        pair.client.dial(pair.owner, "127.0.0.1:1")
        await until(lambda: pair.refused() is not None, "dialling nobody did not end")
        refused = pair.refused()
        assert refused is not None
        assert isinstance(refused.error, PeerLost)


async def test_a_broken_link_is_seen_on_both_sides_and_may_be_dialled_again() -> None:
    async with link_pair() as pair:
        connected = await pair.connect()
        await pair.client.close()
        connected.peer.close()
        await until(lambda: LinkClosed(pair.reader) in pair.at_owner, "the owner saw no end")
        assert pair.refused() is not None
        del pair.at_reader[:]
        await pair.connect()
        assert pair.at_owner.count(LinkOpened(pair.reader)) == 2


async def test_a_reader_may_hang_up_and_dial_again() -> None:
    async with link_pair() as pair:
        (await pair.connect()).peer.close()
        pair.client.hang_up(pair.owner)
        pair.client.hang_up(pair.owner)
        await until(lambda: pair.refused() is not None, "the reader heard nothing")
        await until(lambda: LinkClosed(pair.reader) in pair.at_owner, "the owner heard nothing")
        ended = pair.refused()
        assert ended is not None
        assert isinstance(ended.error, PeerLost)
        assert pair.at_reader[1:] == [ended], "one end, also when told twice"
        pair.at_reader.clear()
        await pair.connect()
        assert pair.at_owner[-1] == LinkOpened(pair.reader)


async def test_a_stranger_who_speaks_nonsense_is_turned_away() -> None:
    async with link_pair() as pair, grpc.aio.insecure_channel(pair.address) as channel:
        stub = kv_pb2_grpc.KvServiceStub(channel)

        async def nonsense() -> AsyncIterator[kv_pb2.LinkRequest]:
            yield kv_pb2.LinkRequest(claim=kv_pb2.LeaseClaim())

        call = stub.Link(nonsense())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(call))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # The owner still serves others.
        await asyncio.wait_for(pair.connect(), 10)


async def test_a_link_that_its_owner_ends_leaves_no_task_behind() -> None:
    """gRPC would leave the writer of an ended call waiting for the next message."""
    async with link_pair() as pair:
        await pair.connect()
        before = asyncio.all_tasks()
        pair.server.close()
        await until(lambda: pair.refused() is not None, "the end was not seen")
        left = {task for task in before if "request_iterator" in str(task.get_coro())}
        assert left, "the client writes by an iterator"
        await until(lambda: all(task.done() for task in left), "the writer still waits")


@pytest.mark.parametrize("greets", [True, False])
async def test_bytes_that_are_no_protobuf_cost_the_link_alone(
    greets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with link_pair() as pair, grpc.aio.insecure_channel(pair.address) as channel:
        call = channel.stream_stream("/baton.v1.KvService/Link")()
        if greets:
            hello = reader_hello_to_pb(side(pair.reader), pair.owner)
            await call.write(hello.SerializeToString())
            await call.read()
        await call.write(b"\xff\xff\xff")
        code = await asyncio.wait_for(call.code(), 10)
        assert code is (grpc.StatusCode.OK if greets else grpc.StatusCode.INVALID_ARGUMENT)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        await asyncio.wait_for(pair.connect(), 10)
