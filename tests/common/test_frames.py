"""Submits in parts: what goes in comes out, and nobody can make the other side hold much."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.wire import keys

from baton.common.codec import key_to_pb
from baton.common.control_codec import submit_from_pb, submit_to_pb
from baton.common.errors import InvalidRequest, QueueFull
from baton.common.frames import (
    MAX_FRAME_BYTES,
    MAX_PART_BYTES,
    OutgoingSubmit,
    SubmitAssembly,
)
from baton.common.ids import RequestKey, TransferId
from baton.common.messages import PrefillJob, Submit
from baton.common.sampling import SamplingParams
from baton.v1 import worker_pb2 as pb


def key_of(number: int) -> RequestKey:
    return RequestKey(TransferId(number.to_bytes(16, "big")), 1)


KEY = key_of(1)


def submit_of(
    num_tokens: int, *, key: RequestKey = KEY, age_s: float = 0.0, time_left_s: float = 10.0
) -> Submit:
    return Submit(
        key=key,
        prompt_tokens=[100_000 + index % 50_000 for index in range(num_tokens)],
        output_tokens=[7, 8],
        sampling=SamplingParams(max_tokens=4),
        tenant_key=b"tenant",
        age_s=age_s,
        time_left_s=time_left_s,
        job=PrefillJob(None, b"grant"),
    )


def frames_of(submit: Submit, *, now: float = 0.0, every_s: float = 0.0) -> list[pb.AttachRequest]:
    """All frames, the first written at `now`, each later one `every_s` after the one before."""
    outgoing = OutgoingSubmit(submit, now=0.0)
    frames = []
    while not outgoing.is_done:
        frames.append(outgoing.next_frame(now))
        now += every_s
    return frames


def put_together(assembly: SubmitAssembly, frames: list[pb.AttachRequest]) -> list[pb.Submit]:
    found = []
    for frame in frames:
        part = frame.submit_part
        whole = assembly.add(KEY, part.data, is_last=part.is_last)
        if whole is not None:
            found.append(whole)
    return found


def test_a_small_submit_travels_whole() -> None:
    submit = submit_of(1000)
    (frame,) = frames_of(submit)
    assert submit_from_pb(frame.submit) == submit


@settings(max_examples=40, deadline=None)
@given(st.integers(22_000, 150_000))
def test_a_large_submit_travels_in_frames_and_comes_out_the_same(num_tokens: int) -> None:
    submit = submit_of(num_tokens)
    frames = frames_of(submit)
    assert len(frames) > 1
    assert max(frame.ByteSize() for frame in frames) <= MAX_FRAME_BYTES
    assembly = SubmitAssembly()
    (whole,) = put_together(assembly, frames)
    assert submit_from_pb(whole) == submit
    assert assembly.num_bytes == 0


@pytest.mark.parametrize("num_tokens", [10, 30_000])
def test_the_times_are_those_of_the_frame_that_ends_a_submit(num_tokens: int) -> None:
    frames = frames_of(submit_of(num_tokens, age_s=1.0), now=2.0, every_s=0.5)
    last = frames[0].submit if len(frames) == 1 else put_together(SubmitAssembly(), frames)[0]
    waited_s = 2.0 + 0.5 * (len(frames) - 1)
    assert last.age_s == pytest.approx(1.0 + waited_s)
    assert last.time_left_s == pytest.approx(10.0 - waited_s)


@pytest.mark.parametrize("num_tokens", [10, 30_000])
def test_time_left_never_falls_below_zero(num_tokens: int) -> None:
    """Also when the first part was written with time left, which a missing field would keep."""
    frames = frames_of(submit_of(num_tokens, time_left_s=2.5), now=2.0, every_s=1.0)
    last = frames[0].submit if len(frames) == 1 else put_together(SubmitAssembly(), frames)[0]
    assert last.time_left_s == (0.5 if len(frames) == 1 else 0.0)


def test_a_rewound_submit_begins_anew() -> None:
    outgoing = OutgoingSubmit(submit_of(60_000), now=0.0)
    first = outgoing.next_frame(0.0)
    outgoing.rewind()
    assert outgoing.next_frame(0.0) == first


def test_a_cancel_drops_the_parts_and_those_that_still_come() -> None:
    frames = frames_of(submit_of(60_000))
    assembly = SubmitAssembly()
    put_together(assembly, frames[:2])
    assert assembly.num_bytes > 0
    assembly.cancel(KEY)
    assert assembly.num_bytes == 0
    assert put_together(assembly, frames[2:]) == []
    assert assembly.num_bytes == 0


def test_parts_that_are_no_submit_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="protobuf"):
        SubmitAssembly().add(KEY, b"\xff\xff\xff", is_last=True)


def test_parts_of_another_request_are_refused() -> None:
    data = submit_to_pb(submit_of(10, key=key_of(2))).SerializeToString()
    with pytest.raises(InvalidRequest, match="another request"):
        SubmitAssembly().add(KEY, data, is_last=True)


def test_a_submit_that_is_too_large_is_refused_once_and_held_no_longer() -> None:
    assembly = SubmitAssembly()
    refusals = 0
    for _ in range(2 * SubmitAssembly.MAX_SUBMIT_BYTES // MAX_PART_BYTES):
        try:
            assembly.add(KEY, bytes(MAX_PART_BYTES), is_last=False)
        except InvalidRequest:
            refusals += 1
    assert refusals == 1
    assert assembly.num_bytes == 0
    assert assembly.add(KEY, b"", is_last=True) is None
    with pytest.raises(InvalidRequest, match="protobuf"):
        assembly.add(KEY, b"\xff", is_last=True)


def test_what_is_unfinished_is_bounded_in_bytes_and_in_number() -> None:
    assembly = SubmitAssembly()
    per_key = 15 * 1024 * 1024
    for number in range(4):
        assembly.add(key_of(number), bytes(per_key), is_last=False)
    with pytest.raises(QueueFull, match="bytes"):
        assembly.add(key_of(4), bytes(per_key), is_last=False)
    many = SubmitAssembly()
    for number in range(SubmitAssembly.MAX_OPEN):
        many.add(key_of(number), b"x", is_last=False)
    with pytest.raises(QueueFull, match="unfinished"):
        many.add(key_of(SubmitAssembly.MAX_OPEN), b"x", is_last=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(keys, st.binary(max_size=50), st.booleans()), max_size=60))
def test_no_sequence_of_parts_leaves_bytes_without_an_open_submit(
    parts: list[tuple[RequestKey, bytes, bool]],
) -> None:
    assembly = SubmitAssembly()
    for key, data, is_last in parts:
        try:
            assembly.add(key, data, is_last=is_last)
        except InvalidRequest:
            assert is_last, "nothing here is too large"
    for key, _, _ in parts:
        assembly.cancel(key)
    assert assembly.num_bytes == 0


def test_a_part_fits_a_frame_with_the_largest_key() -> None:
    key = key_to_pb(RequestKey(TransferId(b"\xff" * 16), 2**32 - 1))
    part = pb.SubmitPart(key=key, data=bytes(MAX_PART_BYTES + 18), is_last=True)
    assert pb.AttachRequest(submit_part=part).ByteSize() <= MAX_FRAME_BYTES
