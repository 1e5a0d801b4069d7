"""What waits to be written to one router: step frames and the newest load report, bounded.

Above high water the router's sequences pause, below low water they go on; a router that stays above
for too long, or passes the cap, loses its stream. The engine waits for none of this.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from baton.common.clock import Clock
from baton.common.control_codec import load_to_pb, record_to_pb
from baton.common.errors import BatonError, SlowReader
from baton.common.frames import MAX_FRAME_BYTES
from baton.common.ids import RouterId
from baton.common.messages import LoadReport, OutputRecord
from baton.v1 import worker_pb2 as pb
from baton.worker.core import Event, RouterPaused, RouterResumed

# Tokens of one record on the wire: at most 5 bytes each, so that a record fits a frame.
MAX_RECORD_TOKENS: Final = 8192
# Tag and length of a record within its frame.
_RECORD_OVERHEAD_BYTES: Final = 6


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what waits in an outbox: high water. Low water is a quarter of it, the cap four times."""

    num_bytes: int = 1024 * 1024
    num_frames: int = 1024

    def times(self, factor: float) -> "Bounds":
        return Bounds(int(self.num_bytes * factor), int(self.num_frames * factor))


HIGH_WATER: Final = Bounds()


class FrameOutbox:
    """Of one stream; used on the event loop only. Posts RouterPaused and RouterResumed in pairs.

    Records are dropped until `listen`: those that the engine made before it took the stream's hello
    are of positions beyond those that the router asks for, and would leave a gap.
    """

    def __init__(
        self,
        router_id: RouterId,
        post: Callable[[Event], None],
        clock: Clock,
        *,
        slow_router_s: float,
        high: Bounds = HIGH_WATER,
    ) -> None:
        self.router_id = router_id
        self.failure: BatonError | None = None
        self._post = post
        self._clock = clock
        self._slow_router_s = slow_router_s
        self._high = high
        self._low, self._cap = high.times(1 / 4), high.times(4)
        self._frames: deque[tuple[int, pb.StepFrame]] = deque()
        self._num_bytes = 0
        self._load: LoadReport | None = None
        self._changed = asyncio.Event()
        self._is_listening = False
        self._is_closed = False
        self._paused_at: float | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def listen(self) -> None:
        """The engine has taken the hello: what it tells from now on continues what it names."""
        self._is_listening = True

    def put_records(self, records: list[OutputRecord]) -> None:
        """Queue the records of a step; frames that wait are joined."""
        if self._is_listening:
            self._put(records)

    def answer(self, record: OutputRecord) -> None:
        """Queue an answer that the engine has no part in."""
        self._put([record])

    def put_load(self, load: LoadReport) -> None:
        """Queue a load report in place of the older one."""
        self._load = load
        self._changed.set()
        self.check_pace()

    def check_pace(self) -> None:
        """Close the stream of a router that has been too slow for too long."""
        if self._paused_at is None:
            return
        slow_s = self._clock.monotonic() - self._paused_at
        if slow_s > self._slow_router_s:
            self.close(SlowReader(f"the router did not keep up for {slow_s:.1f} s"))

    def close(self, failure: BatonError | None = None) -> None:
        """Drop what waits; idempotent, the first failure stands."""
        if self._is_closed:
            return
        self._is_closed = True
        self.failure = failure
        self._frames.clear()
        self._num_bytes = 0
        self._changed.set()
        self._resume()

    async def take(self) -> pb.AttachResponse | None:
        """The next message as soon as there is one; None when closed."""
        while not (self._is_closed or self._load is not None or self._frames):
            self._changed.clear()
            await self._changed.wait()
        if self._is_closed:
            return None
        # First, since it is the heartbeat as well; there is at most one per period.
        if self._load is not None:
            load, self._load = self._load, None
            return pb.AttachResponse(load=load_to_pb(load))
        num_bytes, frame = self._frames.popleft()
        self._num_bytes -= num_bytes
        if self._is_within(self._low):
            self._resume()
        return pb.AttachResponse(frame=frame)

    def _put(self, records: list[OutputRecord]) -> None:
        if self._is_closed:
            return
        # One burst may pass the cap: the answer to a hello is as large as what was missed.
        if not self._is_within(self._cap):
            self.close(SlowReader(f"more than {self._cap.num_bytes} bytes waited for the router"))
            return
        for record in records:
            for piece in _pieces(record):
                self._append(record_to_pb(piece))
        self._changed.set()
        if self._paused_at is None and not self._is_within(self._high):
            self._paused_at = self._clock.monotonic()
            self._post(RouterPaused(self.router_id))

    def _append(self, wire: pb.OutputRecord) -> None:
        num_bytes = wire.ByteSize() + _RECORD_OVERHEAD_BYTES
        self._num_bytes += num_bytes
        if self._frames and self._frames[-1][0] + num_bytes <= MAX_FRAME_BYTES:
            held, frame = self._frames.pop()
            num_bytes += held
        else:
            frame = pb.StepFrame()
        frame.records.append(wire)
        self._frames.append((num_bytes, frame))

    def _is_within(self, bounds: Bounds) -> bool:
        return self._num_bytes <= bounds.num_bytes and len(self._frames) <= bounds.num_frames

    def _resume(self) -> None:
        if self._paused_at is not None:
            self._paused_at = None
            self._post(RouterResumed(self.router_id))


def _pieces(record: OutputRecord) -> Iterator[OutputRecord]:
    """The record in pieces that fit a frame: reports with the first, the end with the last."""
    rest = record
    while len(rest.tokens) > MAX_RECORD_TOKENS:
        yield replace(
            rest,
            tokens=rest.tokens[:MAX_RECORD_TOKENS],
            finish=None,
            error=None,
            forwarded_tokens=0,
        )
        rest = replace(
            rest,
            position=rest.position + MAX_RECORD_TOKENS,
            tokens=rest.tokens[MAX_RECORD_TOKENS:],
            prefill=None,
            handover=None,
        )
    yield rest
