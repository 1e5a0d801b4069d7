"""Submits in frames of at most 64 KiB, so that a cancel waits for one frame and not for a prompt.

A prompt of a million tokens is about 3 MB. `OutgoingSubmit` cuts it on the router's side,
`SubmitAssembly` puts it together on the worker's.
"""

from dataclasses import replace
from typing import Final

from google.protobuf.message import DecodeError

from baton.common.codec import key_from_pb, key_to_pb
from baton.common.control_codec import submit_to_pb
from baton.common.errors import InvalidRequest, QueueFull
from baton.common.ids import RequestKey
from baton.common.messages import Submit
from baton.v1 import worker_pb2 as pb

MAX_FRAME_BYTES: Final = 64 * 1024
# Key, tags and lengths around the bytes of a part, and the times at the end of the last one.
_SLACK_BYTES: Final = 512
MAX_PART_BYTES: Final = MAX_FRAME_BYTES - _SLACK_BYTES
# What a token id costs at most where submits wait, and the rest of a submit.
_TOKEN_BYTES: Final = 4
_SUBMIT_BYTES: Final = 256


class OutgoingSubmit:
    """A submit on its way: whole, or in parts. Its times are those of the frame that ends it."""

    def __init__(self, submit: Submit, *, now: float) -> None:
        self.key = submit.key
        # What it holds here while it waits, about.
        self.num_bytes = _SUBMIT_BYTES + _TOKEN_BYTES * (
            len(submit.prompt_tokens) + len(submit.output_tokens)
        )
        self.is_begun = False
        self.is_done = False
        self._submit = submit
        self._made_at = now
        self._body = b""
        self._offset = 0

    def next_frame(self, now: float) -> pb.AttachRequest:
        """The frame to write now; the last one sets `is_done`."""
        assert not self.is_done, "all of it was framed"
        if not self.is_begun:
            self.is_begun = True
            wire = submit_to_pb(self._at(now))
            if wire.ByteSize() <= MAX_PART_BYTES:
                self.is_done = True
                return pb.AttachRequest(submit=wire)
            self._body = wire.SerializeToString()
        chunk = self._body[self._offset : self._offset + MAX_PART_BYTES]
        self._offset += len(chunk)
        self.is_done = self._offset == len(self._body)
        if self.is_done:
            # Concatenated messages merge and the last value of a field wins: the times of now
            # replace those of the first part.
            chunk += self._times(now)
        part = pb.SubmitPart(key=key_to_pb(self.key), data=chunk, is_last=self.is_done)
        return pb.AttachRequest(submit_part=part)

    def rewind(self) -> None:
        """Begin anew: the stream that carried the first parts is gone, and they with it."""
        self.is_begun = self.is_done = False
        self._body, self._offset = b"", 0

    def _at(self, now: float) -> Submit:
        waited_s = now - self._made_at
        return replace(
            self._submit,
            age_s=self._submit.age_s + waited_s,
            time_left_s=max(0.0, self._submit.time_left_s - waited_s),
        )

    def _times(self, now: float) -> bytes:
        at = self._at(now)
        times = pb.Submit(age_s=at.age_s, time_left_s=at.time_left_s).SerializeToString()
        # A time of 0.0 is no field on the wire and would leave the older one standing.
        return times if at.time_left_s > 0 else times + _NO_TIME_LEFT


# Submit.time_left_s = 0.0, spelled out: field 6, 64-bit.
_NO_TIME_LEFT: Final = bytes([6 << 3 | 1]) + bytes(8)


class SubmitAssembly:
    """The submits that one stream sends in parts; bounded, and gone with the stream."""

    MAX_SUBMIT_BYTES: Final = 16 * 1024 * 1024
    MAX_BYTES: Final = 64 * 1024 * 1024
    MAX_OPEN: Final = 64
    # Keys whose further parts are ignored; the oldest are forgotten first.
    MAX_IGNORED: Final = 1024

    def __init__(self) -> None:
        self._open: dict[RequestKey, bytearray] = {}
        self._ignored: dict[RequestKey, None] = {}
        self.num_bytes = 0

    def add(self, key: RequestKey, data: bytes, *, is_last: bool) -> pb.Submit | None:
        """The submit once its last part is here.

        Raises InvalidRequest or QueueFull, once per submit: what the router is told of this key.
        Its further parts are ignored.
        """
        if key in self._ignored:
            if is_last:
                del self._ignored[key]
            return None
        refusal = self._refusal(key, len(data))
        if refusal is not None:
            self._drop(key, ignore=not is_last)
            raise refusal
        self._open.setdefault(key, bytearray()).extend(data)
        self.num_bytes += len(data)
        return self._finish(key) if is_last else None

    def cancel(self, key: RequestKey) -> None:
        """Drop the parts of this submit, and ignore those that still come."""
        if key in self._open:
            self._drop(key, ignore=True)

    def _refusal(self, key: RequestKey, num_bytes: int) -> InvalidRequest | QueueFull | None:
        held = len(self._open.get(key, b""))
        if held + num_bytes > self.MAX_SUBMIT_BYTES:
            return InvalidRequest(f"a submit has at most {self.MAX_SUBMIT_BYTES} bytes")
        if self.num_bytes + num_bytes > self.MAX_BYTES:
            return QueueFull(f"unfinished submits hold more than {self.MAX_BYTES} bytes here")
        if not held and len(self._open) >= self.MAX_OPEN:
            return QueueFull(f"{self.MAX_OPEN} submits are unfinished here")
        return None

    def _finish(self, key: RequestKey) -> pb.Submit:
        data = bytes(self._open[key])
        self._drop(key, ignore=False)
        try:
            submit = pb.Submit.FromString(data)
        except DecodeError as error:
            raise InvalidRequest("the parts of a submit are no valid protobuf together") from error
        if key_from_pb(submit.key) != key:
            raise InvalidRequest("a submit names another request than its parts", field="key")
        return submit

    def _drop(self, key: RequestKey, *, ignore: bool) -> None:
        self.num_bytes -= len(self._open.pop(key, b""))
        if ignore:
            if len(self._ignored) >= self.MAX_IGNORED:
                del self._ignored[next(iter(self._ignored))]
            self._ignored[key] = None
