"""What crosses a wire comes back equal; what is malformed never reaches a state machine."""

import re
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wire

from baton.common import codec, control_codec
from baton.common.errors import BatonError, InvalidRequest
from baton.common.ids import Epoch, RequestKey, TransferId, WorkerId, WorkerIdentity
from baton.common.messages import (
    LeaseState,
    LeaseStatus,
    OutputRecord,
    PrefillJob,
    Submit,
)
from baton.common.sampling import SamplingParams
from baton.kvtransfer import link_codec
from baton.kvtransfer.handshake import LocalSide
from baton.kvtransfer.transport.base import ArenaDescriptor
from baton.v1 import common_pb2, kv_pb2, worker_pb2

KEY = RequestKey(TransferId(bytes(range(16))), 1)
WORKER = WorkerIdentity(WorkerId("p0"), Epoch(7), "life")
SUBMIT = Submit(
    key=KEY,
    prompt_tokens=[1, 2, 3],
    sampling=SamplingParams(max_tokens=4),
    tenant_key=b"",
    age_s=0.0,
    time_left_s=1.0,
    job=PrefillJob(WORKER),
)
quick = settings(max_examples=60, deadline=None)


def over_the_wire(message: Message) -> Any:
    """The message as another process reads it."""
    return type(message).FromString(message.SerializeToString())


def without_error(message: Any) -> tuple[Any, Any]:
    """Exceptions compare by identity: the message without its error, and what the error says."""
    error = message.error
    said = None if error is None else (type(error), error.message)
    return replace(message, error=None), said


ROUND_TRIPS: list[tuple[Any, Callable[[Any], Message], Callable[[Any], Any]]] = [
    (wire.keys, codec.key_to_pb, codec.key_from_pb),
    (wire.identities, codec.identity_to_pb, codec.identity_from_pb),
    (wire.samplings, codec.sampling_to_pb, codec.sampling_from_pb),
    (wire.submits, control_codec.submit_to_pb, control_codec.submit_from_pb),
    (wire.router_hellos, control_codec.router_hello_to_pb, control_codec.router_hello_from_pb),
    (wire.models, control_codec.model_to_pb, control_codec.model_from_pb),
    (wire.lease_rows, control_codec.lease_row_to_pb, control_codec.lease_row_from_pb),
    (wire.loads, control_codec.load_to_pb, control_codec.load_from_pb),
    (wire.worker_hellos, control_codec.worker_hello_to_pb, control_codec.worker_hello_from_pb),
    (wire.reader_messages, link_codec.reader_message_to_pb, link_codec.reader_message_from_pb),
    (
        wire.router_messages,
        control_codec.router_message_to_pb,
        control_codec.router_message_from_pb,
    ),
]


@pytest.mark.parametrize(
    ("strategy", "encode", "decode"), ROUND_TRIPS, ids=lambda part: getattr(part, "__name__", "")
)
def test_a_message_comes_back_equal(
    strategy: st.SearchStrategy[Any],
    encode: Callable[[Any], Message],
    decode: Callable[[Any], Any],
) -> None:
    @quick
    @given(strategy)
    def check(message: Any) -> None:
        assert decode(over_the_wire(encode(message))) == message

    check()


@quick
@given(wire.records)
def test_records_come_back_equal(record: OutputRecord) -> None:
    back = control_codec.record_from_pb(over_the_wire(control_codec.record_to_pb(record)))
    assert without_error(back) == without_error(record)


@quick
@given(wire.statuses)
def test_statuses_come_back_equal(status: LeaseStatus) -> None:
    back = link_codec.status_from_pb(over_the_wire(link_codec.status_to_pb(status)).status)
    assert without_error(back) == without_error(status)


@quick
@given(wire.errors)
def test_errors_come_back_equal(error: BatonError) -> None:
    back = codec.error_from_pb(over_the_wire(codec.error_to_pb(error)))
    assert (type(back), back.message) == (type(error), error.message)


@quick
@given(wire.identities, wire.identities, st.dictionaries(wire.names, wire.texts, max_size=4))
def test_a_hello_names_both_sides(
    reader: WorkerIdentity, owner: WorkerIdentity, fields: dict[str, str]
) -> None:
    ours = LocalSide(identity=reader, fingerprint="abc", fields=fields, transport="nixl")
    hello = over_the_wire(link_codec.reader_hello_to_pb(ours, owner))
    back = link_codec.reader_hello_from_pb(hello)
    assert (back.identity, back.owner, dict(back.fields)) == (reader, owner, fields)
    assert (back.fingerprint, back.transport) == ("abc", "nixl")


@quick
@given(wire.arenas, wire.identities)
def test_an_arena_comes_back_equal(arena: ArenaDescriptor, owner: WorkerIdentity) -> None:
    wire_form = over_the_wire(link_codec.arena_to_pb(arena, owner))
    assert link_codec.arena_from_pb(wire_form, owner) == arena


def test_damaged_transport_metadata_is_refused() -> None:
    """Ten thousand changes of an owner's hello: none is taken for the arena that was sent."""
    arena = ArenaDescriptor(
        transport="nixl",
        metadata=bytes(range(200)),
        base_address=2**40,
        block_bytes=4096,
        num_slots=128,
        generations_address=2**41,
    )
    ours = LocalSide(identity=WORKER, fingerprint="abc", fields={}, transport="nixl")
    sent = link_codec.owner_hello_to_pb(ours, arena, 1).SerializeToString()
    draw = Random(7)
    num_refused = 0
    for _ in range(10_000):
        damaged = bytearray(sent)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        try:
            hello = kv_pb2.LinkResponse.FromString(bytes(damaged)).hello
            read = link_codec.arena_from_pb(hello.arena, WORKER)
        except (InvalidRequest, DecodeError):
            num_refused += 1
        else:
            assert read == arena, "the damage was elsewhere in the hello"
    assert num_refused > 8_000


def test_control_bytes_of_a_submit_follow_its_tokens() -> None:
    """The ids are packed: about as many bytes as the varints take, nothing per token beside."""
    short, long = (
        control_codec.submit_to_pb(replace(SUBMIT, prompt_tokens=[100] * count)).ByteSize()
        for count in (0, 1000)
    )
    assert 1000 <= long - short <= 1010


def edited(message: Any, edit: Callable[[Any], object]) -> Any:
    copy = over_the_wire(message)
    edit(copy)
    return copy


def status_pb(**fields: Any) -> kv_pb2.LeaseStatus:
    return kv_pb2.LeaseStatus(
        **{"key": codec.key_to_pb(KEY), "state": kv_pb2.LEASE_STATE_OPEN, **fields}
    )


def arena_of_worker(message: kv_pb2.ArenaDescriptor) -> ArenaDescriptor:
    return link_codec.arena_from_pb(message, WORKER)


SUBMIT_PB = control_codec.submit_to_pb(SUBMIT)
MALFORMED: list[tuple[Callable[[Any], object], Any, str]] = [
    (codec.key_from_pb, common_pb2.RequestKey(), "16 bytes, this one has 0"),
    (codec.key_from_pb, common_pb2.RequestKey(transfer_id=b"x" * 17), "this one has 17"),
    (codec.identity_from_pb, common_pb2.WorkerIdentity(epoch=1), "needs an id"),
    (codec.identity_from_pb, common_pb2.WorkerIdentity(worker_id="p0"), "and an epoch"),
    (codec.role_from_pb, 0, "unknown worker role 0"),
    (codec.role_from_pb, 99, "unknown worker role 99"),
    (control_codec.submit_from_pb, worker_pb2.Submit(), "names its job"),
    (control_codec.submit_from_pb, edited(SUBMIT_PB, lambda s: s.ClearField("key")), "transfer id"),
    (
        control_codec.submit_from_pb,
        edited(SUBMIT_PB, lambda s: s.prefill.reader.ClearField("worker_id")),
        "worker identity",
    ),
    (control_codec.router_hello_from_pb, worker_pb2.RouterHello(), "names its router"),
    (control_codec.worker_hello_from_pb, worker_pb2.WorkerHello(), "worker identity"),
    (control_codec.record_from_pb, worker_pb2.OutputRecord(), "transfer id"),
    (link_codec.reader_hello_from_pb, kv_pb2.LinkRequest(), "opens with a hello"),
    (link_codec.reader_message_from_pb, kv_pb2.LinkRequest(), "not None"),
    (
        link_codec.reader_message_from_pb,
        kv_pb2.LinkRequest(hello=kv_pb2.ReaderHello()),
        "not hello",
    ),
    (
        link_codec.reader_message_from_pb,
        kv_pb2.LinkRequest(claim=kv_pb2.LeaseClaim()),
        "transfer id",
    ),
    (arena_of_worker, kv_pb2.ArenaDescriptor(num_slots=1), "blocks and slots"),
    (arena_of_worker, kv_pb2.ArenaDescriptor(block_bytes=1), "blocks and slots"),
    (link_codec.status_from_pb, status_pb(state=0), "unknown lease state 0"),
    (link_codec.status_from_pb, status_pb(state=99), "unknown lease state 99"),
    (link_codec.status_from_pb, status_pb(slots=[1]), "1 slots with 0 generations"),
]


@pytest.mark.parametrize(
    ("decode", "message", "says"), MALFORMED, ids=[says for _, _, says in MALFORMED]
)
def test_a_malformed_message_is_refused(
    decode: Callable[[Any], object], message: Any, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)) as refused:
        decode(message)
    assert refused.value.field


def announcement(**fields: Any) -> LeaseStatus:
    return LeaseStatus(**{"key": KEY, "state": LeaseState.OPEN, **fields})


def test_coalesced_announcements_keep_the_handles() -> None:
    first = announcement(slots=(4, 2), generations=(9, 8), readable_tokens=32)
    last = announcement(readable_tokens=40, output_tokens=(5,))
    merged = link_codec.merge_status(first, last)
    assert (merged.slots, merged.generations) == ((4, 2), (9, 8))
    assert (merged.readable_tokens, merged.output_tokens) == (40, (5,))


def test_digests_add_up_block_by_block() -> None:
    first = announcement(slots=(4, 2, 3), generations=(9, 8, 7), digests=(11,))
    merged = link_codec.merge_status(first, announcement(first_digest=1, digests=(12, 13)))
    assert (merged.first_digest, merged.digests) == (0, (11, 12, 13))
    again = link_codec.merge_status(merged, announcement(first_digest=1, digests=(12, 13)))
    assert again.digests == (11, 12, 13)


def test_an_end_replaces_whatever_was_announced() -> None:
    ended = announcement(state=LeaseState.ENDED)
    assert link_codec.merge_status(announcement(slots=(1,), generations=(1,)), ended) is ended


def test_new_handles_replace_old_ones() -> None:
    newer = announcement(slots=(7,), generations=(3,))
    assert link_codec.merge_status(announcement(slots=(1,), generations=(1,)), newer) is newer


@quick
@given(st.lists(wire.statuses, min_size=1, max_size=4))
def test_the_newest_word_on_progress_stands(statuses: list[LeaseStatus]) -> None:
    merged = None
    for status in statuses:
        merged = link_codec.merge_status(merged, status)
    assert merged is not None
    newest = statuses[-1]
    assert (merged.state, merged.readable_tokens) == (newest.state, newest.readable_tokens)
    assert (merged.output_tokens, merged.finished) == (newest.output_tokens, newest.finished)
